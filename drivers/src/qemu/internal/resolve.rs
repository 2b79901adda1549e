//! What became of a step on internal snapshots, told from an observation alone. Pure.

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{Observation, Remedy, Resolution, StepContext};
use snaptree_engine::operation::{Code, Failure};

use super::save::cut_short;
use super::{Image, Job, Load, Memory, Save, job_id, tag};
use crate::qemu::config::QemuConfig;
use crate::qemu::live::Machine;
use crate::qemu::lock::in_use;
use crate::qemu::observe::Detail;
use crate::qemu::switch::written_meanwhile;

const FINISH: Resolution = Resolution::HalfDone(Remedy::Finish);

fn ask(failure: Failure) -> Resolution {
    Resolution::HalfDone(Remedy::AskSomeone(failure))
}

fn take_back(failure: Failure) -> Resolution {
    Resolution::HalfDone(Remedy::TakeBack(failure))
}

impl Image {
    fn is_as_expected(&self, seen: &Observation) -> bool {
        seen.files.get(&self.file).is_some_and(|facts| self.expect.holds(facts.stamp))
    }
}

impl Save {
    pub(in crate::qemu) fn resolve(
        &self,
        context: &StepContext<'_>,
        seen: &Observation,
        detail: &Detail,
    ) -> Resolution {
        let job = job_id(context, Job::First);
        let tag = tag(self.snapshot);
        let tagged = self.images.iter().filter(|image| detail.entry(&image.file, &tag).is_some()).count();
        // Whether it was synced, and the guest let go on, cannot be seen.
        if tagged == self.images.len() {
            return FINISH;
        }
        match (&self.live, &detail.machine, seen.in_use.first()) {
            (Some(_), Machine::Live(machine), Some(_)) if machine.jobs.contains(&job) => FINISH,
            (None, _, Some(holder)) => take_back(in_use(holder)),
            (None, _, None) if tagged == 0 => {
                match self.images.iter().find(|image| !image.is_as_expected(seen)) {
                    Some(image) => take_back(written_meanwhile(&image.file)),
                    None => Resolution::NotDone,
                }
            }
            _ => take_back(cut_short()),
        }
    }
}

impl Load {
    pub(in crate::qemu) fn resolve(
        &self,
        context: &StepContext<'_>,
        seen: &Observation,
        detail: &Detail,
    ) -> Resolution {
        let jobs = [Job::First, Job::Afresh].map(|job| job_id(context, job));
        let can_start = QemuConfig::of(context.state).is_ok_and(|(_, config)| config.runs.can_start());
        let tag = tag(self.snapshot);
        let mut entries = self.images.iter().filter_map(|image| detail.entry(&image.file, &tag));
        let is_begun = entries.any(|entry| entry.is_active);
        match (&self.memory, &detail.machine, seen.in_use.first()) {
            (Some(_), Machine::Live(machine), Some(_)) => {
                // What is not known to the process that runs was not begun in it.
                if machine.jobs.iter().any(|known| jobs.contains(known)) {
                    FINISH
                } else {
                    Resolution::NotDone
                }
            }
            (None, _, Some(holder)) if !is_begun => take_back(in_use(holder)),
            (_, _, Some(holder)) => ask(in_use(holder)),
            (_, _, None) if is_begun => FINISH,
            (Some(Memory { was, .. }), _, None) if *was != RunState::Off => {
                if can_start {
                    FINISH
                } else {
                    take_back(Failure::new(
                        Code::Expired,
                        "the machine ended before the snapshot was loaded into it",
                    ))
                }
            }
            (_, _, None) => match self.images.iter().find(|image| !image.is_as_expected(seen)) {
                Some(image) => take_back(written_meanwhile(&image.file)),
                None => Resolution::NotDone,
            },
        }
    }
}
