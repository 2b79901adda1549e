//! What stands behind the guest agent's socket: a script, or the real agent.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::running::{Witness, wait_until};

/// How a scripted agent takes a freeze.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Freeze {
    /// It freezes, and says so.
    #[default]
    Done,
    /// It freezes, and answers nothing; what comes next it answers.
    Unanswered,
    /// It freezes, and says so after this time.
    Late(Duration),
    /// It freezes, and hangs until it is told to go on.
    Hangs,
    /// It says that it cannot, and has frozen something.
    Fails,
    /// It finds nothing to freeze.
    Nothing,
}

/// What an agent was asked for, and what could be seen then.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The command.
    pub command: String,
    /// Whether the guest ran.
    pub guest_ran: bool,
    /// The snapshots that the layers folder told of.
    pub snapshots: Vec<String>,
}

#[derive(Debug, Default)]
struct State {
    freeze: Freeze,
    is_frozen: bool,
    hangs: bool,
    is_deaf: bool,
    asked: Vec<Asked>,
    witness: Option<Witness>,
}

/// An agent behind a socket.
#[derive(Clone, Debug)]
pub struct Agent {
    /// The socket.
    pub socket: PathBuf,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Agent {
    /// An agent that does as its script says.
    ///
    /// # Panics
    /// The socket cannot be made.
    pub fn scripted(socket: &Path) -> Self {
        Self::new(socket, Self::play)
    }

    /// The real agent at `real`, with what it is asked for written down.
    ///
    /// # Panics
    /// The socket cannot be made.
    pub fn passing_on(socket: &Path, real: &Path) -> Self {
        let real = real.to_owned();
        Self::new(socket, move |agent, client| agent.pass_on(client, &real))
    }

    fn new(socket: &Path, serve: impl Fn(&Self, &UnixStream) + Send + 'static) -> Self {
        let agent = Self { socket: socket.to_owned(), state: Arc::default() };
        let listener = UnixListener::bind(socket).expect("a socket");
        let serving = agent.clone();
        // One client after the other, as behind QEMU's socket.
        thread::spawn(move || listener.incoming().flatten().for_each(|client| serve(&serving, &client)));
        agent
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().expect("nobody panics with it")
    }

    /// Whoever tells what could be seen when it was asked.
    pub fn watch(&self, witness: Witness) {
        self.state().witness = Some(witness);
    }

    /// Nobody looks any more when it is asked, which takes time.
    pub fn unwatch(&self) {
        self.state().witness = None;
    }

    /// From now on it takes a freeze so; what it was asked before is forgotten.
    pub fn takes(&self, freeze: Freeze) {
        let mut state = self.state();
        state.freeze = freeze;
        state.asked.clear();
    }

    /// It answers nothing at all, as where none runs in the guest.
    pub fn is_deaf(&self, is_deaf: bool) {
        self.state().is_deaf = is_deaf;
    }

    /// Somebody else freezes.
    pub fn is_frozen_by_another(&self) {
        self.state().is_frozen = true;
    }

    /// The guest is booted, so nothing is frozen.
    pub fn boots(&self) {
        self.state().is_frozen = false;
    }

    /// One that hangs goes on.
    pub fn goes_on(&self) {
        self.state().hangs = false;
        self.state.1.notify_all();
    }

    /// Whether it holds the file systems frozen.
    pub fn is_frozen(&self) -> bool {
        self.state().is_frozen
    }

    /// What it was asked to freeze and thaw.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    fn note(&self, command: &str) {
        if !matches!(command, "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw") {
            return;
        }
        let witness = self.state().witness.clone();
        let asked = Asked {
            command: command.to_owned(),
            guest_ran: witness.as_ref().is_some_and(Witness::goes_on),
            snapshots: witness.map_or_else(Vec::new, |witness| witness.files().into_keys().collect()),
        };
        self.state().asked.push(asked);
    }

    fn play(&self, client: &UnixStream) {
        let mut to = client;
        for line in lines(client) {
            let Some(heard) = words(&line) else { continue };
            if self.state().is_deaf {
                continue;
            }
            let command = heard["execute"].as_str().unwrap_or_default();
            self.note(command);
            let answer = match command {
                "guest-sync-delimited" => {
                    let id = json!({ "return": heard["arguments"]["id"] });
                    let mut bytes =
                        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"stray\"}}\n\xff".to_vec();
                    bytes.extend(format!("{id}\n").bytes());
                    Some(bytes)
                }
                "guest-fsfreeze-status" => {
                    let word = if self.is_frozen() { "frozen" } else { "thawed" };
                    Some(line_of(&json!({ "return": word })))
                }
                "guest-fsfreeze-freeze" => self.freeze(),
                "guest-fsfreeze-thaw" => {
                    let was = std::mem::replace(&mut self.state().is_frozen, false);
                    Some(line_of(&json!({ "return": u32::from(was) })))
                }
                other => panic!("asked for {other}"),
            };
            // A client that is gone misses it.
            answer.and_then(|answer| to.write_all(&answer).ok());
        }
    }

    fn freeze(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        let freeze = state.freeze;
        state.is_frozen = freeze != Freeze::Nothing;
        match freeze {
            Freeze::Done => Some(line_of(&json!({ "return": 1 }))),
            Freeze::Nothing => Some(line_of(&json!({ "return": 0 }))),
            Freeze::Unanswered => None,
            Freeze::Fails => {
                let desc = "failed to freeze /: Input/output error";
                Some(line_of(&json!({ "error": { "class": "GenericError", "desc": desc } })))
            }
            Freeze::Late(after) => {
                drop(state);
                thread::sleep(after);
                Some(line_of(&json!({ "return": 1 })))
            }
            Freeze::Hangs => {
                state.hangs = true;
                let woken = self.state.1.wait_while(state, |state| state.hangs);
                drop(woken.expect("nobody panics with it"));
                Some(line_of(&json!({ "return": 1 })))
            }
        }
    }

    fn pass_on(&self, client: &UnixStream, real: &Path) {
        let mut upstream = UnixStream::connect(real).expect("the real agent");
        let back = (upstream.try_clone().expect("a stream"), client.try_clone().expect("a stream"));
        let answers = thread::spawn(move || std::io::copy(&mut &back.0, &mut &back.1).is_ok());
        for line in lines(client) {
            if let Some(heard) = words(&line) {
                self.note(heard["execute"].as_str().unwrap_or_default());
            }
            upstream.write_all(&line).expect("the real agent hears");
        }
        upstream.shutdown(Shutdown::Both).ok();
        answers.join().expect("it ends with the connection");
    }
}

fn line_of(answer: &Value) -> Vec<u8> {
    format!("{answer}\n").into_bytes()
}

fn lines(client: &UnixStream) -> impl Iterator<Item = Vec<u8>> {
    let mut reader = BufReader::new(client.try_clone().expect("a stream"));
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        let read = reader.read_until(b'\n', &mut line).unwrap_or(0);
        (read > 0).then_some(line)
    })
}

fn words(line: &[u8]) -> Option<Value> {
    serde_json::from_slice(line.strip_prefix(&[0xff]).unwrap_or(line)).ok()
}

/// The real agent, with one small file system that it can freeze.
#[derive(Debug)]
pub struct RealAgent {
    /// Its socket.
    pub socket: PathBuf,
    child: Child,
}

impl RealAgent {
    /// Starts it, with its socket in `folder`, which is on a tmpfs. None where it cannot be given mounts of its own.
    ///
    /// # Panics
    /// It is not there, or does not come up.
    pub fn start(folder: &Path) -> Option<Self> {
        let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/lab/guest-agent"));
        let mut child = Command::new(script).arg(folder).spawn().expect("a shell script");
        let socket = folder.join("agent");
        let mut ended = None;
        wait_until("the agent listens, or has ended", || {
            ended = child.try_wait().expect("it is ours");
            ended.is_some() || socket.exists()
        });
        match ended {
            None => Some(Self { socket, child }),
            Some(status) if status.code() == Some(3) => None,
            Some(status) => panic!("the agent ended with {status}"),
        }
    }

    /// Its file system, as this machine sees it.
    pub fn file_system(&self) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join("root/frozen")
    }
}

impl Drop for RealAgent {
    fn drop(&mut self) {
        // A frozen file system would outlive its mount; one that is not frozen is an error, which nobody needs to read.
        let thawing = Command::new("fsfreeze").arg("--unfreeze").arg(self.file_system()).output();
        thawing.ok();
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
