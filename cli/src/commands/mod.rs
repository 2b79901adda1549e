//! The commands: each opens the state, asks the engine, and prints what came of it.

mod audit;
mod carry;
mod domain;
mod drift;
mod history;
mod host;
mod log;
mod op;
mod policy;
pub mod query;
mod recover;
mod serve;
mod settings;
mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::CommandFactory;
use snaptree_engine::command::{self as request, Create, SnapshotRef};

use crate::args::inspect::{DemoCutArgs, DemoRequest};
use crate::args::snapshot::Wait;
use crate::args::{Cli, Command, WriterArgs};
use crate::context::Context;
use crate::demo;
use crate::exit::Exit;
use crate::hooks::StopAt;
use crate::render;

/// A request that stops for good at a named place, to be killed there: the demo's own.
async fn cut(context: &Context, args: DemoCutArgs) -> Result<Exit> {
    let lock = WriterArgs { lock_timeout: Duration::from_secs(10) };
    let writer = context.writer_here(&lock, Arc::new(StopAt(args.stop_at)))?;
    let command = match args.request {
        DemoRequest::Create => {
            request::Command::Create(Create { name: Some(args.name), ..Create::default() })
        }
        DemoRequest::Revert => {
            request::Command::Revert { snapshot: SnapshotRef::Name(args.name), run_state: None, keep: false }
        }
    };
    let wait = Wait::ToTheEnd;
    let asked = carry::Asked { domain: &args.domain, command, key: None, wait };
    carry::carry(context, &writer, &asked).await
}

/// Carries out a command.
///
/// # Errors
/// Whatever went wrong before there was an outcome to tell.
pub async fn run(context: &Context, command: Command) -> Result<Exit> {
    match command {
        Command::Domain(command) => domain::run(context, command).await,
        Command::Host(command) => host::run(context, command).await,
        Command::Create(args) => snapshot::create(context, args).await,
        Command::Revert(args) => snapshot::revert(context, args).await,
        Command::Delete(args) => snapshot::delete(context, args).await,
        Command::Edit(args) => snapshot::edit(context, args).await,
        Command::Hold(args) => snapshot::hold(context, args).await,
        Command::Release(args) => snapshot::release(context, args).await,
        Command::List(args) => query::list(context, args).await,
        Command::Tree(args) => query::tree(context, args).await,
        Command::Show(args) => query::show(context, args).await,
        Command::Xml(args) => query::xml(context, args).await,
        Command::Current(args) => query::current(context, args).await,
        Command::Log(args) => log::run(context, args).await,
        Command::Op(command) => op::run(context, command).await,
        Command::Audit(command) => audit::run(context, command).await,
        Command::Recover(args) => recover::recover(context, args).await,
        Command::Reconcile(args) => recover::reconcile(context, args).await,
        Command::Drift(args) => drift::run(context, args).await,
        Command::Policy(command) => policy::run(context, command).await,
        Command::Serve(args) => serve::run(context, args).await,
        Command::Config(command) => settings::run(context, command),
        Command::Completions(args) => {
            let mut text = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "snaptree", &mut text);
            render::print(&String::from_utf8(text)?)?;
            Ok(Exit::Done)
        }
        Command::Demo(args) => demo::run(context, args).await,
        Command::DemoCut(args) => cut(context, args).await,
    }
}
