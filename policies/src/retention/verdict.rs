//! Which snapshots stay, which go, and why.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use snaptree_engine::event::Actor;
use snaptree_engine::project::Dated;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{PolicyName, SnapshotId};

use super::depth::DepthLimit;
use super::keep::{Keep, Limit, Rule};
use super::period::{Per, Period, Wall};
use crate::span::Reach;

/// A snapshot, as far as retention looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// When it was taken.
    pub created: Timestamp,
    /// Its place in the log: of two snapshots the one with the greater was taken later, whatever clocks said.
    pub seq: u64,
    /// Whether it counts, and whether it may go.
    pub standing: Standing,
}

/// Whether a snapshot counts, and whether it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It counts, and goes when no rule keeps it.
    Counted,
    /// It counts like any other, so that a hold changes nothing for the others, but it stays.
    Held,
    /// The run that asks has just taken it. It counts like any other, but it stays.
    Own,
    /// It neither counts nor goes.
    Uncounted(Uncounted),
}

/// Why a snapshot neither counts nor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uncounted {
    /// Someone else made it.
    Foreign,
    /// It is still being made, or a request about it is open.
    Unfinished,
    /// Making it failed.
    Failed,
    /// The hypervisor no longer has it.
    Lost,
    /// It is dated later than now: a clock was ahead when it was taken, or has gone back since. Only once the clock
    /// has reached it does it count.
    Future,
}

impl Candidate {
    /// What `policy` has to see in `snapshot` at `now`; `dated` is when it was taken, as far as the log knows.
    pub fn of(snapshot: &Snapshot, dated: Option<Dated>, policy: &PolicyName, now: Timestamp) -> Self {
        let standing = if snapshot.made_by != Actor::Policy(policy.clone()) {
            Standing::Uncounted(Uncounted::Foreign)
        } else if snapshot.lost {
            Standing::Uncounted(Uncounted::Lost)
        } else if snapshot.hold.as_ref().is_some_and(|hold| hold.in_force(now)) {
            Standing::Held
        } else {
            Standing::Counted
        };
        let Dated { seq, at } = dated.unwrap_or(Dated { seq: 0, at: snapshot.created });
        Self { snapshot: snapshot.id, created: at, seq, standing }
    }

    /// Its standing by a clock that shows `now`.
    fn standing_at(&self, now: Timestamp) -> Standing {
        match self.standing {
            Standing::Uncounted(_) => self.standing,
            _ if self.created > now => Standing::Uncounted(Uncounted::Future),
            other => other,
        }
    }
}

/// What is to become of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// It stays.
    Keep,
    /// It goes.
    Delete,
}

/// The decision on a snapshot, with every reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// When it was taken.
    pub created: Timestamp,
    /// What is to become of it.
    pub decision: Decision,
    /// Why; never empty. Those of a delete go into its event.
    pub reasons: Vec<Reason>,
}

impl Verdict {
    /// Whether it neither counts nor goes because it is dated later than now.
    pub fn is_future(&self) -> bool {
        self.reasons.as_slice() == [Reason::Uncounted(Uncounted::Future)]
    }

    /// Whether it stays.
    pub fn keeps(&self) -> bool {
        self.decision == Decision::Keep
    }
}

/// Why a snapshot stays, or goes. Its `Display` is the sentence that `policy plan` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Stays: the newest of a period of a rule that was not full.
    Newest {
        /// The rule.
        rule: Rule,
        /// The period.
        period: Period,
        /// The how manieth of the rule it is, from 1.
        nth: u32,
    },
    /// Stays: the oldest of all, and the rule was not full.
    Oldest {
        /// The rule.
        rule: Rule,
        /// The how manieth of the rule it is, from 1.
        nth: u32,
    },
    /// Stays: there is no rule.
    NoRule,
    /// Stays: among the fewest that are to be left.
    MinKeep {
        /// The how manieth it is, from 1.
        nth: u32,
        /// How many are to be left.
        of: u32,
    },
    /// Stays: a hold is in force.
    Held,
    /// Stays: the run that asks has just taken it.
    Own,
    /// Stays: the clock is in doubt.
    InDoubt,
    /// Stays: not this policy's business.
    Uncounted(Uncounted),
    /// Goes: the rule had as many as it keeps, all of them newer.
    Full {
        /// The rule.
        rule: Rule,
    },
    /// Goes: every rule had as many as it keeps, all of them newer.
    AllFull,
    /// Goes: the rule has a newer one of the same period.
    Superseded {
        /// The rule.
        rule: Rule,
        /// The period.
        period: Period,
    },
    /// Goes: further back than the rule reaches.
    Outside {
        /// The rule.
        rule: Rule,
    },
    /// Goes: older than a snapshot may get.
    TooOld {
        /// How old it may get.
        max_age: Reach,
    },
    /// Goes: a rule would keep it, but the machine's disk would stand upon too many layers.
    TooDeep {
        /// The rule that would keep it.
        rule: Rule,
        /// How many there may be, and who says so.
        limit: DepthLimit,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest { rule, period, nth } => match (rule.limit, rule.per) {
                (Limit::Within(reach), Per::Snapshot) => {
                    write!(f, "{}: less than {reach} before the newest", rule.key())
                }
                (Limit::Within(reach), _) => {
                    write!(f, "{}: newest of {period}, less than {reach} before the newest", rule.key())
                }
                (Limit::Count(count), Per::Snapshot) => write!(f, "{}: {nth} of {count}", rule.key()),
                (Limit::Count(count), _) => {
                    write!(f, "{}: newest of {period}, {nth} of {count}", rule.key())
                }
                (Limit::All, Per::Snapshot) => write!(f, "{}: all are kept", rule.key()),
                (Limit::All, _) => write!(f, "{}: newest of {period}", rule.key()),
            },
            Self::Oldest { rule, nth } => match rule.limit {
                Limit::Count(count) => write!(f, "{}: oldest, {nth} of {count}", rule.key()),
                Limit::All | Limit::Within(_) => write!(f, "{}: oldest", rule.key()),
            },
            Self::NoRule => f.write_str("no rule: all are kept"),
            Self::MinKeep { nth, of } => write!(f, "min-keep: {nth} of {of}"),
            Self::Held => f.write_str("held"),
            Self::InDoubt => f.write_str("held back: the clock leapt"),
            Self::Own => f.write_str("taken by this run"),
            Self::Uncounted(Uncounted::Future) => f.write_str("not counted: dated later than now"),
            Self::Uncounted(Uncounted::Foreign) => f.write_str("not made by this policy"),
            Self::Uncounted(Uncounted::Unfinished) => f.write_str("not counted: unfinished"),
            Self::Uncounted(Uncounted::Failed) => f.write_str("not counted: failed"),
            Self::Uncounted(Uncounted::Lost) => f.write_str("not counted: the hypervisor no longer has it"),
            Self::Full { rule } => write!(f, "{rule}: full with newer ones"),
            Self::AllFull => f.write_str("every rule is full with newer ones"),
            Self::Superseded { rule, period } => write!(f, "{}: {period} has a newer one", rule.key()),
            Self::Outside { rule } => write!(f, "{rule}: further back than that"),
            Self::TooOld { max_age } => write!(f, "max-age: older than {max_age}"),
            Self::TooDeep { rule, limit: DepthLimit::Policy(most) } => {
                write!(f, "max-depth: more than {most} in a row, though {} would keep it", rule.key())
            }
            Self::TooDeep { rule, limit: DepthLimit::Hypervisor(most) } => write!(
                f,
                "the hypervisor has room for {most} in a row and the next one, though {} would keep it",
                rule.key()
            ),
        }
    }
}

/// How far a rule has got on its way from the newest snapshot to the oldest.
struct Tally {
    rule: Rule,
    /// For rules by age: only what is later than this.
    after: Timestamp,
    /// The periods that it has one of. They are all needed, since a clock that went back comes to one again.
    seen: BTreeSet<Period>,
    taken: u32,
}

impl Tally {
    fn full(&self) -> bool {
        matches!(self.rule.limit, Limit::Count(count) if self.taken >= count.get())
    }

    /// What the rule says about the next older snapshot.
    fn judge(&mut self, age: Timestamp, wall: Wall, place: Place) -> Result<Reason, Reason> {
        let rule = self.rule;
        if self.full() {
            return Err(Reason::Full { rule });
        }
        if matches!(rule.limit, Limit::Within(_)) && age <= self.after {
            return Err(Reason::Outside { rule });
        }
        let period = wall.period(rule.per);
        let newest = rule.per == Per::Snapshot || self.seen.insert(period);
        if !newest && place == Place::Among {
            return Err(Reason::Superseded { rule, period });
        }
        self.taken += 1;
        let nth = self.taken;
        Ok(if newest { Reason::Newest { rule, period, nth } } else { Reason::Oldest { rule, nth } })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Among,
    Oldest,
}

/// The verdict on every candidate, the newest first.
///
/// Which of two is newer is the log's to say: clocks leap, and the log does not. Periods go by a snapshot's own date.
/// Where a later snapshot has the earlier date, one of the two dates is wrong, and its age is counted from the later
/// date, so that nothing is too old before its time. What is dated later than `now` neither counts nor goes.
///
/// Each rule goes from the newest counted snapshot to the oldest and keeps the newest of each period, until it is full;
/// the oldest of all is kept too while the rule is not. A snapshot is kept if any rule keeps it, and one may count for
/// several rules. These are restic's rules (0.16 and later), and differ from them in that the two runs of a repeated
/// hour are two hours, and in `max-age` and `min-keep`.
///
/// `now` decides which snapshots are of the future, and how old a snapshot is for `max-age`. `within` reaches back from
/// the newest snapshot, not from `now`: a long pause deletes nothing.
///
/// Pure. The kept ones judged again are all kept.
pub fn verdicts(candidates: &[Candidate], keep: &Keep, now: Timestamp, zone: &TimeZone) -> Vec<Verdict> {
    let standing = |candidate: &Candidate| Candidate { standing: candidate.standing_at(now), ..*candidate };
    let mut sorted: Vec<Candidate> = candidates.iter().map(standing).collect();
    sorted.sort_unstable_by_key(|candidate| Reverse((candidate.seq, candidate.created, candidate.snapshot)));
    let counted = |candidate: &Candidate| !matches!(candidate.standing, Standing::Uncounted(_));
    let oldest = sorted.iter().rev().find(|found| counted(found)).map(|candidate| candidate.snapshot);
    let ages = ages(&sorted, now);
    let newest = sorted.iter().zip(&ages).find(|(candidate, _)| counted(candidate)).map(|(_, age)| *age);
    let mut judge = Judge::new(keep, newest, oldest, now, zone);
    sorted.iter().zip(ages).map(|(candidate, age)| judge.verdict(candidate, age)).collect()
}

/// From when the age of each is counted, in the same order: the latest date until then that is not of the future.
fn ages(sorted: &[Candidate], now: Timestamp) -> Vec<Timestamp> {
    let mut latest = Timestamp::MIN;
    let age = |candidate: &Candidate| {
        latest = if candidate.created <= now { latest.max(candidate.created) } else { latest };
        latest
    };
    let mut ages: Vec<Timestamp> = sorted.iter().rev().map(age).collect();
    ages.reverse();
    ages
}

struct Judge<'a> {
    keep: &'a Keep,
    zone: &'a TimeZone,
    tallies: Vec<Tally>,
    oldest: Option<SnapshotId>,
    /// What was taken before this is older than `max-age`.
    since: Option<(Timestamp, Reach)>,
    counted: u32,
}

impl<'a> Judge<'a> {
    fn new(
        keep: &'a Keep,
        newest: Option<Timestamp>,
        oldest: Option<SnapshotId>,
        now: Timestamp,
        zone: &'a TimeZone,
    ) -> Self {
        let after = |rule: &Rule| match (rule.limit, newest) {
            (Limit::Within(reach), Some(newest)) => reach.before(newest, zone),
            _ => Timestamp::MIN,
        };
        let tallies = keep
            .rules()
            .iter()
            .map(|rule| Tally { rule: *rule, after: after(rule), seen: BTreeSet::new(), taken: 0 })
            .collect();
        let since = keep.max_age().map(|age| (age.before(now, zone), age));
        Self { keep, zone, tallies, oldest, since, counted: 0 }
    }

    fn verdict(&mut self, candidate: &Candidate, age: Timestamp) -> Verdict {
        let Candidate { snapshot, created, standing, .. } = *candidate;
        let (decision, reasons) = match standing {
            Standing::Uncounted(why) => (Decision::Keep, vec![Reason::Uncounted(why)]),
            Standing::Counted | Standing::Held | Standing::Own => self.counted(candidate, age),
        };
        Verdict { snapshot, created, decision, reasons }
    }

    fn counted(&mut self, candidate: &Candidate, age: Timestamp) -> (Decision, Vec<Reason>) {
        self.counted = self.counted.saturating_add(1);
        let (mut kept, mut missed) = self.by_the_rules(candidate, age);
        if let Some((since, max_age)) = self.since
            && age < since
        {
            kept.clear();
            missed = vec![Reason::TooOld { max_age }];
        }
        let of = self.keep.min_keep().get();
        if self.counted <= of {
            kept.push(Reason::MinKeep { nth: self.counted, of });
        }
        if candidate.standing == Standing::Held {
            kept.push(Reason::Held);
        }
        if candidate.standing == Standing::Own {
            kept.push(Reason::Own);
        }
        if kept.is_empty() { (Decision::Delete, missed) } else { (Decision::Keep, kept) }
    }

    fn by_the_rules(&mut self, candidate: &Candidate, age: Timestamp) -> (Vec<Reason>, Vec<Reason>) {
        if self.tallies.is_empty() {
            return (vec![Reason::NoRule], Vec::new());
        }
        let place = if self.oldest == Some(candidate.snapshot) { Place::Oldest } else { Place::Among };
        // Asking the time zone is most of the work, and no rule that is full needs it.
        if self.tallies.iter().all(Tally::full) {
            let missed = match self.tallies.as_slice() {
                [only] => Reason::Full { rule: only.rule },
                _ => Reason::AllFull,
            };
            return (Vec::new(), vec![missed]);
        }
        let (mut kept, mut missed) = (Vec::new(), Vec::new());
        let wall = Wall::at(candidate.created, self.zone);
        for tally in &mut self.tallies {
            match tally.judge(age, wall, place) {
                Ok(reason) => kept.push(reason),
                Err(reason) => missed.push(reason),
            }
        }
        (kept, missed)
    }
}
