//! Whose a domain's layers are: one state's, the one that wrote them last.
//!
//! A state directory that was copied tells the same of the same machine as the one that it was copied from. If both
//! went on, each would switch away what the other has acknowledged. What is kept beside the layers names the state that
//! wrote it, so the other is asked: where it still stands and has that event in its log, this one is the copy. Where it
//! is gone, or never heard of it, this log was moved or restored, and [`restore`](super::restore) goes on.

use std::path::Path;

use async_trait::async_trait;

use crate::driver::{Head, KeptHead};
use crate::engine::{Engine, EngineError};
use crate::ids::DomainId;
use crate::operation::{Code, Failure};
use crate::project::DomainState;

/// How the state stands that wrote what is kept beside a domain's layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is this one.
    Here,
    /// It is another one, has that event in its log, and looks after the domain.
    There,
    /// It is gone, does not have the event, or has let go of the domain.
    Gone,
    /// It is another one, and this user may not read it; why not.
    Hidden(String),
}

/// The states of this host, asked by their directories.
#[async_trait]
pub trait States: Send + Sync {
    /// How `state` stands to a domain and to an event that it is said to have written.
    async fn standing(&self, state: &Path, domain: DomainId, head: Head) -> Standing;
}

/// Knows of no other state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

#[async_trait]
impl States for Alone {
    async fn standing(&self, _state: &Path, _domain: DomainId, _head: Head) -> Standing {
        Standing::Gone
    }
}

impl Engine {
    /// Refuses a domain whose layers another state looks after.
    pub(crate) async fn check_keeper(&self, state: &DomainState, kept: &KeptHead) -> Result<(), EngineError> {
        let (Some(keeper), Some(domain)) = (&kept.keeper, &state.domain) else { return Ok(()) };
        match self.states.standing(keeper, domain.id, kept.head).await {
            Standing::Here | Standing::Gone => Ok(()),
            Standing::There => Err(anothers(keeper, domain.name.as_str()).into()),
            Standing::Hidden(why) => Err(hidden(keeper, domain.name.as_str(), &why).into()),
        }
    }

    /// The same, where nothing is to be taken over.
    pub(crate) async fn check_is_ours(&self, state: &DomainState) -> Result<(), EngineError> {
        match self.driver_of(state)?.kept_head(state).await.map_err(EngineError::Driver)? {
            Some(kept) => self.check_keeper(state, &kept).await,
            None => Ok(()),
        }
    }
}

/// The refusal of what another state looks after.
pub(crate) fn anothers(keeper: &Path, domain: &str) -> Failure {
    let keeper = keeper.display();
    Failure::new(
        Code::InUse,
        format!(
            "the machine '{domain}' is looked after by the state {keeper}, which wrote its layers last: this state is a \
             copy of that one, and two would undo each other's snapshots"
        ),
    )
    .hint(format!(
        "use --state {keeper}; or, if this state is to have the machine from now on, let go of it there: snaptree \
         --state {keeper} domain remove {domain} --metadata"
    ))
    .refused()
}

pub(crate) fn hidden(keeper: &Path, domain: &str, why: &str) -> Failure {
    let message = format!(
        "the layers of machine '{domain}' were written last by the state {}, and whether that still looks after it \
         cannot be told: {why}",
        keeper.display()
    );
    Failure::new(Code::Permission, message)
        .hint("ask as a user who may read that state, or remove it if it is not used any more")
        .refused()
}
