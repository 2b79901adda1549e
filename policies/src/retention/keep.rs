//! What a policy keeps: the rules of `[keep]`.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::period::Per;
use crate::span::Reach;

/// How many of a rule's periods count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// So many periods that have a snapshot, the newest first. Empty ones do not count, so a pause costs nothing.
    Count(NonZeroU32),
    /// All of them (`"all"`).
    All,
    /// Those of snapshots later than this long before the newest one.
    Within(Reach),
}

/// One rule: the newest snapshot of each of so many periods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// What it keeps one of.
    pub per: Per,
    /// How many.
    pub limit: Limit,
}

impl Rule {
    /// The key in the policy file, such as `daily` or `within-daily`.
    pub const fn key(&self) -> &'static str {
        match (self.limit, self.per) {
            (Limit::Within(_), per) => within_key(per),
            (_, per) => count_key(per),
        }
    }
}

/// The key of the rule that counts.
pub(crate) const fn count_key(per: Per) -> &'static str {
    match per {
        Per::Snapshot => "last",
        Per::Hour => "hourly",
        Per::Day => "daily",
        Per::Week => "weekly",
        Per::Month => "monthly",
        Per::Quarter => "quarterly",
        Per::Year => "yearly",
    }
}

/// The key of the rule that goes by age.
pub(crate) const fn within_key(per: Per) -> &'static str {
    match per {
        Per::Snapshot => "within",
        Per::Hour => "within-hourly",
        Per::Day => "within-daily",
        Per::Week => "within-weekly",
        Per::Month => "within-monthly",
        Per::Quarter => "within-quarterly",
        Per::Year => "within-yearly",
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.limit {
            Limit::Count(count) => write!(f, "{} {count}", self.key()),
            Limit::All => write!(f, "{} all", self.key()),
            Limit::Within(reach) => write!(f, "{} {reach}", self.key()),
        }
    }
}

/// Rules that cannot stand together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeepError {
    /// Two rules of the same key.
    #[error("'{0}' is there twice")]
    Twice(&'static str),
}

/// What a policy keeps: a snapshot stays if *any* rule keeps it, and is not older than `max-age`.
///
/// Without a rule every snapshot stays (until `max-age`, if that is set): a policy that says nothing about keeping
/// deletes nothing. [`min_keep`](Self::min_keep) is at least one, so no policy can delete everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Draft", rename_all = "kebab-case")]
pub struct Keep {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rules: Vec<Rule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_age: Option<Reach>,
    min_keep: NonZeroU32,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Draft {
    #[serde(default)]
    rules: Vec<Rule>,
    #[serde(default)]
    max_age: Option<Reach>,
    #[serde(default = "one")]
    min_keep: NonZeroU32,
}

const fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

impl TryFrom<Draft> for Keep {
    type Error = KeepError;
    fn try_from(draft: Draft) -> Result<Self, KeepError> {
        Self::new(draft.rules, draft.max_age, draft.min_keep)
    }
}

impl Default for Keep {
    /// Keeps everything.
    fn default() -> Self {
        Self { rules: Vec::new(), max_age: None, min_keep: one() }
    }
}

impl Keep {
    /// Puts rules together; they are sorted from the finest to the coarsest.
    ///
    /// # Errors
    /// Two of them have the same key.
    pub fn new(
        mut rules: Vec<Rule>,
        max_age: Option<Reach>,
        min_keep: NonZeroU32,
    ) -> Result<Self, KeepError> {
        rules.sort_by_key(|rule| (rule.per, matches!(rule.limit, Limit::Within(_))));
        if let Some(twice) = rules.windows(2).find(|pair| pair[0].key() == pair[1].key()) {
            return Err(KeepError::Twice(twice[0].key()));
        }
        Ok(Self { rules, max_age, min_keep })
    }

    /// The rules, from the finest to the coarsest.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The age past which a snapshot goes whatever the rules say.
    pub fn max_age(&self) -> Option<Reach> {
        self.max_age
    }

    /// The same without what goes by age.
    pub fn by_count(&self) -> Self {
        let counts = |rule: &&Rule| !matches!(rule.limit, Limit::Within(_));
        let rules = self.rules.iter().filter(counts).copied().collect();
        Self { rules, max_age: None, min_keep: self.min_keep }
    }

    /// The fewest snapshots that are left, the newest ones, whatever `max-age` says.
    pub fn min_keep(&self) -> NonZeroU32 {
        self.min_keep
    }

    /// Whether nothing is ever deleted.
    pub fn keeps_all(&self) -> bool {
        self.rules.is_empty() && self.max_age.is_none()
    }
}
