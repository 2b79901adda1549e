//! `snaptree config ...`

use std::time::Duration;

use anyhow::Result;
use snaptree_drivers::qemu::LeftOut;
use snaptree_engine::engine::Foreign;
use snaptree_engine::reconcile::merge::human_bytes;

use crate::args::inspect::ConfigCommand;
use crate::config::{Config, files};
use crate::context::Context;
use crate::exit::{Exit, Trouble};
use crate::render;

/// Carries out a command on the settings.
///
/// # Errors
/// A settings file cannot be read, or says what no setting says.
pub fn run(context: &Context, command: ConfigCommand) -> Result<Exit> {
    match command {
        ConfigCommand::Show => show(context, &Config::load()?),
        ConfigCommand::Check { file: None } => check(context, &Config::load()?),
        ConfigCommand::Check { file: Some(file) } => {
            let mut config = Config::default();
            config.add(&file)?;
            if config.files.is_empty() {
                return Err(Trouble::not_found(format!("there is no file {}", file.display())).into());
            }
            check(context, &config)
        }
    }
}

fn show(context: &Context, config: &Config) -> Result<Exit> {
    let settings = &config.settings;
    if context.json {
        render::json(&serde_json::json!({
            "files": config.files,
            "state": context.dir,
            "settings": {
                "concurrency": {
                    "overall": settings.concurrency_max,
                    "per-connection": settings.concurrency_per_connection_max,
                },
                "drift": { "every-ms": config.drift_every.map(millis), "foreign": settings.foreign },
                "esx": {
                    "connect-timeout-ms": millis(config.esx.connect),
                    "call-timeout-ms": millis(config.esx.call),
                },
                "merge": { "copy-max": settings.merge_copy_bytes_max },
                "qemu": {
                    "tool-timeout-ms": millis(config.qemu.header),
                    "copy-timeout-ms": millis(config.qemu.copy),
                    "job-speed": config.job_speed_bytes,
                    "left-out-disks": config.left_out_disks,
                },
                "operation": { "deadline-s": settings.first_step_s_max },
                "retry": {
                    "attempts": settings.attempts_max,
                    "delay-min-ms": settings.retry_delay_ms_min,
                    "delay-max-ms": settings.retry_delay_ms_max,
                },
                "space": { "margin": settings.space_margin_bytes },
                "serve": { "socket": config.socket },
                "virtualbox": { "manage": config.manage },
            },
        }))?;
        return Ok(Exit::Done);
    }
    let mut text = String::new();
    for file in files() {
        let read = if config.files.contains(&file) { "read" } else { "not there" };
        text.push_str(&format!("# {}: {read}\n", file.display()));
    }
    text.push_str(&format!("# state: {}\n\n", context.dir.display()));
    text.push_str(&format!(
        "[concurrency]\noverall = {}\nper-connection = {}\n\n[drift]\nevery = \"{}\"\nforeign = \"{}\"\n\n[esx]\nconnect-timeout = \"{}\"\ncall-timeout = \"{}\"\n\n[merge]\ncopy-max = {}    # {}\n\n[qemu]\ntool-timeout = \"{}\"\ncopy-timeout = \"{}\"\njob-speed = {}    # {}\nleft-out-disks = \"{}\"\n\n[operation]\ndeadline = \"{}s\"\n\n[retry]\nattempts = {}\ndelay-min = \"{}\"\ndelay-max = \"{}\"\n\n[space]\nmargin = {}    # {}\n",
        settings.concurrency_max,
        settings.concurrency_per_connection_max,
        duration_words(config.drift_every.map_or(0, millis)),
        match settings.foreign {
            Foreign::Adopt => "adopt",
            Foreign::Report => "report",
        },
        duration_words(millis(config.esx.connect)),
        duration_words(millis(config.esx.call)),
        settings.merge_copy_bytes_max,
        human_bytes(settings.merge_copy_bytes_max),
        duration_words(millis(config.qemu.header)),
        duration_words(millis(config.qemu.copy)),
        config.job_speed_bytes,
        match config.job_speed_bytes {
            0 => "no limit".to_owned(),
            bytes => format!("{}/s", human_bytes(bytes)),
        },
        match config.left_out_disks {
            LeftOut::Warn => "warn",
            LeftOut::Refuse => "refuse",
        },
        settings.first_step_s_max.unwrap_or(0),
        settings.attempts_max,
        duration_words(settings.retry_delay_ms_min),
        duration_words(settings.retry_delay_ms_max),
        settings.space_margin_bytes,
        human_bytes(settings.space_margin_bytes),
    ));
    if let Some(socket) = &config.socket {
        text.push_str(&format!("\n[serve]\nsocket = {:?}\n", socket.display().to_string()));
    }
    text.push_str(&format!("\n[virtualbox]\nmanage = {:?}\n", config.manage.display().to_string()));
    render::print(&text)?;
    Ok(Exit::Done)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn duration_words(millis: u64) -> String {
    if millis.is_multiple_of(1_000) { format!("{}s", millis / 1_000) } else { format!("{millis}ms") }
}

fn check(context: &Context, config: &Config) -> Result<Exit> {
    if context.json {
        render::json(&serde_json::json!({ "ok": true, "files": config.files }))?;
    } else if config.files.is_empty() {
        render::print("No settings file is there; the defaults are in force.\n")?;
    } else {
        let files: String = config.files.iter().map(|file| format!("{}: good\n", file.display())).collect();
        render::print(&files)?;
    }
    Ok(Exit::Done)
}
