//! What needs someone: operations that can go neither on nor back, and those that nobody wants any more.

use snaptree_engine::OperationId;
use snaptree_engine::command::Command;
use snaptree_engine::driver::NoWatch;
use snaptree_engine::engine::EngineError;
use snaptree_engine::operation::{Code, Phase, Verdict};

use super::check::{Must, Violation, broken};
use super::life::{Cast, Life};

impl Cast {
    /// Someone looks at what needs attention: lets it try again, or says that its step is not done (which is so: it was
    /// refused). Nobody gives one up: that leaves a half-done step as it is, which nothing can be expected of.
    pub(super) async fn see_to_attention(&mut self, life: &Life, number: usize) -> Result<(), Violation> {
        let id = self.watched[number].id;
        for _ in 0..6 {
            self.watched[number].catch_up(&self.world)?;
            let open = &self.watched[number].rebuilt.open;
            let waiting = open.iter().find(|open| matches!(open.phase, Phase::NeedsAttention { .. }));
            let Some(waiting) = waiting else { return Ok(()) };
            let operation = waiting.id;
            self.check(life, number).await?;
            self.cannot_be_called_off(life, number, operation).await?;
            let command = if self.random.chance(40) {
                Command::Resolve { operation, verdict: Verdict::NotDone, reason: "seen".to_owned() }
            } else {
                Command::Retry(operation)
            };
            self.tell(format!("see to {operation}: {command:?}"));
            let answer = life.engine.submit(&life.requester, id, &command, None).await;
            answer.must("what needs attention can be seen to")?;
            self.drive(life, number).await?;
        }
        broken("seeing to an operation leads on", "six times were not enough")
    }

    async fn cannot_be_called_off(
        &mut self,
        life: &Life,
        number: usize,
        operation: OperationId,
    ) -> Result<(), Violation> {
        let id = self.watched[number].id;
        match life.engine.cancel(&life.requester, id, operation, &NoWatch).await {
            Err(EngineError::Rejected(rejection)) if rejection.code == Code::NeedsAttention => Ok(()),
            other => broken("what needs attention is not called off", format!("{:?}", other.map(|_| ()))),
        }
    }

    /// Calls an open operation off: it is taken back, or carried through where it is too late for that.
    pub(super) async fn call_off(
        &mut self,
        life: &Life,
        number: usize,
        operation: OperationId,
    ) -> Result<(), Violation> {
        self.tell(format!("call off {operation}"));
        let watched = &mut self.watched[number];
        if let Some(asked) = watched.model.operations.get_mut(&operation) {
            asked.called_off = true;
        }
        let id = watched.id;
        match life.engine.cancel(&life.requester, id, operation, &NoWatch).await {
            Ok(_) | Err(EngineError::Driver(_)) => self.watched[number].catch_up(&self.world),
            Err(EngineError::Rejected(rejection)) if rejection.code == Code::NeedsAttention => Ok(()),
            Err(error) => broken("an open operation can be called off", error.to_string()),
        }
    }

    /// After a restart, some of what was cut short is called off before anything else happens.
    pub(super) async fn call_off_some(&mut self, life: &Life) -> Result<(), Violation> {
        for number in 0..self.watched.len() {
            let open: Vec<OperationId> =
                self.watched[number].rebuilt.open.iter().map(|open| open.id).collect();
            if !open.is_empty() && self.random.chance(20) {
                let operation = *self.random.pick(&open);
                self.call_off(life, number, operation).await?;
            }
        }
        Ok(())
    }
}
