//! `list`, `show` and `domain list` for people.

use std::fmt::Write as _;

use snaptree_engine::domain::RunState;
use snaptree_engine::event::MemoryKind;
use snaptree_engine::layer::MemoryWay;
use snaptree_engine::reconcile::merge::human_bytes;
use snaptree_engine::tree::Labels;

use super::table::{Cell, table};
use super::text::{Look, safe};
use super::view::{DomainView, FreesView, ListView, MachineView, PhaseWord, ShowView, SnapshotView};
use crate::wire::LeftOut;

/// The table of snapshots.
pub fn list(view: &ListView, look: &Look) -> String {
    if view.snapshots.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<Cell>> = view.snapshots.iter().map(|snapshot| row(snapshot, look)).collect();
    table(&["", "NAME", "CREATED", "STATE", "PARENT", "SIZE", "FREES", "NOTES", "DESCRIPTION"], &rows, look)
}

fn row(snapshot: &SnapshotView, look: &Look) -> Vec<Cell> {
    let paint = look.paint;
    let name = safe(&snapshot.name);
    let gone = snapshot.phase == PhaseWord::Tombstone;
    let created = snapshot.created.or(snapshot.deleted).map(|at| look.time(at)).unwrap_or_default();
    vec![
        Cell::painted(if snapshot.current { "*" } else { "" }, |text| paint.good(text)),
        Cell::painted(&name, |text| if gone { paint.dim(text) } else { paint.name(text) }),
        Cell::plain(created),
        Cell::painted(snapshot.state.unwrap_or("deleted"), |text| {
            if gone { paint.dim(text) } else { text.to_owned() }
        }),
        Cell::plain(snapshot.parent.as_deref().map(|parent| safe(parent).into_owned()).unwrap_or_default()),
        Cell::plain(snapshot.allocated.map(human_bytes).unwrap_or_default()),
        Cell::plain(snapshot.frees.map(freed).unwrap_or_default()),
        Cell::painted(&notes(snapshot), |text| paint.dim(text)),
        Cell::plain(first_line(snapshot.description.as_deref().unwrap_or_default())),
    ]
}

/// The first line of a text, with a sign if there are more.
fn first_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().map(safe).unwrap_or_default();
    if lines.next().is_some() { format!("{first} …") } else { first.into_owned() }
}

/// What a delete frees, in words: `3.0 MiB`, `up to 3.0 MiB`, `1.0 MiB to 3.0 MiB`.
pub fn freed(frees: FreesView) -> String {
    let most = human_bytes(frees.at_most);
    match u64::try_from(frees.at_least) {
        Ok(least) if least >= frees.at_most => most,
        Ok(least) if least > 0 => format!("{} to {most}", human_bytes(least)),
        _ => format!("up to {most}"),
    }
}

/// What more a delete may take for good, in words; none where it takes nothing.
pub fn taken(frees: FreesView) -> Option<String> {
    let more =
        frees.at_least.checked_neg().and_then(|more| u64::try_from(more).ok()).filter(|more| *more > 0)?;
    Some(format!("or takes up to {} more, since its data is copied into each child", human_bytes(more)))
}

/// Held, labels, and whatever is unusual.
pub fn notes(snapshot: &SnapshotView) -> String {
    let mut notes = Vec::new();
    if snapshot.held {
        notes.push("held".to_owned());
    }
    if let Some(real) = &snapshot.real_name {
        notes.push(format!("'{}' at the hypervisor", safe(real)));
    }
    match snapshot.phase {
        PhaseWord::Ready => {}
        PhaseWord::Deleting => notes.push("being deleted".to_owned()),
        PhaseWord::Lost => notes.push("lost: the hypervisor no longer has it".to_owned()),
        PhaseWord::Tombstone => {
            let reason = snapshot.reason.as_deref().unwrap_or_default();
            notes.push(format!("data still there: {}", safe(reason)));
        }
    }
    notes.extend(label_words(&snapshot.labels));
    notes.join("  ")
}

fn label_words(labels: &Labels) -> Vec<String> {
    labels.iter().map(|(key, value)| format!("{key}={}", safe(value))).collect()
}

/// One snapshot, line by line.
pub fn show(view: &ShowView, look: &Look) -> String {
    let snapshot = &view.snapshot;
    let mut lines: Vec<(&str, String)> = vec![
        ("Name", look.paint.bold(safe(&snapshot.name))),
        ("Domain", safe(&view.domain).into_owned()),
        ("Id", snapshot.id.to_string()),
    ];
    if let Some(real) = &snapshot.real_name {
        lines.insert(1, ("Real name", safe(real).into_owned()));
    }
    if let Some(text) = &snapshot.description {
        lines.push(("Description", text.lines().map(safe).collect::<Vec<_>>().join("\n               ")));
    }
    lines.push(("Current", if snapshot.current { "yes" } else { "no" }.to_owned()));
    lines.push(("State", snapshot.state.unwrap_or("-").to_owned()));
    let memory = match view.memory {
        MemoryKind::No => "not kept",
        MemoryKind::Internal => "inside the image",
        MemoryKind::External => "in a file",
    };
    let memory = match &view.memory_file {
        Some(kept) => {
            let how = match kept.way {
                MemoryWay::Background => "while the guest ran on",
                MemoryWay::Stopped => "while the guest was stopped",
            };
            let file = kept.file.display().to_string();
            format!("in {} ({}), written {how}", safe(&file), human_bytes(kept.size))
        }
        None => memory.to_owned(),
    };
    lines.push(("Memory", memory));
    if let Some(created) = snapshot.created {
        lines.push(("Created", format!("{} ({})", look.time(created), look.age(created))));
    }
    let made_by = view.made_by.to_string();
    lines.push(match view.operation {
        Some(operation) => ("Made by", format!("{} in operation {operation}", safe(&made_by))),
        None => ("Made by", "somebody else at the hypervisor; adopted".to_owned()),
    });
    lines.push(("Parent", snapshot.parent.as_deref().map_or("-".to_owned(), |name| safe(name).into_owned())));
    let children: Vec<_> = snapshot.children.iter().map(|name| safe(name)).collect();
    lines.push(("Children", if children.is_empty() { "-".to_owned() } else { children.join(", ") }));
    if !snapshot.labels.is_empty() {
        lines.push(("Labels", label_words(&snapshot.labels).join("  ")));
    }
    if let Some(hold) = view.hold.as_ref().filter(|_| snapshot.held) {
        let until = hold.until.map_or_else(String::new, |until| format!(" until {}", look.time(until)));
        lines.push(("Held", format!("by {}{until}: {}", safe(&hold.by.to_string()), safe(&hold.reason))));
    }
    if let Some(bytes) = snapshot.allocated {
        lines.push(("Size", human_bytes(bytes)));
    }
    if let Some(frees) = snapshot.frees {
        let taken = taken(frees).map(|taken| format!(", {taken}")).unwrap_or_default();
        lines.push(("Frees", format!("{} if it is deleted{taken}", freed(frees))));
    }
    for medium in &view.left_out {
        lines.push(("Left out", format!("{}, which a revert leaves as it is", safe(medium))));
    }
    for disk in &view.disks {
        let size = disk.allocated.map(|bytes| format!(" ({} used)", human_bytes(bytes))).unwrap_or_default();
        let file = disk.file.as_ref().map_or_else(String::new, |file| format!(" in {}", file.display()));
        lines.push(("Disk", format!("{}{}{size}", disk.name, safe(&file))));
    }
    let mut out = String::new();
    for (head, text) in lines {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{:<14} {text}", format!("{head}:"));
    }
    out
}

/// The table of domains.
pub fn domains(views: &[DomainView], look: &Look) -> String {
    if views.is_empty() {
        return String::new();
    }
    let rows: Vec<Vec<Cell>> = views
        .iter()
        .map(|view| {
            let open = view.open_operations.len();
            vec![
                Cell::painted(&safe(view.domain.name.as_str()), |text| look.paint.name(text)),
                Cell::plain(view.domain.driver.as_str()),
                Cell::plain(view.snapshots.to_string()),
                Cell::plain(view.current.as_deref().map(|name| safe(name).into_owned()).unwrap_or_default()),
                Cell::plain(if open == 0 { String::new() } else { open.to_string() }),
                Cell::painted(&label_words(&view.domain.labels).join("  "), |text| look.paint.dim(text)),
            ]
        })
        .collect();
    table(&["NAME", "DRIVER", "SNAPSHOTS", "CURRENT", "OPEN", "LABELS"], &rows, look)
}

/// A domain that could not be looked at, as a line among those of others.
pub fn left_out(left: &LeftOut, look: &Look) -> String {
    let LeftOut { domain, error } = left;
    let name = look.paint.name(safe(domain));
    let why = look.paint.bad(format!("could not be looked at: {}", safe(&error.message)));
    let hint = error.hint.as_deref().map(|hint| format!("  hint: {}\n", safe(hint))).unwrap_or_default();
    format!("{name}: {why}\n{hint}")
}

/// Who runs a machine, how it is reached, and whether it runs.
fn machine_words(machine: &MachineView) -> String {
    let by = match machine.run_by {
        "managed" => "run by Snaptree",
        "commands" => "run by commands",
        "attached" => "run by somebody else, reached by QMP",
        _ => "run by somebody else, worked on only while it is off",
    };
    let socket = machine.qmp.as_ref().map(|socket| format!(" ({})", safe(&socket.display().to_string())));
    let now = match machine.now {
        Some(RunState::Running) => "running",
        Some(RunState::Paused) => "paused",
        Some(RunState::Off) => "off",
        None => "whether it runs cannot be seen",
    };
    format!("{by}{}; {now}", socket.unwrap_or_default())
}

/// One domain, line by line.
pub fn domain(view: &DomainView, look: &Look) -> String {
    let domain = &view.domain;
    let mut out = String::new();
    let mut line = |head: &str, text: String| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{:<14} {text}", format!("{head}:"));
    };
    line("Name", look.paint.bold(safe(domain.name.as_str())));
    line("Id", domain.id.to_string());
    line("Driver", domain.driver.to_string());
    for disk in &domain.disks {
        let path = disk.path.as_ref().map_or_else(String::new, |path| format!(" {}", path.display()));
        let size = human_bytes(disk.virtual_size_bytes);
        let left_out = disk.left_out.as_deref().map(|why| format!(", no part of snapshots ({})", safe(why)));
        let left_out = look.paint.warn(left_out.unwrap_or_default());
        line("Disk", format!("{}{} ({size}){left_out}", disk.name, safe(&path)));
    }
    if let Some(machine) = &view.machine {
        line("Machine", machine_words(machine));
        if let Some(agent) = &machine.agent {
            line("Guest agent", safe(&agent.display().to_string()).into_owned());
        }
    }
    if !domain.labels.is_empty() {
        line("Labels", label_words(&domain.labels).join("  "));
    }
    line("Snapshots", view.snapshots.to_string());
    line("Current", view.current.as_deref().map_or("-".to_owned(), |name| safe(name).into_owned()));
    if view.tombstones > 0 {
        line("Tombstones", format!("{} (deleted, data still there: list --all)", view.tombstones));
    }
    for finding in &view.drift {
        line("Drift", look.paint.bad(safe(&finding.to_string())));
    }
    for operation in &view.open_operations {
        line("Open", operation.to_string());
    }
    for layer in &view.layers {
        let file = layer.file.display().to_string();
        line("Layer", format!("{} {:<9} {}", layer.disk, layer.role, safe(&file)));
    }
    for memory in &view.memory {
        let file = memory.file.display().to_string();
        line("Memory", format!("{} ({})", safe(&file), human_bytes(memory.size)));
    }
    out
}
