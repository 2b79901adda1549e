//! The guest's file systems rest while its disks are exchanged: freeze, stop, exchange, switch, cont, thaw.
//!
//! The agent hears nothing while the machine is stopped, so the freeze comes before and the thaw after. From the moment
//! at which a freeze may be on its way until the thaw was answered a mark lies in the layers folder: whoever finds it
//! there after an interruption thaws, and nobody thaws what somebody else froze.
//!
//! Architecture Invariant: no exchange begins later than [`EXCHANGE_BY`] after the freeze was sent. Before it, whatever
//! goes wrong leads back; a snapshot that was to be quiesced is quiesced, or there is none.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use tokio::time::Instant;

use super::monitor::Monitor;
use crate::qemu::adopt::Work;
use crate::qemu::agent::{Agent, AgentError, Limits, Status};
use crate::qemu::config::QemuConfig;
use crate::qemu::step::{Live, Quiesce, Switch, Turn};

/// Longest that a guest's file systems stay frozen, where it is in Snaptree's hands: programs in the guest wait for them.
const FROZEN_MAX: Duration = Duration::from_secs(10);
/// How long a guest may take to freeze them.
const FREEZE: Duration = Duration::from_secs(5);
/// When it is too late for the exchange, so that the rest of [`FROZEN_MAX`] is for the way back.
const EXCHANGE_BY: Duration = Duration::from_secs(8);
/// What a thaw gets at least, however late it is.
const THAW_MIN: Duration = Duration::from_secs(2);
/// What a thaw gets that nobody else waits for.
const THAW: Duration = Duration::from_secs(5);

/// File systems that are frozen, and the connection by which they are thawed.
pub(super) struct Rest {
    socket: PathBuf,
    agent: Agent,
    since: Instant,
    file_systems: u64,
}

/// How a quiesced snapshot went; part of what its step learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(in crate::qemu) struct Quiesced {
    /// How many file systems were frozen.
    frozen: u64,
    /// How many were still frozen when they were thawed.
    thawed: u64,
    /// For how long, from the request to freeze to the answer that they are thawed, in milliseconds.
    frozen_ms: u64,
}

impl Switch {
    /// Has the guest bring its file systems to rest, if that was asked for. If it fails, they are as before.
    pub(super) async fn freeze(&self, work: Work<'_>, live: Live) -> Result<Option<Rest>, DriverError> {
        if live.quiesce == Quiesce::No {
            return Ok(None);
        }
        let socket = socket_of(work)?;
        let mut agent = Agent::connect(&socket, Limits::default()).await.map_err(not_quiesced)?;
        if agent.status().await.map_err(not_quiesced)? == Status::Frozen {
            return Err(DriverError::permanent(
                Code::InUse,
                "the guest was not quiesced: somebody else has frozen its file systems already",
            )
            .hint(
                "another snapshot or backup may be under way; if not, thaw them with guest-fsfreeze-thaw, or \
                   restart the guest agent",
            ));
        }
        self.turn.mark_frozen()?;
        work.reached("qemu.live.freezing");
        let since = Instant::now();
        let frozen = agent.freeze(FREEZE).await;
        work.reached("qemu.live.frozen");
        let mut rest = Rest { socket, agent, since, file_systems: 0 };
        let why = match frozen {
            Ok(0) => "it froze no file system".to_owned(),
            Ok(file_systems) => {
                rest.file_systems = file_systems;
                return Ok(Some(rest));
            }
            Err(error) => error.to_string(),
        };
        Err(rest.take_back(&self.turn, format!("the guest was not quiesced: {why}")).await)
    }

    /// Thaws what an interrupted freeze of this step may have left frozen. The guest must run.
    pub(in crate::qemu) async fn thaw_left(&self, work: Work<'_>) -> Result<(), DriverError> {
        if !self.turn.is_marked_frozen()? {
            return Ok(());
        }
        let thawed = thaw_anew(&socket_of(work)?).await.map_err(still_frozen)?;
        tracing::info!(thawed, "the guest's file systems were thawed after an interruption");
        self.turn.unmark_frozen()?;
        work.reached("qemu.live.thawed");
        Ok(())
    }
}

impl Rest {
    /// How long may be waited for something that comes before the exchange.
    pub(super) fn left(&self) -> Duration {
        EXCHANGE_BY.saturating_sub(self.since.elapsed())
    }

    /// Refuses an exchange that would come too late.
    pub(super) fn check(&self) -> Result<(), DriverError> {
        let frozen = self.since.elapsed();
        if frozen < EXCHANGE_BY {
            return Ok(());
        }
        Err(DriverError::permanent(
            Code::Timeout,
            format!(
                "the guest's file systems had been frozen for {} ms before the snapshot could be taken, and {} s is \
                 the most in all",
                frozen.as_millis(),
                FROZEN_MAX.as_secs()
            ),
        ))
    }

    /// Thaws what runs again.
    pub(super) async fn end(mut self, work: Work<'_>, turn: &Turn) -> Result<Quiesced, DriverError> {
        let thawed = self.thaw().await.map_err(still_frozen)?;
        let frozen_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        turn.unmark_frozen()?;
        work.reached("qemu.live.thawed");
        if thawed == 0 {
            tracing::warn!(frozen_ms, "the guest's file systems were thawed before Snaptree asked for it");
        }
        Ok(Quiesced { frozen: self.file_systems, thawed, frozen_ms })
    }

    /// What comes of a failure before the exchange: the guest goes on, and its file systems are thawed.
    pub(super) async fn give_up(
        self,
        switch: &Switch,
        work: Work<'_>,
        (monitor, live): (&mut Monitor, Live),
        error: DriverError,
    ) -> DriverError {
        let goes_on = switch.go_on(work, monitor, live).await;
        let mut back = self.take_back(&switch.turn, error.failure.message).await;
        if let Err(stopped) = goes_on {
            back.failure.message = format!("{}; and it could not go on: {stopped}", back.failure.message);
        }
        back.failure.code = error.failure.code;
        DriverError { class: error.class, source: error.source, ..back }
    }

    /// Thaws after a failure, and adds to it what came of that.
    async fn take_back(mut self, turn: &Turn, failure: String) -> DriverError {
        let error = match self.thaw().await {
            Ok(_) => match turn.unmark_frozen() {
                Ok(()) => {
                    return DriverError::permanent(
                        Code::Io,
                        format!("{failure}; its file systems are thawed"),
                    );
                }
                Err(error) => error.to_string(),
            },
            Err(error) => format!("they may still be frozen: {error}"),
        };
        DriverError::permanent(Code::Io, format!("{failure}; {error}"))
    }

    async fn thaw(&mut self) -> Result<u64, AgentError> {
        let wait = FROZEN_MAX.saturating_sub(self.since.elapsed()).max(THAW_MIN);
        match self.agent.thaw(wait).await {
            // One that was restarted meanwhile has forgotten the connection, and not what it froze.
            Err(AgentError::Closed { .. }) => thaw_anew(&self.socket).await,
            answer => answer,
        }
    }
}

async fn thaw_anew(socket: &Path) -> Result<u64, AgentError> {
    Agent::connect(socket, Limits::default()).await?.thaw(THAW).await
}

fn socket_of(work: Work<'_>) -> Result<PathBuf, Failure> {
    let (domain, config) = QemuConfig::of(work.context.state)?;
    config.agent.ok_or_else(|| super::no_agent(&domain.name))
}

fn not_quiesced(error: AgentError) -> DriverError {
    let code = match &error {
        AgentError::Silent { .. } | AgentError::TimedOut { .. } => Code::Timeout,
        _ => Code::Io,
    };
    DriverError::permanent(code, format!("the guest was not quiesced: {error}"))
        .hint("see that qemu-ga runs in the guest, or leave out --quiesce")
}

fn still_frozen(error: AgentError) -> DriverError {
    DriverError::permanent(
        Code::Timeout,
        format!("the guest's file systems may still be frozen, since they could not be thawed: {error}"),
    )
    .hint("restart the guest agent, or thaw in the guest (fsfreeze --unfreeze), and run snaptree op retry")
}
