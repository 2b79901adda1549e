//! What happens in the demo.

use std::time::Duration;

use anyhow::Result;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::log::{EventLog, OperationFilter};
use snaptree_engine::operation::Outcome;
use snaptree_store::Store;

use super::guest::{Guest, Turn};
use super::stage::{Stage, is_watched};
use crate::render::text::{count, short};

/// How long somebody who watches gets to read a chapter.
const PAUSE: Duration = Duration::from_millis(400);

/// Plays all of it.
///
/// # Errors
/// A command failed, or some content is not what it should be.
pub async fn play(stage: &Stage, guest: &mut Guest) -> Result<()> {
    three_snapshots(stage, guest).await?;
    another_way(stage, guest).await?;
    delete_in_the_middle(stage, guest).await?;
    cut_revert(stage, guest, "upgrade", Turn::Before).await?;
    cut_revert(stage, guest, "other-idea", Turn::After).await?;
    if guest.driver() == DriverKind::Qemu {
        cut_create(stage, guest).await?;
    }
    what_remains(stage, guest).await
}

fn pause() {
    if is_watched() {
        std::thread::sleep(PAUSE);
    }
}

async fn write(stage: &Stage, guest: &mut Guest) -> Result<()> {
    let said = guest.write().await?;
    stage.say(&format!("  {said}"))
}

async fn take(stage: &Stage, guest: &mut Guest, name: &str) -> Result<()> {
    stage.run(&["create", "web", name])?;
    guest.took(name);
    Ok(())
}

/// Compares everything, and says so.
async fn compare(stage: &Stage, guest: &mut Guest) -> Result<()> {
    let snapshots = guest.compare_all().await?;
    stage.well(&format!(
        "{} and the machine's disk read as they should (SHA-256)",
        count(snapshots, "snapshot")
    ))?;
    pause();
    Ok(())
}

async fn three_snapshots(stage: &Stage, guest: &mut Guest) -> Result<()> {
    stage.chapter("A machine, and three snapshots of it")?;
    let mut args = vec!["domain", "add", "web"];
    args.extend(guest.registration());
    stage.run(&args)?;
    for name in ["base", "after-install", "upgrade"] {
        write(stage, guest).await?;
        take(stage, guest, name).await?;
    }
    compare(stage, guest).await
}

async fn another_way(stage: &Stage, guest: &mut Guest) -> Result<()> {
    stage.chapter("The upgrade was a mistake: back, and another way")?;
    write(stage, guest).await?;
    stage.run(&["revert", "web", "after-install"])?;
    guest.reverted("after-install");
    compare(stage, guest).await?;
    write(stage, guest).await?;
    take(stage, guest, "other-idea").await?;
    stage.run(&["tree", "web"])?;
    compare(stage, guest).await
}

async fn delete_in_the_middle(stage: &Stage, guest: &mut Guest) -> Result<()> {
    stage.chapter("Delete a snapshot that others are built upon: its changes merge into its children")?;
    stage.run(&["delete", "web", "after-install", "--dry-run"])?;
    stage.run(&["delete", "web", "after-install"])?;
    guest.deleted("after-install");
    stage.run(&["tree", "web"])?;
    compare(stage, guest).await
}

/// A revert that is killed inside the step that makes it true.
async fn cut_revert(stage: &Stage, guest: &mut Guest, name: &str, turn: Turn) -> Result<()> {
    stage.chapter(match turn {
        Turn::Before => "A revert that is killed just before its point of no return",
        Turn::After => "And one that is killed just after it",
    })?;
    write(stage, guest).await?;
    stage.cut("revert", name, guest.place(turn))?;
    let snapshots = guest.compare_snapshots().await?;
    let found = match guest.reads_as(name).await? {
        Turn::Before => "as before".to_owned(),
        Turn::After => format!("as '{name}'"),
    };
    stage.well(&format!(
        "right after the crash: {} intact, and the machine's disk reads {found}, nothing in between",
        count(snapshots, "snapshot")
    ))?;
    stage.run(&["op", "list", "--open"])?;
    stage.run(&["recover"])?;
    if last_outcome(stage).await? == Some(Outcome::Succeeded) {
        guest.reverted(name);
    }
    compare(stage, guest).await
}

/// A snapshot that is killed while it is taken, of a machine that is used before anyone recovers.
async fn cut_create(stage: &Stage, guest: &mut Guest) -> Result<()> {
    stage
        .chapter("A snapshot is killed while it is taken, and the machine is used before anyone recovers")?;
    stage.cut("create", "too-late", guest.place(Turn::Before))?;
    write(stage, guest).await?;
    stage.say("  what was asked for is no longer there to be taken, so recovery has to go back")?;
    stage.run(&["recover"])?;
    if last_outcome(stage).await? == Some(Outcome::Succeeded) {
        guest.took("too-late");
    }
    compare(stage, guest).await
}

async fn what_remains(stage: &Stage, guest: &mut Guest) -> Result<()> {
    stage.chapter("What remains: the tree, and who did what")?;
    stage.run(&["tree", "web"])?;
    stage.run(&["log", "web", "--kind", "Snapshot."])?;
    if let Some(operation) = last_revert(stage).await? {
        stage.say("  the whole story of the second revert, with the cut in it:")?;
        stage.run(&["op", "show", &operation])?;
    }
    stage.run(&["audit", "verify"])?;
    guest.compare_all().await?;
    Ok(())
}

async fn rows(stage: &Stage) -> Result<Vec<snaptree_engine::log::OperationRow>> {
    let store = Store::open_reader(stage.state())?;
    Ok(store.operations(&OperationFilter::default(), 1_000).await?)
}

/// How the last request of a person ended.
async fn last_outcome(stage: &Stage) -> Result<Option<Outcome>> {
    let rows = rows(stage).await?;
    Ok(rows.iter().rev().find(|row| row.kind != "merge").and_then(|row| row.outcome))
}

/// The end of the id of the last revert.
async fn last_revert(stage: &Stage) -> Result<Option<String>> {
    let rows = rows(stage).await?;
    Ok(rows.iter().rev().find(|row| row.kind == "revert").map(|row| short(row.id)))
}
