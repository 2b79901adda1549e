//! The policies of the year, and what they come to, thought out anew from what the README says of them.

use std::collections::BTreeSet;

use jiff::civil::Weekday;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

/// The time zone of all policies: its clock changes twice a year.
pub const ZONE: &str = "Europe/Vienna";

/// What a policy runs in every one of, and what a rule keeps the newest of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Every {
    /// Each snapshot.
    One,
    /// An hour.
    Hour,
    /// A day.
    Day,
    /// A week, from Monday.
    Week,
    /// A month.
    Month,
}

/// A rule: the newest snapshot of each of so many periods.
#[derive(Clone, Copy, Debug)]
pub struct Rule(pub Every, pub usize);

/// A policy.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Its name, and its schedule.
    pub name: &'static str,
    /// How often it runs.
    pub runs: Every,
    /// What it keeps.
    pub keep: &'static [Rule],
}

/// The policies, all of them on every domain.
pub const POLICIES: [Policy; 4] = [
    Policy {
        name: "hourly",
        runs: Every::Hour,
        keep: &[
            Rule(Every::One, 3),
            Rule(Every::Hour, 24),
            Rule(Every::Day, 7),
            Rule(Every::Week, 5),
            Rule(Every::Month, 12),
        ],
    },
    Policy { name: "daily", runs: Every::Day, keep: &[Rule(Every::Day, 14)] },
    Policy { name: "weekly", runs: Every::Week, keep: &[Rule(Every::Week, 8)] },
    Policy { name: "monthly", runs: Every::Month, keep: &[Rule(Every::One, 2), Rule(Every::Month, 6)] },
];

impl Every {
    const fn key(self) -> &'static str {
        match self {
            Self::One => "last",
            Self::Hour => "hourly",
            Self::Day => "daily",
            Self::Week => "weekly",
            Self::Month => "monthly",
        }
    }

    /// The period that a moment lies in, as the program writes it.
    fn period(self, at: &Zoned) -> String {
        match self {
            Self::One => at.timestamp().to_string(),
            Self::Hour => format!("{} {:02}h{}", at.date(), at.hour(), at.offset()),
            Self::Day => at.date().to_string(),
            Self::Week => {
                let week = at.date().iso_week_date();
                format!("{}-W{:02}", week.year(), week.week())
            }
            Self::Month => format!("{}-{:02}", at.year(), at.month()),
        }
    }

    /// The beginning of the period that a moment lies in: the last moment at which what runs in every one was due.
    fn began(self, at: &Zoned) -> Timestamp {
        let day = |zoned: Zoned| zoned.start_of_day().expect("a day").timestamp();
        match self {
            Self::One => at.timestamp(),
            // The zone's offset is a whole number of hours.
            Self::Hour => Timestamp::from_second(at.timestamp().as_second() / 3_600 * 3_600).expect("a time"),
            Self::Day => day(at.clone()),
            Self::Week => {
                let back = i64::from(at.weekday().since(Weekday::Monday));
                day(at.checked_sub(back.days()).expect("a day"))
            }
            Self::Month => day(at.first_of_month().expect("a month")),
        }
    }
}

/// A snapshot, with all that a rule asks of its time.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Its name.
    pub name: String,
    /// When it was taken.
    pub at: Timestamp,
    /// Per rule of its policy, its period.
    periods: Vec<String>,
}

impl Taken {
    /// A snapshot of `policy`.
    pub fn new(policy: &Policy, name: String, at: Timestamp) -> Self {
        let shown = at.to_zoned(zone());
        Self { name, at, periods: policy.keep.iter().map(|rule| rule.0.period(&shown)).collect() }
    }
}

fn zone() -> TimeZone {
    TimeZone::get(ZONE).expect("a time zone")
}

impl Policy {
    /// The policy file.
    pub fn file(&self) -> String {
        let keep: String =
            self.keep.iter().map(|Rule(every, count)| format!("{} = {count}\n", every.key())).collect();
        format!(
            "name = \"{0}\"\ndomains = [\"vm-*\"]\nschedule = \"{0}\"\ntimezone = \"{ZONE}\"\nmax-depth = 200\n\
             [keep]\n{keep}",
            self.name
        )
    }

    /// Its snapshots of a domain, in order, if it was defined at the first of these moments and looked for what was
    /// due at the others.
    pub fn taken(&self, looked: &[Timestamp]) -> Vec<Taken> {
        let Some((defined, looked)) = looked.split_first() else { return Vec::new() };
        let mut ran = BTreeSet::new();
        let mut taken = Vec::new();
        for at in looked {
            let due = self.runs.began(&at.to_zoned(zone()));
            // What ran at a moment that this clock has not come to settles nothing.
            let last = ran.range(..=*at).next_back().copied();
            let last = match last {
                _ if defined <= at => last.unwrap_or(*defined).max(*defined),
                Some(last) => last,
                None => *at - 60.seconds(),
            };
            if due > last {
                ran.insert(due);
                let name = format!("{}-{}", self.name, due.strftime("%Y%m%dT%H%M%SZ"));
                taken.push(Taken::new(self, name, *at));
            }
        }
        taken
    }

    /// The names of those that stay, of `all` in the order in which they were taken; none of them later than now.
    pub fn stay<'a>(&self, all: &'a [Taken]) -> BTreeSet<&'a str> {
        let mut stay = BTreeSet::new();
        for (number, Rule(_, count)) in self.keep.iter().enumerate() {
            let mut full = 0;
            let mut seen = BTreeSet::new();
            for (index, taken) in all.iter().enumerate().rev() {
                if full == *count {
                    break;
                }
                // Two that were taken at the same moment are two.
                let new = seen.insert(&taken.periods[number]) || self.keep[number].0 == Every::One;
                if new || index == 0 {
                    full += 1;
                    stay.insert(taken.name.as_str());
                }
            }
        }
        stay
    }

    /// Why `all[index]` goes, in the program's words; nothing if it stays.
    pub fn reasons(&self, all: &[Taken], index: usize) -> Vec<String> {
        let mut reasons = Vec::new();
        let mut full_rules = 0;
        for (number, Rule(every, count)) in self.keep.iter().enumerate() {
            let newer = all[index + 1..].iter().map(|taken| &taken.periods[number]);
            let period = &all[index].periods[number];
            let full = match every {
                Every::One => newer.clone().count(),
                _ => newer.clone().collect::<BTreeSet<_>>().len(),
            };
            if full >= *count {
                full_rules += 1;
                reasons.push(format!("{} {count}: full with newer ones", every.key()));
            } else if *every != Every::One && newer.clone().any(|other| other == period) && index > 0 {
                reasons.push(format!("{}: {period} has a newer one", every.key()));
            } else {
                return Vec::new();
            }
        }
        if full_rules == self.keep.len() && full_rules > 1 {
            return vec!["every rule is full with newer ones".to_owned()];
        }
        reasons
    }
}
