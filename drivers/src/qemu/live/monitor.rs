//! What is said to a running QEMU, one method per act, and what its answers mean for a step.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::operation::Code;

use super::graph::{Graph, Node};
use super::seen::{Chain, LiveMachine, LiveNode, Run};
use crate::process::Process;
use crate::qemu::qmp::{Limits, Qmp, QmpError, Version};

/// Longest that QEMU's main loop may be busy with one of our commands: it flushes and reopens images in some of them.
const LONG_REPLY_MS: u64 = 60_000;
/// How often a job is looked at while nothing is heard of it.
const JOB_LOOK_MS: u64 = 20;
/// The first version that takes no disks behind an incoming migration until the guest goes on or it is told to.
const WAITS_WITHOUT_DISKS_SINCE: Version = (10, 0);
/// For what it answers at once.
const REPLY_MS: u64 = 10_000;

/// A connection to the machine's QEMU.
pub(in crate::qemu) struct Monitor {
    qmp: Qmp,
    socket: PathBuf,
}

/// Where a block job stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qemu) struct Job {
    /// QEMU's word: `running`, `ready`, `pending`, `concluded`, ...
    pub(in crate::qemu) status: String,
    /// Why it failed, once it is concluded.
    pub(in crate::qemu) error: Option<String>,
    /// How far it is, in units of its own.
    pub(in crate::qemu) done: u64,
    /// Of how much.
    pub(in crate::qemu) total: u64,
}

impl Monitor {
    /// Connects.
    pub(in crate::qemu) async fn connect(socket: &Path) -> Result<Self, QmpError> {
        let qmp = Qmp::connect(socket, Limits::default()).await?;
        Ok(Self { qmp, socket: socket.to_path_buf() })
    }

    pub(super) async fn ask(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, DriverError> {
        self.qmp.execute(command, arguments).await.map_err(failed)
    }

    pub(super) async fn act(
        &mut self,
        command: &'static str,
        arguments: Value,
    ) -> Result<Value, DriverError> {
        tracing::debug!(command, %arguments, "qmp");
        self.qmp.execute_within(command, arguments, LONG_REPLY_MS).await.map_err(failed)
    }

    /// Gives QEMU an open file with a command.
    pub(super) async fn give(
        &mut self,
        command: &'static str,
        arguments: Value,
        file: &fs::File,
    ) -> Result<(), DriverError> {
        self.qmp.execute_with(command, arguments, file).await.map(|_| ()).map_err(failed)
    }

    /// QEMU's version.
    pub(super) const fn version(&self) -> Version {
        self.qmp.version()
    }

    /// QEMU's process, as far as the kernel knows who listens.
    pub(in crate::qemu) fn process(&self) -> Option<Process> {
        Process::of(self.qmp.peer()?)
    }

    /// QEMU's word for what the guest does.
    pub(in crate::qemu) async fn status(&mut self) -> Result<String, DriverError> {
        let answer = self.ask("query-status", Value::Null).await?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Whether the guest runs.
    pub(in crate::qemu) async fn run_state(&mut self) -> Result<Run, DriverError> {
        Ok(match self.status().await?.as_str() {
            "running" => Run::Running,
            "paused" | "prelaunch" | "debug" | "suspended" => Run::Paused,
            _ => Run::Stuck,
        })
    }

    /// Whether the guest is stopped and can simply go on, also behind a migration of Snaptree's that is over.
    pub(in crate::qemu) async fn waits(&mut self) -> Result<bool, DriverError> {
        let status = self.status().await?;
        Ok(matches!(status.as_str(), "paused" | "prelaunch" | "debug" | "suspended" | "postmigrate"))
    }

    /// What is open.
    pub(in crate::qemu) async fn graph(&mut self) -> Result<Graph, DriverError> {
        let named = self.ask("query-named-block-nodes", json!({ "flat": true })).await?;
        let edges = self.ask("x-debug-query-block-graph", Value::Null).await?;
        Graph::parse(&named, &edges).map_err(|reason| {
            DriverError::permanent(
                Code::Invalid,
                format!("QEMU's answer about its disks cannot be read: {reason}"),
            )
        })
    }

    /// What is open for each device.
    pub(in crate::qemu) async fn chains(&mut self) -> Result<Vec<Chain>, DriverError> {
        let graph = self.graph().await?;
        let chains = graph.devices.iter().map(|device| Chain {
            nodes: device.chain.iter().filter_map(|name| graph.node(name)).map(LiveNode::of).collect(),
            device: device.name.clone(),
            access: device.access,
            medium: device.medium.clone(),
            jobs: device.jobs.clone(),
        });
        Ok(chains.collect())
    }

    /// The machine as planning and recovery see it.
    pub(in crate::qemu) async fn look(&mut self) -> Result<LiveMachine, DriverError> {
        let run = self.run_state().await?;
        let chains = self.chains().await?;
        Ok(LiveMachine {
            qmp: self.socket.clone(),
            run,
            chains,
            jobs: self.jobs().await?.into_iter().map(|(id, _)| id).collect(),
            version: self.version(),
            ram_bytes: self.ram_bytes().await?,
            pid: self.qmp.peer(),
        })
    }

    /// The size of the machine's memory.
    async fn ram_bytes(&mut self) -> Result<u64, DriverError> {
        let answer = self.ask("query-memory-size-summary", Value::Null).await?;
        let bytes = |key: &str| answer.get(key).and_then(Value::as_u64).unwrap_or(0);
        Ok(bytes("base-memory").saturating_add(bytes("plugged-memory")))
    }

    /// Stops the guest; one that is stopped stays so.
    pub(in crate::qemu) async fn stop(&mut self) -> Result<(), DriverError> {
        self.act("stop", Value::Null).await.map(|_| ())
    }

    /// The same, for someone who cannot wait for long.
    pub(in crate::qemu) async fn stop_within(&mut self, wait: Duration) -> Result<(), DriverError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.qmp.execute_within("stop", Value::Null, wait_ms).await.map(|_| ()).map_err(failed)
    }

    /// Lets the guest go on.
    pub(in crate::qemu) async fn cont(&mut self) -> Result<(), DriverError> {
        self.act("cont", Value::Null).await.map(|_| ())
    }

    /// Exchanges what the machine writes on several disks at one instant: (node, overlay).
    pub(in crate::qemu) async fn exchange(&mut self, pairs: &[(String, String)]) -> Result<(), DriverError> {
        let action = |(node, overlay): &(String, String)| json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } });
        let actions: Vec<Value> = pairs.iter().map(action).collect();
        self.act("transaction", json!({ "actions": actions })).await.map(|_| ())
    }

    /// Closes a node; one that is not there is fine.
    pub(in crate::qemu) async fn close(&mut self, node: &str) -> Result<(), DriverError> {
        match self.qmp.execute_within("blockdev-del", json!({ "node-name": node }), LONG_REPLY_MS).await {
            Ok(_) => Ok(()),
            Err(QmpError::Refused { description, .. }) if description.starts_with("Failed to find node") => {
                Ok(())
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Closes every node by which `file` is open and which nothing uses.
    pub(in crate::qemu) async fn close_file(&mut self, file: &Path) -> Result<(), DriverError> {
        self.close_files(|open| open == file).await
    }

    /// Closes every node of such files that nothing else uses, the upper ones of a chain before the lower ones.
    pub(in crate::qemu) async fn close_files(
        &mut self,
        is_such: impl Fn(&Path) -> bool,
    ) -> Result<(), DriverError> {
        let graph = self.graph().await?;
        // QEMU closes by itself what it opened by itself.
        let such =
            |node: &&Node| !node.name.starts_with('#') && !graph.is_attached(node) && is_such(&node.named);
        let mut open: Vec<String> = graph.nodes.iter().filter(such).map(|node| node.name.clone()).collect();
        while !open.is_empty() {
            let before = open.len();
            let mut refused = None;
            for node in std::mem::take(&mut open) {
                match self.close(&node).await {
                    Ok(()) => {}
                    Err(error) if error.class == ErrorClass::Permanent => {
                        refused = Some(error);
                        open.push(node);
                    }
                    Err(error) => return Err(error),
                }
            }
            match refused {
                Some(error) if open.len() == before => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Brings all that QEMU has in mind of an image to its file: the tables of a finished job are among it.
    ///
    /// There is no QMP command for it; the monitor for humans has one, and says nothing when it is done.
    pub(in crate::qemu) async fn flush(&mut self, node: &str) -> Result<(), DriverError> {
        let line = format!("qemu-io {node} \"flush\"");
        let said = self.act("human-monitor-command", json!({ "command-line": line })).await?;
        match said.as_str().map(str::trim) {
            None | Some("") => Ok(()),
            Some(said) => Err(DriverError::unknown(
                Code::Io,
                format!("QEMU could not flush node {node}: {}", said.lines().next().unwrap_or_default()),
            )),
        }
    }

    /// A layer takes all that is between it and `base`, and stands on `base` afterwards.
    pub(in crate::qemu) async fn stream(
        &mut self,
        job: &str,
        node: &str,
        base: (&str, &Path),
        speed_bytes: u64,
    ) -> Result<(), DriverError> {
        let arguments = json!({ "job-id": job, "device": node, "base-node": base.0, "backing-file": base.1,
            "speed": speed_bytes, "auto-finalize": false, "auto-dismiss": false });
        self.act("block-stream", arguments).await.map(|_| ())
    }

    /// What is between `top` and `base` goes down into `base`. With the root for a top the machine writes `base` once
    /// the job is completed.
    pub(in crate::qemu) async fn commit(
        &mut self,
        job: &str,
        root: &str,
        top: Option<&str>,
        base: (&str, &Path),
        speed_bytes: u64,
    ) -> Result<(), DriverError> {
        let mut arguments = json!({ "job-id": job, "device": root, "base-node": base.0, "speed": speed_bytes,
            "auto-finalize": false, "auto-dismiss": false });
        if let Some(top) = top {
            arguments["top-node"] = json!(top);
            arguments["backing-file"] = json!(base.1);
        }
        self.act("block-commit", arguments).await.map(|_| ())
    }

    /// Begins a job on an internal snapshot: `snapshot-save`, `snapshot-load` (both with the node that has the memory) or
    /// `snapshot-delete`. Whether it can be done is said by the job alone, once it is concluded.
    pub(in crate::qemu) async fn snapshot_job(
        &mut self,
        command: &'static str,
        job: &str,
        tag: &str,
        memory: Option<&str>,
        nodes: &[&str],
    ) -> Result<(), DriverError> {
        let mut arguments = json!({ "job-id": job, "tag": tag, "devices": nodes });
        if let Some(memory) = memory {
            arguments["vmstate"] = json!(memory);
        }
        self.act(command, arguments).await.map(|_| ())
    }

    /// Waits for the end of such a job; why it failed, if it did. It is not dismissed.
    pub(in crate::qemu) async fn snapshot_job_ended(
        &mut self,
        id: &str,
        busy: Duration,
    ) -> Result<Result<(), String>, DriverError> {
        loop {
            let wait_ms = REPLY_MS.max(u64::try_from(busy.as_millis()).unwrap_or(u64::MAX));
            let jobs = self.jobs_within(wait_ms).await?;
            let Some((_, job)) = jobs.into_iter().find(|(found, _)| found == id) else {
                return Err(DriverError::unknown(Code::Io, format!("QEMU does not know job {id} any more")));
            };
            if job.status == "concluded" {
                return Ok(job.error.map_or(Ok(()), Err));
            }
            self.pause(JOB_LOOK_MS).await?;
        }
    }

    /// Lets QEMU forget the jobs on snapshots that came to their end.
    pub(in crate::qemu) async fn dismiss_concluded(&mut self) -> Result<(), DriverError> {
        for (id, job) in self.jobs().await? {
            if job.status == "concluded" && id.starts_with("st-") {
                self.tell_job("job-dismiss", &id).await?;
            }
        }
        Ok(())
    }

    /// Every job.
    pub(in crate::qemu) async fn jobs(&mut self) -> Result<Vec<(String, Job)>, DriverError> {
        self.jobs_within(REPLY_MS).await
    }

    /// The same of a QEMU that may be busy for that long: it hears nothing while it writes or reads memory.
    pub(in crate::qemu) async fn jobs_within(
        &mut self,
        wait_ms: u64,
    ) -> Result<Vec<(String, Job)>, DriverError> {
        let answer = self.qmp.execute_within("query-jobs", Value::Null, wait_ms).await.map_err(failed)?;
        let text = |job: &Value, key: &str| job.get(key).and_then(Value::as_str).map(str::to_owned);
        let number = |job: &Value, key: &str| job.get(key).and_then(Value::as_u64).unwrap_or(0);
        let jobs = answer.as_array().into_iter().flatten().filter_map(|job| {
            let seen = Job {
                status: text(job, "status")?,
                error: text(job, "error"),
                done: number(job, "current-progress"),
                total: number(job, "total-progress"),
            };
            Some((text(job, "id")?, seen))
        });
        Ok(jobs.collect())
    }

    /// One job; none if there is none of that id.
    pub(in crate::qemu) async fn job(&mut self, id: &str) -> Result<Option<Job>, DriverError> {
        Ok(self.jobs().await?.into_iter().find(|(found, _)| found == id).map(|(_, job)| job))
    }

    /// A verb for a job: `job-complete`, `job-finalize`, `job-cancel`, `job-dismiss`.
    pub(in crate::qemu) async fn tell_job(
        &mut self,
        verb: &'static str,
        id: &str,
    ) -> Result<(), DriverError> {
        self.act(verb, json!({ "id": id })).await.map(|_| ())
    }

    /// Waits until something happens, or for a moment.
    pub(in crate::qemu) async fn pause(&mut self, wait_ms: u64) -> Result<(), DriverError> {
        self.qmp.event(wait_ms).await.map(|_| ()).map_err(failed)
    }

    /// Waits for QEMU's word that the guest has shut down.
    pub(super) async fn is_guest_off_within(&mut self, wait: Duration) -> Result<bool, DriverError> {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let event = self.qmp.event(wait_ms).await.map_err(failed)?;
        Ok(event.is_some_and(|event| event["event"] == "SHUTDOWN"))
    }

    /// Ends QEMU at once. The connection ends with it.
    pub(in crate::qemu) async fn quit(&mut self) -> Result<(), DriverError> {
        match self.qmp.execute("quit", Value::Null).await {
            Ok(_) | Err(QmpError::Closed { .. }) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    /// Has a QEMU that is stopped behind an incoming migration take its disks, with their locks. Before version 10 it has
    /// them already.
    pub(super) async fn take_disks(&mut self) -> Result<(), DriverError> {
        if self.version() < WAITS_WITHOUT_DISKS_SINCE {
            return Ok(());
        }
        self.act("blockdev-set-active", json!({ "active": true })).await.map(|_| ())
    }

    /// Presses the machine's power button.
    pub(in crate::qemu) async fn power_button(&mut self) -> Result<(), DriverError> {
        self.act("system_powerdown", Value::Null).await.map(|_| ())
    }
}

impl LiveNode {
    fn of(node: &Node) -> Self {
        let file = fs::canonicalize(&node.named).unwrap_or_else(|_| node.named.clone());
        Self {
            node: node.name.clone(),
            named: node.named.clone(),
            file,
            read_only: node.read_only,
            has_bitmaps: node.has_bitmaps,
        }
    }
}

/// The node of the file of an image that Snaptree opened.
pub(super) fn file_node(node: &str) -> String {
    format!("{node}-f")
}

/// What a failed command means for a step: a refusal had no effect, and of all else nobody knows.
pub(in crate::qemu) fn failed(error: QmpError) -> DriverError {
    let (class, code) = match &error {
        QmpError::Refused { .. } => (ErrorClass::Permanent, Code::Invalid),
        QmpError::TimedOut { .. } | QmpError::Silent { .. } => (ErrorClass::Unknown, Code::Timeout),
        _ => (ErrorClass::Unknown, Code::Io),
    };
    DriverError::new(class, code, error.to_string())
}
