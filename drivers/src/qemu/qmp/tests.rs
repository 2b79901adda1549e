//! What comes from the other end is written by these tests; `tests/tests/qemu_machines.rs` has the real one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Limits, Qmp, QmpError};

const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";

/// Short, so that a test of a limit is short.
const LIMITS: Limits =
    Limits { connect_ms: 1_000, greeting_ms: 100, reply_ms: 2_000, line_bytes_max: 4096, events_max: 3 };

/// The other end.
struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Answers the next command as QEMU does.
    async fn answer(&mut self, answer: Value) {
        let id = self.hear().await["id"].take();
        self.say(&format!("{}\r\n", json!({ "return": answer, "id": id }))).await;
    }
}

/// A client that has negotiated, and its peer.
async fn connected() -> (Qmp, Peer) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let (qmp, peer) = tokio::join!(Qmp::connect(&socket, LIMITS), async {
        let mut peer = Peer(BufReader::new(listener.accept().await.unwrap().0));
        // What was meant for the client before.
        peer.say("{\"return\": {\"status\": \"running\"}, \"id\": 1}\r\n").await;
        peer.say(GREETING).await;
        let mut heard = peer.hear().await;
        assert_eq!(heard["execute"], "qmp_capabilities");
        let id = heard["id"].take();
        peer.say("{\"error\": {\"desc\": \"of the client before\"}, \"id\": 1}\r\n").await;
        peer.say(&format!("{}\r\n", json!({ "return": {}, "id": id }))).await;
        peer
    });
    (qmp.unwrap(), peer)
}

/// What connecting says where the other end says this first, and then hears.
async fn refused_after(first: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let (qmp, _peer) = tokio::join!(Qmp::connect(&socket, LIMITS), async {
        let mut peer = Peer(BufReader::new(listener.accept().await.unwrap().0));
        peer.say(first).await;
        peer
    });
    let text = qmp.unwrap_err().to_string();
    text.replace(socket.to_str().unwrap(), "SOCKET")
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_taken_for_the_next_one() {
    let (mut qmp, mut peer) = connected().await;
    let given_up = qmp.execute_within("query-jobs", Value::Null, 10).await;
    assert!(matches!(given_up, Err(QmpError::TimedOut { waited_ms: 10, .. })), "{given_up:?}");
    let late = peer.hear().await["id"].take();
    let (answer, ()) = tokio::join!(qmp.execute("query-status", Value::Null), async {
        let id = peer.hear().await["id"].take();
        peer.say(&format!("{}\n", json!({ "return": "late", "id": late }))).await;
        peer.say(&format!("{}\n", json!({ "return": "in time", "id": id }))).await;
    });
    assert_eq!(answer.unwrap(), "in time");
}

#[tokio::test]
async fn a_line_that_comes_in_pieces_is_kept_when_its_reader_is_gone() {
    let (mut qmp, mut peer) = connected().await;
    peer.say("{\"event\": \"ST").await;
    assert_eq!(qmp.event(10).await.unwrap(), None);
    peer.say("OP\"}\r\n").await;
    assert_eq!(qmp.event(1_000).await.unwrap().unwrap()["event"], "STOP");
}

#[tokio::test]
async fn events_between_are_kept_in_order_and_only_the_newest() {
    let (mut qmp, mut peer) = connected().await;
    let (answer, ()) = tokio::join!(qmp.execute("query-jobs", Value::Null), async {
        for number in 0..5 {
            peer.say(&format!("{{\"event\": \"E{number}\"}}\n")).await;
        }
        peer.answer(json!([])).await;
    });
    assert_eq!(answer.unwrap(), json!([]));
    for expected in ["E2", "E3", "E4"] {
        assert_eq!(qmp.event(1_000).await.unwrap().unwrap()["event"], expected);
    }
    assert_eq!(qmp.event(1).await.unwrap(), None);
}

#[tokio::test]
async fn a_refusal_is_told_in_qemus_words() {
    let (mut qmp, mut peer) = connected().await;
    let (answer, ()) = tokio::join!(qmp.execute("blockdev-del", json!({ "node-name": "a" })), async {
        let heard = peer.hear().await;
        assert_eq!(heard["arguments"]["node-name"], "a");
        let error =
            json!({ "error": { "class": "GenericError", "desc": "Failed to find node" }, "id": heard["id"] });
        peer.say(&format!("{error}\n")).await;
    });
    assert_eq!(answer.unwrap_err().to_string(), "QEMU refuses blockdev-del: Failed to find node");
}

#[tokio::test]
async fn a_line_without_an_end_is_refused_before_it_fills_the_memory() {
    let (mut qmp, mut peer) = connected().await;
    let (answer, ()) = tokio::join!(qmp.execute("query-jobs", Value::Null), async {
        peer.hear().await;
        peer.say(&"x".repeat(2 * LIMITS.line_bytes_max)).await;
    });
    let text = answer.unwrap_err().to_string();
    assert!(text.ends_with("does not speak QMP: a line of more than 4096 bytes"), "{text}");
}

#[tokio::test]
async fn one_that_ends_in_the_middle_is_closed() {
    let (mut qmp, mut peer) = connected().await;
    let (answer, ()) = tokio::join!(qmp.execute("quit", Value::Null), async move {
        peer.hear().await;
        drop(peer);
    });
    assert!(matches!(answer, Err(QmpError::Closed { .. })), "{answer:?}");
}

#[tokio::test]
async fn what_does_not_greet_greets_wrongly_or_is_not_there_is_told_apart() {
    assert_eq!(refused_after("").await, "QEMU at SOCKET does not greet: another client has its monitor");
    assert_eq!(
        refused_after("{\"hello\": 1}\n").await,
        "what answers at SOCKET does not speak QMP: no greeting"
    );
    assert!(
        refused_after("SSH-2.0-OpenSSH\r\n").await.starts_with("what answers at SOCKET does not speak QMP")
    );
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp");
    let absent = Qmp::connect(&socket, LIMITS).await.unwrap_err();
    assert!(matches!(absent, QmpError::Absent { .. }), "{absent}");
    // A socket that was left behind by a killed QEMU refuses.
    drop(UnixListener::bind(&socket).unwrap());
    let absent = Qmp::connect(&socket, LIMITS).await.unwrap_err();
    assert!(matches!(absent, QmpError::Absent { .. }), "{absent}");
}
