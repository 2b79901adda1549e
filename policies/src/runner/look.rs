//! What retention looks at, from what the log tells of a domain.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use jiff::Timestamp;
use snaptree_engine::operation::Request;
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{OperationId, PolicyName, SnapshotId};
use uuid::Uuid;

use crate::file::Policy;
use crate::retention::{Candidate, Depth, File, Node, Plan, Shape, Standing, Trust, Uncounted};

/// The domain's snapshots as `policy` sees them at `now`.
pub fn candidates(state: &DomainState, policy: &PolicyName, now: Timestamp) -> Vec<Candidate> {
    let wanted: BTreeSet<SnapshotId> = state
        .open
        .iter()
        .filter(|open| matches!(open.request, Request::Delete(_) | Request::Revert(_)))
        .flat_map(|open| open.request.snapshots())
        .collect();
    let candidate = |snapshot| {
        let snapshot: &Snapshot = snapshot;
        let mut candidate = Candidate::of(snapshot, state.dated.get(&snapshot.id).copied(), policy, now);
        if wanted.contains(&snapshot.id) && !matches!(candidate.standing, Standing::Uncounted(_)) {
            candidate.standing = Standing::Uncounted(Uncounted::Unfinished);
        }
        candidate
    };
    state.tree.iter().map(candidate).collect()
}

/// The domain's tree with the sizes of its files, as far as the log knows them.
pub fn shape(state: &DomainState) -> Shape {
    let layers = |id: SnapshotId| {
        state.layers.disks.values().filter_map(move |disk| disk.layer_of(id).map(|(_, layer)| layer))
    };
    let node = |id: SnapshotId, parent: Option<SnapshotId>| {
        let registered = layers(id).any(|layer| layer.registered);
        Node {
            parent,
            bytes: layers(id).filter_map(|layer| layer.stamp).map(|stamp| stamp.size_bytes).sum(),
            file: if registered { File::Registered } else { File::Layer },
        }
    };
    let nodes = state.tree.iter().map(|snapshot| (snapshot.id, node(snapshot.id, snapshot.parent)));
    let active = state.layers.disks.values().filter_map(|disk| disk.active_layer()?.1.stamp);
    Shape {
        nodes: nodes.collect(),
        current: state.tree.current().map(|snapshot| snapshot.id),
        active_bytes: active.map(|stamp| stamp.size_bytes).sum(),
        depth_max: depth_max(state),
    }
}

/// How many snapshots the domain's disks can stand upon for long.
pub fn depth_max(state: &DomainState) -> Option<NonZeroU32> {
    let takes = state.domain.as_ref()?.capabilities.depth_max;
    // Where layers are files, the one that the machine writes to is one of them.
    let active = usize::from(!state.layers.disks.is_empty());
    NonZeroU32::new(u32::try_from(takes.saturating_sub(1 + active)).ok()?)
}

/// Whom a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// Someone who wants to know.
    Show,
    /// The run whose snapshot that operation took.
    Run(OperationId),
}

/// What retention would do to the domain at `now`: what `policy plan` prints and a run carries out.
pub fn plan_of(policy: &Policy, state: &DomainState, now: Timestamp, plan_for: For, trust: Trust) -> Plan {
    let mut candidates = candidates(state, &policy.name, now);
    if let For::Run(operation) = plan_for {
        let own = state.tree.iter().find(|snapshot| snapshot.made_in == Some(operation));
        let own = own.and_then(|own| candidates.iter_mut().find(|found| found.snapshot == own.id));
        if let Some(own) = own.filter(|own| own.standing == Standing::Counted) {
            own.standing = Standing::Own;
        }
    }
    policy.plan(&candidates, &shape(state), now, trust)
}

/// What the machine's disk stands upon once `policy` has taken one more snapshot of it at `now`, and retention has
/// followed.
pub fn depth_with_one_more(policy: &Policy, state: &DomainState, now: Timestamp) -> Depth {
    let one_more = SnapshotId::from_uuid(Uuid::max());
    let mut candidates = candidates(state, &policy.name, now);
    let standing = Standing::Own;
    candidates.push(Candidate { snapshot: one_more, created: now, seq: u64::MAX, standing });
    let mut shape = shape(state);
    let bytes = std::mem::take(&mut shape.active_bytes);
    shape.nodes.insert(one_more, Node { parent: shape.current, bytes, file: File::Layer });
    shape.current = Some(one_more);
    policy.plan(&candidates, &shape, now, Trust::Sound).depth
}
