//! Events in words.

use std::collections::BTreeMap;

use snaptree_engine::domain::{Disk, Domain};
use snaptree_engine::event::{
    ClockWitness, Course, DeleteScope, DeleteWhat, DomainChanged, DriftCleared, DriftFound, Envelope, Event,
    HowFinished, SnapshotEdited, StepFound, SystemRecovered, SystemRestored, UnregisterWish,
};
use snaptree_engine::operation::{Request, Verdict};
use snaptree_engine::reconcile::drift::Finding;
use snaptree_engine::reconcile::merge::{MergeAction, MergePlan, human_bytes};
use snaptree_engine::{DomainId, OperationId, SnapshotId, SnapshotName, StreamId};

use super::text::{Look, safe, short};

/// What events name only by id, learnt from the events before.
#[derive(Clone, Debug, Default)]
pub struct Known {
    snapshots: BTreeMap<SnapshotId, String>,
    steps: BTreeMap<OperationId, Vec<String>>,
    domains: BTreeMap<DomainId, String>,
}

impl Known {
    /// Takes from an event what later ones may name by id.
    pub fn learn(&mut self, envelope: &Envelope) {
        if let (StreamId::Domain(id), Event::DomainRegistered(e)) = (&envelope.stream, &envelope.event) {
            self.domains.insert(*id, e.domain.name.to_string());
        }
        match &envelope.event {
            Event::DomainChanged(e) => {
                if let (StreamId::Domain(id), Some(name)) = (&envelope.stream, &e.name) {
                    self.domains.insert(*id, name.to_string());
                }
            }
            Event::SnapshotCreateRequested(e) => self.name(e.snapshot, e.name.as_str()),
            Event::SnapshotCreated(e) => self.name(e.snapshot.id, e.snapshot.name.as_str()),
            Event::SnapshotDeleted(e) => self.name(e.snapshot, e.name.as_str()),
            Event::SnapshotAdopted(e) => self.name(e.snapshot.id, e.snapshot.name.as_str()),
            Event::SystemRestored(e) => {
                let names = e.tree.iter().map(|snapshot| (snapshot.id, &snapshot.name));
                for (id, name) in names.chain(e.tombstones.iter().map(|(id, name)| (*id, name))) {
                    self.name(id, name.as_str());
                }
            }
            Event::SnapshotEdited(SnapshotEdited { snapshot, name: Some(name), .. }) => {
                self.name(*snapshot, name.as_str());
            }
            Event::OperationPlanned(e) => {
                if let Some(operation) = envelope.operation {
                    let names = e.steps.iter().map(|step| step.name.clone()).collect();
                    self.steps.insert(operation, names);
                }
            }
            _ => {}
        }
    }

    fn name(&mut self, id: SnapshotId, name: &str) {
        self.snapshots.insert(id, name.to_owned());
    }

    /// Names a domain.
    pub fn name_domain(&mut self, id: DomainId, name: String) {
        self.domains.insert(id, name);
    }

    /// A snapshot's name, or the end of its id.
    pub fn snapshot(&self, id: SnapshotId) -> String {
        match self.snapshots.get(&id) {
            Some(name) => format!("'{name}'"),
            None => format!("snapshot {}", short(id)),
        }
    }

    /// A snapshot's name.
    pub fn snapshot_name(&self, id: SnapshotId) -> Option<&str> {
        self.snapshots.get(&id).map(String::as_str)
    }

    /// A domain's name, if it was learnt.
    pub fn domain(&self, id: DomainId) -> Option<&str> {
        self.domains.get(&id).map(String::as_str)
    }

    /// Whether everything that `envelope` names by id is known.
    pub fn knows_all_of(&self, envelope: &Envelope) -> bool {
        let steps = match &envelope.event {
            Event::OperationStepStarted(_)
            | Event::OperationStepFinished(_)
            | Event::OperationUndoStarted(_)
            | Event::OperationUndoFinished(_)
            | Event::OperationAttemptFailed(_)
            | Event::SystemRecovered(_) => {
                envelope.operation.is_none_or(|operation| self.steps.contains_key(&operation))
            }
            _ => true,
        };
        steps && mentioned(&envelope.event).iter().all(|id| self.snapshots.contains_key(id))
    }

    fn list(&self, ids: &[SnapshotId]) -> String {
        let names: Vec<String> = ids.iter().map(|id| self.snapshot(*id)).collect();
        names.join(", ")
    }

    fn step(&self, operation: Option<OperationId>, index: usize) -> String {
        let steps = operation.and_then(|operation| self.steps.get(&operation));
        match steps.and_then(|steps| Some((steps.get(index)?, steps.len()))) {
            Some((name, count)) => format!("step {}/{count} ({name})", index + 1),
            None => format!("step {}", index + 1),
        }
    }
}

/// The snapshots that an event is about.
pub fn mentioned(event: &Event) -> Vec<SnapshotId> {
    if let Some(request) = Request::of(event) {
        return request.snapshots();
    }
    match event {
        Event::SnapshotCreated(e) => vec![e.snapshot.id],
        Event::SnapshotReverted(e) => vec![e.snapshot],
        Event::SnapshotDeleted(e) => vec![e.snapshot],
        Event::SnapshotAdopted(e) => vec![e.snapshot.id],
        Event::SystemRestored(e) => e.tree.iter().map(|snapshot| snapshot.id).collect(),
        Event::DriftFound(DriftFound { finding: Finding::SnapshotLost { snapshot, .. } })
        | Event::DriftCleared(DriftCleared { finding: Finding::SnapshotLost { snapshot, .. } }) => {
            vec![*snapshot]
        }
        Event::SnapshotEdited(e) => vec![e.snapshot],
        Event::SnapshotHeld(e) => vec![e.snapshot],
        Event::SnapshotReleased(e) => vec![e.snapshot],
        Event::MergeFinished(e) => e.snapshots.clone(),
        Event::MergeDeferred(e) => vec![e.snapshot],
        _ => Vec::new(),
    }
}

/// One line of `log`.
pub fn line(envelope: &Envelope, known: &Known, look: &Look) -> String {
    let paint = look.paint;
    let domain = match &envelope.stream {
        StreamId::Domain(id) => known.domain(*id).map_or_else(|| short(id), str::to_owned),
        StreamId::Policy(name) => name.to_string(),
        StreamId::System => "-".to_owned(),
    };
    let operation = envelope
        .operation
        .map_or_else(String::new, |operation| format!("  {}", paint.dim(format!("[{}]", short(operation)))));
    format!(
        "{}  {}  {:<10}  {}  {}{operation}",
        paint.dim(format!("{:>5}", envelope.seq)),
        look.time(envelope.at),
        safe(&envelope.actor.to_string()),
        paint.name(format!("{:<8}", safe(&domain))),
        painted(&envelope.event, &words(envelope, known, look), look),
    )
}

fn painted(event: &Event, words: &str, look: &Look) -> String {
    let words = safe(words);
    match event {
        Event::OperationFailed(_) | Event::OperationNeedsAttention(_) => look.paint.bad(words),
        Event::OperationHookFinished(e) if e.failure.is_some() => look.paint.warn(words),
        Event::OperationUndoStarted(_)
        | Event::OperationUndoFinished(_)
        | Event::OperationAttemptFailed(_)
        | Event::OperationCancelled(_)
        | Event::OperationExpired(_)
        | Event::SystemRecovered(_)
        | Event::DriftFound(_)
        | Event::SystemRestored(_)
        | Event::ClockLeapt(_)
        | Event::MergeDeferred(_) => look.paint.warn(words),
        Event::SnapshotCreated(_)
        | Event::SnapshotReverted(_)
        | Event::SnapshotDeleted(_)
        | Event::MergeFinished(_)
        | Event::DomainRegistered(_)
        | Event::DomainUnregistered(_) => look.paint.bold(words),
        _ => words.into_owned(),
    }
}

/// What happened, not yet made safe for a terminal.
pub fn words(envelope: &Envelope, known: &Known, look: &Look) -> String {
    match &envelope.event {
        Event::DomainRegistered(_)
        | Event::DomainChanged(_)
        | Event::DomainRepaired(_)
        | Event::DomainUnregisterRequested(_)
        | Event::DomainUnregistered(_)
        | Event::SystemOpened(_)
        | Event::SystemRestored(_) => domain_words(&envelope.event),
        Event::SnapshotCreateRequested(_)
        | Event::SnapshotCreated(_)
        | Event::SnapshotRevertRequested(_)
        | Event::SnapshotReverted(_)
        | Event::SnapshotDeleteRequested(_)
        | Event::SnapshotDeleted(_)
        | Event::SnapshotEditRequested(_)
        | Event::SnapshotEdited(_)
        | Event::SnapshotHeld(_)
        | Event::SnapshotAdopted(_)
        | Event::SnapshotReleased(_) => snapshot_words(&envelope.event, known, look),
        Event::MergeStarted(e) => {
            format!("began to merge {} ({})", known.list(&e.plan.snapshots), way(&e.plan))
        }
        Event::MergeFinished(e) => format!("merged {}", known.list(&e.snapshots)),
        Event::DriftFound(e) => format!("found: {}", e.finding),
        Event::DriftCleared(e) => format!("no longer so: {}", e.finding),
        Event::MergeDeferred(e) => {
            format!("the data of {} stays for now: {}", known.snapshot(e.snapshot), e.reason)
        }
        Event::HostAdded(e) => format!("registered host '{}', or what is kept of it", e.host),
        Event::HostRemoved(e) => format!("forgot host '{}'", e.host),
        Event::ClockLeapt(e) => format!(
            "found that the clock went from {} to {}: policies hold back their deletes",
            look.time(e.from),
            look.time(e.to)
        ),
        Event::ClockConfirmed(e) => match e.by {
            ClockWitness::Person => "said that the clock is right: policies delete again".to_owned(),
            ClockWitness::Time => "the clock has gone on for long enough: policies delete again".to_owned(),
        },
        event if event.kind().starts_with("Policy.") => super::policy::words(event, look),
        _ => operation_words(envelope, known, look),
    }
}

fn domain_words(event: &Event) -> String {
    match event {
        Event::DomainRegistered(e) => format!("registered domain '{}' {}", e.domain.name, disks(&e.domain)),
        Event::DomainChanged(e) => changed_words(e),
        Event::DomainRepaired(e) => format!("repaired the machine: {}", e.what),
        Event::DomainUnregisterRequested(e) => format!("asked to let go of the domain, {}", wish(e.wish)),
        Event::DomainUnregistered(e) => match e.left.len() {
            0 => format!("let go of the domain, {}", wish(e.wish)),
            left => format!("let go of the domain, {}; {left} files stay", wish(e.wish)),
        },
        Event::SystemOpened(e) => format!("made the state directory ({})", e.program),
        Event::SystemRestored(e) => restored_words(e),
        _ => String::new(),
    }
}

fn changed_words(changed: &DomainChanged) -> String {
    let named = changed.name.as_ref().map(|name| format!("named the domain '{name}'"));
    let labels = changed.labels.as_ref().map(|_| "changed the domain's labels".to_owned());
    let names =
        |disks: &[Disk]| disks.iter().map(|disk| disk.name.to_string()).collect::<Vec<_>>().join(", ");
    let access = changed.access.as_ref().map(|access| match &access.disks {
        None => "changed how the machine is reached".to_owned(),
        Some(disks) => format!("changed the domain's disks: {}", names(disks)),
    });
    let disks =
        changed.disks.as_ref().map(|disks| format!("found the machine with the disks {}", names(disks)));
    let words: Vec<String> = [named, labels, access, disks].into_iter().flatten().collect();
    words.join(", and ")
}

fn disks(domain: &Domain) -> String {
    let disks: Vec<String> = domain
        .disks
        .iter()
        .map(|disk| match &disk.path {
            Some(path) => format!("{}={}", disk.name, path.display()),
            None => disk.name.to_string(),
        })
        .collect();
    format!("({}: {})", domain.driver, disks.join(", "))
}

const fn wish(wish: UnregisterWish) -> &'static str {
    match wish {
        UnregisterWish::Untouched => "which has nothing to put back",
        UnregisterWish::Forget => "and only what is known of it",
        UnregisterWish::Flatten => "with a plain image in its place",
        UnregisterWish::KeepLayers => "with its files as they are",
    }
}

/// What was taken over when the log turned out to be an older copy.
fn restored_words(restored: &SystemRestored) -> String {
    let list =
        |names: &[SnapshotName]| names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "the log was restored from an older copy: took over what is kept beside the layers, as of event {} of the lost log",
        restored.seq
    );
    if !restored.adopted.is_empty() {
        text.push_str(&format!("; new here: {}", list(&restored.adopted)));
    }
    if !restored.gone.is_empty() {
        text.push_str(&format!("; gone: {}", list(&restored.gone)));
    }
    text
}

fn snapshot_words(event: &Event, known: &Known, look: &Look) -> String {
    let named = |id| known.snapshot(id);
    match event {
        Event::SnapshotCreateRequested(e) => format!("asked for snapshot '{}'", e.name),
        Event::SnapshotCreated(e) => format!("created snapshot '{}'", e.snapshot.name),
        Event::SnapshotRevertRequested(e) => format!("asked to revert to {}", named(e.snapshot)),
        Event::SnapshotReverted(e) => format!("reverted to {}", named(e.snapshot)),
        Event::SnapshotDeleteRequested(e) => {
            let what = match (e.what, e.scope) {
                (DeleteWhat::Metadata, _) => " (only what is known of it)",
                (_, DeleteScope::Named) => "",
                (_, DeleteScope::Children) => " and what is below",
                (_, DeleteScope::ChildrenOnly) => ": only what is below",
            };
            let reasons =
                if e.reasons.is_empty() { String::new() } else { format!(": {}", e.reasons.join("; ")) };
            format!("asked to delete {}{what}{reasons}", known.list(&e.named))
        }
        Event::SnapshotDeleted(e) => format!("deleted snapshot '{}'", e.name),
        Event::SnapshotAdopted(e) => {
            format!("took over snapshot '{}', which somebody made at the hypervisor", e.snapshot.name)
        }
        Event::SnapshotEditRequested(e) => {
            format!("asked to change snapshot {}: {}", named(e.edit.snapshot), changes(&e.edit))
        }
        Event::SnapshotEdited(e) => format!("changed snapshot {}: {}", named(e.snapshot), changes(e)),
        Event::SnapshotHeld(e) => {
            let until = e.hold.until.map_or_else(String::new, |until| format!(" until {}", look.time(until)));
            format!("put a hold on {}{until}: {}", named(e.snapshot), e.hold.reason)
        }
        Event::SnapshotReleased(e) => format!("released {}", named(e.snapshot)),
        _ => String::new(),
    }
}

/// What of a snapshot is to change.
fn changes(edit: &SnapshotEdited) -> String {
    let changes: Vec<String> = [
        edit.name.as_ref().map(|name| format!("name '{name}'")),
        edit.description.as_ref().map(|_| "description".to_owned()),
        edit.labels.as_ref().map(|_| "labels".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect();
    changes.join(", ")
}

fn operation_words(envelope: &Envelope, known: &Known, look: &Look) -> String {
    let step = |index| known.step(envelope.operation, index);
    match &envelope.event {
        Event::OperationPlanned(e) => {
            let names: Vec<&str> = e.steps.iter().map(|step| step.name.as_str()).collect();
            match names.len() {
                0 => "planned: nothing has to be touched".to_owned(),
                count => format!("planned {}: {}", super::text::count(count, "step"), names.join(", ")),
            }
        }
        Event::OperationStepStarted(e) => format!("{} begins", step(e.step)),
        Event::OperationStepFinished(e) => match e.how {
            HowFinished::Executed => format!("{} done", step(e.step)),
            HowFinished::Observed => format!("{} was found to be done", step(e.step)),
        },
        Event::OperationUndoStarted(e) => format!("taking back {}: {}", step(e.step), e.failure),
        Event::OperationUndoFinished(e) => format!("{} taken back", step(e.step)),
        Event::OperationAttemptFailed(e) => {
            format!("{} did not work: {}; again at {}", step(e.step), e.failure, look.precise(e.retry_at))
        }
        Event::OperationHookStarted(e) => format!("hook {} begins", e.hook.as_str()),
        Event::OperationHookFinished(e) => match &e.failure {
            None => format!("hook {} done", e.hook.as_str()),
            Some(failure) => format!("hook {} failed: {failure}", e.hook.as_str()),
        },
        Event::SystemRecovered(e) => recovered_words(e, &step(e.step)),
        Event::OperationSucceeded(_) => "operation succeeded".to_owned(),
        Event::OperationFailed(e) => format!("operation failed: {}", e.failure),
        Event::OperationCancelled(e) => format!("operation called off: {}", e.failure),
        Event::OperationExpired(e) => format!("operation expired: {}", e.failure),
        Event::OperationResolved(e) => {
            let said = match e.verdict {
                Verdict::Done => "said that the step is done",
                Verdict::NotDone => "said that the step is not done",
                Verdict::Abandon => "abandoned the operation",
            };
            format!("{said}: {}", e.reason)
        }
        Event::OperationNeedsAttention(e) => format!("operation needs attention: {}", e.failure),
        Event::OperationRetried(_) => "operation may try again".to_owned(),
        Event::CheckpointKept(_) => "checkpoint kept".to_owned(),
        other => other.kind().to_owned(),
    }
}

/// Why a step's end was not known, what was found of it, and what follows.
fn recovered_words(recovered: &SystemRecovered, step: &str) -> String {
    let why = match &recovered.failure {
        Some(failure) => format!("the end of {step} was not known ({failure})"),
        None => format!("{step} had been cut short"),
    };
    let found = match recovered.found {
        StepFound::Done => "found it done",
        StepFound::NotBegun => "found that it had no effect yet",
        StepFound::HalfDone => "found it half done",
    };
    let course = match (recovered.course, recovered.found) {
        (Course::Forward, StepFound::Done) => "going on",
        (Course::Forward, _) => "doing what is missing",
        (Course::Back, _) => "taking it back",
        (Course::Ask, _) => "it can go neither on nor back by itself",
    };
    format!("{why}: {found}, {course}")
}

/// Which way a merge goes, and what it costs.
pub fn way(plan: &MergePlan) -> String {
    let mut ways: Vec<&str> = plan
        .actions
        .iter()
        .map(|action| match action {
            MergeAction::Drop { .. } => "nothing is built upon it: dropped",
            MergeAction::Fold { .. } => "merged by the hypervisor",
            MergeAction::Pull { dependants, .. } if dependants.len() > 1 => "pulled up into each child",
            MergeAction::Pull { .. } => "pulled up into its child",
            MergeAction::Push { .. } => "its child pushed down into it",
        })
        .collect();
    ways.dedup();
    let otherwise = plan.bytes_moved_otherwise.map(human_bytes);
    let otherwise = otherwise.map(|bytes| format!("; {bytes} the other way")).unwrap_or_default();
    match plan.bytes_moved {
        0 => ways.join(", "),
        bytes => format!("{}, {} copied at most{otherwise}", ways.join(", "), human_bytes(bytes)),
    }
}

/// What an operation was asked to do, in words.
pub fn request_words(request: &Request, known: &Known) -> String {
    match request {
        Request::Create(e) => format!("create '{}'", e.name),
        Request::Revert(e) => format!("revert to {}", known.snapshot(e.snapshot)),
        Request::Delete(e) => format!("delete {}", known.list(&e.named)),
        Request::Edit(e) => format!("change {}", known.snapshot(e.edit.snapshot)),
        Request::Merge(e) => format!("merge {}", known.list(&e.plan.snapshots)),
        Request::Unregister(e) => format!("let go of the domain, {}", wish(e.wish)),
    }
}
