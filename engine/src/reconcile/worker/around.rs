//! The programs before and after an operation.

use crate::around::{Hook, HookCall, HookEnd, HookPhase, HookStage, OnFailure};
use crate::engine::EngineError;
use crate::event::{OperationFailed, OperationHookFinished, OperationHookStarted};
use crate::operation::{Code, Failure, Operation, Phase, Request};

use super::{Hand, Pass, Worker};

impl Worker<'_> {
    /// Runs the program before. Where its failure aborts, the operation ends with that.
    pub(super) async fn before(&mut self, operation: &Operation, hook: &Hook) -> Result<Pass, EngineError> {
        if operation.stages.before == HookStage::Started {
            self.found = Some("the hook before was at work".to_owned());
        }
        let failure = self.run_hook(operation, hook, HookPhase::Before, None).await?;
        let Some(failure) = failure.filter(|_| hook.on_failure == OnFailure::Abort) else {
            return Ok(Pass::On(Hand::Found));
        };
        let Some(operation) = self.state.operation(operation.id).cloned() else { return Ok(Pass::Rests) };
        let message = format!("the hook before failed: {}", failure.message);
        let failure = Failure { code: failure.code, message, hint: failure.hint, refused: false };
        self.end(&operation, vec![OperationFailed { failure }.into()]).await
    }

    /// Runs the program after, if it has to. Its failure changes nothing but the log.
    pub(super) async fn after(&mut self, operation: &Operation, end: HookEnd) -> Result<(), EngineError> {
        if let Some(hook) = operation.hook_after(end) {
            self.run_hook(operation, hook, HookPhase::After, Some(end)).await?;
        }
        Ok(())
    }

    /// Whether an operation goes on although the program is about to end: what the program before has stopped would
    /// stand still until the next start. What is taken back instead ends with the program after, too.
    pub(super) fn sees_through(&self, operation: &Operation) -> bool {
        let taken_back = !self.engine.stop.parks() && operation.can_go_back();
        let may_take_long = matches!(operation.phase, Phase::Waiting { .. } | Phase::NeedsAttention { .. });
        operation.is_within_hooks() && !taken_back && !may_take_long
    }

    /// What went wrong, if something did.
    async fn run_hook(
        &mut self,
        operation: &Operation,
        hook: &Hook,
        phase: HookPhase,
        end: Option<HookEnd>,
    ) -> Result<Option<Failure>, EngineError> {
        let (Some(domain), Request::Create(request)) = (&self.state.domain, &operation.request) else {
            return Ok(Some(Failure::new(Code::Invalid, "only a snapshot has programs around it")));
        };
        let domain = domain.name.clone();
        self.commit(operation, vec![OperationHookStarted { hook: phase }.into()]).await?;
        self.engine.hooks.reached(&format!("hook.started.{}", phase.as_str()));
        let call = HookCall {
            hook,
            phase,
            end,
            operation: operation.id,
            actor: &operation.actor,
            domain: &domain,
            snapshot: &request.name,
        };
        let failure = self.engine.hook_runner.run(&call).await.err();
        self.engine.hooks.reached(&format!("hook.done.{}", phase.as_str()));
        let event = OperationHookFinished { hook: phase, failure: failure.clone() };
        self.commit(operation, vec![event.into()]).await?;
        Ok(failure)
    }
}
