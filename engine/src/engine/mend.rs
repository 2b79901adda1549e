//! Putting right where a machine's files are. It is told in the log before and after; whoever is cut off in between does
//! it again, which is as good as once.

use super::{Engine, EngineError, Requester};
use crate::command::reject;
use crate::driver::{Mend, Mending, Relocated};
use crate::event::{DomainRelocated, DomainRepairBegun, DomainRepaired, Event};
use crate::ids::{DomainId, StreamId};
use crate::log::{LogError, NewEvent};
use crate::operation::Code;
use crate::project::DomainState;

impl Engine {
    /// What [`mend`](Engine::mend) would do, in words. Nothing is written or touched.
    ///
    /// # Errors
    /// An operation is open, or it cannot be put right without somebody who looks.
    pub async fn mends(&self, domain: DomainId, mend: &Mend) -> Result<Vec<String>, EngineError> {
        let state = self.load(domain).await?;
        self.check_is_ours(&state).await?;
        nothing_open(&state)?;
        let mending = self.driver_of(&state)?.mends(&state, mend).await.map_err(EngineError::Driver)?;
        Ok(mending.what)
    }

    /// Puts right where the machine's files are, and says what was done; nothing where all was right.
    ///
    /// # Errors
    /// As [`Engine::mends`], or a file cannot be written, or the store failed.
    pub async fn mend(
        &self,
        requester: &Requester,
        domain: DomainId,
        mend: &Mend,
    ) -> Result<Vec<String>, EngineError> {
        let state = self.load_for_work(requester, domain).await?;
        nothing_open(&state)?;
        let driver = self.driver_of(&state)?;
        let Mending { what, claims } = driver.mends(&state, mend).await.map_err(EngineError::Driver)?;
        if what.is_empty() {
            return Ok(what);
        }
        let stream = StreamId::Domain(domain);
        let new = |event: Event| NewEvent::of_itself(stream.clone(), event);
        // What the files' new place takes is taken before anything is done, so that the end of it cannot be refused.
        let begun = DomainRepairBegun { what: what.clone(), claims };
        let expected = vec![(stream.clone(), state.version)];
        match self.append(requester, expected, vec![new(begun.into())]).await {
            Ok(_) => {}
            Err(LogError::Claimed { claim, owner }) => return Err(self.claimed(&claim, owner).await),
            Err(error) => return Err(error.into()),
        }
        self.hooks.reached("mend.begun");
        let relocated = driver.mend(&state, mend).await.map_err(EngineError::Driver)?;
        self.hooks.reached("mend.done");
        let moved = relocated.map(|moved| {
            let Relocated { config, disks, layers, claims } = moved;
            Event::from(DomainRelocated { config, disks, layers, claims })
        });
        let repaired = what.iter().map(|what| Event::from(DomainRepaired { what: what.clone() }));
        let events = moved.into_iter().chain(repaired).map(new).collect();
        self.append(requester, Vec::new(), events).await?;
        Ok(what)
    }
}

/// Steps in hand go by the files as they were when they were planned.
fn nothing_open(state: &DomainState) -> Result<(), EngineError> {
    match state.open.first() {
        None => Ok(()),
        Some(open) => {
            let message =
                format!("operation {} ({}) on this domain is not finished", open.id, open.request.kind());
            let hint = "`snaptree recover` finishes it; or say what became of it: `snaptree op resolve`";
            Err(reject(Code::InUse, message).hint(hint).into())
        }
    }
}
