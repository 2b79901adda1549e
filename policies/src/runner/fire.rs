//! A run's requests for snapshots.

use jiff::Timestamp;
use snaptree_engine::command::{Command, Content, Create};
use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::{
    Actor, Event, Origin, Place, PolicyFired, PolicyRequest, PolicyRun, PolicySkipped, RunPart,
};
use snaptree_engine::log::LogError;
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::together::{Beside, Decided, Wanted};
use snaptree_engine::{DomainId, NameError, OperationId, SnapshotName, StreamId};

use super::book::{Chosen, actor};
use super::look::{depth_max, depth_with_one_more};
use super::project::PolicyState;
use crate::file::Policy;
use crate::retention::Depth;

/// What a run asked of one domain.
#[derive(Clone, Debug, PartialEq)]
pub struct Ran {
    /// The domain.
    pub domain: Chosen,
    /// The request.
    pub request: PolicyRequest,
}

impl Ran {
    /// The operation that the request became.
    pub fn operation(&self) -> Option<OperationId> {
        self.request.operation
    }
}

/// Who a policy's requests come from.
pub(super) fn requester(state: &PolicyState, origin: &Origin) -> Requester {
    Requester { actor: actor(&state.name), origin: origin.clone() }
}

/// Beside the stream of a policy that was thought over as `state` has it; `matters` says what changes that.
pub(super) fn beside<'a>(
    state: &PolicyState,
    matters: &'a (dyn Fn(&Event) -> bool + Send + Sync),
) -> Beside<'a> {
    Beside { stream: StreamId::Policy(state.name.clone()), version: state.version, matters }
}

/// Whether an event only tells that a policy is at work.
pub(super) fn is_of_a_run(event: &Event) -> bool {
    matches!(event, Event::PolicyFired(_) | Event::PolicySkipped(_))
}

/// The key of a run's request on a domain.
pub(super) fn key(policy: &Policy, planned: Timestamp, domain: DomainId) -> String {
    format!("{}/{planned}/{domain}", policy.name)
}

/// What is asked of a domain; or why nothing can be.
enum Wish {
    Asked(String, Box<Wanted>),
    Refused(String, Failure),
}

/// A run to be asked for.
#[derive(Clone, Copy, Debug)]
pub struct Firing<'a> {
    /// The planned instant, or when it was asked for.
    pub planned: Timestamp,
    /// Who asked for it; none if it is due.
    pub asked_by: Option<&'a Actor>,
    /// The domains that it is for; none if there is only something to skip.
    pub domains: &'a [Chosen],
    /// What is recorded as skipped with it.
    pub skipped: &'a [PolicySkipped],
}

/// Most domains whose requests are one append. The more there are, the likelier one of them is at work and changes
/// meanwhile, and the longer is the event.
const APPEND_DOMAINS_MAX: usize = 32;

/// Asks for a snapshot of each domain, and records the run and what is skipped: an append for every few domains, since a
/// run is known by its instant and each domain. A domain that refuses keeps none of the others back.
///
/// # Errors
/// The policy was changed meanwhile, before anything was asked of any domain (a conflict: read again), or the store
/// failed. Where it was changed later, what was asked until then stands and is returned.
pub async fn fire(
    engine: &Engine,
    origin: &Origin,
    state: &PolicyState,
    policy: &Policy,
    firing: Firing<'_>,
) -> Result<Vec<Ran>, EngineError> {
    let mut version = state.version;
    let mut ran = Vec::with_capacity(firing.domains.len());
    let mut skipped = firing.skipped;
    let mut left = firing.domains;
    let mut most = APPEND_DOMAINS_MAX;
    loop {
        let (domains, rest) = left.split_at(most.min(left.len()));
        let matters = |event: &Event| firing.is_changed_by(domains, event);
        let mut beside = Beside { version, ..beside(state, &matters) };
        let firing = Firing { domains, skipped, ..firing };
        match fire_some(engine, origin, state, &mut beside, policy, firing).await {
            Ok(some) => ran.extend(some),
            // One of them is hard at work: the fewer they are, the sooner there is a moment at which all of them rest.
            Err(EngineError::Log(LogError::Conflict { stream, .. }))
                if stream != beside.stream && domains.len() > 1 =>
            {
                most = domains.len() / 2;
                continue;
            }
            // Another run has asked something of them: the snapshots' names are thought over.
            Err(EngineError::Log(LogError::Conflict { stream, found, .. }))
                if stream == beside.stream && is_a_run(engine, &stream, found).await? =>
            {
                version = found;
                continue;
            }
            Err(EngineError::Log(LogError::Conflict { .. })) if !ran.is_empty() => return Ok(ran),
            Err(error) => return Err(error),
        }
        (version, skipped, left) = (beside.version, &[], rest);
        if left.is_empty() {
            return Ok(ran);
        }
    }
}

/// Whether the event of that version only tells that the policy is at work.
async fn is_a_run(engine: &Engine, stream: &StreamId, version: u64) -> Result<bool, EngineError> {
    let found = engine.log().read_stream(stream, version.saturating_sub(1), u64::MAX, 1).await?;
    Ok(found.first().is_some_and(|envelope| is_of_a_run(&envelope.event)))
}

impl Firing<'_> {
    /// Whether an event that somebody else has written changes what is to be asked of `domains`.
    fn is_changed_by(&self, domains: &[Chosen], event: &Event) -> bool {
        match event {
            Event::PolicyFired(fired) if fired.part == RunPart::Retention => false,
            Event::PolicyFired(fired) => {
                fired.domains.iter().any(|run| domains.iter().any(|domain| domain.id == run.domain))
            }
            // What a person asks for is no planned instant, and a suspended policy runs when it is told to.
            Event::PolicySkipped(_) => false,
            Event::PolicySuspended(_) | Event::PolicyResumed(_) => self.asked_by.is_none(),
            _ => true,
        }
    }
}

async fn fire_some(
    engine: &Engine,
    origin: &Origin,
    state: &PolicyState,
    beside: &mut Beside<'_>,
    policy: &Policy,
    firing: Firing<'_>,
) -> Result<Vec<Ran>, EngineError> {
    let Firing { planned, asked_by, domains, skipped } = firing;
    let mut wishes = Vec::with_capacity(domains.len());
    for domain in domains {
        wishes.push(wish(engine, policy, planned, domain).await?);
    }
    let wanted: Vec<Wanted> = wishes
        .iter()
        .filter_map(|wish| match wish {
            Wish::Asked(_, wanted) => Some((**wanted).clone()),
            Wish::Refused(..) => None,
        })
        .collect();
    let tell =
        |decided: &[Decided]| {
            let mut events: Vec<Event> = skipped.iter().cloned().map(Event::from).collect();
            if !domains.is_empty() {
                let runs = domains.iter().zip(requests(&wishes, decided)).map(|(domain, request)| {
                    PolicyRun { domain: domain.id, name: domain.name.clone(), requests: vec![request] }
                });
                let asked_by = asked_by.cloned();
                let domains = runs.collect();
                let (part, uptime) = (RunPart::Snapshots, engine.uptime());
                events.push(PolicyFired { planned, part, asked_by, domains, uptime }.into());
            }
            events
        };
    let decided = engine.submit_together(&requester(state, origin), beside, &wanted, &tell).await?;
    let requests = requests(&wishes, &decided);
    Ok(domains.iter().cloned().zip(requests).map(|(domain, request)| Ran { domain, request }).collect())
}

/// The wishes with what was decided on those that were asked.
fn requests(wishes: &[Wish], decided: &[Decided]) -> Vec<PolicyRequest> {
    let mut decided = decided.iter();
    let request = |wish: &Wish| {
        let (snapshot, outcome) = match wish {
            Wish::Refused(name, failure) => (name, Some(Decided::Refused(failure.clone()))),
            Wish::Asked(name, _) => (name, decided.next().cloned()),
        };
        let (operation, refused) = match outcome {
            Some(Decided::Operation(operation)) => (Some(operation), None),
            Some(Decided::Refused(failure)) => (None, Some(failure)),
            None => (None, None),
        };
        PolicyRequest { snapshot: snapshot.clone(), operation, refused, reasons: Vec::new() }
    };
    wishes.iter().map(request).collect()
}

async fn wish(
    engine: &Engine,
    policy: &Policy,
    planned: Timestamp,
    domain: &Chosen,
) -> Result<Wish, EngineError> {
    let state = match engine.load(domain.id).await {
        Ok(state) => Some(state),
        // The request is refused with the reason.
        Err(error) if error.spares_others() => None,
        Err(error) => return Err(error),
    };
    let name = match name_of(policy, planned, domain, state.as_ref()) {
        Ok(name) => name,
        Err(error) => {
            let failure = Failure::new(Code::Invalid, error.to_string()).refused();
            return Ok(Wish::Refused(policy.snapshot.name.to_string(), failure));
        }
    };
    let spec = &policy.snapshot;
    let content = if spec.memory { Content::WithMemory } else { Content::DisksOnly };
    let create = Create {
        name: Some(name.clone()),
        description: spec.description.clone(),
        labels: spec.labels.clone(),
        content,
        place: Place::Usual,
        disks: None,
        quiesce: spec.quiesce,
    };
    if let Some(failure) = state.and_then(|state| too_deep(engine, policy, &state)) {
        return Ok(Wish::Refused(name.to_string(), failure));
    }
    let wanted = Wanted {
        domain: domain.id,
        command: Command::Create(create),
        key: key(policy, planned, domain.id),
        around: policy.hooks.around(),
    };
    Ok(Wish::Asked(name.to_string(), Box::new(wanted)))
}

/// The snapshot's name. Times in names are whole seconds: within one, and where somebody else took the name, the second
/// gets a number.
fn name_of(
    policy: &Policy,
    planned: Timestamp,
    domain: &Chosen,
    state: Option<&DomainState>,
) -> Result<SnapshotName, NameError> {
    let name = policy.snapshot.name.name(&policy.name, &domain.name, planned)?;
    let Some(tree) = state.map(DomainState::tree_after_open) else { return Ok(name) };
    let mut free = name.clone();
    let mut number = 2_u32;
    while tree.by_name(&free).is_some() {
        free = SnapshotName::new(format!("{name}-{number}"))?;
        number += 1;
    }
    Ok(free)
}

/// The refusal of a snapshot that the machine's disk would stand upon beside more than it may.
fn too_deep(engine: &Engine, policy: &Policy, state: &DomainState) -> Option<Failure> {
    let room = depth_max(state).filter(|room| *room < policy.max_depth);
    let (message, hint) = match (depth_with_one_more(policy, state, engine.now()), room) {
        (Depth::Fits(_), _) => return None,
        (Depth::Exceeds(depth), None) => (
            format!(
                "with it the disk would stand upon {depth} snapshots, max-depth is {}, and none of them may go",
                policy.max_depth
            ),
            "delete or release some, or raise max-depth",
        ),
        (Depth::Exceeds(depth), Some(room)) => (
            format!(
                "with it the disk would stand upon {depth} snapshots, the hypervisor has room for {room} and the next one, \
                 and none of them may go"
            ),
            "delete or release some; `snaptree policy plan` tells why each of them stays",
        ),
    };
    Some(Failure::new(Code::Invalid, message).hint(hint).refused())
}
