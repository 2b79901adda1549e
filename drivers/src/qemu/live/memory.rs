//! The memory of a running machine goes into a file of its own, at the instant at which its disks are exchanged.
//!
//! ```text
//!   prepare   capabilities, bandwidth, the file: opened by Snaptree, and given to QEMU through the QMP socket
//!   stop      (exchange: the disks, see the module exchange; the switch)
//!   migrate   QEMU goes through all memory once, which takes longest; then it saves its devices and protects the memory:
//!             from here on each page is written before it changes
//!   cont      the guest runs on while its memory is written
//!   keep      completed, synced, looked through; then a generation says that the snapshot is there
//! ```
//! A QEMU or a kernel that cannot do that (userfaultfd) writes the memory while the guest is stopped.
//!
//! Where the guest stays stopped until it is told to go on (QEMU 10), `migrate` comes first behind the stop, and the disks
//! are exchanged meanwhile.
//!
//! The file is opened here and not by QEMU: it may run as another user, and needs no shell and no right to the folder.
//! What it writes does not pass through this process, so nothing is lost with it.
//!
//! Architecture Invariant: no guest goes on before QEMU has saved its devices, or has given that up. Else the memory
//! would be of a later instant than the disks.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use snaptree_engine::driver::{DriverError, ErrorClass, StepProgress};
use snaptree_engine::layer::MemoryWay;
use snaptree_engine::operation::{Code, Failure};
use tokio::time::Instant;

use super::monitor::Monitor;
use super::seen::Run;
use crate::qemu::adopt::Work;
use crate::qemu::files::{self, Doing, remove};
use crate::qemu::qmp::Version;
use crate::qemu::step::{Live, TakeMemory};

/// QEMU's name of the file that was given to it, where it takes one by name.
const FILE_NAME: &str = "snaptree-memory";
/// QEMU's number of the set of files in which it is, where it takes one by number.
const FILE_SET: u64 = 0x57ab;
/// The first version that takes a file by number; the other way is deprecated since 9.1.
const FILE_SETS_SINCE: Version = (8, 2);
/// The first version that is known to leave a guest stopped that was stopped before.
const STAYS_STOPPED_SINCE: Version = (10, 0);
/// More than any disk takes: QEMU's own limit is made for networks.
const BANDWIDTH_BYTES: u64 = 1 << 40;
/// Longest that a guest stays stopped until its devices are saved.
const TAKEN_BY: Duration = Duration::from_secs(10);
/// Longest that no memory moves.
const STALLED: Duration = Duration::from_secs(30);
const POLL_MS: u64 = 2;
/// The same where a guest waits. QEMU answers on the thread that the guest needs, so it is not asked without a pause.
const POLL_SOON_MS: u64 = 1;
const POLL_SLOWLY_MS: u64 = 20;
/// Largest description at the end of a stream that is looked for.
const DESCRIPTION_BYTES_MAX: u64 = 4 << 20;
const STREAM_MAGIC: [u8; 8] = *b"QEVM\0\0\0\x03";
/// QEMU's marks (`QEMU_VM_EOF`, `QEMU_VM_VMDESCRIPTION`).
const END_OF_STATE: u8 = 0;
const DESCRIPTION: u8 = 6;

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Migration {
    /// There was none.
    None,
    /// It began, and nothing is saved.
    Setup,
    /// It is under way.
    Active {
        /// Pages that were written.
        pages: u64,
        done_bytes: u64,
        total_bytes: u64,
    },
    /// All is written, or read.
    Completed,
    /// It came to nothing; why, where QEMU says so.
    Failed(String),
}

/// What QEMU was made ready for.
pub(super) struct Ready {
    way: MemoryWay,
    why: Option<String>,
    uri: String,
    told: Told,
}

/// Whether QEMU was told to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// It was, and the disks are exchanged while it goes through the memory.
    Already,
    /// It will be, when the disks are exchanged.
    Later,
}

/// How the memory was taken; part of what the step learnt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in crate::qemu) struct Taken {
    way: MemoryWay,
    /// Why not in the background.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// How long the guest was stopped, by the clock of this process, in microseconds: all of it ...
    paused_us: u64,
    /// ... and of that, until its disks were exchanged,
    exchange_us: u64,
    /// and until its devices were saved (or, where the guest stays stopped, all was written).
    memory_us: u64,
    /// Why there is none.
    #[serde(skip)]
    pub(in crate::qemu) failed: Option<Failure>,
}

impl Monitor {
    /// Where the last migration stands.
    pub(super) async fn migration(&mut self) -> Result<Migration, DriverError> {
        let answer = self.act("query-migrate", Value::Null).await?;
        let number = |key: &str| answer.pointer(&format!("/ram/{key}")).and_then(Value::as_u64).unwrap_or(0);
        Ok(match answer.get("status").and_then(Value::as_str) {
            None | Some("none") => Migration::None,
            Some("setup") => Migration::Setup,
            Some("completed") => Migration::Completed,
            Some("cancelled") => Migration::Failed("it was cancelled".to_owned()),
            Some("failed") => {
                let why = answer.get("error-desc").and_then(Value::as_str);
                Migration::Failed(why.unwrap_or("without saying why").to_owned())
            }
            Some(_) => Migration::Active {
                pages: number("normal").saturating_add(number("duplicate")),
                done_bytes: number("transferred"),
                total_bytes: number("total"),
            },
        })
    }

    /// Makes QEMU ready for a migration, as far as that can be done while the guest runs.
    async fn prepare_memory(&mut self, file: &File) -> Result<Ready, DriverError> {
        let answer = self.ask("query-migrate", Value::Null).await?;
        if let Some(reason) = answer.pointer("/blocked-reasons/0").and_then(Value::as_str) {
            return Err(DriverError::permanent(
                Code::Unsupported,
                format!("QEMU cannot save the machine's memory: {reason}"),
            )
            .hint("leave out --memory, or take what stands in the way from the machine"));
        }
        if matches!(self.migration().await?, Migration::Setup | Migration::Active { .. }) {
            return Err(DriverError::permanent(Code::InUse, "a migration of the machine is under way")
                .hint("wait for it to end, and try again"));
        }
        let (way, why) = match self.set_background(MemoryWay::Background).await {
            Ok(()) => (MemoryWay::Background, None),
            Err(error) if error.class == ErrorClass::Permanent => {
                (MemoryWay::Stopped, Some(error.failure.message))
            }
            Err(error) => return Err(error),
        };
        if way == MemoryWay::Stopped {
            self.set_background(way).await?;
        }
        self.act("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH_BYTES })).await?;
        let uri = self.give_memory(file).await?;
        Ok(Ready { way, why, uri, told: Told::Later })
    }

    async fn set_background(&mut self, way: MemoryWay) -> Result<(), DriverError> {
        let set = json!({ "capability": "background-snapshot", "state": way == MemoryWay::Background });
        self.act("migrate-set-capabilities", json!({ "capabilities": [set] })).await.map(|_| ())
    }

    /// Whether this version lets a guest go on by itself when it has saved its devices.
    pub(super) fn lets_guest_go_on(&self) -> bool {
        self.version() < STAYS_STOPPED_SINCE
    }

    /// How the memory is being taken.
    pub(in crate::qemu) async fn memory_way(&mut self) -> Result<MemoryWay, DriverError> {
        let answer = self.ask("query-migrate-capabilities", Value::Null).await?;
        let on = answer.as_array().into_iter().flatten().any(|capability| {
            capability["capability"] == "background-snapshot" && capability["state"] == true
        });
        Ok(if on { MemoryWay::Background } else { MemoryWay::Stopped })
    }

    /// Hands over an open file; how a migration calls it.
    pub(super) async fn give_memory(&mut self, file: &File) -> Result<String, DriverError> {
        self.take_memory_back().await?;
        if self.version() < FILE_SETS_SINCE {
            self.give("getfd", json!({ "fdname": FILE_NAME }), file).await?;
            return Ok(format!("fd:{FILE_NAME}"));
        }
        self.give("add-fd", json!({ "fdset-id": FILE_SET }), file).await?;
        Ok(format!("file:/dev/fdset/{FILE_SET}"))
    }

    /// Has QEMU close a file that was given to it and is not in use.
    pub(super) async fn take_memory_back(&mut self) -> Result<(), DriverError> {
        let closed = if self.version() < FILE_SETS_SINCE {
            self.act("closefd", json!({ "fdname": FILE_NAME })).await
        } else {
            self.act("remove-fd", json!({ "fdset-id": FILE_SET })).await
        };
        match closed {
            // There was none.
            Err(error) if error.class == ErrorClass::Permanent => Ok(()),
            closed => closed.map(|_| ()),
        }
    }

    /// Returns once the guest may go on: QEMU has saved its devices, or will not.
    pub(super) async fn until_taken(
        &mut self,
        work: Work<'_>,
        way: MemoryWay,
    ) -> Result<Option<Failure>, DriverError> {
        let mut moved = (0, Instant::now());
        loop {
            let (late, done) = match self.migration().await? {
                Migration::Active { pages: 1.., .. } if way == MemoryWay::Background => return Ok(None),
                Migration::Completed => return Ok(None),
                Migration::None => return Ok(Some(never_begun())),
                Migration::Failed(why) => return Ok(Some(not_written(&why))),
                Migration::Setup => (TAKEN_BY, 0),
                Migration::Active { done_bytes, total_bytes, .. } => {
                    let progress = StepProgress::Bytes { done: done_bytes, total: total_bytes };
                    work.context.progress.step_progress(progress);
                    (if way == MemoryWay::Background { TAKEN_BY } else { STALLED }, done_bytes)
                }
            };
            if done > moved.0 {
                moved = (done, Instant::now());
            }
            if moved.1.elapsed() > late {
                return self.give_memory_up("QEMU had not saved it in time").await.map(Some);
            }
            // Where QEMU lets the guest go on by itself, it says so.
            self.pause(POLL_SOON_MS).await?;
        }
    }

    /// Waits until all memory is written; why it is not, if it comes to nothing.
    pub(in crate::qemu) async fn until_written(
        &mut self,
        work: Work<'_>,
    ) -> Result<Option<Failure>, DriverError> {
        let mut moved = (0, Instant::now());
        loop {
            match self.migration().await? {
                Migration::Completed => return Ok(None),
                Migration::None => return Ok(Some(never_begun())),
                Migration::Failed(why) => return Ok(Some(not_written(&why))),
                Migration::Setup => {}
                Migration::Active { done_bytes, total_bytes, .. } => {
                    let progress = StepProgress::Bytes { done: done_bytes, total: total_bytes };
                    work.context.progress.step_progress(progress);
                    if done_bytes > moved.0 {
                        moved = (done_bytes, Instant::now());
                    }
                }
            }
            if moved.1.elapsed() > STALLED {
                return self.give_memory_up("no more of it was written").await.map(Some);
            }
            self.pause(POLL_SLOWLY_MS).await?;
        }
    }

    /// Ends a migration that does not go on.
    async fn give_memory_up(&mut self, why: &str) -> Result<Failure, DriverError> {
        tracing::warn!(why, "the memory is given up");
        self.act("migrate_cancel", Value::Null).await?;
        let until = Instant::now() + TAKEN_BY;
        while matches!(self.migration().await?, Migration::Setup | Migration::Active { .. }) {
            if Instant::now() > until {
                tracing::warn!("QEMU does not let go of it");
                break;
            }
            self.pause(POLL_MS).await?;
        }
        Ok(not_written(why))
    }

    /// Leaves QEMU as others expect it, also where it was cut off in the middle.
    pub(in crate::qemu) async fn end_memory(&mut self) -> Result<(), DriverError> {
        if matches!(self.migration().await?, Migration::Setup | Migration::Active { .. }) {
            self.give_memory_up("nobody waits for it any more").await?;
        }
        self.set_background(MemoryWay::Stopped).await?;
        self.take_memory_back().await
    }
}

fn not_written(why: &str) -> Failure {
    Failure::new(Code::Io, format!("the machine's memory could not be kept: {why}")).hint(
        "the disks were taken without it, and are folded away again; ask for it again, or with --disk-only",
    )
}

fn never_begun() -> Failure {
    not_written("it was cut off before QEMU began to write it")
}

impl TakeMemory {
    /// Makes the file, and QEMU ready for it. The guest runs.
    pub(super) async fn prepare(
        &self,
        work: Work<'_>,
        monitor: &mut Monitor,
        live: Live,
    ) -> Result<Ready, DriverError> {
        // One that is there was begun by this very step: its name carries the operation.
        remove(&self.file)?;
        files::make_private(&self.file)?;
        files::dress(&self.file, &self.like, self.mode)?;
        let file = fs::OpenOptions::new().write(true).open(&self.file).doing("open", &self.file)?;
        let ready = monitor.prepare_memory(&file).await?;
        if live.was != Run::Running && (ready.way == MemoryWay::Stopped || monitor.lets_guest_go_on()) {
            let (major, minor) = monitor.version();
            return Err(DriverError::permanent(
                Code::Unsupported,
                format!("the machine is paused, and QEMU {major}.{minor} would let it go on for its memory"),
            )
            .hint("let it go on and try again, or leave out --memory"));
        }
        work.reached("qemu.memory.prepared");
        Ok(ready)
    }
}

impl Ready {
    /// Has QEMU begin before the disks are exchanged, if the guest, which is stopped, stays so.
    pub(super) async fn begin(&mut self, work: Work<'_>, monitor: &mut Monitor) -> Result<(), DriverError> {
        if self.way == MemoryWay::Background && !monitor.lets_guest_go_on() {
            monitor.act("migrate", json!({ "uri": self.uri })).await?;
            self.told = Told::Already;
            work.reached("qemu.memory.told");
        }
        Ok(())
    }

    /// Has QEMU save the machine, which is stopped since `stopped`. It returns when the guest may go on.
    pub(super) async fn take(
        self,
        work: Work<'_>,
        monitor: &mut Monitor,
        stopped: Instant,
    ) -> Result<Taken, DriverError> {
        let exchanged = Instant::now();
        let told = match self.told {
            Told::Already => Ok(Value::Null),
            Told::Later => monitor.act("migrate", json!({ "uri": self.uri })).await,
        };
        let failed = match told {
            Ok(_) => {
                work.reached("qemu.memory.begun");
                monitor.until_taken(work, self.way).await?
            }
            Err(error) if error.class == ErrorClass::Permanent => Some(not_written(&error.failure.message)),
            Err(error) => return Err(error),
        };
        work.reached("qemu.memory.taken");
        Ok(Taken {
            way: self.way,
            why: self.why,
            paused_us: 0,
            exchange_us: micros(exchanged.duration_since(stopped)),
            memory_us: micros(exchanged.elapsed()),
            failed,
        })
    }
}

impl Taken {
    /// The guest goes on again.
    pub(super) fn resumed(&mut self, stopped: Instant) {
        self.paused_us = micros(stopped.elapsed());
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Looks whether a file is a machine's whole memory: a stream of QEMU's that begins as one and came to its end, which
/// is a description of what is in it (since QEMU 2.3).
pub(in crate::qemu) fn check_stream(path: &Path) -> Result<(), DriverError> {
    let broken = |what: &str| {
        Err(DriverError::permanent(Code::BadImage, format!("memory file {} {what}", path.display())))
    };
    let mut file = files::open_image(path).doing("open", path)?;
    let mut magic = [0; STREAM_MAGIC.len()];
    match file.read_exact(&mut magic) {
        Ok(()) if magic == STREAM_MAGIC => {}
        _ => return broken("does not begin as a machine's state does"),
    }
    let size = file.metadata().doing("look at", path)?.len();
    let tail_bytes = size.min(DESCRIPTION_BYTES_MAX);
    file.seek(SeekFrom::Start(size - tail_bytes)).doing("read", path)?;
    let mut tail = Vec::new();
    file.take(tail_bytes).read_to_end(&mut tail).doing("read", path)?;
    if ends_with_description(&tail) { Ok(()) } else { broken("does not end as a machine's state does") }
}

fn ends_with_description(tail: &[u8]) -> bool {
    let is_end = |window: &[u8], at: usize| {
        let [END_OF_STATE, DESCRIPTION, length @ .., b'{'] = window else { return false };
        let Ok(length) = <[u8; 4]>::try_from(length) else { return false };
        usize::try_from(u32::from_be_bytes(length)).is_ok_and(|length| at + 6 + length == tail.len())
    };
    tail.last() == Some(&b'}') && tail.windows(7).enumerate().any(|(at, window)| is_end(window, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(description: &str) -> Vec<u8> {
        let mut stream =
            [&STREAM_MAGIC[..], &[1, 2, 6, 0, 0, 0, 9, b'{', END_OF_STATE, DESCRIPTION]].concat();
        stream.extend(u32::try_from(description.len()).unwrap().to_be_bytes());
        stream.extend(description.as_bytes());
        stream
    }

    #[test]
    fn a_memory_file_is_whole_only_with_its_beginning_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m");
        let check = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            check_stream(&path).map_err(|error| error.to_string())
        };
        let whole = stream(r#"{"configuration": {}, "devices": []}"#);
        assert_eq!(check(&whole), Ok(()));
        for cut in [0, 4, 8, 17, whole.len() - 1] {
            assert!(check(&whole[..cut]).is_err(), "{cut} bytes of it");
        }
        assert!(check(&whole[1..]).is_err());
        assert!(check(&[whole, vec![b'}']].concat()).is_err(), "something behind its end");
    }
}
