//! What will run, and when.

use jiff::Timestamp;
use snaptree_engine::PolicyName;
use snaptree_engine::engine::{Engine, EngineError};

use super::book::{Chosen, chosen, registered_at};
use super::project::PolicyState;
use crate::schedule::{History, due};

/// A run to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appointment {
    /// When, with the jitter; not after now if it is due.
    pub at: Timestamp,
    /// The planned instant.
    pub planned: Timestamp,
    /// The policy.
    pub policy: PolicyName,
    /// The domain.
    pub domain: Chosen,
}

/// The next `count` runs from `now` on over those of `policies` that run by themselves, in the order in which they come.
///
/// # Errors
/// The store failed.
pub async fn agenda<'a>(
    engine: &Engine,
    policies: impl IntoIterator<Item = &'a PolicyState>,
    now: Timestamp,
    count: usize,
) -> Result<Vec<Appointment>, EngineError> {
    let nothing = History::default();
    let mut all = Vec::new();
    for state in policies {
        let Some(policy) = state.running() else { continue };
        for domain in chosen(engine, policy).await? {
            let history = state.histories.get(&domain.id).unwrap_or(&nothing);
            let since = state.since.max(registered_at(engine, domain.id).await?);
            let asked = policy.asked(domain.id, since, history);
            let due = due(&asked, now);
            let first = due.next_at.and_then(|at| at.checked_sub(asked.delay).ok());
            let later = first.into_iter().flat_map(|first| {
                std::iter::once(first).chain(policy.schedule.upcoming(first, policy.zone()))
            });
            let appointment = |planned: Timestamp| {
                let at = planned.checked_add(asked.delay).unwrap_or(planned);
                Appointment { at, planned, policy: state.name.clone(), domain: domain.clone() }
            };
            all.extend(due.run.into_iter().chain(later).take(count).map(appointment));
        }
        // No more than needed is kept, however many domains there are.
        all.sort_by(|a, b| (a.at, &a.policy, &a.domain.name).cmp(&(b.at, &b.policy, &b.domain.name)));
        all.truncate(count);
    }
    Ok(all)
}
