//! A run's requests for deletes.

use snaptree_engine::command::{Command, Delete, SnapshotRef};
use snaptree_engine::engine::{Engine, EngineError};
use snaptree_engine::event::{
    DeleteScope, DeleteWhat, Event, MergeWish, Origin, PolicyFired, PolicyRequest, PolicyRun, RunPart,
};
use snaptree_engine::project::DomainState;
use snaptree_engine::together::{Decided, Wanted};

use super::fire::{beside, is_of_a_run, key, requester};
use super::look::{For, plan_of};
use super::project::{PolicyState, Run};
use crate::file::Policy;
use crate::retention::{Plan, Trust};

/// Asks for the deletes of `policy` that follow `run`, in the plan's order, and records
/// them: one append, and none if nothing goes.
///
/// The caller knows that the run's snapshot was taken.
///
/// # Errors
/// The policy was changed meanwhile, or somebody else has asked for them (a conflict: read again), or the store failed.
pub async fn retain(
    engine: &Engine,
    origin: &Origin,
    state: &PolicyState,
    policy: &Policy,
    run: &Run,
    trust: Trust,
) -> Result<Vec<PolicyRequest>, EngineError> {
    let there = engine.load(run.domain).await?;
    let plan = plan_of(policy, &there, engine.now(), run.create.operation.map_or(For::Show, For::Run), trust);
    let mut requests = wishes(&there, &plan);
    if requests.is_empty() {
        return Ok(Vec::new());
    }
    let key = key(policy, run.planned, run.domain);
    let wanted: Vec<Wanted> = plan
        .deletes
        .iter()
        .zip(&requests)
        .map(|(delete, request)| Wanted {
            domain: run.domain,
            command: Command::Delete(Delete {
                snapshots: vec![SnapshotRef::Id(delete.snapshot)],
                scope: DeleteScope::Named,
                what: DeleteWhat::Snapshot,
                merge: MergeWish::Auto,
                reasons: request.reasons.clone(),
            }),
            key: format!("{key}/delete/{}", delete.snapshot),
            around: None,
        })
        .collect();
    let tell = |decided: &[Decided]| {
        let mut requests = requests.clone();
        settle(&mut requests, decided);
        let domains = vec![PolicyRun { domain: run.domain, name: run.name.clone(), requests }];
        let (planned, part, uptime) = (run.planned, RunPart::Retention, engine.uptime());
        let fired = PolicyFired { planned, part, asked_by: None, domains, uptime };
        vec![Event::from(fired)]
    };
    // Deletes of the domain that another run has asked for make the plan another one.
    let matters = |event: &Event| match event {
        Event::PolicyFired(fired) if fired.part == RunPart::Retention => {
            fired.domains.iter().any(|other| other.domain == run.domain)
        }
        event => !is_of_a_run(event),
    };
    let mut beside = beside(state, &matters);
    let decided = engine.submit_together(&requester(state, origin), &mut beside, &wanted, &tell).await?;
    settle(&mut requests, &decided);
    Ok(requests)
}

/// The deletes of a plan, before anything was decided on them.
fn wishes(state: &DomainState, plan: &Plan) -> Vec<PolicyRequest> {
    let request = |delete: &crate::retention::Delete| {
        let verdict = plan.verdicts.iter().find(|verdict| verdict.snapshot == delete.snapshot);
        let reasons = verdict.map(|verdict| verdict.reasons.iter().map(ToString::to_string).collect());
        let name = state.tree.get(delete.snapshot).map(|snapshot| snapshot.name.to_string());
        PolicyRequest {
            snapshot: name.unwrap_or_else(|| delete.snapshot.to_string()),
            operation: None,
            refused: None,
            reasons: reasons.unwrap_or_default(),
        }
    };
    plan.deletes.iter().map(request).collect()
}

fn settle(requests: &mut [PolicyRequest], decided: &[Decided]) {
    for (request, decided) in requests.iter_mut().zip(decided) {
        match decided {
            Decided::Operation(operation) => request.operation = Some(*operation),
            Decided::Refused(failure) => request.refused = Some(failure.clone()),
        }
    }
}
