//! What became of a step, told from an observation alone. Pure.

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Observation, Remedy, Resolution, StepContext, StepReport};
use snaptree_engine::layer::FileStamp;
use snaptree_engine::operation::{Code, Failure};

use super::config::PathWish;
use super::files::WRITE_BITS;
use super::generation::Stand;
use super::live::{Machine, Run};
use super::lock::in_use;
use super::observe::{Detail, Entry};
use super::step::{Adopt, DropLayers, Flatten, Guard, Place, Power, Pull, QemuStep, Switch, Under, Writer};
use super::switch::written_meanwhile;

/// What became of a step.
pub(super) fn resolve(context: &StepContext<'_>, step: &QemuStep, seen: &Observation) -> Resolution {
    let detail = match Detail::of(seen) {
        Ok(detail) => detail,
        Err(failure) => return Resolution::HalfDone(Remedy::AskSomeone(failure)),
    };
    match step {
        QemuStep::Adopt(adopt) => adopt.resolve(seen, &detail),
        QemuStep::Switch(switch) => switch.resolve(context, seen, &detail),
        QemuStep::Pull(pull) => pull.resolve(seen, &detail),
        // Whether a push came to its end cannot be seen, and it can always be run again.
        QemuStep::Push(_) => Resolution::HalfDone(Remedy::Finish),
        QemuStep::Drop(drop) => drop.resolve(seen),
        QemuStep::Flatten(flatten) => flatten.resolve(seen, &detail),
        // As a push.
        QemuStep::Fold(_) => FINISH,
        QemuStep::Place(place) => place.resolve(seen, &detail),
        // Removing what is gone already is nothing, and whether the folders were synced cannot be seen.
        QemuStep::Clean(_) => FINISH,
        QemuStep::Power(power) => power.resolve(seen),
        QemuStep::Keep(keep) => match keep.turn.stand(seen.generation.as_deref()) {
            Stand::Elsewhere => ask(keep.turn.elsewhere(seen.generation.as_deref()).to_string()),
            // What became of the memory is QEMU's to say.
            Stand::Before | Stand::Switched => FINISH,
        },
        // A QEMU that waits holds no locks, so an observation does not tell whether there is one.
        QemuStep::Resume(_) => FINISH,
        QemuStep::Save(save) => save.resolve(context, seen, &detail),
        QemuStep::Load(load) => load.resolve(context, seen, &detail),
        // A tag that is gone already is no reason to fail.
        QemuStep::Erase(_) => FINISH,
    }
}

const FINISH: Resolution = Resolution::HalfDone(Remedy::Finish);

fn take_back(failure: Failure) -> Resolution {
    Resolution::HalfDone(Remedy::TakeBack(failure))
}

fn ask(message: String) -> Resolution {
    Resolution::HalfDone(Remedy::AskSomeone(
        Failure::new(Code::Drift, message)
            .hint("see what is there, then run snaptree op retry or op resolve"),
    ))
}

impl Adopt {
    fn resolve(&self, seen: &Observation, detail: &Detail) -> Resolution {
        let ours = match detail.registered.get(&self.disk) {
            Some(Entry::File { inode, .. }) if *inode == self.stamp.inode => false,
            Some(Entry::Link { target }) if *target == self.target() => true,
            _ => {
                return ask(format!(
                    "{} is neither the image that was being adopted nor Snaptree's link",
                    self.resolved.display()
                ));
            }
        };
        match self.turn.stand(seen.generation.as_deref()) {
            Stand::Elsewhere => ask(self.turn.elsewhere(seen.generation.as_deref()).to_string()),
            // The path may still be the image itself; the same inode is opened either way.
            Stand::Switched if !ours && self.keep_path == PathWish::Follow => match seen.in_use.first() {
                Some(holder) if self.under == Under::Nobody => take_back(in_use(holder)),
                _ => FINISH,
            },
            // The generation before is removed last, when all else is synced.
            Stand::Switched => match &self.turn.previous {
                Some(previous) if !detail.folder.contains(previous) => {
                    Resolution::Done(StepReport { changes: self.changes(), learnt: serde_json::Value::Null })
                }
                _ => FINISH,
            },
            Stand::Before => self.resolve_before(seen, detail),
        }
    }

    fn resolve_before(&self, seen: &Observation, detail: &Detail) -> Resolution {
        if let (Under::Nobody, Some(holder)) = (self.under, seen.in_use.first()) {
            return take_back(in_use(holder));
        }
        let name = detail.backing.get(&self.resolved).map(|backing| &backing.name);
        let rewritten = self.own_backing.as_ref().is_some_and(|own| name == Some(&own.absolute));
        let untouched = seen.files.get(&self.resolved).is_some_and(|found| {
            let expected = self.stamp;
            let found = found.stamp;
            if self.under == Under::Guest || self.unclosed {
                return found.inode == expected.inode;
            }
            found == expected
                || (rewritten && (found.inode, found.size_bytes) == (expected.inode, expected.size_bytes))
        });
        if !untouched {
            return take_back(written_meanwhile(&self.resolved));
        }
        let linked = self.file.file_name().and_then(|name| name.to_str());
        let linked = self.file != self.resolved && linked.is_some_and(|name| detail.folder.contains(name));
        let begun = detail.folder.iter().any(|name| self.turn.leaves(name));
        if rewritten || linked || begun { FINISH } else { Resolution::NotDone }
    }
}

impl Switch {
    fn resolve(&self, context: &StepContext<'_>, seen: &Observation, detail: &Detail) -> Resolution {
        match self.turn.stand(seen.generation.as_deref()) {
            Stand::Elsewhere => ask(self.turn.elsewhere(seen.generation.as_deref()).to_string()),
            Stand::Switched if !self.is_finished(seen, detail) => FINISH,
            Stand::Switched => {
                let stamp_of = |path: &std::path::Path| seen.files.get(path).map(|facts| facts.stamp);
                match self.report(context, &stamp_of) {
                    Ok(report) => Resolution::Done(report),
                    Err(failure) => Resolution::HalfDone(Remedy::AskSomeone(failure)),
                }
            }
            Stand::Before if self.live.is_some() => self.resolve_live(seen, detail),
            Stand::Before => match self.hindrance(seen) {
                Some(failure) => take_back(failure),
                None if self.next.is_some() && self.has_begun(seen, detail) => take_back(
                    Failure::new(Code::Expired, "it was cut off before the disks were switched")
                        .hint("ask for it again"),
                ),
                None if self.has_begun(seen, detail) => Resolution::HalfDone(Remedy::EitherWay),
                None => Resolution::NotDone,
            },
        }
    }

    fn is_finished(&self, seen: &Observation, detail: &Detail) -> bool {
        let mode = |file: &std::path::Path| seen.files.get(file).map(|facts| facts.mode);
        let frozen = self.freeze.iter().all(|f| mode(&f.file).is_some_and(|mode| mode & WRITE_BITS == 0));
        let mut pushed = self.push.iter().filter(|push| push.writer == Writer::Machine);
        let opened = pushed.all(|push| mode(&push.into_file) == Some(push.into_mode));
        // The generation before is removed last, when all else is synced.
        let cleaned = self.turn.previous.as_ref().is_some_and(|previous| !detail.folder.contains(previous));
        let waits = match (&self.live, &detail.machine) {
            (Some(live), Machine::Live(machine)) => live.was == Run::Running && machine.run != Run::Running,
            _ => false,
        };
        let thawed = !detail.folder.contains(&self.turn.frozen_mark());
        frozen && opened && cleaned && thawed && !waits
    }

    /// Before the switch, under a machine that ran when it was planned.
    fn resolve_live(&self, seen: &Observation, detail: &Detail) -> Resolution {
        let pushed = self.push.iter().filter(|push| push.writer == Writer::Machine);
        match (&detail.machine, seen.in_use.first()) {
            // It may have exchanged its disks, and only QEMU knows: whoever settles waits for its answer.
            (Machine::Silent | Machine::Mute { .. }, Some(holder)) => {
                let failure = in_use(holder);
                ask(format!("{}, and does not answer", failure.message))
            }
            (Machine::Live(machine), Some(_)) => {
                let exchanged = self.fresh.iter().any(|fresh| machine.node_of(&fresh.file).is_some());
                let pivoted = pushed.clone().any(|push| machine.node_of(&push.from_file).is_none());
                if exchanged || pivoted {
                    FINISH
                } else if self.fresh.is_empty() {
                    Resolution::HalfDone(Remedy::EitherWay)
                } else {
                    take_back(cut_short())
                }
            }
            // What the guest wrote after its disks were exchanged is in the new layers alone.
            (_, None) if self.fresh.iter().any(|fresh| detail.written.contains(&fresh.file)) => FINISH,
            (_, None) if self.fresh.is_empty() => Resolution::HalfDone(Remedy::EitherWay),
            (_, None) => take_back(cut_short()),
        }
    }

    /// Why it must not go on: the machine runs, or ran meanwhile.
    fn hindrance(&self, seen: &Observation) -> Option<Failure> {
        let guarded = |guard: &Guard| seen.in_use.iter().find(|holder| holder.file == guard.file);
        if let Some(holder) = self.guard.iter().find_map(guarded) {
            return Some(in_use(holder));
        }
        let untouched =
            |guard: &&Guard| seen.files.get(&guard.file).is_some_and(|facts| guard.expect.holds(facts.stamp));
        self.guard.iter().find(|guard| !untouched(guard)).map(|guard| written_meanwhile(&guard.file))
    }

    fn has_begun(&self, seen: &Observation, detail: &Detail) -> bool {
        let made = self.fresh.iter().flat_map(|fresh| [fresh.file.clone(), fresh.draft()]).any(|file| {
            file.file_name().and_then(|name| name.to_str()).is_some_and(|name| detail.folder.contains(name))
        });
        let restacked = self.restack.iter().any(|restack| {
            seen.files
                .get(&restack.file)
                .is_none_or(|facts| facts.backing.as_ref() != Some(&restack.old_file))
        });
        let pushed = self.push.iter().any(|push| push.writer == Writer::Machine);
        made || restacked || pushed || detail.folder.iter().any(|name| self.turn.leaves(name))
    }
}

impl Pull {
    /// Never found done: a header proves nothing.
    fn resolve(&self, seen: &Observation, detail: &Detail) -> Resolution {
        let name = detail.backing.get(&self.file).map(|backing| &backing.name);
        if name == Some(&self.from_file) {
            // The mode may still be the one for writing, which only the step itself takes back.
            let open = seen.files.get(&self.file).is_some_and(|facts| facts.mode & WRITE_BITS != 0);
            return if open && self.writer == Writer::Nobody { FINISH } else { Resolution::NotDone };
        }
        if name == Some(&self.onto_file) {
            return FINISH;
        }
        ask(format!("{} is built upon a file that Snaptree did not put it upon", self.file.display()))
    }
}

impl Power {
    /// Ending what has ended is nothing. Whether a start was asked for cannot be seen while it does not run.
    fn resolve(&self, seen: &Observation) -> Resolution {
        match (self.wish, seen.run_state) {
            (RunState::Off, RunState::Off) => Resolution::Done(StepReport::default()),
            (RunState::Off, _) => Resolution::NotDone,
            _ => FINISH,
        }
    }
}

/// Why a snapshot that was cut off before its moment is not taken later.
fn cut_short() -> Failure {
    Failure::new(Code::Expired, "it was cut off before the snapshot was taken, and the machine ran on")
        .hint("ask for it again")
}

impl DropLayers {
    fn resolve(&self, seen: &Observation) -> Resolution {
        let left = self.files().filter(|file| {
            let images = seen.files.contains_key(*file) || seen.unreadable.contains_key(*file);
            images || seen.memory.contains_key(*file)
        });
        // Where all are gone it is not known whether the folder was synced; unlinking again is nothing.
        if left.count() == self.files().count() { Resolution::NotDone } else { FINISH }
    }
}

impl Flatten {
    fn resolve(&self, seen: &Observation, detail: &Detail) -> Resolution {
        if let Some(holder) = seen.in_use.first() {
            return take_back(in_use(holder));
        }
        let stamp: Option<FileStamp> = seen.files.get(&self.from).map(|facts| facts.stamp);
        if stamp != Some(self.stamp) {
            return take_back(written_meanwhile(&self.from));
        }
        // A copy that is there may be half a copy: it is made anew.
        let name = self.into.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| detail.folder.contains(name)) { FINISH } else { Resolution::NotDone }
    }
}

impl Place {
    fn resolve(&self, seen: &Observation, detail: &Detail) -> Resolution {
        let there = |file: &std::path::Path| {
            file.file_name().and_then(|name| name.to_str()).is_some_and(|name| detail.folder.contains(name))
        };
        let waiting = self.disks.iter().filter(|placed| there(&placed.file)).count();
        // Where none waits it is done once more, for the sync of the folders.
        if waiting < self.disks.len() || waiting == 0 {
            return FINISH;
        }
        match seen.in_use.first() {
            Some(holder) => take_back(in_use(holder)),
            None => Resolution::NotDone,
        }
    }
}
