//! `snaptree host ...`

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use snaptree_drivers::esx::{Found, HostConfig, PasswordSource, Trust};
use snaptree_engine::domain::{DriverKind, RunState};
use snaptree_engine::engine::Engine;
use snaptree_engine::hosts::{Host, Known};
use snaptree_engine::{DomainName, HostName};

use super::carry::open;
use crate::args::WriterArgs;
use crate::args::host::{AddArgs, DiscoverArgs, HostCommand};
use crate::args::value::labels;
use crate::context::{Context, Missing, Writer};
use crate::exit::{Exit, Trouble};
use crate::office::domains_on;
use crate::render;
use crate::render::table::{Cell, table};
use crate::render::text::{Look, count, safe};
use crate::wire::{HostAsk, Registering};

/// A host, as `host show` prints it.
#[derive(Serialize)]
struct HostView {
    host: HostName,
    driver: DriverKind,
    #[serde(flatten)]
    config: HostConfig,
}

impl HostView {
    fn of(host: Host) -> Result<Self> {
        let config = HostConfig::of(&host.config)
            .map_err(|failure| Trouble::new(Exit::Failed, "invalid", failure.message))?;
        Ok(Self { host: host.name, driver: host.driver, config })
    }
}

/// The document of `host add`.
#[derive(Serialize)]
struct Added {
    #[serde(flatten)]
    host: HostView,
    product: String,
    api_version: String,
    vcenter: bool,
}

/// The document of `host show`, and a row of `host list`.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    host: HostView,
    domains: Vec<DomainName>,
}

/// The document of `host list`.
#[derive(Serialize)]
struct Hosts {
    hosts: Vec<Shown>,
}

/// The document of `host remove`.
#[derive(Serialize)]
struct Removed {
    host: HostName,
}

/// The document of `host discover`.
#[derive(Serialize)]
struct Discovered {
    host: HostName,
    machines: Vec<MachineView>,
    added: Vec<DomainName>,
    failed: Vec<NotAdded>,
}

#[derive(Serialize)]
struct MachineView {
    #[serde(flatten)]
    found: Found,
    domain: Option<DomainName>,
}

#[derive(Serialize)]
struct NotAdded {
    name: String,
    error: String,
}

/// Carries out a command on hosts.
///
/// # Errors
/// It was rejected, the host does not answer, or the state cannot be used.
pub async fn run(context: &Context, command: HostCommand) -> Result<Exit> {
    match command {
        HostCommand::Add(args) => add(context, *args).await,
        HostCommand::List => list(context).await,
        HostCommand::Show { host } => show(context, &host).await,
        HostCommand::Remove { host, writer } => remove(context, host, &writer).await,
        HostCommand::Discover(args) => discover(context, args).await,
    }
}

async fn add(context: &Context, args: AddArgs) -> Result<Exit> {
    if args.driver != DriverKind::Esx {
        let message = format!("{} has no hosts; esx is for ESXi and vCenter", args.driver);
        return Err(Trouble::usage(message).into());
    }
    let absolute = |path: PathBuf| std::path::absolute(path);
    let password = match (args.password_file, args.password_env, args.password_command) {
        (Some(file), _, _) => PasswordSource::File(absolute(file)?),
        (None, Some(name), _) => PasswordSource::Environment(name),
        (None, None, Some(command)) => PasswordSource::Command(command),
        (None, None, None) => return Err(Trouble::usage("the password comes from nowhere").into()),
    };
    let trust = match (args.thumbprint, args.ca) {
        (Some(thumbprint), _) => Trust::Thumbprint(thumbprint),
        (None, Some(file)) => Trust::Ca(absolute(file)?),
        (None, None) => Trust::System,
    };
    let config = HostConfig { url: args.url, user: args.user, password, trust };
    let known = if args.replace { Known::Replace } else { Known::Refuse };
    let Writer { engine, office } = context.writer(&args.writer, Missing::Make).await?;
    let ask = HostAsk::Add { host: args.host.clone(), config, known };
    let introduced = office.host(ask).await?.introduced.unwrap_or_default();
    let host = HostView::of(engine.host(&args.host).await?)?;
    if context.json {
        let (product, api_version) = (introduced.product, introduced.api_version);
        render::json(&Added { host, product, api_version, vcenter: introduced.is_vcenter })?;
    } else {
        let (name, product) = (safe(args.host.as_str()), safe(&introduced.product));
        render::print(&format!("Registered host '{name}': {product}.\n"))?;
    }
    Ok(Exit::Done)
}

async fn shown(engine: &Engine, host: Host) -> Result<Shown> {
    let mut domains: Vec<DomainName> = domains_on(engine, &host.name).await?.into_values().collect();
    domains.sort();
    Ok(Shown { host: HostView::of(host)?, domains })
}

async fn list(context: &Context) -> Result<Exit> {
    let reader = context.reader().await?;
    let mut hosts = Vec::new();
    for host in reader.engine.hosts().await?.into_values() {
        hosts.push(shown(&reader.engine, host).await?);
    }
    if context.json {
        render::json(&Hosts { hosts })?;
    } else if hosts.is_empty() {
        render::note("no host is registered; `snaptree host add` registers one");
    } else {
        let look = Look::of_stdout();
        let row = |shown: &Shown| {
            let HostView { host, config, .. } = &shown.host;
            vec![
                Cell::painted(&safe(host.as_str()), |text| look.paint.name(text)),
                Cell::plain(safe(&config.url).into_owned()),
                Cell::plain(safe(&config.user).into_owned()),
                Cell::plain(shown.domains.len().to_string()),
            ]
        };
        let rows: Vec<_> = hosts.iter().map(row).collect();
        render::print(&table(&["HOST", "URL", "USER", "DOMAINS"], &rows, &look))?;
    }
    Ok(Exit::Done)
}

async fn show(context: &Context, host: &HostName) -> Result<Exit> {
    let reader = context.reader().await?;
    let shown = shown(&reader.engine, reader.engine.host(host).await?).await?;
    if context.json {
        render::json(&shown)?;
        return Ok(Exit::Done);
    }
    let HostView { host, driver, config } = &shown.host;
    let trust = match &config.trust {
        Trust::System => "the system's roots".to_owned(),
        Trust::Ca(file) => format!("certificates in {}", file.display()),
        Trust::Thumbprint(thumbprint) => format!("thumbprint {thumbprint}"),
    };
    let domains: Vec<&str> = shown.domains.iter().map(DomainName::as_str).collect();
    let lines = [
        ("Name", host.to_string()),
        ("Driver", driver.to_string()),
        ("URL", config.url.clone()),
        ("User", config.user.clone()),
        ("Password", format!("from {}", config.password)),
        ("Believed by", trust),
        ("Domains", domains.join(", ")),
    ];
    let line = |(head, text): &(&str, String)| format!("{:<14} {}\n", format!("{head}:"), safe(text));
    render::print(&lines.iter().map(line).collect::<String>())?;
    Ok(Exit::Done)
}

async fn remove(context: &Context, host: HostName, writer: &WriterArgs) -> Result<Exit> {
    let Writer { office, .. } = open(context, writer).await?;
    office.host(HostAsk::Remove { host: host.clone() }).await?;
    if context.json {
        render::json(&Removed { host })?;
    } else {
        render::print(&format!("Forgot host '{}'.\n", safe(host.as_str())))?;
    }
    Ok(Exit::Done)
}

async fn discover(context: &Context, args: DiscoverArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let mut found = office.host(HostAsk::Discover { host: args.host.clone() }).await?.machines;
    if let Some(names) = &args.names {
        found.retain(|found| DomainName::new(found.name.as_str()).is_ok_and(|name| names.matches(&name)));
    }
    let mut domains = domains_on(&engine, &args.host).await?;
    let (mut added, mut failed) = (Vec::new(), Vec::new());
    if args.add {
        for found in found.iter().filter(|found| !found.template && !domains.contains_key(&found.vm)) {
            match register(&args, &*office, found).await {
                Ok(name) => added.push((found.vm.clone(), name)),
                Err(error) => failed.push(NotAdded { name: found.name.clone(), error: error.to_string() }),
            }
        }
        domains.extend(added.iter().cloned());
    }
    let exit = if failed.is_empty() { Exit::Done } else { Exit::Failed };
    let added = added.into_iter().map(|(_, name)| name).collect();
    let view = |found: Found| MachineView { domain: domains.get(&found.vm).cloned(), found };
    let machines = found.into_iter().map(view).collect();
    tell(context, &Discovered { host: args.host, machines, added, failed })?;
    Ok(exit)
}

async fn register(
    args: &DiscoverArgs,
    office: &dyn crate::office::Office,
    found: &Found,
) -> Result<DomainName> {
    let name = DomainName::new(found.name.as_str())?;
    let registering = Registering {
        host: Some(args.host.clone()),
        vm: Some(found.uuid.clone().or_else(|| found.path.clone()).unwrap_or_else(|| found.name.clone())),
        labels: labels(&args.label),
        ..Registering::new(name, DriverKind::Esx)
    };
    Ok(office.register(registering).await?.domain.name)
}

fn tell(context: &Context, discovered: &Discovered) -> Result<()> {
    if context.json {
        return render::json(discovered);
    }
    let look = Look::of_stdout();
    if discovered.machines.is_empty() {
        render::note("there is no such machine");
    } else {
        let rows: Vec<_> = discovered.machines.iter().map(|machine| row(machine, &look)).collect();
        render::print(&table(&["NAME", "PATH", "POWER", "DOMAIN"], &rows, &look))?;
    }
    for NotAdded { name, error } in &discovered.failed {
        render::note(&format!("'{}' was not registered: {}", safe(name), safe(error)));
    }
    if !discovered.added.is_empty() {
        render::note(&format!("registered {}", count(discovered.added.len(), "domain")));
    }
    Ok(())
}

fn row(machine: &MachineView, look: &Look) -> Vec<Cell> {
    let power = match (machine.found.template, machine.found.power) {
        (true, _) => "template",
        (false, RunState::Running) => "running",
        (false, RunState::Paused) => "suspended",
        (false, RunState::Off) => "off",
    };
    let domain = machine.domain.as_ref().map_or("", |name| name.as_str());
    vec![
        Cell::plain(safe(&machine.found.name).into_owned()),
        Cell::painted(&safe(machine.found.path.as_deref().unwrap_or_default()), |text| look.paint.dim(text)),
        Cell::plain(power),
        Cell::painted(&safe(domain), |text| look.paint.name(text)),
    ]
}
