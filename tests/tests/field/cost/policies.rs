//! Policies: what a look, a request and a start cost once much has happened.

use std::process::Stdio;

use jiff::{SignedDuration, Timestamp};
use snaptree_engine::event::{Actor, Event, PolicyFired, PolicyRequest, PolicyRun, RunPart};
use snaptree_engine::log::{Append, EventFilter, EventLog, NewEvent};
use snaptree_engine::{DomainId, DomainName, PolicyName, StreamId};
use snaptree_policies::runner::{Book, Scheduler, told};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::fleet::{Fleet, forge, origin, requester};
use snaptree_tests::program::Program;
use uuid::Uuid;

const HOURLY: &str = "name = \"p\"\ndomains = [\"*\"]\nschedule = \"every 1h\"\n[keep]\nlast = 2\n";

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

fn policy() -> StreamId {
    StreamId::Policy(PolicyName::new("p").expect("a name"))
}

/// A run of the policy in that hour on so many domains that are not registered any more.
fn fired(hour: i64, domains: u128) -> NewEvent {
    let request = || PolicyRequest {
        snapshot: format!("p-{hour}"),
        operation: None,
        refused: None,
        reasons: Vec::new(),
    };
    let run = |number| PolicyRun {
        domain: DomainId::from_uuid(Uuid::from_u128(number)),
        name: DomainName::new(format!("gone-{number}")).expect("a name"),
        requests: vec![request()],
    };
    let event = PolicyFired {
        uptime: None,
        planned: at("2025-01-01T00:00:00Z") + SignedDuration::from_hours(hour),
        part: RunPart::Snapshots,
        asked_by: None,
        domains: (0..domains).map(run).collect(),
    };
    NewEvent { stream: policy(), event: event.into(), operation: None, cause: None, key: None }
}

async fn append(fleet: &Fleet, events: Vec<NewEvent>) {
    let requester = requester();
    let append = Append {
        expect: Vec::new(),
        actor: Actor::Policy(PolicyName::new("p").expect("a name")),
        origin: requester.origin,
        at: at("2025-12-31T00:00:00Z"),
        events,
    };
    fleet.log.append(append).await.expect("appended");
}

/// A policy with half a year of hourly runs behind it.
async fn after_half_a_year(domains: u128) -> Fleet {
    let fleet = Fleet::new(2, "2025-12-31T00:00:30Z").await;
    fleet.set(HOURLY).await;
    append(&fleet, (0..4_000).map(|hour| fired(hour, domains)).collect()).await;
    fleet
}

#[tokio::test]
async fn c1_planning_and_a_start_read_what_changed_and_not_what_ever_happened() {
    let fleet = after_half_a_year(3).await;
    let first = Book::read(&fleet.engine()).await.expect("read");
    assert!(fleet.log.read_since() >= 4_000, "once, there is no other way");
    // A start.
    let again = Book::read(&fleet.engine()).await.expect("read");
    let read = fleet.log.read_since();
    assert!(read < 400, "{read} events were read from 4,001");
    assert_eq!(first.get(&name()), again.get(&name()));
    // A look, when nothing happened and when little did.
    let engine = fleet.engine();
    let mut scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
    scheduler.tick().await.expect("a look");
    fleet.log.read_since();
    scheduler.tick().await.expect("a look");
    let read = fleet.log.read_since();
    // The installation's own events are few: hosts, and leaps of the clock.
    assert!(read <= 1, "{read} events were read in a look at nothing new");
    append(&fleet, vec![fired(4_000, 3)]).await;
    scheduler.tick().await.expect("a look");
    let read = fleet.log.read_since();
    assert!(read < 64, "{read} events were read for one that is new");
}

fn name() -> PolicyName {
    PolicyName::new("p").expect("a name")
}

#[tokio::test]
async fn c1_what_is_told_of_runs_is_read_from_their_end() {
    let fleet = after_half_a_year(3).await;
    let book = Book::read(&fleet.engine()).await.expect("read");
    fleet.log.read_since();
    let state = book.get(&name()).expect("the policy");
    let last = told(&fleet.engine(), state, 5).await.expect("the log");
    let read = fleet.log.read_since();
    assert!(read <= 256, "{read} events were read to tell of 5 runs");
    assert_eq!(last.len(), 5);
    let all = told(&fleet.engine(), state, usize::MAX).await.expect("the log");
    assert_eq!(all.len(), 12_000, "all of them are there to be told of");
    assert_eq!(all[..5], last[..]);
}

#[tokio::test]
async fn c_checkpoints_can_be_dropped_and_those_of_another_program_are() {
    let fleet = after_half_a_year(2).await;
    let kept = Book::read(&fleet.engine()).await.expect("read");
    for forged in [
        "DELETE FROM checkpoints",
        "UPDATE checkpoints SET projector = 999",
        "UPDATE checkpoints SET version = version - 1",
        "UPDATE checkpoints SET state = 'nothing'",
        "DROP TABLE checkpoints",
    ] {
        fleet.forge(forged);
        fleet.log.read_since();
        let book = Book::read(&fleet.engine()).await.expect("read");
        assert!(fleet.log.read_since() >= 4_000, "{forged}: all was read again");
        assert_eq!(kept.get(&name()), book.get(&name()), "{forged}");
    }
}

#[tokio::test]
async fn c_many_domains_take_no_run_of_any_other_and_years_of_runs_take_no_room() {
    let domains = 500;
    let fleet = Fleet::new(0, "2025-12-31T00:00:30Z").await;
    fleet.set(HOURLY).await;
    append(&fleet, (0..300).map(|hour| fired(hour, domains)).collect()).await;
    let book = Book::read(&fleet.engine()).await.expect("read");
    let state = book.get(&name()).expect("the policy");
    assert_eq!(state.last_runs().count(), 500, "150,000 runs, and the last of each domain is known");
    assert!(state.histories.values().all(|history| history.len() < 128));
    let checkpoint = fleet.log.checkpoint(&policy(), snaptree_policies::runner::PROJECTOR, u64::MAX).await;
    let bytes = checkpoint.expect("the log").expect("there is one").state.len();
    assert!(bytes < 1 << 20, "a checkpoint of {bytes} bytes");
}

#[tokio::test]
async fn c_a_clock_that_goes_back_beyond_what_is_kept_takes_no_snapshot_twice() {
    let fleet = Fleet::new(1, "2026-01-01T00:00:30Z").await;
    fleet.set(HOURLY).await;
    let begin = at("2026-01-01T00:00:30Z");
    let engine = fleet.engine();
    let mut scheduler = Scheduler::new(engine.clone(), origin()).await.expect("a scheduler");
    for hour in 1..=200 {
        fleet.go_to(begin + SignedDuration::from_hours(hour));
        fleet.live(&engine, &mut scheduler).await;
    }
    let asked = requests(&fleet).await;
    for back in [1, 63, 64, 65, 66, 120, 121, 199] {
        fleet.go_to(begin + SignedDuration::from_hours(200 - back));
        fleet.life().await;
    }
    assert_eq!(requests(&fleet).await, asked, "each instant was asked for once");
}

async fn requests(fleet: &Fleet) -> usize {
    let filter = EventFilter { kind: Some("Snapshot.CreateRequested".to_owned()), ..EventFilter::default() };
    let events = fleet.log.read(0, &filter, usize::MAX >> 1).await.expect("the log");
    events.iter().filter(|envelope| matches!(envelope.event, Event::SnapshotCreateRequested(_))).count()
}

#[test]
fn c1_two_policies_at_once_over_the_same_domains_both_end_with_all_snapshots() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    let daemon = {
        program.json(0, &["domain", "add", "vm-0", "--driver", "sim"]);
        Daemon::start(&program)
    };
    let domains = 40;
    for number in 1..domains {
        program.json(0, &["domain", "add", &format!("vm-{number}"), "--driver", "sim"]);
    }
    for name in ["daily", "hourly"] {
        let text =
            format!("name = \"{name}\"\ndomains = [\"*\"]\nschedule = \"2190-01-01\"\n[keep]\nlast = 1\n");
        let file = folder.path().join(format!("{name}.toml"));
        std::fs::write(&file, text).expect("a file");
        program.json(0, &["policy", "set", file.to_str().expect("a path")]);
    }
    for round in 1..=2 {
        let run = |name| {
            let mut command = program.command(&["policy", "run", name, "--json"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
        };
        // Each policy twice at once: what one has asked for, the other does not ask for again, nor fail of it.
        let runs: Vec<_> = ["daily", "hourly", "daily", "hourly"].into_iter().map(run).collect();
        for run in runs {
            let ended = run.wait_with_output().expect("it ends");
            let said = String::from_utf8_lossy(&ended.stderr).into_owned();
            let said = format!("{said}{}", String::from_utf8_lossy(&ended.stdout));
            assert_eq!(ended.status.code(), Some(0), "round {round}: {said}");
            let view: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("JSON");
            let runs = view["runs"].as_array().expect("runs");
            assert_eq!(runs.len(), domains, "round {round}");
            assert!(runs.iter().all(|run| run["outcome"] == "succeeded"), "round {round}: {view}");
        }
    }
    daemon.end();
    program.json(0, &["audit", "verify"]);
    // What both keep is there, and nothing else.
    for number in [0, domains - 1] {
        let list = program.json(0, &["list", &format!("vm-{number}")]);
        assert_eq!(list["snapshots"].as_array().expect("snapshots").len(), 2, "{list}");
    }
    forge(&program.state, "DELETE FROM checkpoints");
    program.json(0, &["policy", "next"]);
}
