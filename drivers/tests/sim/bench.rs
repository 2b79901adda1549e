//! A domain on the simulated hypervisor that is driven by hand, a step at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use jiff::Timestamp;
use serde_json::Value;
use snaptree_drivers::sim::SimDriver;
use snaptree_engine::domain::{Domain, DriverKind};
use snaptree_engine::driver::{
    CallOff, Driver, DriverError, Head, Hooks, Learnt, NoHooks, Observation, Probe, Progress, Registration,
    Resolution, StepContext, StepProgress, StepReport,
};
use snaptree_engine::event::{
    Actor, DeleteScope, DeleteWhat, DomainRegistered, DomainUnregisterRequested, Envelope, Event, Hash,
    MemoryKind, MergeWish, Origin, Place, RequestTerms, SnapshotCreateRequested, SnapshotCreated,
    SnapshotDeleteRequested, SnapshotDeleted, SnapshotRevertRequested, SnapshotReverted, UnregisterWish,
};
use snaptree_engine::operation::{Failure, Poison, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::Snapshot;
use snaptree_engine::{
    DiskName, DomainId, DomainName, EventId, OperationId, SnapshotId, SnapshotName, StreamId,
};
use uuid::Uuid;

/// One domain on the simulated hypervisor, and what the log would say of it.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) driver: SimDriver,
    pub(crate) state: DomainState,
}

/// An operation that was planned; its steps can be carried out one by one.
pub(crate) struct Planned {
    pub(crate) operation: OperationId,
    pub(crate) request: Request,
    pub(crate) steps: Vec<Step>,
}

pub(crate) struct Silent;

impl Progress for Silent {
    fn step_progress(&self, _progress: StepProgress) {}
}

/// Ends the caller at that place, as a kill would.
pub(crate) struct KillAt(String);

impl Hooks for KillAt {
    fn reached(&self, name: &str) {
        assert!(name != self.0, "killed at {name}");
    }
}

pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

pub(crate) fn vda() -> DiskName {
    DiskName::new("vda").unwrap()
}

pub(crate) fn now() -> Timestamp {
    "2026-11-23T02:15:00Z".parse().unwrap()
}

pub(crate) fn fresh() -> SnapshotId {
    SnapshotId::from_uuid(Uuid::now_v7())
}

pub(crate) fn probe(options: Value, disks: &[(&str, &str)]) -> Result<Probe, DriverError> {
    let registration = Registration {
        id: DomainId::from_uuid(Uuid::now_v7()),
        name: DomainName::new("web").unwrap(),
        driver: DriverKind::Sim,
        disks: disks
            .iter()
            .map(|(name, path)| (DiskName::new(*name).unwrap(), PathBuf::from(path)))
            .collect(),
        options,
        taken: BTreeMap::new(),
    };
    run(SimDriver::new(PathBuf::from("/nonexistent")).probe(&registration))
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(Value::Null, &[])
    }

    pub(crate) fn with(options: Value, disks: &[(&str, &str)]) -> Self {
        let probe = probe(options, disks).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let driver = SimDriver::new(dir.path().to_owned());
        let mut bench = Self { dir, driver, state: DomainState::default() };
        let domain = Domain {
            id: DomainId::from_uuid(Uuid::now_v7()),
            name: DomainName::new("web").unwrap(),
            driver: DriverKind::Sim,
            disks: probe.disks,
            config: probe.config,
            labels: BTreeMap::new(),
            capabilities: probe.capabilities,
        };
        bench.log(DomainRegistered { domain, claims: Vec::new() });
        bench
    }

    pub(crate) fn log(&mut self, event: impl Into<Event>) {
        let origin = Origin { uid: 0, host: "h".into(), pid: 1, via: "cli".into(), sudo_user: None };
        self.state.apply(&Envelope {
            seq: self.state.seq + 1,
            id: EventId::from_uuid(Uuid::now_v7()),
            stream: StreamId::System,
            version: self.state.version + 1,
            at: now(),
            actor: Actor::Engine,
            origin,
            epoch: 1,
            operation: None,
            cause: None,
            key: None,
            event: event.into(),
            hash: Hash([0; 32]),
        });
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join(format!("sim/{}.json", self.state.domain.as_ref().unwrap().id))
    }

    pub(crate) fn edit(&self, change: impl FnOnce(&mut Value)) {
        let mut machine = serde_json::from_slice(&fs::read(self.file()).unwrap()).unwrap();
        change(&mut machine);
        fs::write(self.file(), machine.to_string()).unwrap();
    }

    pub(crate) fn write(&self, block: u64, value: u64) {
        self.driver.write(&self.state, &vda(), block, value).unwrap();
    }

    pub(crate) fn content(&self) -> String {
        self.driver.content_sha256(&self.state, &vda()).unwrap()
    }

    pub(crate) fn content_of(&self, snapshot: SnapshotId) -> String {
        self.driver.snapshot_sha256(&self.state, snapshot, &vda()).unwrap()
    }

    pub(crate) fn observe(&self) -> Observation {
        run(self.driver.observe(&self.state)).unwrap()
    }

    pub(crate) fn plan(&self, request: Request) -> Result<Planned, Failure> {
        let operation = OperationId::from_uuid(Uuid::now_v7());
        let plan = self.driver.plan(operation, &request, &self.state, &self.observe())?;
        Ok(Planned { operation, request, steps: plan.steps })
    }

    pub(crate) fn context<'a>(
        &'a self,
        planned: &'a Planned,
        index: usize,
        hooks: &'a dyn Hooks,
    ) -> StepContext<'a> {
        StepContext {
            state: &self.state,
            operation: planned.operation,
            request: &planned.request,
            index,
            head: Head { seq: 1, hash: Hash([0; 32]) },
            now: now(),
            hooks,
            progress: &Silent,
            call_off: CallOff::default(),
        }
    }

    pub(crate) fn execute(&self, planned: &Planned, index: usize) -> Result<StepReport, DriverError> {
        run(self.driver.execute(&self.context(planned, index, &NoHooks), &planned.steps[index]))
    }

    pub(crate) fn execute_killed_at(&self, planned: &Planned, index: usize, place: &str) {
        let hooks = KillAt(place.to_owned());
        let context = self.context(planned, index, &hooks);
        let step = &planned.steps[index];
        let killed = catch_unwind(AssertUnwindSafe(|| run(self.driver.execute(&context, step))));
        assert!(killed.is_err(), "{place} was not reached");
    }

    pub(crate) fn resolve(&self, planned: &Planned, index: usize) -> Resolution {
        let context = self.context(planned, index, &NoHooks);
        self.driver.resolve(&context, &planned.steps[index], &self.observe())
    }

    pub(crate) fn undo(&self, planned: &Planned) -> Result<StepReport, DriverError> {
        run(self.driver.undo(&self.context(planned, 0, &NoHooks), &planned.steps[0]))
    }

    /// Logs what the operation made true.
    pub(crate) fn outcome(&mut self, planned: &Planned, report: &StepReport) {
        match &planned.request {
            Request::Create(request) => {
                let learnt: Learnt = serde_json::from_value(report.learnt.clone()).unwrap();
                let snapshot = Snapshot {
                    id: request.snapshot,
                    name: request.name.clone(),
                    description: None,
                    parent: None,
                    created: learnt.taken.unwrap(),
                    state: learnt.state.unwrap(),
                    memory: request.memory,
                    disks: request.disks.clone(),
                    labels: BTreeMap::new(),
                    hold: None,
                    made_by: Actor::Engine,
                    made_in: Some(planned.operation),
                    lost: false,
                    native: None,
                    left_out: Vec::new(),
                    real_name: None,
                };
                self.log(SnapshotCreated { snapshot });
            }
            Request::Revert(request) => self.log(SnapshotReverted { snapshot: request.snapshot }),
            _ => {}
        }
    }

    /// Plans a request and carries it through.
    pub(crate) fn carry(&mut self, request: Request) -> Vec<StepReport> {
        let planned = self.plan(request).unwrap();
        let mut reports = Vec::new();
        for (index, step) in planned.steps.iter().enumerate() {
            reports.push(self.execute(&planned, index).unwrap());
            assert_eq!(self.resolve(&planned, index), Resolution::Done(reports[index].clone()));
            if let Poison::AtFinish(snapshots) = &step.poison {
                for snapshot in snapshots {
                    let name = self.state.tree.get(*snapshot).unwrap().name.clone();
                    self.log(SnapshotDeleted { snapshot: *snapshot, name, stays: false });
                }
            }
        }
        if let Some(report) = reports.first() {
            self.outcome(&planned, report);
        }
        reports
    }

    pub(crate) fn create(&mut self, name: &str) -> SnapshotId {
        let request = create(name);
        let id = request.snapshot;
        self.carry(Request::Create(request));
        id
    }
}

pub(crate) fn create(name: &str) -> SnapshotCreateRequested {
    SnapshotCreateRequested {
        snapshot: fresh(),
        name: SnapshotName::new(name).unwrap(),
        description: None,
        labels: BTreeMap::new(),
        disks: BTreeSet::from([vda()]),
        memory: MemoryKind::Internal,
        place: Place::Usual,
        quiesce: false,
        before_revert: false,
        request: RequestTerms::default(),
    }
}

pub(crate) fn revert(snapshot: SnapshotId) -> Request {
    Request::Revert(SnapshotRevertRequested {
        snapshot,
        run_state: None,
        keep: None,
        request: RequestTerms::default(),
    })
}

pub(crate) fn delete(snapshots: &[SnapshotId], what: DeleteWhat) -> Request {
    Request::Delete(SnapshotDeleteRequested {
        snapshots: snapshots.to_vec(),
        named: snapshots.to_vec(),
        scope: DeleteScope::Named,
        what,
        merge: MergeWish::Auto,
        reasons: vec![],
        request: RequestTerms::default(),
    })
}

pub(crate) fn unregister(wish: UnregisterWish) -> Request {
    Request::Unregister(DomainUnregisterRequested { wish, request: RequestTerms::default() })
}

/// (our id, our parent's id) of every snapshot that the hypervisor lists, in its order.
pub(crate) fn seen_tree(seen: &Observation) -> Vec<(Option<SnapshotId>, Option<SnapshotId>)> {
    let by_native = |native: &String| seen.snapshots.iter().find(|s| s.native == *native).and_then(|s| s.id);
    seen.snapshots.iter().map(|s| (s.id, s.parent.as_ref().and_then(by_native))).collect()
}
