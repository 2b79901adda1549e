//! `snaptree domain ...`

use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use snaptree_drivers::qemu::{AccessWish, DisksWish, KeptLayers, RunsWish};
use snaptree_engine::OperationId;
use snaptree_engine::command::Command;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::PowerWish;
use snaptree_engine::event::UnregisterWish;
use snaptree_engine::operation::Operation;
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::recovery;

use super::carry::{Asked, carry, giving_up, open};
use crate::args::WriterArgs;
use crate::args::domain::{AccessArgs, AddArgs, DiskCommand, DomainCommand, RemoveArgs, SetArgs};
use crate::args::snapshot::Wait;
use crate::args::value::labels;
use crate::confirm::confirm;
use crate::context::{Context, Missing, Writer};
use crate::exit::{Exit, Trouble};
use crate::render;
use crate::render::text::{Look, count, safe, short};
use crate::render::view::{DomainView, domain_name};
use crate::wire::{LeftOut, Registered, Registering};

/// The document of `domain add`.
#[derive(Serialize)]
struct Added {
    #[serde(flatten)]
    domain: DomainView,
    notes: Vec<String>,
}

/// The document of `domain list`.
#[derive(Serialize)]
struct Domains {
    domains: Vec<DomainView>,
    left_out: Vec<LeftOut>,
}

/// The document of `domain start` and `domain stop`.
#[derive(Serialize)]
struct Powered {
    domain: String,
    state: &'static str,
}

/// Carries out a command on domains.
///
/// # Errors
/// It was rejected, or the state cannot be used.
pub async fn run(context: &Context, command: DomainCommand) -> Result<Exit> {
    match command {
        DomainCommand::Add(args) => add(context, *args).await,
        DomainCommand::List => list(context).await,
        DomainCommand::Show { domain } => show(context, &domain).await,
        DomainCommand::Set(args) => set(context, args).await,
        DomainCommand::Start { domain, writer } => power(context, &domain, PowerWish::Start, &writer).await,
        DomainCommand::Stop { domain, force: false, writer } => {
            power(context, &domain, PowerWish::Shutdown, &writer).await
        }
        DomainCommand::Stop { domain, force: true, writer } => {
            power(context, &domain, PowerWish::End, &writer).await
        }
        DomainCommand::Disk(command) => disk(context, command).await,
        DomainCommand::Remove(args) => remove(context, args).await,
    }
}

async fn add(context: &Context, args: AddArgs) -> Result<Exit> {
    let driver = args.driver.unwrap_or(DriverKind::Esx);
    misplaced(&args, driver)?;
    let Writer { engine, office } = context.writer(&args.writer, Missing::Make).await?;
    let disks = args.disk.into_iter().map(|disk| Ok((disk.name, absolute(disk.path)?)));
    let registering = Registering {
        name: args.name,
        driver,
        disks: disks.collect::<Result<_>>()?,
        labels: labels(&args.label),
        layers: args.layers.map(absolute).transpose()?,
        keep_path: args.keep_path,
        convert: args.convert,
        repair: args.repair,
        runs: RunsWish {
            qmp: args.qmp.map(absolute).transpose()?,
            start: args.start,
            stop: args.stop,
            launch: args.launch,
        },
        agent: args.agent.map(absolute).transpose()?,
        profile: args.profile,
        host: args.host,
        vm: args.vm,
    };
    let Registered { domain, notes } = office.register(registering).await?;
    let state = engine.load(domain.id).await?;
    let view = DomainView::of(&state).ok_or_else(|| Trouble::not_found("the domain is not registered"))?;
    if context.json {
        render::json(&Added { domain: view, notes })?;
    } else {
        let disks: Vec<&str> = domain.disks.iter().map(|disk| disk.name.as_str()).collect();
        render::print(&format!(
            "Registered domain '{}' ({}: {}).\n",
            safe(domain.name.as_str()),
            domain.driver,
            disks.join(", ")
        ))?;
        notes.iter().for_each(|note| render::note(&format!("note: {}", safe(note))));
    }
    Ok(Exit::Done)
}

/// Options that the driver does not have.
fn misplaced(args: &AddArgs, driver: DriverKind) -> Result<(), Trouble> {
    let given = [
        ("--layers", args.layers.is_some(), &[DriverKind::Qemu][..]),
        ("--keep-path", args.keep_path, &[DriverKind::Qemu]),
        ("--convert", args.convert, &[DriverKind::Qemu]),
        ("--repair", args.repair, &[DriverKind::Qemu]),
        ("--qmp", args.qmp.is_some(), &[DriverKind::Qemu]),
        ("--start", args.start.is_some(), &[DriverKind::Qemu]),
        ("--launch", args.launch.is_some(), &[DriverKind::Qemu]),
        ("--agent", args.agent.is_some(), &[DriverKind::Qemu]),
        ("--profile", args.profile.is_some(), &[DriverKind::Sim]),
        ("--host", args.host.is_some(), &[DriverKind::Esx]),
        ("--vm", args.vm.is_some(), &[DriverKind::Virtualbox, DriverKind::Esx]),
        ("--disk", !args.disk.is_empty(), &[DriverKind::Qemu, DriverKind::Sim]),
    ];
    if let Some((option, ..)) = given.iter().find(|(_, given, of)| *given && !of.contains(&driver)) {
        return Err(Trouble::usage(format!("{option} is not for --driver {driver}")));
    }
    match driver {
        DriverKind::Qemu if args.disk.is_empty() => {
            Err(Trouble::usage("a qemu domain needs a disk").hint("--disk vda=/path/to/image.qcow2"))
        }
        DriverKind::Esx if args.host.is_none() => Err(Trouble::usage("an esx domain is on a host")
            .hint("--host HOST --vm PATH|UUID; `snaptree host add` registers a host")),
        DriverKind::Virtualbox if args.vm.is_none() => {
            Err(Trouble::usage("a virtualbox domain is one of its machines")
                .hint("--vm NAME|UUID; `VBoxManage list vms` shows them"))
        }
        _ => Ok(()),
    }
}

async fn power(context: &Context, domain: &str, wish: PowerWish, writer: &WriterArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, writer).await?;
    let id = engine.find_domain(domain).await?;
    office.power(id, wish).await?;
    let state = if wish == PowerWish::Start { "running" } else { "off" };
    if context.json {
        render::json(&Powered { domain: domain.to_owned(), state })?;
    } else {
        render::print(&format!("Domain '{}' is {state}.\n", safe(domain)))?;
    }
    Ok(Exit::Done)
}

async fn list(context: &Context) -> Result<Exit> {
    let reader = context.reader().await?;
    let mut listed = Domains { domains: Vec::new(), left_out: Vec::new() };
    for row in reader.engine.domains().await? {
        match reader.engine.load(row.id).await {
            Ok(state) => listed.domains.extend(DomainView::of(&state)),
            Err(error) if error.spares_others() => listed.left_out.push(LeftOut::new(row.name, error)),
            Err(error) => return Err(error.into()),
        }
    }
    let exit = if listed.left_out.is_empty() { Exit::Done } else { Exit::Failed };
    if context.json {
        render::json(&listed)?;
    } else if listed.domains.is_empty() && exit == Exit::Done {
        render::note("no domain is registered; `snaptree domain add` registers one");
    } else {
        let look = Look::of_stdout();
        let mut text = render::list::domains(&listed.domains, &look);
        text.extend(listed.left_out.iter().map(|domain| render::list::left_out(domain, &look)));
        render::print(&text)?;
    }
    Ok(exit)
}

async fn show(context: &Context, domain: &str) -> Result<Exit> {
    let reader = context.reader().await?;
    let prefix = reader.prefix(None).await?;
    tell(context, &reader.domain(domain, prefix).await?).await
}

async fn tell(context: &Context, state: &DomainState) -> Result<Exit> {
    let view = DomainView::with_machine(state).await;
    let view = view.ok_or_else(|| Trouble::not_found("the domain is not registered"))?;
    if context.json {
        render::json(&view)?;
    } else {
        render::print(&render::list::domain(&view, &Look::of_stdout()))?;
    }
    Ok(Exit::Done)
}

async fn set(context: &Context, args: SetArgs) -> Result<Exit> {
    let access = access(args.access)?;
    if args.name.is_none() && args.label.is_empty() && access.is_none() {
        return Err(Trouble::usage("nothing to change").hint("give --name, --label or --qmp").into());
    }
    let Writer { engine, office } = open(context, &args.writer).await?;
    let domain = engine.find_domain(&args.domain).await?;
    let command = Command::Set { name: args.name, labels: labels(&args.label), access };
    office.submit(domain, &command, None).await?;
    tell(context, &engine.load(domain).await?).await
}

async fn disk(context: &Context, command: DiskCommand) -> Result<Exit> {
    let mut disks = DisksWish::default();
    let (domain, launch, writer) = match command {
        DiskCommand::Add { domain, disk, launch, writer } => {
            if disk.path.as_os_str().is_empty() {
                return Err(Trouble::usage("which image is it?").hint("a disk is written vdb=FILE").into());
            }
            disks.add.insert(disk.name, absolute(disk.path)?);
            (domain, launch, writer)
        }
        DiskCommand::Remove { domain, disk, keep_layers, launch, writer } => {
            disks.remove.insert(disk, if keep_layers { KeptLayers::All } else { KeptLayers::None });
            (domain, launch, writer)
        }
    };
    let Writer { engine, office } = open(context, &writer).await?;
    let domain = engine.find_domain(&domain).await?;
    let runs = RunsWish { launch, ..RunsWish::default() };
    let wish = AccessWish { runs, disks, ..AccessWish::default() };
    let access = Some(serde_json::to_value(wish)?);
    let command = Command::Set { name: None, labels: labels(&[]), access };
    office.submit(domain, &command, None).await?;
    tell(context, &engine.load(domain).await?).await
}

/// None if nothing is said of it.
fn access(args: AccessArgs) -> Result<Option<serde_json::Value>> {
    let AccessArgs { qmp, start, stop, launch, agent } = args;
    let runs = RunsWish { qmp: qmp.map(absolute).transpose()?, start, stop, launch };
    let wish = AccessWish { runs, agent: agent.map(absolute).transpose()?, ..AccessWish::default() };
    Ok(if wish == AccessWish::default() { None } else { Some(serde_json::to_value(wish)?) })
}

/// An empty path says that there is none.
fn absolute(path: PathBuf) -> std::io::Result<PathBuf> {
    if path.as_os_str().is_empty() { Ok(path) } else { std::path::absolute(path) }
}

async fn remove(context: &Context, args: RemoveArgs) -> Result<Exit> {
    if args.metadata {
        return forget(context, args).await;
    }
    let wish = match (args.flatten, args.keep_layers) {
        (true, _) => UnregisterWish::Flatten,
        (false, true) => UnregisterWish::KeepLayers,
        (false, false) => UnregisterWish::Untouched,
    };
    if wish == UnregisterWish::Flatten {
        let question =
            format!("End all snapshots of {} and keep only its current disks?", safe(&args.domain));
        confirm(&question, args.yes)?;
    }
    let command = giving_up(args.give_up, Command::Unregister(wish));
    let asked = Asked { domain: &args.domain, command, key: None, wait: Wait::ToTheEnd };
    carry(context, &open(context, &args.writer).await?, &asked).await
}

/// The document of `domain remove --metadata`.
#[derive(Serialize)]
struct Forgotten {
    kind: &'static str,
    domain: String,
    outcome: &'static str,
    abandoned: Vec<Abandoned>,
    left: Vec<PathBuf>,
}

/// An operation that nobody carries on.
#[derive(Serialize)]
struct Abandoned {
    operation: OperationId,
    kind: &'static str,
    stood: String,
}

/// Lets go of a domain without asking its hypervisor for anything.
async fn forget(context: &Context, args: RemoveArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let id = engine.find_domain(&args.domain).await?;
    let state = engine.load_as_far_as_known(id).await?;
    if !state.open.is_empty() {
        let open = count(state.open.len(), "open operation");
        let domain = safe(&args.domain);
        confirm(&format!("Abandon {open} of {domain} where it stands, and forget the domain?"), args.yes)?;
    }
    office.submit(id, &Command::Unregister(UnregisterWish::Forget), None).await?;
    let abandoned = |open: &Operation| Abandoned {
        operation: open.id,
        kind: open.request.kind(),
        stood: recovery::stood(open),
    };
    let forgotten = Forgotten {
        kind: "unregister",
        domain: domain_name(&state),
        outcome: "succeeded",
        abandoned: state.open.iter().map(abandoned).collect(),
        left: state.layers.files().cloned().collect(),
    };
    if context.json {
        render::json(&forgotten)?;
        return Ok(Exit::Done);
    }
    let mut text = format!("Let go of {}; nothing was touched.\n", safe(&forgotten.domain));
    for Abandoned { operation, kind, stood } in &forgotten.abandoned {
        text.push_str(&format!("  abandoned the {kind} {}: {}\n", short(*operation), safe(stood)));
    }
    for file in &forgotten.left {
        text.push_str(&format!("  left {}\n", safe(&file.display().to_string())));
    }
    render::print(&text)?;
    Ok(Exit::Done)
}
