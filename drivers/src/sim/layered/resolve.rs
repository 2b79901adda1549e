//! What became of a step, told from an observation alone, and what a step reports. Pure.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use snaptree_engine::DomainId;
use snaptree_engine::driver::{Observation, Remedy, Resolution, StepContext, StepReport};
use snaptree_engine::layer::{FileStamp, Layer, LayerChange};
use snaptree_engine::operation::{Code, Failure, Step};

use super::super::machine::Applied;
use super::super::plan::missing;
use super::super::{DISK_BYTES, plan};
use super::step::{Action, Named, Pull, Push, Switch, Turn};
use super::{FileName, path};

/// What this driver adds to an [`Observation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "machine", rename_all = "kebab-case")]
pub(super) enum Detail {
    /// Its file is gone, though the log has snapshots.
    Missing,
    /// It is there.
    Present {
        /// The last step that took effect.
        #[serde(default)]
        last_operation: Option<Applied>,
        /// The files that the machine writes, by disk.
        active: std::collections::BTreeMap<snaptree_engine::DiskName, FileName>,
    },
}

impl Detail {
    pub(super) fn of(observation: &Observation) -> Result<Self, Failure> {
        Self::deserialize(&observation.detail).map_err(|error| {
            Failure::new(Code::Invalid, format!("the observation is none of this driver's: {error}"))
        })
    }
}

/// How a file looks, by its name.
pub(super) type StampOf<'a> = &'a dyn Fn(&str) -> Option<FileStamp>;

const FINISH: Resolution = Resolution::HalfDone(Remedy::Finish);

fn ask(failure: Failure) -> Resolution {
    Resolution::HalfDone(Remedy::AskSomeone(failure))
}

/// What became of a step.
pub(super) fn resolve(context: &StepContext<'_>, step: &Step, seen: &Observation) -> Resolution {
    let found = plan::domain(context.state).and_then(|domain| {
        Ok(Found { domain: domain.id, seen, detail: Detail::of(seen)?, action: Action::of(step)? })
    });
    match found {
        Ok(found) => found.resolve(context),
        Err(failure) => ask(failure),
    }
}

struct Found<'a> {
    domain: DomainId,
    seen: &'a Observation,
    detail: Detail,
    action: Action,
}

impl Found<'_> {
    fn resolve(&self, context: &StepContext<'_>) -> Resolution {
        let Detail::Present { last_operation, .. } = &self.detail else { return ask(missing()) };
        let last = last_operation.as_ref().filter(|last| last.is(context.operation, context.index));
        match &self.action {
            Action::Adopt { turn, .. } | Action::Flatten { turn, .. } => match self.stand(turn) {
                Ok(Stand::Before) => Resolution::NotDone,
                Ok(Stand::Switched) => self.done(last),
                Err(failure) => ask(failure),
            },
            Action::Switch(switch) => match self.stand(&switch.turn) {
                Ok(Stand::Switched) => self.done(last),
                Ok(Stand::Before) => self.switch(switch),
                Err(failure) => ask(failure),
            },
            Action::Pull(pull) => self.pull(pull),
            // Whether a push came to its end cannot be seen, and it can always be run again.
            Action::Push(_) => FINISH,
            Action::Drop { files } => match files.iter().filter(|file| self.exists(&file.file)).count() {
                left if left == files.len() => Resolution::NotDone,
                _ => FINISH,
            },
        }
    }

    fn stand(&self, turn: &Turn) -> Result<Stand, Failure> {
        let generation = self.seen.generation.as_ref();
        if generation == Some(&turn.generation) {
            Ok(Stand::Switched)
        } else if generation == turn.previous.as_ref() {
            Ok(Stand::Before)
        } else {
            let found = generation.map_or("none", String::as_str);
            Err(Failure::new(Code::Drift, format!("generation {found} is switched on, which is neither")))
        }
    }

    fn exists(&self, file: &str) -> bool {
        self.seen.files.contains_key(&path(self.domain, file))
    }

    fn stamp(&self, file: &str) -> Option<FileStamp> {
        self.seen.files.get(&path(self.domain, file)).map(|facts| facts.stamp)
    }

    fn done(&self, last: Option<&Applied>) -> Resolution {
        let learnt = last.map_or(Value::Null, |last| last.learnt.clone());
        match self.action.changes(self.domain, &|file| self.stamp(file)) {
            Ok(changes) => Resolution::Done(StepReport { changes, learnt }),
            Err(failure) => ask(failure),
        }
    }

    fn switch(&self, switch: &Switch) -> Resolution {
        let written =
            switch.freeze.iter().find(|frozen| self.stamp(&frozen.layer.file) != Some(frozen.stamp));
        if let Some(frozen) = written {
            return Resolution::HalfDone(Remedy::TakeBack(written_meanwhile(&frozen.layer.file)));
        }
        let restacked = switch.restack.iter().any(|restack| {
            let facts = self.seen.files.get(&path(self.domain, &restack.layer.file));
            let old = path(self.domain, &restack.old_file);
            facts.is_none_or(|facts| facts.backing.as_ref() != Some(&old))
        });
        let made = switch.fresh.iter().any(|fresh| self.exists(&fresh.new.file));
        if made || restacked { FINISH } else { Resolution::NotDone }
    }

    /// Never found done: a header proves nothing.
    fn pull(&self, pull: &Pull) -> Resolution {
        let facts = self.seen.files.get(&path(self.domain, &pull.layer.file));
        let backing = facts.and_then(|facts| facts.backing.clone());
        if backing == Some(path(self.domain, &pull.from_file)) {
            Resolution::NotDone
        } else if backing == Some(path(self.domain, &pull.onto_file)) {
            FINISH
        } else {
            ask(Failure::new(Code::Drift, format!("{} is built upon something else", pull.layer.file)))
        }
    }
}

enum Stand {
    Before,
    Switched,
}

fn written_meanwhile(file: &str) -> Failure {
    Failure::new(Code::Drift, format!("{file} was written meanwhile: the machine ran"))
}

fn stamped(stamp_of: StampOf<'_>, file: &str) -> Result<FileStamp, Failure> {
    stamp_of(file).ok_or_else(|| Failure::new(Code::Drift, format!("the machine has no file {file}")))
}

impl Action {
    /// What the log records when it is done.
    pub(super) fn changes(
        &self,
        domain: DomainId,
        stamp_of: StampOf<'_>,
    ) -> Result<Vec<LayerChange>, Failure> {
        Ok(match self {
            Self::Adopt { layer, turn } => vec![
                layer.added(domain, None),
                LayerChange::Activated { disk: layer.disk.clone(), layer: layer.layer.clone() },
                LayerChange::Switched { generation: Some(turn.generation.clone()) },
            ],
            Self::Switch(switch) => switch.changes(domain, stamp_of)?,
            Self::Pull(pull) => vec![pull.rebased(&pull.onto, stamp_of)?],
            Self::Push(push) => push.stamped(stamp_of)?,
            Self::Drop { files } => files.iter().map(Named::dropped).collect(),
            Self::Flatten { files, .. } => {
                let dropped = files.iter().map(Named::dropped);
                dropped.chain([LayerChange::Switched { generation: None }]).collect()
            }
        })
    }

    /// What the log records when it is taken back.
    pub(super) fn changes_back(&self, stamp_of: StampOf<'_>) -> Result<Vec<LayerChange>, Failure> {
        Ok(match self {
            Self::Adopt { layer, turn } => {
                vec![layer.dropped(), LayerChange::Switched { generation: turn.previous.clone() }]
            }
            Self::Switch(switch) => {
                let back = switch.restack.iter().filter(|restack| !restack.active);
                back.map(|restack| restack.layer.stamped(stamp_of)).collect::<Result<_, _>>()?
            }
            Self::Pull(pull) => vec![pull.rebased(&pull.from, stamp_of)?],
            Self::Push(push) => push.stamped(stamp_of)?,
            Self::Drop { .. } | Self::Flatten { .. } => Vec::new(),
        })
    }
}

impl Named {
    fn added(&self, domain: DomainId, parent: Option<&snaptree_engine::LayerId>) -> LayerChange {
        let facts = Layer {
            file: path(domain, &self.file),
            parent: parent.cloned(),
            snapshot: None,
            mode: 0o600,
            virtual_size_bytes: DISK_BYTES,
            registered: parent.is_none(),
            stamp: None,
        };
        LayerChange::Added { disk: self.disk.clone(), layer: self.layer.clone(), facts }
    }

    fn dropped(&self) -> LayerChange {
        LayerChange::Dropped { disk: self.disk.clone(), layer: self.layer.clone() }
    }

    fn stamped(&self, stamp_of: StampOf<'_>) -> Result<LayerChange, Failure> {
        let stamp = stamped(stamp_of, &self.file)?;
        Ok(LayerChange::Stamped { disk: self.disk.clone(), layer: self.layer.clone(), stamp })
    }
}

impl Pull {
    fn rebased(
        &self,
        parent: &snaptree_engine::LayerId,
        stamp_of: StampOf<'_>,
    ) -> Result<LayerChange, Failure> {
        let Named { disk, layer, file } = self.layer.clone();
        let stamp = if self.active { None } else { Some(stamped(stamp_of, &file)?) };
        Ok(LayerChange::Rebased { disk, layer, parent: Some(parent.clone()), stamp })
    }
}

impl Push {
    fn stamped(&self, stamp_of: StampOf<'_>) -> Result<Vec<LayerChange>, Failure> {
        Ok(vec![self.into.stamped(stamp_of)?])
    }
}

impl Switch {
    fn changes(&self, domain: DomainId, stamp_of: StampOf<'_>) -> Result<Vec<LayerChange>, Failure> {
        let mut changes: Vec<LayerChange> =
            self.fresh.iter().map(|fresh| fresh.new.added(domain, Some(&fresh.on))).collect();
        if let super::step::Purpose::Create { snapshot, .. } = &self.purpose {
            for frozen in &self.freeze {
                changes.push(LayerChange::Frozen {
                    disk: frozen.layer.disk.clone(),
                    layer: frozen.layer.layer.clone(),
                    snapshot: *snapshot,
                    stamp: stamped(stamp_of, &frozen.layer.file)?,
                });
            }
        }
        changes.extend(self.fresh.iter().map(|fresh| LayerChange::Activated {
            disk: fresh.new.disk.clone(),
            layer: fresh.new.layer.clone(),
        }));
        for push in &self.push {
            let stamp = if push.active { None } else { Some(stamped(stamp_of, &push.into.file)?) };
            let (from, into) = (push.from.layer.clone(), push.into.layer.clone());
            changes.push(LayerChange::Pushed { disk: push.into.disk.clone(), from, into, stamp });
        }
        for restack in &self.restack {
            let Named { disk, layer, file } = restack.layer.clone();
            let stamp = if restack.active { None } else { Some(stamped(stamp_of, &file)?) };
            changes.push(LayerChange::Rebased { disk, layer, parent: Some(restack.onto.clone()), stamp });
        }
        changes.push(LayerChange::Switched { generation: Some(self.turn.generation.clone()) });
        Ok(changes)
    }
}
