//! A policy, checked.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU32;
use std::path::PathBuf;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use snaptree_engine::around::{self, Around, OnFailure};
use snaptree_engine::tree::Labels;
use snaptree_engine::{DomainId, DomainName, PolicyName};

use super::values::{DomainGlob, NameTemplate, TimeZoneName, Webhook};
use crate::retention::{Candidate, Keep, Limits, Plan, Shape, Trust, plan};
use crate::schedule::{Asked, CatchUp, History, Schedule, delay};
use crate::span::Elapsed;

/// `max-depth` if it is left out.
pub const DEPTH_MAX_DEFAULT: NonZeroU32 = NonZeroU32::MIN.saturating_add(63);

/// `suspend-after` if it is left out.
pub const SUSPEND_AFTER_DEFAULT: NonZeroU32 = NonZeroU32::MIN.saturating_add(4);

/// A policy: which domains, when, what, and what to keep. As JSON it is what `Policy.Defined` records; what is read back
/// from there is equal to what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Policy {
    /// Its name.
    pub name: PolicyName,
    /// Which domains.
    pub select: Selection,
    /// When.
    pub schedule: Schedule,
    /// The time zone of the schedule and of the periods of [`keep`](Self::keep).
    pub timezone: TimeZoneName,
    /// By how much later than planned a domain may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jitter: Option<Elapsed>,
    /// What becomes of missed runs.
    pub catch_up: CatchUp,
    /// The age past which a missed run is skipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Elapsed>,
    /// How many snapshots a machine's disk may stand upon.
    pub max_depth: NonZeroU32,
    /// After how many failures in a row the policy is suspended.
    pub suspend_after: NonZeroU32,
    /// How many deletes a run asks for; none for as many as there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletes_per_run: Option<NonZeroU32>,
    /// What kind of snapshot.
    pub snapshot: SnapshotSpec,
    /// What to keep.
    pub keep: Keep,
    /// Programs around a run.
    #[serde(default)]
    pub hooks: Hooks,
    /// Who is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notify: Option<Notify>,
}

impl Policy {
    /// The question what is due for `domain`, for [`due`](crate::schedule::due).
    ///
    /// `since` is when the policy was defined, last changed, or resumed; `history` what the log says of its runs there.
    pub fn asked<'a>(&'a self, domain: DomainId, since: Timestamp, history: &'a History) -> Asked<'a> {
        Asked {
            schedule: &self.schedule,
            zone: self.zone(),
            delay: delay(self.jitter, &self.name, domain),
            catch_up: self.catch_up,
            window: self.window,
            since,
            history,
        }
    }

    /// The retention of one domain: what `policy plan` prints and a run carries out.
    pub fn plan(&self, candidates: &[Candidate], shape: &Shape, now: Timestamp, trust: Trust) -> Plan {
        let of = |keep: &Keep| plan(candidates, keep, self.limits(), shape, now, self.zone());
        match trust {
            Trust::Sound => of(&self.keep),
            Trust::InDoubt => of(&self.keep.by_count()).held_back(shape, self.limits()),
        }
    }

    /// What bounds a run besides the rules.
    pub fn limits(&self) -> Limits {
        Limits { depth_max: self.max_depth, deletes_max: self.deletes_per_run }
    }

    /// The time zone.
    pub fn zone(&self) -> &TimeZone {
        self.timezone.zone()
    }
}

/// Which domains a policy is for: those whose name matches any of the globs, if there are globs, and that have all of
/// the labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Selection {
    /// Globs on names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<DomainGlob>,
    /// Labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

impl Selection {
    /// Whether a domain is one of them. Without globs and labels, none is.
    pub fn matches(&self, name: &DomainName, labels: &Labels) -> bool {
        let named = self.domains.iter().any(|glob| glob.matches(name))
            || (self.domains.is_empty() && !self.labels.is_empty());
        named && self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// What kind of snapshot a policy takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotSpec {
    /// Its name.
    pub name: NameTemplate,
    /// Its description.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// With the machine's memory.
    pub memory: bool,
    /// Whether the guest is asked to sync its file systems first.
    pub quiesce: bool,
    /// Its labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// Programs around a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Hooks {
    /// Before the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Hook>,
    /// After it, whether it succeeded or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Hook>,
}

impl Hooks {
    /// What goes with a request; none if there is no program.
    pub(crate) fn around(&self) -> Option<Around> {
        let hook = |hook: &Hook| around::Hook {
            program: hook.program.clone().into(),
            timeout_s: u64::from(hook.timeout.seconds()),
            environment: hook.environment.clone(),
            on_failure: hook.on_failure,
        };
        let around = Around { before: self.before.as_ref().map(hook), after: self.after.as_ref().map(hook) };
        (around != Around::default()).then_some(around)
    }
}

/// A program with its arguments, run without a shell. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct CommandLine {
    words: Vec<String>,
}

impl CommandLine {
    /// The program: an absolute path.
    pub fn program(&self) -> &str {
        self.words.first().map(String::as_str).unwrap_or_default()
    }

    /// Its arguments.
    pub fn arguments(&self) -> &[String] {
        self.words.get(1..).unwrap_or_default()
    }
}

impl TryFrom<Vec<String>> for CommandLine {
    type Error = String;
    fn try_from(words: Vec<String>) -> Result<Self, String> {
        match words.first() {
            Some(program) if program.starts_with('/') && words.iter().all(|word| !word.contains('\0')) => {
                Ok(Self { words })
            }
            _ => Err("a program is a list of words, the first of which is an absolute path".to_owned()),
        }
    }
}

impl From<CommandLine> for Vec<String> {
    fn from(command: CommandLine) -> Self {
        command.words
    }
}

/// A program around a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Hook {
    /// The program.
    pub program: CommandLine,
    /// How long it may take.
    pub timeout: Elapsed,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// What its failure means.
    pub on_failure: OnFailure,
}

/// Who is told, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Notify {
    /// An address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<Webhook>,
    /// A file that holds an address, which is a secret; its absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook_file: Option<PathBuf>,
    /// A program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandLine>,
    /// How long either may take.
    pub timeout: Elapsed,
    /// When.
    pub on: BTreeSet<Occasion>,
}

/// When someone is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Occasion {
    /// A run failed.
    Failure,
    /// The first run that succeeded after one that failed.
    Recovery,
    /// An operation can go neither on nor back.
    NeedsAttention,
}
