//! Asking for a task, and waiting for its end.

use std::time::Duration;

use snaptree_engine::driver::{CallOff, DriverError, ErrorClass, Progress, StepProgress};
use snaptree_engine::operation::Code;
use tokio::time::{Instant, sleep};
use tracing::instrument;

use super::client::{Client, Effect};
use super::fault::CallError;
use super::observe::machines;
use super::soap::{Element, Fault, Moref, Request, SoapError};
use super::vim::{Query, Task, TaskState};

/// The pauses between two looks at a task: the first, and the longest.
const POLL_MIN: Duration = Duration::from_millis(50);
const POLL_MAX: Duration = Duration::from_secs(2);
/// For how long a host may not answer while its task is waited for, before that is given up. The task goes on.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long somebody else's work on a machine is waited for before a step is resolved.
const SETTLE_MAX: Duration = Duration::from_secs(600);

/// How a task ended.
#[derive(Debug)]
pub enum Ended {
    /// Well.
    Well,
    /// With a fault. What it did before that is to be seen.
    Badly(Fault),
}

/// Who watches a task that is waited for.
#[derive(Clone, Copy)]
pub struct Watched<'a> {
    /// Is told how far it is.
    pub progress: &'a dyn Progress,
    /// Says whether somebody wants it gone.
    pub call_off: CallOff<'a>,
}

/// Asks for a task.
///
/// # Errors
/// [`CallError`]: after some of them the task may run all the same.
pub async fn begin(client: &Client, request: &Request) -> Result<Moref, CallError> {
    let reply = client.call(request, Effect::Some).await?;
    Ok(reply.moref_of("returnval").ok_or(SoapError::Lacks("a task"))?)
}

/// Waits for a task to end, and tells of its progress. One that is called off meanwhile is cancelled, if it can be.
///
/// # Errors
/// Always of a class that has the step resolved: the task is gone, or its host does not answer.
#[instrument(skip_all, fields(host = %client.host, task = task.id))]
pub async fn end(client: &Client, task: &Moref, watched: Watched<'_>) -> Result<Ended, DriverError> {
    let mut pause = POLL_MIN;
    let mut heard = Instant::now();
    let mut cancelled = false;
    loop {
        match info(client, task).await {
            Ok(info) => {
                heard = Instant::now();
                match Task::of(&task.id, &info).map(|task| task.state) {
                    Some(TaskState::Success) => return Ok(Ended::Well),
                    Some(TaskState::Error) => {
                        let fault = info.child("error").map(Fault::of_method);
                        return Ok(Ended::Badly(fault.unwrap_or(Fault::of_method(&Element::default()))));
                    }
                    Some(TaskState::Queued | TaskState::Running) | None => {}
                }
                let percent = info.text_of("progress").and_then(|text| text.parse::<u8>().ok());
                if let Some(percent) = percent.filter(|percent| *percent <= 100) {
                    watched.progress.step_progress(StepProgress::Percent(percent));
                }
                if !cancelled && watched.call_off.is_asked() && info.flag_of("cancelable") == Some(true) {
                    cancelled = true;
                    cancel(client, task).await;
                }
            }
            Err(error) if error.is_gone() => {
                let message = format!("host '{}' does not know task {} any more", client.host, task.id);
                return Err(DriverError::unknown(Code::Io, message));
            }
            Err(error) if heard.elapsed() > SILENCE_MAX || !passes(&error) => {
                let mut error = client.told(error, Effect::Some);
                error.class = ErrorClass::Unknown;
                return Err(error);
            }
            Err(error) => tracing::debug!(%error, "the task could not be looked at"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
    }
}

/// Whether it may be gone at the next look.
fn passes(error: &CallError) -> bool {
    match error {
        CallError::NotSent(_) | CallError::Lost(_) | CallError::TimedOut => true,
        CallError::Reply(SoapError::CutOff) => true,
        CallError::Status(status) => *status >= 500,
        CallError::Fault(fault) => matches!(fault.kind.as_str(), "SystemError" | "NotAuthenticated"),
        CallError::Reply(_) | CallError::NotAllowed(_) | CallError::Ours(_) => false,
    }
}

async fn info(client: &Client, task: &Moref) -> Result<Element, CallError> {
    let object = Query::of("Task", &["info"]).object(task).one(client).await?;
    Ok(object.get("info").cloned().ok_or(SoapError::Lacks("the task"))?)
}

async fn cancel(client: &Client, task: &Moref) {
    if let Err(error) = client.call(&Request::new("CancelTask", task), Effect::None).await {
        tracing::debug!(%error, "the task is not cancelled, and is waited for");
    }
}

/// Returns when nothing that changes snapshots or power is at work on a machine, whoever asked for it, and nothing of
/// ours is still on its way there. A host that was there a moment ago is given the time to come back.
///
/// # Errors
/// The host cannot be asked, or something still is.
#[instrument(skip_all, fields(host = %client.host, vm = vm.id))]
pub async fn settle(client: &Client, vm: &Moref) -> Result<(), DriverError> {
    let patience = if client.has_fenced().await { SILENCE_MAX } else { Duration::ZERO };
    let begun = Instant::now();
    let mut pause = POLL_MIN;
    loop {
        let settled = match client.fence().await {
            Ok(()) => at_rest(client, vm).await,
            Err(error) => Err(client.told(error, Effect::None)),
        };
        match settled {
            Err(error) if error.class == ErrorClass::Transient && begun.elapsed() < patience => {
                tracing::debug!(%error, "the host does not answer, and is given time");
            }
            other => return other,
        }
        sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
    }
}

async fn at_rest(client: &Client, vm: &Moref) -> Result<(), DriverError> {
    let told = |error| client.told(error, Effect::None);
    let deadline = Instant::now() + SETTLE_MAX;
    let mut pause = POLL_MIN;
    loop {
        let found = machines(client, std::slice::from_ref(vm)).await.map_err(told)?.remove(vm);
        // What is gone is worked on by nobody; whoever observes next says that it is gone.
        let Some(machine) = found else { return Ok(()) };
        let at_work = machine.detail.tasks.iter().find(|task| task.is_at_work() && task.concerns_snapshots());
        let Some(task) = at_work else { return Ok(()) };
        if Instant::now() > deadline {
            let message = format!(
                "host '{}' still works on the machine: task {} ({})",
                client.host, task.id, task.what
            );
            let error = DriverError::new(ErrorClass::Busy, Code::InUse, message);
            return Err(match machine.detail.question {
                Some(question) => error.hint(format!("the machine waits for an answer: {question}")),
                None => error.hint("vSphere's own list of tasks shows it; then try again"),
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
    }
}
