//! From the text of a policy file to a policy, or to every problem in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;

use snaptree_engine::LabelKey;
use snaptree_engine::around::OnFailure;
use snaptree_engine::tree::Labels;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::policy::{
    CommandLine, DEPTH_MAX_DEFAULT, Hook, Hooks, Notify, Occasion, Policy, SUSPEND_AFTER_DEFAULT, Selection,
    SnapshotSpec,
};
use crate::retention::{Keep, Limit, Per, Rule, count_key, within_key};
use crate::schedule::CatchUp;
use crate::span::Elapsed;
use snaptree_engine::near::nearest;

/// The largest policy file, in bytes.
pub const FILE_BYTES_MAX: usize = 64 * 1024;

/// The most items in a list or table.
const ITEMS_MAX: usize = 64;

/// The longest text that is not limited otherwise, in bytes.
const TEXT_BYTES_MAX: usize = 4_096;

/// The greatest number of snapshots that a rule may count.
const COUNT_MAX: u32 = 100_000;

const HOOK_TIMEOUT: Elapsed = Elapsed::from_seconds(60);
const NOTIFY_TIMEOUT: Elapsed = Elapsed::from_seconds(10);

/// A policy file that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// Too large.
    #[error("a policy file has at most {FILE_BYTES_MAX} bytes, this one has {0}")]
    TooLarge(usize),
    /// What is wrong, in the order of the file; at least one.
    #[error("{}", lines(.0))]
    Problems(Vec<Problem>),
}

/// One thing that is wrong in a policy file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
    /// What is wrong, and what is allowed.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}: {}", self.line, self.column, self.message)
    }
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// An error with those that caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |told, cause| format!("{told}: {cause}"))
}

impl Policy {
    /// Reads the text of a policy file.
    ///
    /// # Errors
    /// [`FileError`] with every problem in it, not only the first.
    pub fn from_toml(text: &str) -> Result<Self, FileError> {
        if text.len() > FILE_BYTES_MAX {
            return Err(FileError::TooLarge(text.len()));
        }
        let mut reader = Reader { text, problems: Vec::new() };
        let document = match DeTable::parse(text) {
            Ok(document) => document,
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                reader.problem(at, error.message().to_owned());
                return Err(FileError::Problems(reader.problems));
            }
        };
        let policy = reader.policy(document.get_ref());
        let mut problems = reader.problems;
        problems.sort();
        match policy {
            Some(policy) if problems.is_empty() => Ok(policy),
            _ => Err(FileError::Problems(problems)),
        }
    }
}

/// A table of the file, and where it is.
#[derive(Clone, Copy)]
struct Section<'a> {
    /// Its name with a dot, such as `keep.`; empty for the file itself.
    path: &'static str,
    table: Option<&'a DeTable<'a>>,
    at: usize,
}

struct Reader<'a> {
    text: &'a str,
    problems: Vec<Problem>,
}

const TOP: [&str; 15] = [
    "name",
    "domains",
    "labels",
    "schedule",
    "timezone",
    "jitter",
    "catch-up",
    "window",
    "max-depth",
    "suspend-after",
    "deletes-per-run",
    "snapshot",
    "keep",
    "hooks",
    "notify",
];
const PERS: [Per; 7] = [Per::Snapshot, Per::Hour, Per::Day, Per::Week, Per::Month, Per::Quarter, Per::Year];

impl<'a> Reader<'a> {
    fn problem(&mut self, at: usize, message: String) {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        self.problems.push(Problem { line, column, message });
    }

    /// Looks for keys that are not `known`.
    fn section(
        &mut self,
        path: &'static str,
        table: &'a DeTable<'a>,
        at: usize,
        known: &[&str],
    ) -> Section<'a> {
        for (key, _) in table.iter() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let given: String = name.chars().take(60).collect();
            let help = match nearest(&given, known.iter().copied()) {
                Some(near) => format!("did you mean '{path}{near}'?"),
                None => format!("there are {}", known.join(", ")),
            };
            self.problem(key.span().start, format!("there is no key '{path}{given}'; {help}"));
        }
        Section { path, table: Some(table), at }
    }

    /// A table inside another; one without entries if it is left out.
    fn inner(
        &mut self,
        of: Section<'a>,
        key: &'static str,
        path: &'static str,
        known: &[&str],
    ) -> Section<'a> {
        let found = self.value(of, key, |value| value.as_table().ok_or_else(|| wrong(value, "a table")));
        let at = of.table.and_then(|table| table.get(key)).map_or(of.at, |value| value.span().start);
        match found {
            Some(table) => self.section(path, table, at, known),
            None => Section { path, table: None, at },
        }
    }

    /// What `read` makes of the value; `None` if it is left out or wrong.
    fn value<T>(
        &mut self,
        section: Section<'a>,
        key: &str,
        read: impl FnOnce(&'a DeValue<'a>) -> Result<T, String>,
    ) -> Option<T> {
        let value: &Spanned<DeValue<'a>> = section.table?.get(key)?;
        match read(value.get_ref()) {
            Ok(value) => Some(value),
            Err(message) => {
                self.problem(value.span().start, format!("{}{key}: {message}", section.path));
                None
            }
        }
    }

    /// The same, of something that has to be there.
    fn needed<T>(
        &mut self,
        section: Section<'a>,
        key: &str,
        read: impl FnOnce(&'a DeValue<'a>) -> Result<T, String>,
    ) -> Option<T> {
        if section.table.is_none_or(|table| table.get(key).is_none()) {
            self.problem(section.at, format!("'{}{key}' is missing", section.path));
        }
        self.value(section, key, read)
    }

    fn policy(&mut self, document: &'a DeTable<'a>) -> Option<Policy> {
        let top = self.section("", document, 0, &TOP);
        let name = self.needed(top, "name", parsed);
        let schedule = self.needed(top, "schedule", parsed);
        let select = self.selection(top);
        let timezone = self.value(top, "timezone", parsed).unwrap_or_default();
        let jitter = self.value(top, "jitter", parsed);
        let catch_up = self.value(top, "catch-up", |value| {
            one_of(value, &[("once", CatchUp::Once), ("none", CatchUp::None)])
        });
        let window = self.value(top, "window", parsed);
        let max_depth = self.value(top, "max-depth", |value| count(value, 10_000));
        let suspend_after = self.value(top, "suspend-after", |value| count(value, 1_000));
        let deletes_per_run = self.value(top, "deletes-per-run", |value| count(value, COUNT_MAX));
        let snapshot = self.snapshot(top);
        let keep = self.keep(top);
        let hooks = self.hooks(top);
        let notify = self.notify(top);
        Some(Policy {
            name: name?,
            select: select?,
            schedule: schedule?,
            timezone,
            jitter,
            catch_up: catch_up.unwrap_or_default(),
            window,
            max_depth: max_depth.unwrap_or(DEPTH_MAX_DEFAULT),
            suspend_after: suspend_after.unwrap_or(SUSPEND_AFTER_DEFAULT),
            deletes_per_run,
            snapshot,
            keep: keep?,
            hooks,
            notify,
        })
    }

    fn selection(&mut self, top: Section<'a>) -> Option<Selection> {
        let given = |key: &str| top.table.is_some_and(|table| table.get(key).is_some());
        if !given("domains") && !given("labels") {
            self.problem(
                top.at,
                "neither 'domains' nor 'labels' says which machines; domains = [\"*\"] is all".to_owned(),
            );
            return None;
        }
        let named = given("domains").then(|| self.value(top, "domains", |value| items(value, parsed)));
        let labelled = given("labels").then(|| self.value(top, "labels", labels));
        let domains = named.unwrap_or_else(|| Some(Vec::new()))?;
        let labels = labelled.unwrap_or_else(|| Some(Labels::new()))?;
        if domains.is_empty() && labels.is_empty() {
            self.problem(top.at, "'domains' and 'labels' select no machine".to_owned());
        }
        Some(Selection { domains, labels })
    }

    fn snapshot(&mut self, top: Section<'a>) -> SnapshotSpec {
        let known = ["name", "description", "memory", "quiesce", "labels"];
        let section = self.inner(top, "snapshot", "snapshot.", &known);
        let memory = self.value(section, "memory", boolean).unwrap_or_default();
        let quiesce = self.value(section, "quiesce", boolean).unwrap_or_default();
        if memory && quiesce {
            let message = "snapshot.quiesce is for the disks alone: leave it or snapshot.memory out";
            self.problem(section.at, message.to_owned());
        }
        SnapshotSpec {
            name: self.value(section, "name", parsed).unwrap_or_default(),
            description: self.value(section, "description", |value| text(value).map(str::to_owned)),
            memory,
            quiesce,
            labels: self.value(section, "labels", labels).unwrap_or_default(),
        }
    }

    fn keep(&mut self, top: Section<'a>) -> Option<Keep> {
        let counts = PERS.iter().map(|per| count_key(*per));
        let known: Vec<&str> =
            counts.chain(PERS.iter().map(|per| within_key(*per))).chain(["max-age", "min-keep"]).collect();
        let section = self.inner(top, "keep", "keep.", &known);
        let mut rules = Vec::new();
        for per in PERS {
            let counted = self.value(section, count_key(per), limit);
            let within = self.value(section, within_key(per), |value| parsed(value).map(Limit::Within));
            rules.extend(counted.into_iter().chain(within).map(|limit| Rule { per, limit }));
        }
        let max_age = self.value(section, "max-age", parsed);
        let min_keep = self.value(section, "min-keep", |value| {
            count(value, COUNT_MAX)
                .map_err(|message| format!("{message}; a policy may not delete everything"))
        });
        let silent =
            section.table.is_some_and(|table| table.iter().all(|(key, _)| key.get_ref() == "min-keep"));
        if silent {
            self.problem(section.at, "[keep] has no rule; leave it out to keep everything".to_owned());
        }
        // Each key stands once in a table, so the rules cannot contradict each other.
        Keep::new(rules, max_age, min_keep.unwrap_or(NonZeroU32::MIN)).ok()
    }

    fn hooks(&mut self, top: Section<'a>) -> Hooks {
        let section = self.inner(top, "hooks", "hooks.", &["before", "after"]);
        Hooks {
            before: self.hook(section, "before", "hooks.before."),
            after: self.hook(section, "after", "hooks.after."),
        }
    }

    fn hook(&mut self, hooks: Section<'a>, key: &'static str, path: &'static str) -> Option<Hook> {
        hooks.table?.get(key)?;
        let known = ["program", "timeout", "environment", "on-failure"];
        let section = self.inner(hooks, key, path, &known);
        let program = self.needed(section, "program", command);
        let timeout = self.value(section, "timeout", parsed).unwrap_or(HOOK_TIMEOUT);
        let environment = self.value(section, "environment", environment).unwrap_or_default();
        let on_failure = self.value(section, "on-failure", |value| {
            one_of(value, &[("abort", OnFailure::Abort), ("go-on", OnFailure::GoOn)])
        });
        if key == "after" && on_failure == Some(OnFailure::Abort) {
            self.problem(
                section.at,
                format!("{path}on-failure: after the snapshot there is nothing to abort"),
            );
        }
        let usual = if key == "after" { OnFailure::GoOn } else { OnFailure::Abort };
        Some(Hook { program: program?, timeout, environment, on_failure: on_failure.unwrap_or(usual) })
    }

    fn notify(&mut self, top: Section<'a>) -> Option<Notify> {
        top.table?.get("notify")?;
        let known = ["webhook", "webhook-file", "command", "timeout", "on"];
        let section = self.inner(top, "notify", "notify.", &known);
        let webhook = self.value(section, "webhook", parsed);
        let webhook_file = self.value(section, "webhook-file", absolute);
        let command = self.value(section, "command", command);
        let timeout = self.value(section, "timeout", parsed).unwrap_or(NOTIFY_TIMEOUT);
        let all = [
            ("failure", Occasion::Failure),
            ("recovery", Occasion::Recovery),
            ("needs-attention", Occasion::NeedsAttention),
        ];
        let on = self.value(section, "on", |value| items(value, |value| one_of(value, &all)));
        let given = |key: &str| section.table.is_some_and(|table| table.get(key).is_some());
        if !given("webhook") && !given("webhook-file") && !given("command") {
            let message = "[notify] has none of 'webhook', 'webhook-file' and 'command'";
            self.problem(section.at, message.to_owned());
        }
        if given("webhook") && given("webhook-file") {
            self.problem(section.at, "[notify] has both 'webhook' and 'webhook-file'".to_owned());
        }
        let on = on.map_or_else(|| all.iter().map(|(_, on)| *on).collect(), BTreeSet::from_iter);
        Some(Notify { webhook, webhook_file, command, timeout, on })
    }
}

fn wrong(value: &DeValue<'_>, expected: &str) -> String {
    format!("should be {expected}, and is {}", kind(value))
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn text<'a>(value: &'a DeValue<'_>) -> Result<&'a str, String> {
    let text = value.as_str().ok_or_else(|| wrong(value, "a text in quotes"))?;
    match text.len() {
        0..=TEXT_BYTES_MAX => Ok(text),
        bytes => Err(format!("has at most {TEXT_BYTES_MAX} bytes, this one has {bytes}")),
    }
}

fn parsed<T>(value: &DeValue<'_>) -> Result<T, String>
where
    T: FromStr,
    T::Err: std::error::Error,
{
    text(value)?.parse().map_err(|error: T::Err| chain(&error))
}

fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| wrong(value, "true or false"))
}

fn count(value: &DeValue<'_>, most: u32) -> Result<NonZeroU32, String> {
    let number = value.as_integer().ok_or_else(|| wrong(value, "a number"))?;
    let number = u32::from_str_radix(&number.as_str().replace('_', ""), number.radix()).ok();
    let number = number.filter(|number| *number <= most).and_then(NonZeroU32::new);
    number.ok_or_else(|| format!("is from 1 to {most}"))
}

/// How many of a rule: a number, or `"all"`.
fn limit(value: &DeValue<'_>) -> Result<Limit, String> {
    match value {
        DeValue::String(text) if text == "all" => Ok(Limit::All),
        DeValue::Integer(number) if number.as_str() == "0" => {
            Err("is from 1 on; leave the line out to switch the rule off".to_owned())
        }
        DeValue::Integer(_) => count(value, COUNT_MAX).map(Limit::Count),
        other => Err(wrong(other, "a number or \"all\"")),
    }
}

fn one_of<T: Copy>(value: &DeValue<'_>, known: &[(&str, T)]) -> Result<T, String> {
    let given = text(value)?;
    let found = known.iter().find(|(name, _)| *name == given).map(|(_, value)| *value);
    let names = known.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(" or ");
    found.ok_or_else(|| format!("should be {names}"))
}

fn items<'a, T>(
    value: &'a DeValue<'a>,
    read: impl Fn(&'a DeValue<'a>) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let list = value.as_array().ok_or_else(|| wrong(value, "a list in brackets"))?;
    if list.len() > ITEMS_MAX {
        return Err(format!("has at most {ITEMS_MAX} items, this one has {}", list.len()));
    }
    list.iter().map(|item| read(item.get_ref())).collect()
}

fn entries<'a>(value: &'a DeValue<'a>) -> Result<impl Iterator<Item = (&'a str, &'a DeValue<'a>)>, String> {
    let table = value.as_table().ok_or_else(|| wrong(value, "a table such as { key = \"value\" }"))?;
    if table.len() > ITEMS_MAX {
        return Err(format!("has at most {ITEMS_MAX} entries, this one has {}", table.len()));
    }
    Ok(table.iter().map(|(key, value)| (key.get_ref().as_ref(), value.get_ref())))
}

fn labels<'a>(value: &'a DeValue<'a>) -> Result<Labels, String> {
    entries(value)?
        .map(|(key, value)| {
            let key = LabelKey::new(key).map_err(|error| chain(&error))?;
            Ok((key, text(value)?.to_owned()))
        })
        .collect()
}

fn environment<'a>(value: &'a DeValue<'a>) -> Result<BTreeMap<String, String>, String> {
    entries(value)?
        .map(|(key, value)| {
            if key.is_empty() || key.contains(['=', '\0']) {
                return Err(format!("{key:?} is no name of a variable"));
            }
            Ok((key.to_owned(), text(value)?.to_owned()))
        })
        .collect()
}

fn absolute<'a>(value: &'a DeValue<'a>) -> Result<PathBuf, String> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err("should be an absolute path".to_owned()) }
}

fn command<'a>(value: &'a DeValue<'a>) -> Result<CommandLine, String> {
    CommandLine::try_from(items(value, |value| text(value).map(str::to_owned))?)
}
