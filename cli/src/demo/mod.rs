//! `snaptree demo`: the whole story in a directory of its own, with the program's own commands.
//!
//! `story` is what happens, `stage` shows it and runs the commands, `guest` is the machine: it writes content, and
//! its content is compared by SHA-256 after every stage.

mod guest;
mod stage;
mod story;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;
use snaptree_engine::domain::DriverKind;

use self::guest::Guest;
use self::stage::Stage;
use crate::args::inspect::DemoArgs;
use crate::context::Context;
use crate::exit::{Exit, Trouble, is_broken_pipe};
use crate::render;

/// The tools that show the real thing.
const TOOLS: [&str; 2] = ["qemu-img", "qemu-io"];

/// The document of `demo --json`.
#[derive(Serialize)]
struct DemoView {
    ok: bool,
    driver: &'static str,
    snapshots: usize,
    comparisons: usize,
    dir: Option<PathBuf>,
}

/// Where the demo works: a temporary directory that goes when this is dropped, or the one that was named.
enum Place {
    Temporary(tempfile::TempDir),
    Named(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(dir) => dir.path(),
            Self::Named(dir) => dir,
        }
    }

    /// Leaves everything there.
    fn keep(self) -> PathBuf {
        match self {
            Self::Temporary(dir) => dir.keep(),
            Self::Named(dir) => dir,
        }
    }

    /// Removes everything; a named directory was empty, or not there, before.
    fn remove(self) -> Result<()> {
        match self {
            Self::Temporary(dir) => dir.close().context("cannot remove the demo's directory"),
            Self::Named(dir) => std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot remove the demo's directory {}", dir.display())),
        }
    }
}

/// `snaptree demo`
///
/// # Errors
/// A command failed, or some content is not what it should be.
pub async fn run(context: &Context, args: DemoArgs) -> Result<Exit> {
    let (driver, why) = choose(args.driver)?;
    let place = place(args.dir.as_deref())?;
    let stage = Stage::new(place.path(), context.json)?;
    stage.say(&format!("Snaptree's demo, on {why}, in {}", place.path().display()))?;
    let mut guest = Guest::new(driver, place.path())?;
    let played = story::play(&stage, &mut guest).await;
    let view = DemoView {
        ok: played.is_ok(),
        driver: driver.as_str(),
        snapshots: guest.snapshots(),
        comparisons: guest.comparisons(),
        dir: None,
    };
    if let Err(error) = played {
        if is_broken_pipe(&error) {
            // Nobody watches any more, so nobody will look around either.
            place.remove()?;
            return Err(error);
        }
        let dir = place.keep();
        return Err(error.context(format!("the demo failed; look around in {}", dir.display())));
    }
    let state = stage.state().to_owned();
    let kept = if args.keep { Some(place.keep()) } else { place.remove().map(|()| None)? };
    if context.json {
        render::json(&DemoView { dir: kept, ..view })?;
    } else {
        stage.say(&summary(&view, kept.as_deref(), &state))?;
    }
    Ok(Exit::Done)
}

/// Which hypervisor, and why.
fn choose(wish: Option<DriverKind>) -> Result<(DriverKind, String), Trouble> {
    let missing: Vec<&str> = TOOLS.into_iter().filter(|tool| !in_path(tool)).collect();
    match (wish, missing.as_slice()) {
        (Some(DriverKind::Sim), _) => Ok((DriverKind::Sim, "the simulated hypervisor (as asked)".to_owned())),
        (Some(DriverKind::Qemu), missing @ [_, ..]) => {
            let message = format!("{} not found in the PATH", missing.join(" and "));
            Err(Trouble::not_found(message).hint("install qemu-utils, or run `snaptree demo --driver sim`"))
        }
        (Some(DriverKind::Qemu), []) => Ok((DriverKind::Qemu, "real QEMU images (as asked)".to_owned())),
        (Some(other), _) => Err(Trouble::usage(format!("there is no demo on {other}"))
            .hint("`snaptree demo --driver sim` needs nothing installed")),
        (None, []) => {
            Ok((DriverKind::Qemu, format!("real QEMU images ({} found in the PATH)", TOOLS.join(" and "))))
        }
        (None, missing) => Ok((
            DriverKind::Sim,
            format!("the simulated hypervisor ({} not found in the PATH)", missing.join(" and ")),
        )),
    }
}

fn in_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| {
        let file = dir.join(tool);
        file.is_file() && nix::unistd::access(&file, nix::unistd::AccessFlags::X_OK).is_ok()
    })
}

fn place(dir: Option<&Path>) -> Result<Place> {
    let Some(dir) = dir else {
        let made = tempfile::Builder::new().prefix("snaptree-demo-").tempdir();
        return Ok(Place::Temporary(made.context("cannot make a temporary directory")?));
    };
    let dir = std::path::absolute(dir)?;
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut entries = std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    if entries.next().is_some() {
        return Err(Trouble::new(Exit::Refused, "exists", format!("{} is not empty", dir.display()))
            .hint("name a directory that is empty or not there yet")
            .into());
    }
    Ok(Place::Named(dir))
}

fn summary(view: &DemoView, kept: Option<&Path>, state: &Path) -> String {
    let mut text = format!(
        "\n{} snapshots, compared {} times by SHA-256: each read as when it was taken, every time.\n\nTry next:\n",
        view.snapshots, view.comparisons,
    );
    if let Some(dir) = kept {
        text.push_str(&format!(
            "  cd {}; export SNAPTREE_STATE={}\n  snaptree tree web\n",
            dir.display(),
            state.display()
        ));
    } else {
        text.push_str("  snaptree demo --keep                 and look around in what it leaves\n");
    }
    text.push_str(
        "  snaptree domain add NAME --driver qemu --disk vda=FILE\n  \
         snaptree create NAME before-upgrade\n  \
         snaptree help",
    );
    text
}
