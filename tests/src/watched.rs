//! A machine whose guest and whose QEMU are listened to as they speak: both connect to sockets of this process, also
//! those of a QEMU that takes the place of the one before.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::images::text;
use crate::running::counters_in;

/// How long anything may take that is waited for; a guest with much memory in use boots slowly on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// A line that the guest printed.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// When it was read here.
    pub at: Instant,
    /// Its counter in memory.
    pub memory: u32,
}

/// What was heard.
#[derive(Debug, Default)]
struct Heard {
    lines: Vec<Line>,
    /// QMP: when it was read here, and what.
    messages: Vec<(Instant, Value)>,
    monitor: Option<UnixStream>,
}

/// The sockets, and all that was heard at them.
#[derive(Debug)]
pub struct Watched {
    serial: PathBuf,
    monitor: PathBuf,
    heard: Arc<(Mutex<Heard>, Condvar)>,
    next_id: AtomicU64,
}

fn lock(heard: &(Mutex<Heard>, Condvar)) -> MutexGuard<'_, Heard> {
    heard.0.lock().expect("nobody panicked with it")
}

impl Watched {
    /// Listens at two sockets in `folder`.
    ///
    /// # Panics
    /// They cannot be made.
    pub fn new(folder: &Path) -> Self {
        let heard = Arc::<(Mutex<Heard>, Condvar)>::default();
        let [serial, monitor] = ["guest", "monitor"].map(|name| folder.join(name));
        accept(&serial, &heard, hear_guest);
        accept(&monitor, &heard, hear_monitor);
        Self { serial, monitor, heard, next_id: AtomicU64::new(0) }
    }

    /// Where the guest's serial line has to be connected to.
    pub fn serial(&self) -> &Path {
        &self.serial
    }

    /// Where a monitor has to be connected to, by `-qmp`.
    pub fn monitor(&self) -> String {
        format!("unix:{}", text(&self.monitor))
    }

    /// Executes a QMP command in the QEMU that came last.
    ///
    /// # Panics
    /// It is refused.
    pub fn ask(&self, command: &str, arguments: Value) -> Value {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string() + "\n";
        self.until("a monitor", |heard| heard.monitor.as_ref().map(|_| ()));
        lock(&self.heard)
            .monitor
            .as_mut()
            .map(|monitor| monitor.write_all(line.as_bytes()))
            .expect("a monitor")
            .expect("QEMU reads");
        let answer = self.until(command, |heard| {
            heard.messages.iter().rev().find(|(_, said)| said["id"] == id).map(|(_, said)| said.clone())
        });
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// Waits until something was heard.
    fn until<Found>(&self, what: &str, is_heard: impl Fn(&Heard) -> Option<Found>) -> Found {
        let until = Instant::now() + PATIENCE;
        let mut heard = lock(&self.heard);
        loop {
            if let Some(found) = is_heard(&heard) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "after {PATIENCE:?} there is no {what}");
            heard = self.heard.1.wait_timeout(heard, left).expect("nobody panicked with it").0;
        }
    }

    /// Waits until the guest has printed so many more lines; the last of them.
    pub fn more_lines(&self, count: usize) -> Line {
        let before = lock(&self.heard).lines.len();
        self.until("more of the guest", |heard| heard.lines.get(before + count - 1).copied())
    }

    /// Waits for the first line since then that is of an earlier moment of the guest's than `memory`.
    pub fn line_before(&self, since: Instant, memory: u32) -> Line {
        self.until("guest that was set back", |heard| {
            let back = |line: &&Line| line.at >= since && line.memory < memory;
            // The newest are asked first: the guest may have been there before.
            heard.lines.iter().rev().take_while(|line| line.at >= since).filter(back).last().copied()
        })
    }

    /// The longest time between two lines of the guest's from then on, the one that began before included.
    pub fn longest_gap_since(&self, since: Instant) -> Duration {
        let heard = lock(&self.heard);
        let from = heard.lines.partition_point(|line| line.at < since).saturating_sub(1);
        let lines = &heard.lines[from..];
        lines.windows(2).map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default()
    }

    /// How long the guest was stopped since then, by QEMU's own account: from each `STOP` to the `RESUME` behind it.
    pub fn stopped_since(&self, since: Instant) -> Duration {
        let heard = lock(&self.heard);
        let (mut stopped, mut began) = (Duration::ZERO, None);
        for (_, said) in heard.messages.iter().filter(|(at, _)| *at >= since) {
            match said["event"].as_str() {
                Some("STOP") => began = began.or_else(|| time_of(said)),
                Some("RESUME") => {
                    if let (Some(began), Some(ended)) = (began.take(), time_of(said)) {
                        stopped += ended.saturating_sub(began);
                    }
                }
                _ => {}
            }
        }
        stopped
    }
}

fn time_of(event: &Value) -> Option<Duration> {
    let part = |name: &str| event["timestamp"][name].as_u64();
    Some(Duration::from_secs(part("seconds")?) + Duration::from_micros(part("microseconds")?))
}

type Shared = Arc<(Mutex<Heard>, Condvar)>;

fn accept(socket: &Path, heard: &Shared, hear: fn(UnixStream, &Shared)) {
    let listener = UnixListener::bind(socket).expect("a socket");
    let heard = heard.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let heard = heard.clone();
            std::thread::spawn(move || hear(stream, &heard));
        }
    });
}

fn hear_guest(mut stream: UnixStream, heard: &Shared) {
    let mut partial = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut chunk) {
        let at = Instant::now();
        partial.extend_from_slice(&chunk[..count]);
        while let Some(end) = partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = partial.drain(..=end).collect();
            if let Some((memory, _)) = counters_in(String::from_utf8_lossy(&line).trim()) {
                lock(heard).lines.push(Line { at, memory });
                heard.1.notify_all();
            }
        }
    }
}

fn hear_monitor(mut stream: UnixStream, heard: &Shared) {
    let reader = BufReader::new(stream.try_clone().expect("another handle"));
    for line in reader.lines() {
        let Ok(said) = line.map(|line| serde_json::from_str::<Value>(&line).expect("JSON")) else { return };
        if said.get("QMP").is_some() {
            writeln!(stream, "{}", json!({ "execute": "qmp_capabilities" })).expect("QEMU reads");
            lock(heard).monitor = Some(stream.try_clone().expect("another handle"));
        }
        lock(heard).messages.push((Instant::now(), said));
        heard.1.notify_all();
    }
}
