//! Policies, or machines, of which the log has something that this program cannot read.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::Value;
use snaptree_engine::log::{EventFilter, EventLog as _};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::fleet::{Fleet, forge};
use snaptree_tests::program::Program;

fn hourly(name: &str, domains: &str) -> String {
    format!("name = \"{name}\"\n{domains}\nschedule = \"every 1h\"\n[keep]\nlast = 2\n")
}

/// The snapshots that were taken so far, machine by machine.
async fn taken(fleet: &Fleet) -> Vec<usize> {
    let filter = EventFilter { kind: Some("Snapshot.Created".to_owned()), ..EventFilter::default() };
    let created = fleet.log.read(0, &filter, usize::MAX >> 1).await.expect("the log");
    let of = |id| created.iter().filter(|e| e.stream == snaptree_engine::StreamId::Domain(id)).count();
    fleet.domains.iter().map(|id| of(*id)).collect()
}

/// A newer program's schema, no JSON at all, and a kind that nobody knows.
const FORGED: [&str; 3] = ["schema = 99", "data = '{'", "kind = 'Policy.Dreamt'"];

#[tokio::test]
async fn a6_a_policy_that_cannot_be_read_keeps_none_of_the_others_from_running() {
    for forged in FORGED {
        let fleet = Fleet::new(2, "2026-01-01T00:00:30Z").await;
        fleet.set(&hourly("bad", "domains = [\"*\"]")).await;
        fleet.set(&hourly("good", "domains = [\"*\"]")).await;
        fleet.forge(&format!("UPDATE events SET {forged} WHERE stream = 'policy/bad'"));
        fleet.go_to("2026-01-01T01:00:30Z".parse().expect("a time"));
        fleet.life().await;
        assert_eq!(taken(&fleet).await, [1, 1], "{forged}: the good one alone");
        fleet.set(&hourly("bad", "domains = [\"*\"]")).await;
        fleet.go_to("2026-01-01T02:00:30Z".parse().expect("a time"));
        fleet.life().await;
        assert_eq!(taken(&fleet).await, [3, 3], "{forged}: defined anew, it runs again");
    }
}

#[tokio::test]
async fn a6_a_policy_that_becomes_unreadable_under_a_running_scheduler_is_sick_alone() {
    let fleet = Fleet::new(1, "2026-01-01T00:00:30Z").await;
    fleet.set(&hourly("bad", "domains = [\"*\"]")).await;
    fleet.set(&hourly("good", "domains = [\"*\"]")).await;
    let engine = fleet.engine();
    let mut scheduler =
        snaptree_policies::runner::Scheduler::new(engine.clone(), snaptree_tests::fleet::origin())
            .await
            .expect("a scheduler");
    fleet.live(&engine, &mut scheduler).await;
    fleet.set(&hourly("bad", "domains = [\"vm-*\"]")).await;
    fleet.forge("UPDATE events SET schema = 99 WHERE stream = 'policy/bad' AND version = 2");
    fleet.go_to("2026-01-01T01:00:30Z".parse().expect("a time"));
    fleet.live(&engine, &mut scheduler).await;
    assert_eq!(taken(&fleet).await, [1]);
}

#[tokio::test]
async fn a_a_machine_that_cannot_be_read_keeps_no_policy_from_the_others() {
    for domains in ["domains = [\"*\"]", "labels = { all = \"yes\" }"] {
        let fleet = Fleet::new(3, "2026-01-01T00:00:30Z").await;
        fleet.set(&hourly("p", domains)).await;
        fleet.forge(&format!("UPDATE events SET schema = 99 WHERE stream = 'domain/{}'", fleet.domains[1]));
        fleet.go_to("2026-01-01T01:00:30Z".parse().expect("a time"));
        fleet.life().await;
        assert_eq!(taken(&fleet).await, [1, 0, 1], "{domains}");
    }
}

#[test]
fn a6_who_asks_is_told_which_policy_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    for name in ["bad", "good"] {
        let file = folder.path().join(format!("{name}.toml"));
        std::fs::write(&file, hourly(name, "domains = [\"*\"]")).expect("a file");
        program.json(0, &["policy", "set", file.to_str().expect("a path")]);
    }
    forge(&program.state, "UPDATE events SET schema = 99 WHERE stream = 'policy/bad'");
    let check = || {
        let list = program.json(0, &["policy", "list"]);
        let [bad, good] = &list["policies"].as_array().expect("policies")[..] else { panic!("{list}") };
        assert!(bad["error"].as_str().is_some_and(|error| error.contains("schema 99")), "{list}");
        assert_eq!((&bad["next"], &good["error"]), (&Value::Null, &Value::Null), "{list}");
        assert!(good["next"].is_string(), "{list}");
        let next = program.run(&["policy", "next"]);
        assert!(next.stdout.contains("good") && !next.stdout.contains("bad"), "{next:?}");
        assert!(next.stderr.contains("policy 'bad' does not run"), "{next:?}");
        assert_eq!(program.run(&["policy", "run", "bad"]).code, Some(1), "and says why");
        program.json(0, &["policy", "run", "good"]);
    };
    check();
    let daemon = Daemon::start(&program);
    check();
    let mut socket = UnixStream::connect(program.state.join("snaptree.sock")).expect("its socket");
    socket.write_all(b"GET /v1/status HTTP/1.0\r\n\r\n").expect("asked");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let status: Value = serde_json::from_str(body).expect("JSON");
    let sick = status["sick_policies"].as_object().expect("policies");
    assert_eq!(sick.keys().collect::<Vec<_>>(), ["bad"], "{status}");
    // The way out that the messages name.
    let file = folder.path().join("bad.toml");
    program.json(0, &["policy", "set", file.to_str().expect("a path")]);
    assert_eq!(program.json(0, &["policy", "list"])["policies"][0]["error"], Value::Null);
    daemon.end();
}
