//! What comes from the other end is written by these tests; `tests/tests/qemu_agent.rs` has the real one.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Agent, AgentError, Limits, Status};

/// Short, so that a test of a limit is short.
const LIMITS: Limits = Limits {
    connect_ms: 1_000,
    sync_ms: 200,
    reply_ms: 200,
    line_bytes_max: 4096,
    skipped_bytes_max: 32_768,
};
const LONG: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_millis(20);

/// The other end.
struct Peer(BufReader<UnixStream>);

impl Peer {
    async fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = Vec::new();
        self.0.read_until(b'\n', &mut line).await.unwrap();
        let words = line.strip_prefix(&[0xff]).unwrap_or(&line);
        serde_json::from_slice(words).unwrap()
    }

    async fn expect(&mut self, command: &str) {
        assert_eq!(self.hear().await["execute"], command);
    }

    /// Hears a sync and answers as the real agent does: it takes the first byte for an error of its own.
    async fn sync(&mut self) {
        let id = self.hear_sync().await;
        self.answer_sync(&id).await;
    }

    async fn hear_sync(&mut self) -> Value {
        let mut heard = self.hear().await;
        assert_eq!(heard["execute"], "guest-sync-delimited");
        heard["arguments"]["id"].take()
    }

    async fn answer_sync(&mut self, id: &Value) {
        self.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error, stray\"}}\n")
            .await;
        self.say(b"\xff").await;
        self.say(format!("{}\n", json!({ "return": id })).as_bytes()).await;
    }
}

/// A client, and its peer.
async fn connected() -> (Agent, Peer) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent");
    let listener = UnixListener::bind(&socket).unwrap();
    let agent = Agent::connect(&socket, LIMITS).await.unwrap();
    (agent, Peer(BufReader::new(listener.accept().await.unwrap().0)))
}

/// A client and a peer that are in step.
async fn in_step() -> (Agent, Peer) {
    let (mut agent, mut peer) = connected().await;
    let (status, ()) = tokio::join!(agent.status(), async {
        peer.sync().await;
        peer.expect("guest-fsfreeze-status").await;
        peer.say(b"{\"return\": \"thawed\"}\n").await;
    });
    assert_eq!(status.unwrap(), Status::Thawed);
    (agent, peer)
}

#[tokio::test]
async fn a_freeze_and_a_thaw_say_how_many_file_systems_they_met() {
    let (mut agent, mut peer) = in_step().await;
    let (frozen, ()) = tokio::join!(agent.freeze(LONG), async {
        peer.expect("guest-fsfreeze-freeze").await;
        peer.say(b"{\"return\": 3}\n").await;
    });
    assert_eq!(frozen.unwrap(), 3);
    let (thawed, ()) = tokio::join!(agent.thaw(LONG), async {
        peer.sync().await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(b"{\"return\": 2}\n").await;
    });
    assert_eq!(thawed.unwrap(), 2);
}

#[tokio::test]
async fn the_late_answer_to_a_freeze_is_not_taken_for_the_thaw_s() {
    let (mut agent, mut peer) = in_step().await;
    let given_up = agent.freeze(SHORT).await;
    assert!(matches!(given_up, Err(AgentError::TimedOut { waited_ms: 20, .. })), "{given_up:?}");
    peer.expect("guest-fsfreeze-freeze").await;
    let (thawed, ()) = tokio::join!(agent.thaw(LONG), async {
        peer.say(b"{\"return\": 7}\n").await;
        peer.sync().await;
        peer.expect("guest-fsfreeze-thaw").await;
        peer.say(b"{\"return\": 1}\n").await;
    });
    assert_eq!(thawed.unwrap(), 1);
}

#[tokio::test]
async fn an_agent_that_hangs_finds_the_thaw_when_it_goes_on() {
    let (mut agent, mut peer) = in_step().await;
    assert!(agent.freeze(SHORT).await.is_err());
    let thawed = agent.thaw(SHORT).await;
    assert!(matches!(thawed, Err(AgentError::TimedOut { .. })), "{thawed:?}");
    drop(agent);
    peer.expect("guest-fsfreeze-freeze").await;
    peer.hear_sync().await;
    peer.expect("guest-fsfreeze-thaw").await;
}

#[tokio::test]
async fn a_freeze_is_not_sent_to_an_agent_that_does_not_answer() {
    let (mut agent, mut peer) = connected().await;
    let frozen = agent.freeze(LONG).await;
    assert!(matches!(frozen, Err(AgentError::Silent { waited_ms: 200, .. })), "{frozen:?}");
    drop(agent);
    peer.hear_sync().await;
    let mut rest = Vec::new();
    peer.0.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn whatever_an_earlier_client_left_is_skipped() {
    let (mut agent, mut peer) = connected().await;
    let (status, ()) = tokio::join!(agent.status(), async {
        let id = peer.hear_sync().await;
        peer.say(&b"x".repeat(3 * LIMITS.line_bytes_max)).await;
        peer.say(b"\xff{\"return\": 1}\n\xff not JSON\n{\"return\": \"frozen\"}\n").await;
        // What has the number and no delimiter is not its answer, and the end of an answer may be missing.
        peer.say(format!("{}\n", json!({ "return": id })).as_bytes()).await;
        peer.say(b"\xff{\"retu").await;
        peer.answer_sync(&id).await;
        peer.expect("guest-fsfreeze-status").await;
        peer.say(b"\n{\"return\": \"thawed\"}\n").await;
    });
    assert_eq!(status.unwrap(), Status::Thawed);
}

#[tokio::test]
async fn what_never_comes_to_an_end_is_refused_before_it_fills_the_memory() {
    let (mut agent, mut peer) = connected().await;
    let (status, ()) = tokio::join!(agent.status(), async {
        peer.say(&b"x".repeat(2 * LIMITS.skipped_bytes_max)).await;
    });
    let text = status.unwrap_err().to_string();
    assert!(text.ends_with("is no guest agent: more than 32768 bytes, and no answer among them"), "{text}");

    let (mut agent, mut peer) = in_step().await;
    let (frozen, ()) = tokio::join!(agent.freeze(LONG), async {
        peer.say(&b"x".repeat(2 * LIMITS.line_bytes_max)).await;
    });
    let text = frozen.unwrap_err().to_string();
    assert!(text.ends_with("is no guest agent: a line of more than 4096 bytes"), "{text}");
}

#[tokio::test]
async fn an_answer_that_is_none_is_refused() {
    for (answer, problem) in [
        (&b"{\"return\": \"some\"}\n"[..], "its answer to guest-fsfreeze-freeze is no number"),
        (&b"{\"return\": -1}\n"[..], "its answer to guest-fsfreeze-freeze is no number"),
        (&b"{\"event\": \"x\"}\n"[..], "an answer that is neither a return nor an error"),
        (&b"{\n"[..], "EOF while parsing an object at line 2 column 0"),
    ] {
        let (mut agent, mut peer) = in_step().await;
        let (frozen, ()) = tokio::join!(agent.freeze(LONG), peer.say(answer));
        let text = frozen.unwrap_err().to_string();
        assert!(text.ends_with(problem), "{text}");
    }
}

#[tokio::test]
async fn a_refusal_is_told_in_the_agent_s_words_without_what_a_terminal_would_obey() {
    let (mut agent, mut peer) = in_step().await;
    let (frozen, ()) = tokio::join!(agent.freeze(LONG), async {
        let description = format!("no\u{1b}[2J{}", "x".repeat(10_000));
        peer.say(format!("{}\n", json!({ "error": { "desc": description } })).as_bytes()).await;
    });
    let text = frozen.unwrap_err().to_string();
    assert!(text.starts_with("the guest agent refuses guest-fsfreeze-freeze: no\u{fffd}[2Jx"), "{text}");
    assert!(text.chars().count() < 300, "{text}");
}

#[tokio::test]
async fn one_that_ends_in_the_middle_is_closed() {
    let (mut agent, peer) = in_step().await;
    let (frozen, ()) = tokio::join!(agent.freeze(LONG), async move { drop(peer) });
    assert!(matches!(frozen, Err(AgentError::Closed { .. })), "{frozen:?}");
}

#[tokio::test]
async fn a_socket_that_nobody_listens_at_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("agent");
    assert!(matches!(Agent::connect(&socket, LIMITS).await, Err(AgentError::Absent { .. })));
    drop(UnixListener::bind(&socket).unwrap());
    assert!(matches!(Agent::connect(&socket, LIMITS).await, Err(AgentError::Absent { .. })));
}
