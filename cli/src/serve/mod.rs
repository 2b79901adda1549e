//! `snaptree serve`: the daemon. It has the state, keeps the dispatcher at work, and listens on a socket.
//!
//! `socket` is where it listens, `http` what it answers, `follow` how it tells about an operation, `questions` how it
//! reads the log out, `peer` who asks, `schedule` what it does by the clock, `notify` how it tells people of it.
//!
//! Architecture Invariant: who asks is what the kernel says of the socket's peer, never what the peer says of itself.

mod follow;
mod http;
mod notify;
mod peer;
mod questions;
mod schedule;
pub mod socket;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use snaptree_engine::DomainId;
use snaptree_engine::engine::{Engine, Requester};
use snaptree_engine::log::{OpenOnly, OperationFilter};
use snaptree_engine::reconcile::dispatch::{Dispatcher, Wish};
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::{Exit, Trouble};
use crate::office::{PARK_AFTER, Policies};
use crate::render;
use crate::render::text::{Look, count, safe, short};
use crate::wire::OpenView;

/// How long answers under way may take then.
const ANSWERS_MAX: Duration = Duration::from_secs(1);

/// A daemon.
pub struct Daemon {
    /// The engine over its state.
    pub engine: Engine,
    /// Its state directory.
    pub dir: PathBuf,
    /// Keeps the workers at work.
    pub dispatcher: Dispatcher,
    /// Wakes whoever runs policies.
    pub policies: schedule::Policies,
    /// What requests know of policies.
    pub known: Policies,
    /// Since when it is up.
    pub since: Instant,
}

impl Daemon {
    /// Lets a policy's requests on a domain be carried out, and looked at when they are.
    pub fn work_on(&self, domain: DomainId) {
        let done = self.dispatcher.run(domain, Wish::Drive);
        let policies = self.policies.clone();
        tokio::spawn(async move {
            done.await;
            policies.look_now();
        });
    }
}

/// The daemon's own name in the log.
pub fn own_requester() -> Requester {
    let mut requester = crate::requester::this_user();
    "engine".clone_into(&mut requester.origin.via);
    requester
}

/// Listens, works, and ends in an orderly way when it is told to. Each domain is looked at for drift once in
/// `drift_every`, if that is given.
///
/// # Errors
/// It cannot listen, the log cannot be read, or another process has taken the state over.
pub async fn run(
    engine: Engine,
    dir: PathBuf,
    socket: socket::Bound,
    drift_every: Option<Duration>,
    json: bool,
) -> Result<Exit> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let dispatcher = Dispatcher::new(&engine, own_requester());
    let daemon = Arc::new(Daemon {
        engine: engine.clone(),
        dir,
        dispatcher: dispatcher.clone(),
        policies: schedule::Policies::default(),
        known: Policies::default(),
        since: Instant::now(),
    });
    let server = http::Server::start(Arc::clone(&daemon), socket.listener()?);
    tracing::info!(socket = %socket.path().display(), pid = std::process::id(), "listening");
    let recovering = dispatcher.clone();
    let recovery = tokio::spawn(async move { recovering.start().await });
    let by_the_clock = tokio::spawn(by_the_clock(Arc::clone(&daemon), drift_every));
    schedule::tell_manager(sd_notify::NotifyState::Ready);
    let came_to = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        () = dispatcher.fenced() => {
            let message = "another process has taken the state over; nothing is written any more";
            Err(Trouble::new(Exit::Failed, "fenced", message))
        }
        failed = failure_of(recovery) => Err(failed),
    };
    schedule::tell_manager(sd_notify::NotifyState::Stopping);
    by_the_clock.abort();
    tracing::info!("ending: steps in hand are finished, no other begins");
    tokio::select! {
        _ = tokio::time::timeout(PARK_AFTER, dispatcher.stop()) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    server.stop(ANSWERS_MAX).await;
    drop(socket);
    let left = open(&engine).await?;
    came_to?;
    tell(&left, json)?;
    Ok(Exit::Done)
}

/// What is done by the clock, until that cannot go on.
async fn by_the_clock(daemon: Arc<Daemon>, drift_every: Option<Duration>) {
    let drift = async {
        match drift_every {
            Some(every) => schedule::drift(Arc::clone(&daemon), every).await,
            None => std::future::pending().await,
        }
    };
    tokio::join!(
        async {
            if let Err(error) = schedule::policies(Arc::clone(&daemon)).await {
                // Whoever works on a domain finds the same, and ends the daemon.
                tracing::error!(error = &error as &dyn std::error::Error, "policies do not run any more");
            }
        },
        drift,
        schedule::watchdog(Arc::clone(&daemon)),
    );
}

/// Returns if the dispatcher could not begin.
async fn failure_of(
    recovery: tokio::task::JoinHandle<Result<(), snaptree_engine::error::EngineError>>,
) -> Trouble {
    match recovery.await {
        Ok(Ok(())) => std::future::pending().await,
        Ok(Err(error)) => {
            let told = crate::exit::told(&error.into());
            Trouble::new(told.exit, "io", crate::exit::whole(&told).message)
        }
        Err(_) => Trouble::new(Exit::Failed, "failed", "the dispatcher panicked"),
    }
}

/// The operations without an outcome.
///
/// # Errors
/// The log cannot be read.
pub async fn open(engine: &Engine) -> Result<Vec<OpenView>> {
    let filter = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
    let rows = engine.log().operations(&filter, usize::MAX >> 1).await?;
    let view = |row: snaptree_engine::log::OperationRow| OpenView {
        operation: row.id,
        kind: row.kind,
        domain: row.domain_name.to_string(),
        snapshot: row.snapshot,
        needs_attention: row.needs_attention,
        requested: row.requested,
    };
    Ok(rows.into_iter().map(view).collect())
}

/// Says what is still open: the daemon's last words.
fn tell(left: &[OpenView], json: bool) -> Result<()> {
    let look = Look::of_stdout();
    let mut text = String::new();
    for one in left {
        let state =
            if one.needs_attention { "needs attention" } else { "goes on with the next `snaptree serve`" };
        let snapshot = one.snapshot.as_deref().map(|name| format!(" '{}'", safe(name))).unwrap_or_default();
        text.push_str(&format!(
            "{} {}{snapshot} of {}: {state}\n",
            look.paint.dim(format!("[{}]", short(one.operation))),
            safe(&one.kind),
            look.paint.name(safe(&one.domain)),
        ));
    }
    let sum = match left.len() {
        0 => "nothing is left open".to_owned(),
        many => format!("{} left open", count(many, "operation")),
    };
    if json {
        render::json(&serde_json::json!({ "operations": left }))?;
    } else {
        text.push_str(&format!("Ended; {sum}.\n"));
        render::print(&text)?;
    }
    let ids: Vec<String> = left.iter().map(|one| one.operation.to_string()).collect();
    tracing::info!(open = ids.join(" "), "ended; {sum}");
    Ok(())
}
