//! `snaptree serve`

use anyhow::Result;
use snaptree_store::{LockWait, Store};

use crate::args::serve::ServeArgs;
use crate::config::Config;
use crate::context::Context;
use crate::exit::{Exit, Trouble};
use crate::serve::socket::{Bound, default_path};
use crate::{hooks, serve};

/// Takes the state, and serves it until it is told to end.
///
/// # Errors
/// Another daemon has the state, it cannot be used, or the socket cannot be made.
pub async fn run(context: &Context, args: ServeArgs) -> Result<Exit> {
    if let Some(daemon) = context.daemon().await? {
        let status = daemon.status().await?;
        let message = format!(
            "process {} serves {} already, at {}",
            status.pid,
            status.state.display(),
            daemon.socket().display()
        );
        return Err(Trouble::new(Exit::Refused, "in-use", message)
            .hint("every command that writes goes through it by itself; end it with SIGTERM")
            .into());
    }
    let store = Store::open_writer(&context.dir, LockWait { timeout: args.writer.lock_timeout })?;
    let engine = context.engine_on(store, hooks::of_process()?)?;
    let config = Config::load()?;
    let socket = args.socket.or(config.socket).unwrap_or_else(|| default_path(&context.dir));
    let socket = Bound::new(&std::path::absolute(socket)?, &context.dir)?;
    serve::run(engine, context.dir.clone(), socket, config.drift_every, context.json).await
}
