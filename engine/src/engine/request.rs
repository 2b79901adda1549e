//! Requests: decided, written down, or only tried.

use std::path::Path;

use jiff::SignedDuration;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tracing::instrument;

use super::{CONFLICTS_MAX, Engine, EngineError, Requester};
use crate::claim::{Claim, ClaimKind};
use crate::command::{Command, reject};
use crate::decide::{Ctx, decide};
use crate::domain::Domain;
use crate::driver::{CallOff, NoWatch, Observation, Plan, Registration, Resolution, StepContext};
use crate::event::{DeleteWhat, DomainRegistered, Envelope, Event, RequestTerms, UnregisterWish};
use crate::ids::{DomainId, DomainName, LayerId, OperationId, StreamId};
use crate::layer::{LayerChange, Role};
use crate::log::{LogError, NewEvent};
use crate::operation::{Code, Request, Verdict as Said};
use crate::project::DomainState;
use crate::reconcile::beside::{self, Blocked};
use crate::reconcile::merge::Verdict;
use crate::reconcile::space::{self, Frees, Occupied};

/// Longest key of a request, in bytes.
pub const KEY_BYTES_MAX: usize = 255;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is an operation, to be driven.
    Operation(OperationId),
    /// The same key and command was given before, and this operation was its answer.
    Repeated(OperationId),
    /// It was carried out by being written.
    Recorded,
}

/// What a request would do. Nothing was written or touched.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// The request.
    pub request: Request,
    /// Its steps and costs; the space is that of the worst moment, merges included.
    pub plan: Plan,
    /// For a delete: what becomes of each tombstone.
    pub merges: Vec<Verdict>,
    /// For a delete: what it gives back once all of it is merged; none where that cannot be told.
    pub frees: Option<Frees>,
    /// The domain, as the log tells it.
    pub state: DomainState,
    /// The domain as it would be after the request, before any merge.
    pub after: DomainState,
}

impl Engine {
    /// Looks at a domain and registers it. Returns what was found, and notes for the user.
    ///
    /// # Errors
    /// The name is taken, the driver says that it is unfit, or the store failed.
    pub async fn register(
        &self,
        requester: &Requester,
        registration: Registration,
        labels: crate::tree::Labels,
    ) -> Result<(Domain, Vec<String>), EngineError> {
        self.name_is_free(&registration.name).await?;
        crate::decide::labels_fit(&labels)?;
        crate::decide::name_is_seen("domain name", registration.name.as_str())?;
        let driver = self.driver(registration.driver)?;
        let probe = driver.probe(&registration).await.map_err(EngineError::Driver)?;
        let domain = Domain {
            id: registration.id,
            name: registration.name,
            driver: registration.driver,
            disks: probe.disks,
            config: probe.config,
            labels,
            capabilities: probe.capabilities,
        };
        let stream = StreamId::Domain(domain.id);
        let registered = DomainRegistered { domain: domain.clone(), claims: probe.claims };
        let event = NewEvent::of_itself(stream.clone(), registered.into());
        match self.append(requester, vec![(stream, 0)], vec![event]).await {
            Ok(_) => Ok((domain, probe.notes)),
            Err(LogError::Claimed { claim, owner }) => Err(self.claimed(&claim, owner).await),
            Err(error) => Err(error.into()),
        }
    }

    /// That somebody else has it: whoever asked looked before, and somebody came in between.
    async fn claimed(&self, claim: &Claim, owner: DomainId) -> EngineError {
        if claim.kind == ClaimKind::Name {
            return name_is_taken(&claim.value);
        }
        let state = self.load(owner).await.ok();
        let name = state.and_then(|state| state.domain).map(|domain| domain.name.to_string());
        let message = format!("{claim} already belongs to domain '{}'", name.unwrap_or(owner.to_string()));
        reject(Code::Exists, message).into()
    }

    /// A fresh domain id.
    pub fn fresh_domain_id(&self) -> DomainId {
        DomainId::from_uuid(self.ids.next())
    }

    async fn name_is_free(&self, name: &DomainName) -> Result<(), EngineError> {
        // Not by a row alone, which somebody may have made up or taken out.
        match self.find_domain(name.as_str()).await {
            Ok(_) => Err(name_is_taken(name.as_str())),
            Err(EngineError::Rejected(failure)) if failure.code == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Decides a command and writes what follows from it. An operation is then to be [driven](Engine::drive).
    ///
    /// A `key` makes it idempotent: the same key with the same command is answered with the first operation.
    ///
    /// # Errors
    /// A rejection (nothing was written), or the store failed.
    #[instrument(skip_all, fields(%domain))]
    pub async fn submit(
        &self,
        requester: &Requester,
        domain: DomainId,
        command: &Command,
        key: Option<&str>,
    ) -> Result<Submitted, EngineError> {
        if let Command::Set { name: Some(name), .. } = command {
            let owner = self.log.domain_by_name(name).await?;
            if owner.is_some_and(|row| row.id != domain) {
                self.name_is_free(name).await?;
            }
        }
        key_fits(key)?;
        if *command == Command::Unregister(UnregisterWish::Forget) {
            return self.forget(requester, domain).await;
        }
        let digest = key.map(|_| command_digest(command)).transpose()?;
        let stream = StreamId::Domain(domain);
        let mut conflicts = 0;
        loop {
            if let (Some(key), Some(digest)) = (key, &digest)
                && let Some(earlier) = self.log.by_key(&stream, key).await?
            {
                return repeated(&earlier, key, digest);
            }
            let state = self.load_for_work(requester, domain).await?;
            let ctx = self.ctx(requester, &state, digest.clone());
            let mut events = decide(&state, command, &ctx)?;
            match command {
                Command::Resolve { operation, verdict: Said::Done | Said::Abandon, .. } => {
                    self.fill_in_changes(&state, *operation, &mut events).await;
                }
                Command::Set { access: Some(wish), .. } => {
                    self.fill_in_access(&state, wish, &mut events).await?;
                }
                _ => {}
            }
            let operation = OperationId::from_uuid(self.ids.next());
            let (submitted, events) = self.addressed(&stream, command, operation, key, events);
            match self.append(requester, vec![(stream.clone(), state.version)], events).await {
                Ok(_) => return Ok(submitted),
                Err(LogError::Conflict { .. } | LogError::KeyUsed { .. }) if conflicts < CONFLICTS_MAX => {
                    conflicts += 1;
                }
                Err(LogError::Claimed { claim, owner }) => return Err(self.claimed(&claim, owner).await),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// How the machine is reached from now on, as its driver understands the wish.
    async fn fill_in_access(
        &self,
        state: &DomainState,
        wish: &serde_json::Value,
        events: &mut [Event],
    ) -> Result<(), EngineError> {
        let access = self.driver_of(state)?.access(state, wish).await.map_err(EngineError::Driver)?;
        for event in events {
            if let Event::DomainChanged(changed) = event {
                changed.access = Some(access.clone());
            }
        }
        Ok(())
    }

    /// What of the layer graph changed with a step that someone says is done, or with an operation that is abandoned, as
    /// far as an observation tells.
    async fn fill_in_changes(&self, state: &DomainState, id: OperationId, events: &mut [Event]) {
        let Some((operation, step)) =
            state.operation(id).and_then(|found| Some((found, found.step_in_hand()?)))
        else {
            return;
        };
        let Ok(driver) = self.driver_of(state) else { return };
        let (Ok(seen), Ok(head)) = (driver.observe(state).await, self.log.head().await) else { return };
        let context = StepContext {
            state,
            operation: id,
            request: &operation.request,
            index: step,
            head,
            now: self.clock.now(),
            hooks: &*self.hooks,
            progress: &NoWatch,
            call_off: CallOff::default(),
        };
        let Some(step) = operation.steps.get(step) else { return };
        for event in events {
            let Event::OperationResolved(resolved) = event else { continue };
            resolved.changes = match resolved.verdict {
                Said::Abandon => vanished(state, &seen),
                Said::Done | Said::NotDone => match driver.resolve(&context, step, &seen) {
                    Resolution::Done(report) => report.changes,
                    _ => Vec::new(),
                },
            };
        }
    }

    pub(crate) fn ctx(&self, requester: &Requester, state: &DomainState, digest: Option<String>) -> Ctx {
        let now = self.clock.now();
        let wait = self.settings.first_step_s_max.and_then(|seconds| i64::try_from(seconds).ok());
        let deadline = wait.and_then(|seconds| now.checked_add(SignedDuration::from_secs(seconds)).ok());
        Ctx {
            now,
            fresh: self.ids.next(),
            actor: requester.actor.clone(),
            terms: RequestTerms { command_sha256: digest, deadline, ..RequestTerms::default() },
            blocked: self.driver_of(state).map_or(Blocked::Domain, |driver| beside::blocked(&*driver, state)),
        }
    }

    /// Puts decided events on their stream: a request begins an operation, the rest is only recorded.
    pub(crate) fn addressed(
        &self,
        stream: &StreamId,
        command: &Command,
        operation: OperationId,
        key: Option<&str>,
        events: Vec<Event>,
    ) -> (Submitted, Vec<NewEvent>) {
        let is_request = events.iter().any(|event| Request::of(event).is_some());
        let (operation, submitted) = match command {
            Command::Resolve { operation, .. } => (Some(*operation), Submitted::Operation(*operation)),
            Command::Retry(retried) => (Some(*retried), Submitted::Operation(*retried)),
            _ if is_request => (Some(operation), Submitted::Operation(operation)),
            _ => (None, Submitted::Recorded),
        };
        // What a command is about is its last request: those before it make it possible, as operations of their own.
        let mut last = true;
        let mut addressed: Vec<NewEvent> = Vec::with_capacity(events.len());
        for event in events.into_iter().rev() {
            let is_request = Request::of(&event).is_some();
            let before = is_request && !last;
            addressed.push(NewEvent {
                stream: stream.clone(),
                key: key.filter(|_| is_request && !before).map(str::to_owned),
                event,
                operation: if before { Some(OperationId::from_uuid(self.ids.next())) } else { operation },
                cause: None,
            });
            last &= !is_request;
        }
        addressed.reverse();
        (submitted, addressed)
    }

    /// What a command would do. It takes no lock and writes nothing.
    ///
    /// # Errors
    /// A rejection, a precondition that is broken, or the hypervisor could not be asked.
    pub async fn dry_run(
        &self,
        requester: &Requester,
        domain: DomainId,
        command: &Command,
    ) -> Result<DryRun, EngineError> {
        let state = self.load(domain).await?;
        let events = decide(&state, command, &self.ctx(requester, &state, None))?;
        let mut requests: Vec<Request> = events.iter().filter_map(Request::of).collect();
        let request = requests.pop().ok_or_else(|| reject(Code::Invalid, "this command has no steps"))?;
        let driver = self.driver_of(&state)?;
        let observation = driver.observe(&state).await.map_err(EngineError::Driver)?;
        let mut plan =
            driver.plan(OperationId::from_uuid(self.ids.next()), &request, &state, &observation)?;
        match &request {
            Request::Revert(revert) => plan.left_out = state.left_by_revert(revert.snapshot),
            Request::Create(_) => plan.left_out.extend(state.domain.iter().flat_map(Domain::left_out)),
            _ => {}
        }
        let policy = self.settings.merge_policy();
        space::check_plan(&request, &plan, (&state, &observation), policy.margin_bytes)?;
        for before in &requests {
            let mut first =
                driver.plan(OperationId::from_uuid(self.ids.next()), before, &state, &observation)?;
            space::check_plan(before, &first, (&state, &observation), policy.margin_bytes)?;
            first.steps.append(&mut plan.steps);
            // What the revert would give up is in the snapshot that is taken first.
            plan = Plan {
                steps: first.steps,
                bytes_moved: plan.bytes_moved.saturating_add(first.bytes_moved),
                bytes_freed: 0,
                peak_space_bytes: plan.peak_space_bytes.saturating_add(first.peak_space_bytes),
                lost: first.lost,
                left_out: plan.left_out.into_iter().chain(first.left_out).collect(),
            };
        }
        let (mut after, mut merges, mut frees) = (state.clone(), Vec::new(), None);
        if let Request::Delete(delete) = &request {
            let deleted = (&requester.actor, self.clock.now());
            let foreseen = space::foresee(&state, delete, deleted, &observation, policy)?;
            plan.peak_space_bytes = plan.peak_space_bytes.max(foreseen.peak_bytes);
            (after, merges) = (foreseen.after, foreseen.verdicts);
            let allocated = |file: &Path| Some(observation.files.get(file)?.allocated_bytes);
            frees = (delete.what == DeleteWhat::Snapshot)
                .then(|| Occupied::new(&state, allocated).frees(&delete.snapshots))
                .flatten();
        }
        Ok(DryRun { request, plan, merges, frees, state, after })
    }
}

/// Whether a key can be kept: it goes into the log and into its index.
fn key_fits(key: Option<&str>) -> Result<(), EngineError> {
    let Some(key) = key else { return Ok(()) };
    if key.is_empty() || key.len() > KEY_BYTES_MAX || key.chars().any(char::is_control) {
        let message = format!("a key has 1 to {KEY_BYTES_MAX} bytes and no control characters");
        return Err(reject(Code::Invalid, message).into());
    }
    Ok(())
}

fn name_is_taken(name: &str) -> EngineError {
    reject(Code::Exists, format!("a domain '{name}' is registered already"))
        .hint("choose another name, or `snaptree domain remove` the old one")
        .into()
}

/// What an abandoned operation may have unlinked: layers that nobody needs, and whose files are gone; upper ones first.
fn vanished(state: &DomainState, seen: &Observation) -> Vec<LayerChange> {
    let mut left = state.layers.clone();
    let mut changes = Vec::new();
    let there = |file: &Path| seen.files.contains_key(file) || seen.unreadable.contains_key(file);
    loop {
        let gone = left.disks.iter().find_map(|(disk, layers)| {
            let needless = |id: &LayerId| {
                matches!(layers.role(id, &state.tree), Role::Tombstone(_))
                    && layers.dependants(id).next().is_none()
            };
            let gone = layers.layers.iter().find(|(id, layer)| needless(id) && !there(&layer.file));
            gone.map(|(layer, _)| LayerChange::Dropped { disk: disk.clone(), layer: layer.clone() })
        });
        let Some(gone) = gone else { return changes };
        left.apply(&gone);
        changes.push(gone);
    }
}

/// The SHA-256 of a command's JSON, in hex.
pub(crate) fn command_digest<T: Serialize>(command: &T) -> Result<String, serde_json::Error> {
    let digest = Sha256::digest(serde_json::to_vec(command)?);
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The answer to a key that was used before.
fn repeated(earlier: &Envelope, key: &str, digest: &str) -> Result<Submitted, EngineError> {
    let stored = match Request::of(&earlier.event) {
        Some(Request::Create(r)) => r.request.command_sha256,
        Some(Request::Revert(r)) => r.request.command_sha256,
        Some(Request::Delete(r)) => r.request.command_sha256,
        Some(Request::Edit(r)) => r.request.command_sha256,
        Some(Request::Unregister(r)) => r.request.command_sha256,
        Some(Request::Merge(_)) | None => None,
    };
    match (earlier.operation, stored) {
        (Some(operation), Some(stored)) if stored == digest => Ok(Submitted::Repeated(operation)),
        _ => Err(reject(Code::Exists, format!("the key '{key}' was given with another command before"))
            .hint("a key stands for one command; choose another")
            .into()),
    }
}
