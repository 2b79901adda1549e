//! May it be? A pure judgement of a command by the state that the log tells, before anything is written.
//!
//! A request is judged by the tree *as it will be after the open requests*. What only an observation can tell
//! (an image in use, space, permissions) is judged when the operation is planned.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use uuid::Uuid;

use crate::command::{Command, Content, Create, Delete, Rejection, SnapshotRef, Unclear, reject};
use crate::domain::{Disk, Domain};
use crate::event::{
    Actor, DeleteScope, DeleteWhat, DomainChanged, DomainUnregisterRequested, Event, MemoryKind,
    OperationResolved, OperationRetried, Place, RequestTerms, SnapshotCreateRequested,
    SnapshotDeleteRequested, SnapshotEditRequested, SnapshotEdited, SnapshotHeld, SnapshotReleased,
    SnapshotRevertRequested, UnregisterWish,
};
use crate::ids::{DiskName, OperationId, SnapshotId, SnapshotName, is_visible};
use crate::near::nearest;
use crate::operation::{Code, Operation, Phase, Verdict};
use crate::project::DomainState;
use crate::reconcile::beside::Blocked;
use crate::tree::{Hold, Labels, Snapshot, Tree};

/// Longest description, and longest reason, in bytes.
pub const TEXT_BYTES_MAX: usize = 64 << 10;
/// Longest description of how a machine is reached, its commands included, in bytes of JSON.
pub const ACCESS_BYTES_MAX: usize = 64 << 10;
/// Most reasons of one delete.
pub const REASONS_MAX: usize = 64;
/// Most labels on one thing.
pub const LABELS_MAX: usize = 64;
/// Longest value of a label, in bytes.
pub const LABEL_BYTES_MAX: usize = 255;
/// What the name of a snapshot begins with that keeps what a revert gave up.
pub const KEPT_NAME: &str = "before-revert-";
/// Most things inside the images that one request may give up.
pub const GIVEN_UP_MAX: usize = 1_024;
/// Longest name of such a thing, in bytes: QEMU's own limit is 1023 for a bitmap.
pub const INSIDE_NAME_BYTES_MAX: usize = 1_023;
/// Most operations that may wait for one domain.
pub const OPEN_OPERATIONS_MAX: usize = 1_000;

/// What a judgement needs beside state and command.
#[derive(Clone, Debug)]
pub struct Ctx {
    /// Now.
    pub now: Timestamp,
    /// A fresh id, for the snapshot that may be made.
    pub fresh: Uuid,
    /// Who asks.
    pub actor: Actor,
    /// What goes with the request: its deadline, and the digest of the command if there is a key.
    pub terms: RequestTerms,
    /// What operations that need attention keep others from.
    pub blocked: Blocked,
}

/// Judges `command`.
///
/// # Errors
/// A [`Rejection`] that says what is wrong and what to do; nothing is to be written then.
pub fn decide(state: &DomainState, command: &Command, ctx: &Ctx) -> Result<Vec<Event>, Rejection> {
    // A removal that is stuck must still be settled, so these come before the domain is looked at.
    match command {
        Command::Retry(operation) => {
            needs_attention(state, *operation)?;
            return Ok(vec![OperationRetried {}.into()]);
        }
        Command::Resolve { operation, verdict, reason } => {
            return resolved(state, *operation, *verdict, reason);
        }
        Command::GivingUp { names, request } => return giving_up(state, names, request, ctx),
        _ => {}
    }
    let domain = registered(state)?;
    match command {
        Command::Create(_) | Command::Revert { .. } | Command::Delete(_) | Command::Unregister(_) => {
            domain_is_free(state, &ctx.blocked)?;
        }
        _ => {}
    }
    if state.open.len() >= OPEN_OPERATIONS_MAX {
        return Err(reject(
            Code::Invalid,
            format!("{OPEN_OPERATIONS_MAX} operations wait for this domain already"),
        ));
    }
    let tree = state.tree_after_open();
    let event = match command {
        Command::Create(create) => create_requested(state, domain, &tree, create, ctx)?.into(),
        Command::Revert { snapshot, run_state, keep } => {
            let snapshot = find(state, &tree, snapshot)?;
            not_lost(snapshot)?;
            let (snapshot, run_state, request) = (snapshot.id, *run_state, ctx.terms.clone());
            let kept = keep.then(|| kept(state, domain, &tree, ctx)).transpose()?;
            let keep = kept.as_ref().map(|kept| kept.snapshot);
            let revert = SnapshotRevertRequested { snapshot, run_state, keep, request };
            return Ok(kept.into_iter().map(Event::from).chain([revert.into()]).collect());
        }
        Command::Delete(delete) => delete_requested(state, domain, &tree, delete, ctx)?,
        Command::Edit { snapshot, name, description, labels } => {
            let edit = edited(state, &tree, snapshot, name.as_ref(), description.as_deref(), labels)?;
            name_fits(domain, name.as_ref())?;
            edit_event(domain, &tree, edit, ctx)?
        }
        Command::Hold { snapshot, reason, until } => held(state, &tree, snapshot, reason, *until, ctx)?,
        Command::Release { snapshot } => {
            let snapshot = find(state, &tree, snapshot)?;
            if snapshot.hold.is_none() {
                return Err(reject(Code::Invalid, format!("snapshot '{}' is not held", snapshot.name)));
            }
            SnapshotReleased { snapshot: snapshot.id }.into()
        }
        Command::Set { name, labels, access } => {
            if access.is_some() {
                nothing_in_hand(state)?;
            }
            if let Some(name) = name {
                name_is_seen("domain name", name.as_str())?;
            }
            let access_bytes = access.as_ref().map_or(0, |access| access.to_string().len());
            if access_bytes > ACCESS_BYTES_MAX {
                let message = format!("how a machine is reached has at most {ACCESS_BYTES_MAX} bytes in all");
                return Err(reject(Code::Invalid, message));
            }
            let labels = merged(&domain.labels, labels)?;
            DomainChanged { name: name.clone(), labels, ..DomainChanged::default() }.into()
        }
        Command::Unregister(UnregisterWish::Forget) => {
            return Err(reject(Code::Invalid, "a domain is forgotten without a request"));
        }
        Command::Unregister(wish) => unregister(state, *wish, ctx)?,
        Command::GivingUp { .. } | Command::Retry(_) | Command::Resolve { .. } => {
            return Err(reject(Code::Invalid, "this makes no request"));
        }
    };
    Ok(vec![event])
}

/// Judges a request for which something is given up.
fn giving_up(
    state: &DomainState,
    names: &BTreeSet<String>,
    request: &Command,
    ctx: &Ctx,
) -> Result<Vec<Event>, Rejection> {
    match request {
        Command::Create(_) | Command::Delete(_) | Command::Unregister(_) => {}
        _ => return Err(reject(Code::Invalid, "nothing can be given up for this request")),
    }
    if names.len() > GIVEN_UP_MAX || names.iter().any(|name| name.len() > INSIDE_NAME_BYTES_MAX) {
        let message = format!(
            "at most {GIVEN_UP_MAX} names of at most {INSIDE_NAME_BYTES_MAX} bytes can be given up at once"
        );
        return Err(reject(Code::Invalid, message));
    }
    let terms = RequestTerms { give_up: names.clone(), ..ctx.terms.clone() };
    decide(state, request, &Ctx { terms, ..ctx.clone() })
}

fn registered(state: &DomainState) -> Result<&Domain, Rejection> {
    let domain = state.domain.as_ref().filter(|_| state.registered);
    let domain = domain.ok_or_else(|| reject(Code::NotFound, "the domain is not registered"))?;
    let ending =
        state.open.iter().any(|open| matches!(open.request, crate::operation::Request::Unregister(_)));
    if ending {
        return Err(reject(Code::Invalid, format!("domain '{}' is being removed", domain.name))
            .hint("`snaptree op list` shows the operation, `snaptree recover` finishes it"));
    }
    Ok(domain)
}

/// Finds a snapshot in the tree as it will be; tells a snapshot that is going from one that never was.
fn find<'a>(state: &DomainState, tree: &'a Tree, wanted: &SnapshotRef) -> Result<&'a Snapshot, Rejection> {
    let unclear = match wanted.find(tree) {
        Ok(found) => return Ok(found),
        Err(unclear) => unclear,
    };
    let name = state.domain.as_ref().map_or("?", |domain| domain.name.as_str());
    let what = match wanted {
        SnapshotRef::Name(wanted) => format!("snapshot '{wanted}'"),
        SnapshotRef::There(wanted) => format!("snapshot '{wanted}'"),
        SnapshotRef::Id(id) => format!("snapshot {id}"),
        SnapshotRef::Current => {
            return Err(reject(Code::NotFound, format!("{name} has no current snapshot")));
        }
    };
    if let Unclear::Several(several) = &unclear {
        let message = format!("{what} of domain '{name}' could be any of {}", several.len());
        return Err(reject(Code::Invalid, message).hint(unclear.hint().unwrap_or_default()));
    }
    if wanted.find(&state.tree).is_ok() {
        return Err(reject(Code::NotFound, format!("{what} of domain '{name}' is being deleted")));
    }
    let hint = unclear.hint().unwrap_or_else(|| hint_at_near(name, tree, wanted));
    Err(reject(Code::NotFound, format!("{name} has no {what}")).hint(hint))
}

/// Which snapshot was perhaps meant, and where all of them are listed.
pub fn hint_at_near(domain: &str, tree: &Tree, wanted: &SnapshotRef) -> String {
    let near = match wanted {
        SnapshotRef::Name(name) => nearest(name.as_str(), tree.iter().map(|one| one.name.as_str())),
        SnapshotRef::There(name) => nearest(name, tree.iter().map(|one| one.name.as_str())),
        SnapshotRef::Id(_) | SnapshotRef::Current => None,
    };
    let meant = near.map(|near| format!("did you mean '{near}'? ")).unwrap_or_default();
    format!("{meant}`snaptree list '{domain}'` lists its snapshots")
}

fn not_lost(snapshot: &Snapshot) -> Result<(), Rejection> {
    if snapshot.lost {
        return Err(reject(
            Code::Drift,
            format!("the hypervisor no longer has snapshot '{}'", snapshot.name),
        ));
    }
    Ok(())
}

fn name_is_free(tree: &Tree, name: &SnapshotName, but: Option<SnapshotId>) -> Result<(), Rejection> {
    match tree.by_name(name) {
        Some(taken) if Some(taken.id) != but => {
            Err(reject(Code::Exists, format!("domain moment {name} already exists"))
                .hint("choose another name, or delete that snapshot first"))
        }
        _ => Ok(()),
    }
}

/// The seconds since the epoch, or the next number that is free (libvirt's default name), behind `prefix`.
fn free_name(tree: &Tree, prefix: &str, now: Timestamp) -> Result<SnapshotName, Rejection> {
    let taken: BTreeSet<&str> = tree.iter().map(|snapshot| snapshot.name.as_str()).collect();
    let mut number = now.as_second();
    while taken.contains(format!("{prefix}{number}").as_str()) {
        number += 1;
    }
    SnapshotName::new(format!("{prefix}{number}")).map_err(|error| reject(Code::Invalid, error.to_string()))
}

fn name_fits(domain: &Domain, name: Option<&SnapshotName>) -> Result<(), Rejection> {
    let most = domain.capabilities.name_bytes_max;
    match name {
        Some(name) if name.as_str().len() > most => Err(reject(
            Code::Invalid,
            format!("{} allows snapshot names of {most} bytes at most", domain.driver),
        )),
        Some(name) => name_is_seen("snapshot name", name.as_str()),
        None => Ok(()),
    }
}

/// The snapshot of what a revert gives up: with the memory, if the machine has any then and the driver can.
fn kept(
    state: &DomainState,
    domain: &Domain,
    tree: &Tree,
    ctx: &Ctx,
) -> Result<SnapshotCreateRequested, Rejection> {
    let can = &domain.capabilities;
    let content = if can.memory_external { Content::WithMemory } else { Content::Auto };
    let name = Some(free_name(tree, KEPT_NAME, ctx.now)?);
    let create = Create { name, content, ..Create::default() };
    let request = create_requested(state, domain, tree, &create, ctx)?;
    Ok(SnapshotCreateRequested { before_revert: true, ..request })
}

fn create_requested(
    state: &DomainState,
    domain: &Domain,
    tree: &Tree,
    create: &Create,
    ctx: &Ctx,
) -> Result<SnapshotCreateRequested, Rejection> {
    let capabilities = &domain.capabilities;
    let name = match &create.name {
        Some(name) => name.clone(),
        None => free_name(tree, "", ctx.now)?,
    };
    name_is_free(tree, &name, None)?;
    name_fits(domain, Some(&name))?;
    text_fits("description", create.description.as_deref().unwrap_or_default())?;
    labels_fit(&create.labels)?;
    let depth = tree.current().map_or(0, |current| tree.ancestors(current.id).count() + 1);
    if depth >= capabilities.depth_max {
        return Err(reject(
            Code::Unsupported,
            format!(
                "the chain would be deeper than the {} snapshots that {} can take",
                capabilities.depth_max, domain.driver
            ),
        )
        .hint("delete some snapshots of the chain; their changes are merged"));
    }
    let place = place_of(state, domain, create.place)?;
    let memory = memory_kind(domain, place, create.content)?;
    let disks = selected_disks(domain, create.disks.as_ref())?;
    if memory == MemoryKind::External && disks.len() < domain.snapshotted().count() {
        return Err(reject(Code::Invalid, "the memory goes with all disks of the machine or with none")
            .hint("leave out --memory, or the choice of disks"));
    }
    if create.quiesce {
        may_quiesce(domain, memory)?;
    }
    Ok(SnapshotCreateRequested {
        snapshot: SnapshotId::from_uuid(ctx.fresh),
        name,
        description: create.description.clone().filter(|text| !text.is_empty()),
        labels: create.labels.clone(),
        disks,
        memory,
        place,
        quiesce: create.quiesce,
        before_revert: false,
        request: ctx.terms.clone(),
    })
}

/// A domain keeps all its snapshots in one way; one that is asked for without a word about it goes where the others are.
fn place_of(state: &DomainState, domain: &Domain, wanted: Place) -> Result<Place, Rejection> {
    match (wanted, state.place()) {
        (Place::Internal, Some(Place::Usual)) => Err(reject(
            Code::Unsupported,
            format!(
                "domain '{}' has external snapshots, and the two kinds are not mixed in one domain",
                domain.name
            ),
        )
        .hint("leave out --internal, or delete its snapshots first")),
        (Place::Usual, Some(Place::Internal)) => Ok(Place::Internal),
        (wanted, _) => Ok(wanted),
    }
}

/// Whether and where the memory is to be kept. Inside an image it is kept wherever there is any; that a machine which
/// is off has none is known when it is planned.
fn memory_kind(domain: &Domain, place: Place, content: Content) -> Result<MemoryKind, Rejection> {
    let can = &domain.capabilities;
    let unsupported = |message: String, hint: &str| Err(reject(Code::Unsupported, message).hint(hint));
    match (place, content) {
        (Place::Internal, _) if !can.internal => unsupported(
            format!("snapshots of domain '{}' cannot be kept inside its disk images", domain.name),
            "leave out --internal",
        ),
        (_, Content::DisksOnly) => Ok(MemoryKind::No),
        (Place::Internal, Content::Auto | Content::WithMemory) => Ok(MemoryKind::Internal),
        (Place::Usual, Content::WithMemory) if can.memory_external => Ok(MemoryKind::External),
        (Place::Usual, Content::Auto | Content::WithMemory) if can.memory => Ok(MemoryKind::Internal),
        (Place::Usual, Content::Auto) => Ok(MemoryKind::No),
        (Place::Usual, Content::WithMemory) if can.internal => unsupported(
            format!("domain '{}' can keep its memory only inside its disk images", domain.name),
            "add --internal, or leave out --memory",
        ),
        (Place::Usual, Content::WithMemory) => unsupported(
            format!("domain '{}' cannot be snapshotted with its memory", domain.name),
            "leave out --memory; a QEMU machine that Snaptree itself starts (domain add --launch) can be",
        ),
    }
}

/// libvirt: `VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE` needs `VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY`.
fn may_quiesce(domain: &Domain, memory: MemoryKind) -> Result<(), Rejection> {
    if memory != MemoryKind::No {
        return Err(reject(Code::Invalid, "quiesce requires disk-only: memory that is kept needs no rest")
            .hint("add --disk-only, or leave out --quiesce"));
    }
    if !domain.capabilities.quiesce {
        let message = format!(
            "domain '{}' cannot be quiesced: it was registered without a way to ask its guest for it",
            domain.name
        );
        return Err(reject(Code::Unsupported, message).hint(
            "register it with its guest agent's socket (domain add --agent, with the drivers that have it), leave out \
             quiesce, or freeze and thaw by a policy's hooks",
        ));
    }
    Ok(())
}

fn selected_disks(
    domain: &Domain,
    wanted: Option<&BTreeSet<DiskName>>,
) -> Result<BTreeSet<DiskName>, Rejection> {
    let all: BTreeSet<DiskName> = domain.snapshotted().map(|disk| disk.name.clone()).collect();
    let Some(wanted) = wanted else { return Ok(all) };
    let left_out = |disk: &&Disk| wanted.contains(&disk.name) && disk.left_out.is_some();
    if let Some(Disk { name, left_out: Some(why), .. }) = domain.disks.iter().find(left_out) {
        return Err(reject(Code::Unsupported, format!("disk '{name}' is no part of snapshots ({why})")));
    }
    if let Some(unknown) = wanted.difference(&all).next() {
        return Err(reject(Code::NotFound, format!("no disk named '{unknown}'")));
    }
    if wanted.is_empty() {
        return Err(reject(Code::Invalid, "nothing selected for snapshot"));
    }
    if wanted.len() < all.len() && !domain.capabilities.disk_selection {
        return Err(reject(Code::Unsupported, format!("{} snapshots all disks or none", domain.driver)));
    }
    Ok(wanted.clone())
}

fn delete_requested(
    state: &DomainState,
    domain: &Domain,
    tree: &Tree,
    delete: &Delete,
    ctx: &Ctx,
) -> Result<Event, Rejection> {
    if delete.scope == DeleteScope::ChildrenOnly && !domain.capabilities.children_only {
        return Err(reject(Code::Unsupported, format!("{} cannot delete the children alone", domain.driver)));
    }
    if delete.what == DeleteWhat::Metadata && !domain.capabilities.metadata_only {
        return Err(reject(
            Code::Unsupported,
            format!("{} cannot forget a snapshot and keep its data", domain.driver),
        ));
    }
    let mut named = Vec::new();
    let mut going = BTreeSet::new();
    for wanted in &delete.snapshots {
        let snapshot = find(state, tree, wanted)?;
        if !named.contains(&snapshot.id) {
            named.push(snapshot.id);
        }
        if delete.scope != DeleteScope::Named {
            going.extend(tree.descendants(snapshot.id));
        }
        if delete.scope != DeleteScope::ChildrenOnly {
            going.insert(snapshot.id);
        }
    }
    if named.is_empty() {
        return Err(reject(Code::Invalid, "no snapshot is named"));
    }
    for id in &going {
        refuse_held(tree, *id, ctx.now)?;
    }
    if delete.reasons.len() > REASONS_MAX {
        return Err(reject(Code::Invalid, format!("a delete has at most {REASONS_MAX} reasons")));
    }
    for reason in &delete.reasons {
        text_fits("reason", reason)?;
    }
    Ok(SnapshotDeleteRequested {
        snapshots: children_first(tree, &going),
        named,
        scope: delete.scope,
        what: delete.what,
        merge: delete.merge,
        reasons: delete.reasons.clone(),
        request: ctx.terms.whenever(),
    }
    .into())
}

/// Orders snapshots so that each comes before its parent; deepest first.
fn children_first(tree: &Tree, ids: &BTreeSet<SnapshotId>) -> Vec<SnapshotId> {
    let mut depths: BTreeMap<SnapshotId, usize> = BTreeMap::new();
    for id in ids {
        let mut path = vec![*id];
        path.extend(
            tree.ancestors(*id).map(|snapshot| snapshot.id).take_while(|id| !depths.contains_key(id)),
        );
        let known = path.last().and_then(|top| tree.get(*top)).and_then(|top| top.parent);
        let depth = known.and_then(|parent| depths.get(&parent)).map_or(0, |depth| depth + 1);
        depths.extend(path.into_iter().rev().enumerate().map(|(below, id)| (id, depth + below)));
    }
    let mut ordered: Vec<SnapshotId> = ids.iter().copied().collect();
    ordered.sort_by_key(|id| (std::cmp::Reverse(depths.get(id).copied().unwrap_or(0)), *id));
    ordered
}

fn refuse_held(tree: &Tree, id: SnapshotId, now: Timestamp) -> Result<(), Rejection> {
    let Some(snapshot) = tree.get(id) else { return Ok(()) };
    match &snapshot.hold {
        Some(hold) if hold.in_force(now) => {
            let until = hold.until.map_or_else(String::new, |until| format!(" until {until}"));
            Err(reject(
                Code::Held,
                format!("snapshot '{}' is held by {}{until}: {}", snapshot.name, hold.by, hold.reason),
            )
            .hint("`snaptree release` ends the hold"))
        }
        _ => Ok(()),
    }
}

fn edited(
    state: &DomainState,
    tree: &Tree,
    wanted: &SnapshotRef,
    name: Option<&SnapshotName>,
    description: Option<&str>,
    labels: &Labels,
) -> Result<SnapshotEdited, Rejection> {
    let snapshot = find(state, tree, wanted)?;
    if !state.tree.contains(snapshot.id) {
        return Err(reject(Code::Invalid, format!("snapshot '{}' is still being taken", snapshot.name)));
    }
    if let Some(name) = name {
        name_is_free(tree, name, Some(snapshot.id))?;
    }
    text_fits("description", description.unwrap_or_default())?;
    let labels = merged(&snapshot.labels, labels)?;
    if name.is_none() && description.is_none() && labels.is_none() {
        return Err(reject(Code::Invalid, "nothing to change").hint("give --name, --description or --label"));
    }
    let description = description.map(str::to_owned);
    Ok(SnapshotEdited { snapshot: snapshot.id, name: name.cloned(), real_name: None, description, labels })
}

/// Where the hypervisor keeps names, a change of them is an operation; all else is carried out by being written.
fn edit_event(domain: &Domain, tree: &Tree, edit: SnapshotEdited, ctx: &Ctx) -> Result<Event, Rejection> {
    let kept_there = domain.capabilities.keeps_names && (edit.name.is_some() || edit.description.is_some());
    if !kept_there || tree.get(edit.snapshot).is_none_or(|snapshot| snapshot.lost) {
        return Ok(edit.into());
    }
    if ctx.blocked == Blocked::Domain {
        return Err(reject(Code::NeedsAttention, "another operation of this domain needs attention first")
            .hint("`snaptree op list --open` names it; then `snaptree op retry` or `snaptree op resolve`"));
    }
    Ok(SnapshotEditRequested { edit, request: ctx.terms.whenever() }.into())
}

fn held(
    state: &DomainState,
    tree: &Tree,
    wanted: &SnapshotRef,
    reason: &str,
    until: Option<Timestamp>,
    ctx: &Ctx,
) -> Result<Event, Rejection> {
    let snapshot = find(state, tree, wanted)?;
    if !state.tree.contains(snapshot.id) {
        return Err(reject(Code::Invalid, format!("snapshot '{}' is still being taken", snapshot.name)));
    }
    text_fits("reason", reason)?;
    if reason.trim().is_empty() {
        return Err(reject(Code::Invalid, "a hold needs a reason").hint("--reason 'what it is kept for'"));
    }
    if until.is_some_and(|until| until <= ctx.now) {
        return Err(
            reject(Code::Invalid, "the hold would have ended already").hint("--until takes a time to come")
        );
    }
    let hold = Hold { reason: reason.to_owned(), until, by: ctx.actor.clone() };
    Ok(SnapshotHeld { snapshot: snapshot.id, hold }.into())
}

fn nothing_open(state: &DomainState) -> Result<(), Rejection> {
    if state.open.is_empty() {
        return Ok(());
    }
    Err(reject(Code::Invalid, "operations of this domain are still open")
        .hint("`snaptree op list` shows them, `snaptree recover` finishes them"))
}

/// Steps in hand go by how the machine was reached when they were planned. One that needs attention may need it for
/// just that, and is resolved anew before it goes on; what of it the driver must not lose, the driver knows.
fn nothing_in_hand(state: &DomainState) -> Result<(), Rejection> {
    let rests =
        |operation: &&Operation| matches!(operation.phase, Phase::NeedsAttention { .. } | Phase::Requested);
    let Some(open) = state.open.iter().find(|operation| !rests(operation)) else { return Ok(()) };
    let message = format!(
        "the {} {} of this domain is in hand, and goes by how the machine was reached when it was planned",
        open.request.kind(),
        open.id
    );
    Err(reject(Code::Invalid, message)
        .hint("`snaptree recover` finishes it, or finds that it needs attention: then this can be changed"))
}

fn unregister(state: &DomainState, wish: UnregisterWish, ctx: &Ctx) -> Result<Event, Rejection> {
    nothing_open(state)?;
    let stands = !state.tree.is_empty() || !state.tombstones.is_empty();
    let wish = match wish {
        UnregisterWish::Untouched if stands => {
            let count = state.tree.len() + state.tombstones.len();
            return Err(reject(Code::Invalid, format!("{count} snapshots or their remains still stand"))
                .hint("--flatten puts one plain image back and ends them, --keep-layers leaves every file as it is"));
        }
        // What was adopted is put back; without snapshots that is a rename.
        UnregisterWish::Untouched if state.layers.generation.is_some() => UnregisterWish::Flatten,
        wish => wish,
    };
    if wish == UnregisterWish::Flatten {
        for snapshot in state.tree.iter() {
            refuse_held(&state.tree, snapshot.id, ctx.now)?;
        }
    }
    Ok(DomainUnregisterRequested { wish, request: ctx.terms.whenever() }.into())
}

/// While an operation can go neither on nor back, nobody knows what another one upon the same layers would build upon.
/// Which layers a request touches is known when it is planned; here only what blocks all of them is turned down.
fn domain_is_free(state: &DomainState, blocked: &Blocked) -> Result<(), Rejection> {
    let stuck = state.open.iter().find(|operation| matches!(operation.phase, Phase::NeedsAttention { .. }));
    match stuck {
        Some(stuck) if *blocked == Blocked::Domain => Err(reject(
            Code::NeedsAttention,
            format!("the {} {} of this domain needs attention first", stuck.request.kind(), stuck.id),
        )
        .hint("`snaptree op show` tells why; then `snaptree op retry` or `snaptree op resolve`")),
        _ => Ok(()),
    }
}

fn needs_attention(state: &DomainState, operation: OperationId) -> Result<&Operation, Rejection> {
    match state.operation(operation) {
        Some(found) if matches!(found.phase, Phase::NeedsAttention { .. }) => Ok(found),
        Some(_) => Err(reject(Code::Invalid, format!("operation {operation} does not need attention"))),
        None => Err(reject(Code::NotFound, format!("operation {operation} is not open"))),
    }
}

fn resolved(
    state: &DomainState,
    operation: OperationId,
    verdict: Verdict,
    reason: &str,
) -> Result<Vec<Event>, Rejection> {
    let found = needs_attention(state, operation)?;
    text_fits("reason", reason)?;
    if reason.trim().is_empty() {
        return Err(reject(Code::Invalid, "a verdict needs a reason").hint("--reason 'what was seen'"));
    }
    let event = OperationResolved { verdict, reason: reason.to_owned(), changes: Vec::new() }.into();
    if found.phase.next(&event, found.steps.len()).is_none() {
        return Err(reject(Code::Invalid, "no step of it is in hand that could be done or not done")
            .hint("--abandon lets it end here"));
    }
    Ok(vec![event])
}

/// Whether a reader would see the name. Judged here and not by the name's type, since an old log may have such names.
pub(crate) fn name_is_seen(what: &str, name: &str) -> Result<(), Rejection> {
    match is_visible(name) {
        true => Ok(()),
        false => Err(reject(Code::Invalid, format!("a {what} must have a character that can be seen"))),
    }
}

fn text_fits(what: &str, text: &str) -> Result<(), Rejection> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(reject(Code::Invalid, format!("a {what} has at most {TEXT_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// Checks labels as they are given by a user.
///
/// # Errors
/// Too many, too long, or with control characters.
pub fn labels_fit(labels: &Labels) -> Result<(), Rejection> {
    if labels.len() > LABELS_MAX {
        return Err(reject(Code::Invalid, format!("at most {LABELS_MAX} labels are allowed")));
    }
    match labels
        .iter()
        .find(|(_, value)| value.len() > LABEL_BYTES_MAX || value.chars().any(char::is_control))
    {
        Some((key, _)) => Err(reject(
            Code::Invalid,
            format!("label '{key}': a value has at most {LABEL_BYTES_MAX} bytes and no control characters"),
        )),
        None => Ok(()),
    }
}

/// The labels after `change`, whose empty values remove; `None` if nothing is to change.
fn merged(labels: &Labels, change: &Labels) -> Result<Option<Labels>, Rejection> {
    if change.is_empty() {
        return Ok(None);
    }
    let mut merged = labels.clone();
    for (key, value) in change {
        if value.is_empty() {
            merged.remove(key);
        } else {
            merged.insert(key.clone(), value.clone());
        }
    }
    labels_fit(&merged)?;
    Ok(Some(merged))
}
