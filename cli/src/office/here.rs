//! This process does the work itself.

use std::future::Future;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use snaptree_engine::command::Command;
use snaptree_engine::driver::PowerWish;
use snaptree_engine::engine::{Engine, EngineError, Requester, Submitted};
use snaptree_engine::reconcile::drift::Drift;
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::{DomainId, OperationId};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::{Office, Policies, host, policy, register, with_owners};
use crate::exit::{Exit, Trouble};
use crate::progress::Shown;
use crate::render;
use crate::wire::{Accounts, HostAnswer, HostAsk, PolicyAnswer, PolicyAsk, Registered, Registering};

/// The process's exit code after a second Ctrl-C: 128 and the signal, as shells have it.
pub const INTERRUPTED: i32 = 130;

/// How long the step in hand may go on after a signal. Service managers and people give a program 10 s.
pub const PARK_AFTER: Duration = Duration::from_secs(8);

/// This process, which has the state for itself.
pub struct Here {
    /// The engine over it.
    pub engine: Engine,
    /// Who asks.
    pub requester: Requester,
    /// What is known of policies.
    pub policies: Policies,
}

#[async_trait]
impl Office for Here {
    async fn submit(&self, domain: DomainId, command: &Command, key: Option<&str>) -> Result<Submitted> {
        let command = with_owners(&self.engine, command.clone()).await?;
        Ok(self.engine.submit(&self.requester, domain, &command, key).await?)
    }

    async fn finish(&self, domain: DomainId, _operation: OperationId) -> Result<Driven> {
        let shown = Shown::on_stderr();
        self.heeding(&shown, self.engine.drive(&self.requester, domain, &shown)).await
    }

    async fn cancel(&self, domain: DomainId, operation: OperationId) -> Result<Driven> {
        let shown = Shown::on_stderr();
        self.heeding(&shown, self.engine.cancel(&self.requester, domain, operation, &shown)).await
    }

    async fn reconcile(&self, domain: DomainId) -> Result<Driven> {
        let shown = Shown::on_stderr();
        self.heeding(&shown, self.engine.reconcile(&self.requester, domain, &shown)).await
    }

    async fn recover(&self) -> Result<Accounts> {
        let shown = Shown::on_stderr();
        Ok(self.heeding(&shown, self.engine.recover(&self.requester, &shown)).await?.into())
    }

    async fn drift(&self, domain: DomainId) -> Result<Drift> {
        Ok(self.engine.drift(&self.requester, domain).await?)
    }

    async fn drift_all(&self, domains: &[DomainId]) -> Result<Vec<(DomainId, Result<Drift>)>> {
        let looked = self.engine.drift_all(&self.requester, domains).await?;
        Ok(looked.into_iter().map(|(domain, drift)| (domain, drift.map_err(Into::into))).collect())
    }

    async fn power(&self, domain: DomainId, wish: PowerWish) -> Result<()> {
        Ok(self.engine.power(domain, wish).await?)
    }

    async fn register(&self, registering: Registering) -> Result<Registered> {
        register(&self.engine, &self.requester, registering).await
    }

    async fn host(&self, ask: HostAsk) -> Result<HostAnswer> {
        host(&self.engine, &self.requester, ask).await
    }

    async fn policy(&self, ask: PolicyAsk) -> Result<PolicyAnswer> {
        policy(&self.engine, &self.policies, &self.requester, &ask).await
    }

    fn is_ending(&self) -> bool {
        self.engine.stop_handle().asked()
    }

    fn works_on_alone(&self) -> bool {
        false
    }
}

impl Here {
    /// Runs `work`; the first Ctrl-C asks it to end, the second ends the process. A step that goes on for too long after
    /// the first is parked: what works for it is left alone, and recovery waits for it.
    async fn heeding<T>(
        &self,
        shown: &Shown,
        work: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T> {
        let stop = self.engine.stop_handle();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let park = tokio::time::sleep(Duration::MAX);
        tokio::pin!(work, park);
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    shown.end();
                    return Ok(done?);
                }
                () = &mut park => return Err(parked().into()),
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if stop.asked() {
                shown.end();
                render::note("ended at once; `snaptree recover` finishes what is open");
                std::process::exit(INTERRUPTED);
            }
            stop.ask();
            park.as_mut().reset(Instant::now() + PARK_AFTER);
            shown.say(
                "ending after this step: what can be taken back is, the rest is left to `snaptree recover` \
                 (Ctrl-C again ends at once)",
            );
        }
    }
}

fn parked() -> Trouble {
    let message =
        format!("the step in hand did not end within {} s and was left as it is", PARK_AFTER.as_secs());
    Trouble::new(Exit::Attention, "parked", message)
        .hint("`snaptree recover` waits for what still works for it, and finishes it")
}
