//! Long answers: what the daemon holds of them, and that they are whole.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use snaptree_store::{LockWait, Store};
use snaptree_tests::daemon::Daemon;
use snaptree_tests::history::{append, history};
use snaptree_tests::program::Program;

/// Operations that leave no snapshot behind: they make most of the log.
const OPERATIONS: usize = 2_500;

/// A state with a long log.
fn state(folder: &Path) -> Program {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let state = folder.join("state");
    runtime.block_on(async {
        let store = Store::open_writer(&state, LockWait { timeout: Duration::ZERO }).expect("a state");
        append(&store, history("web", 10, OPERATIONS)).await;
    });
    Program::new(state)
}

/// Asks, and leaves the answer to be read.
fn ask(program: &Program, question: &Value) -> UnixStream {
    let mut socket = UnixStream::connect(program.state.join("snaptree.sock")).expect("its socket");
    let body = question.to_string();
    let head = "POST /v1/log HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length:";
    write!(socket, "{head} {}\r\n\r\n{body}", body.len()).expect("asked");
    socket
}

fn answer(mut socket: UnixStream) -> Vec<Value> {
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("answered");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    serde_json::from_str(body).expect("an array, whole")
}

#[test]
fn c2_long_answers_cost_the_daemon_a_few_pages_however_slowly_they_are_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = state(folder.path());
    let daemon = Daemon::start(&program);
    let one = json!({ "ask": "events", "seq": 0, "count": 100_000, "filter": {} });
    let stream = answer(ask(&program, &json!({ "ask": "events", "seq": 1, "count": 1, "filter": {} })));
    let stream = json!({
        "ask": "stream", "stream": stream[0]["stream"], "version": 0, "seq_max": u64::MAX, "count": 100_000,
    });
    let before = daemon.memory_peak_bytes();
    // All of them are asked before any is read.
    let asked = [&one, &one, &one, &stream].map(|question| ask(&program, question));
    let answers = asked.map(answer);
    let grown = daemon.memory_peak_bytes() - before;
    let many = answers[0].len();
    assert!(many > 5 * OPERATIONS, "{many} events");
    for rows in &answers[..3] {
        assert_eq!(rows.len(), many);
        let in_order = rows.iter().enumerate().all(|(place, row)| row["seq"] == json!(place + 1));
        assert!(in_order, "each event once");
    }
    assert_eq!(answers[3].len(), many - 1, "all but the first are of that stream");
    assert!(grown < 32 << 20, "the daemon grew by {} KiB", grown >> 10);
    daemon.end();
}

#[test]
fn c_operations_are_answered_in_pages_the_newest_in_their_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = state(folder.path());
    let daemon = Daemon::start(&program);
    let operations =
        |count: usize| answer(ask(&program, &json!({ "ask": "operations", "filter": {}, "count": count })));
    let all = operations(usize::MAX >> 1);
    assert!(all.len() >= OPERATIONS, "{}", all.len());
    assert!(all.is_sorted_by_key(|row| row["seq"].as_u64()));
    for count in [1, 256, 257, 1_000] {
        assert_eq!(operations(count), all[all.len() - count..], "the newest {count}");
    }
    daemon.end();
}
