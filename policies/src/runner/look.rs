//! What retention looks at, from what the log tells of a domain.

use std::collections::BTreeSet;

use jiff::Timestamp;
use snaptree_engine::operation::Request;
use snaptree_engine::project::DomainState;
use snaptree_engine::{PolicyName, SnapshotId};
use uuid::Uuid;

use crate::file::Policy;
use crate::retention::{Candidate, Depth, File, Node, Plan, Shape, Standing, Uncounted};

/// The domain's snapshots as `policy` sees them at `now`.
pub fn candidates(state: &DomainState, policy: &PolicyName, now: Timestamp) -> Vec<Candidate> {
    let wanted: BTreeSet<SnapshotId> = state
        .open
        .iter()
        .filter(|open| matches!(open.request, Request::Delete(_) | Request::Revert(_)))
        .flat_map(|open| open.request.snapshots())
        .collect();
    let candidate = |snapshot| {
        let mut candidate = Candidate::of(snapshot, policy, now);
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
    }
}

/// What retention would do to the domain at `now`: what `policy plan` prints and a run carries out.
pub fn plan_of(policy: &Policy, state: &DomainState, now: Timestamp) -> Plan {
    policy.plan(&candidates(state, &policy.name, now), &shape(state), now)
}

/// What the machine's disk stands upon once `policy` has taken one more snapshot of it at `now`, and retention has
/// followed.
pub fn depth_with_one_more(policy: &Policy, state: &DomainState, now: Timestamp) -> Depth {
    let one_more = SnapshotId::from_uuid(Uuid::max());
    let mut candidates = candidates(state, &policy.name, now);
    candidates.push(Candidate { snapshot: one_more, created: now, standing: Standing::Counted });
    let mut shape = shape(state);
    let bytes = std::mem::take(&mut shape.active_bytes);
    shape.nodes.insert(one_more, Node { parent: shape.current, bytes, file: File::Layer });
    shape.current = Some(one_more);
    policy.plan(&candidates, &shape, now).depth
}
