//! `snaptree`: snapshots of virtual machines, from the command line.
//!
//! `args` says what can be written, `context` opens the state, `commands` carries it out, `render` prints it, `exit`
//! decides how it ends.

mod args;
mod commands;
mod config;
mod confirm;
mod context;
mod demo;
mod exit;
mod hooks;
mod office;
mod programs;
mod progress;
mod render;
mod requester;
mod serve;
mod story;
mod when;
mod wire;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use snaptree_drivers::child;

use crate::args::suggest::improved;
use crate::args::{Cli, Command};
use crate::context::Context;
use crate::exit::{Exit, Trouble};

fn main() -> ExitCode {
    if let Some(code) = child::become_leashed(std::env::args_os()) {
        return ExitCode::from(code);
    }
    child::leash_children();
    let words: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&words) {
        Ok(cli) => cli,
        Err(error) => return misused(&improved(error, &Cli::command(), &words)),
    };
    trace(&cli);
    let json = cli.global.json;
    let exit = match run(cli) {
        Ok(exit) => exit,
        Err(error) if exit::is_broken_pipe(&error) => Exit::Done,
        Err(error) => tell(&error, json),
    };
    ExitCode::from(exit.code())
}

fn run(cli: Cli) -> anyhow::Result<Exit> {
    let mut builder = match &cli.command {
        Command::Serve(_) => tokio::runtime::Builder::new_multi_thread(),
        // One thread is enough: whatever takes long is a child process, and starting threads is not free.
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = builder.enable_all().build()?;
    let exit = runtime.block_on(async {
        let context = Context::new(&cli.global).await?;
        let exit = commands::run(&context, cli.command).await;
        context.close().await;
        exit
    });
    // A step that takes too long, or a look at a file system that hangs, must not keep a program that was told to end.
    runtime.shutdown_background();
    exit
}

fn tell(error: &anyhow::Error, json: bool) -> Exit {
    let told = exit::told(error);
    tracing::debug!(error = format!("{error:#}"), "the command failed");
    let printed = json && render::print(&format!("{}\n", exit::in_json(&told))).is_ok();
    // Also where standard output is what failed.
    if !printed {
        render::note(&exit::in_words(&told));
    }
    told.exit
}

/// What clap has to say: help and versions are results, the rest is misuse.
fn misused(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|arg| arg == "--json");
    if error.use_stderr() && json {
        let message = error.render().to_string();
        let message = message.trim_end().strip_prefix("error: ").unwrap_or(&message).to_owned();
        let trouble = Trouble::usage(message).hint("`snaptree help` shows the commands");
        return ExitCode::from(tell(&trouble.into(), true).code());
    }
    // If the help cannot be printed, nobody reads it.
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { Exit::Usage.code() } else { Exit::Done.code() })
}

/// Tracing to stderr, for those who ask for it; a daemon's log.
fn trace(cli: &Cli) {
    let level = match (cli.global.verbose, &cli.command) {
        (0, Command::Serve(_)) => tracing::Level::INFO,
        (0, _) => return,
        (1, _) => tracing::Level::INFO,
        (2, _) => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
