//! What a policy file may say, and what is said about one that says something else.

use std::num::NonZeroU32;

use proptest::prelude::*;
use snaptree_engine::{DomainName, LabelKey};

use super::*;
use crate::retention::Per;
use crate::schedule::CatchUp;

const FULL: &str = r#"
name = "hourly"
domains = ["web-*", "db[0-9]"]
labels = { tier = "prod" }
schedule = "hourly"
timezone = "Europe/Vienna"
jitter = "5m"
catch-up = "none"
window = "12h"
max-depth = 32
suspend-after = 3
deletes-per-run = 20

[snapshot]
name = "{domain}.{policy}-{time}"
description = "by the hour"
memory = false
quiesce = true
labels = { made-by = "hourly" }

[keep]
last = 3
hourly = 24
daily = "all"
within = "36h"
within-weekly = "2mo"
max-age = "1y"
min-keep = 2

[hooks.before]
program = ["/usr/local/bin/freeze", "--all"]
timeout = "30s"
environment = { MODE = "snapshot" }
on-failure = "go-on"

[hooks.after]
program = ["/usr/local/bin/thaw"]

[notify]
webhook = "https://example.com/hook"
command = ["/usr/local/bin/page", "me"]
on = ["failure", "needs-attention"]
"#;

const LEAST: &str = "name = \"x\"\nschedule = \"daily\"\ndomains = [\"*\"]\n";

fn problems(text: &str) -> String {
    Policy::from_toml(text).map(|policy| format!("{policy:?}")).unwrap_err().to_string()
}

/// The least file with something added.
fn with(more: &str) -> String {
    problems(&format!("{LEAST}{more}"))
}

#[test]
fn every_key_is_read() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&Policy::from_toml(FULL).unwrap()).unwrap());
}

#[test]
fn a_policy_reads_back_from_its_event() {
    for text in [FULL, LEAST] {
        let policy = Policy::from_toml(text).unwrap();
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    }
}

#[test]
fn the_example_of_the_documentation_is_a_policy() {
    let example: String = include_str!("mod.rs")
        .lines()
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.trim_start_matches("//!").trim_start()))
        .collect();
    let policy = Policy::from_toml(&example).unwrap();
    assert_eq!(policy.keep.rules().len(), 4);
}

#[test]
fn what_is_left_out_has_a_default() {
    let policy = Policy::from_toml(LEAST).unwrap();
    assert_eq!(policy.timezone.to_string(), "UTC");
    assert_eq!((policy.catch_up, policy.window, policy.jitter), (CatchUp::Once, None, None));
    assert_eq!((policy.max_depth.get(), policy.suspend_after.get()), (64, 5));
    assert_eq!(policy.snapshot.name.to_string(), "{policy}-{time}");
    assert!(policy.keep.keeps_all());
    assert_eq!(policy.notify, None);
}

#[test]
fn what_is_wrong_is_told_with_its_place_and_what_is_allowed() {
    let texts = [
        problems(""),
        problems("name = \"x\nschedule = 3"),
        with("dommains = []"),
        with("[keep]\nhourley = 3"),
        with("[keep]\nfortnightly = 3"),
        with("[kepe]\nlast = 3"),
        with("[snapshot]\nname = \"{polciy}-{time}\"\nmemory = \"no\""),
        with("[snapshot]\nname = \"{policy}\""),
        with("timezone = \"Europe/Wien\"\njitter = 5\nwindow = \"soon\"\ncatch-up = \"twice\""),
        with("max-depth = 0\nsuspend-after = -1\ndeletes-per-run = 1.5"),
        with("[keep]\nlast = 0\ndaily = -1\nweekly = \"many\"\nwithin = \"6m\"\nmax-age = \"0d\""),
        with("[hooks]\nbefore = { program = [\"freeze\"] }\nafter = { timeout = \"1m\" }"),
        with("[hooks.after]\nprogram = [\"/x\"]\non-failure = \"abort\""),
        with("[notify]\non = [\"success\"]"),
        with("[notify]\nwebhook = \"https://user:secret@example.com/\""),
        problems("name = \"a/b\"\nschedule = \"hourli\"\nlabels = { \"a b\" = \"x\" }"),
        problems("name = \"x\"\nschedule = \"every 6mo\"\ndomains = [\"[a\"]"),
        problems("name = \"x\"\nschedule = \"0 25 * * *\"\ndomains = []"),
    ];
    insta::assert_snapshot!(texts.join("\n\n"));
}

#[test]
fn no_policy_can_delete_everything() {
    assert!(with("[keep]\nlast = 1\nmin-keep = 0").contains("may not delete everything"));
    assert!(with("[keep]").contains("leave it out to keep everything"));
    assert!(with("[keep]\nmin-keep = 3").contains("leave it out to keep everything"));
    let policy = Policy::from_toml(&format!("{LEAST}[keep]\nmax-age = \"1s\"")).unwrap();
    assert_eq!(policy.keep.min_keep(), NonZeroU32::MIN);
    assert!(policy.keep.rules().iter().all(|rule| rule.per == Per::Snapshot));
}

#[test]
fn limits_hold() {
    assert_eq!(
        Policy::from_toml(&"#".repeat(FILE_BYTES_MAX + 1)),
        Err(FileError::TooLarge(FILE_BYTES_MAX + 1))
    );
    let many: Vec<String> = (0..65).map(|n| format!("\"d{n}\"")).collect();
    let text = format!("name = \"x\"\nschedule = \"daily\"\ndomains = [{}]", many.join(","));
    assert!(problems(&text).contains("at most 64 items"));
    assert!(with(&format!("[snapshot]\ndescription = \"{}\"", "x".repeat(4_097))).contains("at most 4096"));
}

#[test]
fn machines_are_selected_by_any_glob_and_all_labels() {
    let policy = Policy::from_toml(FULL).unwrap();
    let name = |name: &str| DomainName::new(name).unwrap();
    let labels = |tier: &str| [(LabelKey::new("tier").unwrap(), tier.to_owned())].into();
    assert!(policy.select.matches(&name("web-1"), &labels("prod")));
    assert!(policy.select.matches(&name("db7"), &labels("prod")));
    assert!(!policy.select.matches(&name("db77"), &labels("prod")));
    assert!(!policy.select.matches(&name("web-1"), &labels("test")));
    assert!(!policy.select.matches(&name("mail"), &labels("prod")));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,300}", at in any::<prop::sample::Index>()) {
        let _ = Policy::from_toml(&text);
        // Also something that is nearly a policy.
        let place = (0..=at.index(FULL.len())).rev().find(|at| FULL.is_char_boundary(*at)).unwrap_or(0);
        let mut broken = FULL.to_owned();
        broken.insert_str(place, &text.chars().take(3).collect::<String>());
        if let Err(FileError::Problems(problems)) = Policy::from_toml(&broken) {
            prop_assert!(!problems.is_empty());
            prop_assert!(problems.iter().all(|problem| problem.line >= 1 && problem.column >= 1));
        }
    }
}
