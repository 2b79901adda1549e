//! A small engine around the driver: it keeps a domain's state by events, and can be cut off at every hook.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::hash::{DefaultHasher, Hash as _, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;
use snaptree_drivers::qemu::{PathWish, QemuConfig, QemuDriver, QemuOptions};
use snaptree_engine::domain::{Domain, DriverKind};
use snaptree_engine::driver::{
    CallOff, Driver, DriverError, ErrorClass, Head, Hooks, Learnt, Observation, Progress, Registration,
    Remedy, Resolution, StepContext, StepProgress, StepReport,
};
use snaptree_engine::event::*;
use snaptree_engine::operation::{Failure, Poison, Request, Step};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::merge::{MergePlan, MergePolicy, PutOff, Verdict, verdicts};
use snaptree_engine::tree::{Labels, Snapshot};
use snaptree_engine::{
    DiskName, DomainId, DomainName, EventId, OperationId, SnapshotId, SnapshotName, StreamId,
};

pub const SIZE: &str = "8M";

/// Records where it was, and crashes at one place.
#[derive(Default)]
pub struct CrashAt {
    pub at: Option<usize>,
    pub seen: Mutex<Vec<String>>,
}

/// What a crashing hook throws.
struct Crash;

impl Hooks for CrashAt {
    fn reached(&self, name: &str) {
        let mut seen = self.seen.lock().unwrap();
        seen.push(name.to_owned());
        if self.at == Some(seen.len() - 1) {
            drop(seen);
            resume_unwind(Box::new(Crash));
        }
    }
}

impl Progress for CrashAt {
    fn step_progress(&self, progress: StepProgress) {
        match progress {
            StepProgress::Bytes { done, total } => assert!(done <= total),
            StepProgress::Percent(percent) => assert!(percent <= 100),
        }
    }
}

/// How an operation ended here.
#[derive(Debug, PartialEq)]
pub enum Ended {
    Done,
    Failed(Failure),
}

/// What recovery does with a step that is half done and could go either way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wish {
    Forward,
    Back,
}

pub struct Lab {
    pub dir: tempfile::TempDir,
    pub driver: QemuDriver,
    pub state: DomainState,
    pub disks: Vec<(DiskName, PathBuf)>,
    pub keep: PathWish,
    pub names: BTreeMap<String, SnapshotId>,
    /// What every snapshot's disks read as when it was taken.
    pub contents: BTreeMap<SnapshotId, BTreeMap<DiskName, u64>>,
    pub seq: u64,
    /// What happens between a crash and the recovery.
    pub after_crash: Option<Box<dyn Fn()>>,
    /// At which hook of the recovery it crashes again, going forward or back.
    pub second_crash: Option<usize>,
    /// Whether the disks are read before a snapshot is taken.
    pub read_before_create: bool,
}

pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).env("LC_ALL", "C").output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

pub fn make(path: &Path, size: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), size]);
}

pub fn make_on(path: &Path, base: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path.to_str().unwrap()]);
}

pub fn io(path: &Path, command: &str) {
    let text = run("qemu-io", &["-f", "qcow2", "-c", command, path.to_str().unwrap()]);
    assert!(!text.contains("failed"), "{command}: {text}");
}

/// What the disk reads as.
pub fn content(path: &Path) -> u64 {
    let raw = tempfile::NamedTempFile::new().unwrap();
    run("qemu-img", &["convert", "-O", "raw", path.to_str().unwrap(), raw.path().to_str().unwrap()]);
    let mut hasher = DefaultHasher::new();
    std::fs::read(raw.path()).unwrap().hash(&mut hasher);
    hasher.finish()
}

pub fn registration(disks: &[(DiskName, PathBuf)], options: &QemuOptions) -> Registration {
    Registration {
        id: DomainId::from_uuid(uuid::Uuid::now_v7()),
        name: DomainName::new("web").unwrap(),
        driver: DriverKind::Qemu,
        disks: disks.to_vec(),
        options: serde_json::to_value(options).unwrap(),
        taken: BTreeMap::new(),
    }
}

impl Lab {
    pub async fn new(disks: &[&str]) -> Self {
        Self::with(disks, PathWish::Follow, |_| {}).await
    }

    /// `prepare` may do something with the images before they are registered.
    pub async fn with(disks: &[&str], keep: PathWish, prepare: impl Fn(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks: Vec<(DiskName, PathBuf)> = disks
            .iter()
            .map(|name| (DiskName::new(*name).unwrap(), dir.path().join(format!("{name}.qcow2"))))
            .collect();
        for (_, path) in &disks {
            make(path, SIZE);
            io(path, "write -P 1 0 3M");
        }
        prepare(dir.path());
        Self::register(dir, disks, keep).await
    }

    pub async fn register(dir: tempfile::TempDir, disks: Vec<(DiskName, PathBuf)>, keep: PathWish) -> Self {
        let driver = QemuDriver::new(dir.path().join("run")).settle_grace(Duration::from_secs(5));
        let registration = registration(&disks, &QemuOptions { keep_path: keep, ..QemuOptions::default() });
        let probe = driver.probe(&registration).await.unwrap();
        let mut lab = Self {
            dir,
            driver,
            state: DomainState::default(),
            disks,
            keep,
            names: BTreeMap::new(),
            contents: BTreeMap::new(),
            seq: 0,
            after_crash: None,
            second_crash: None,
            read_before_create: true,
        };
        let domain = Domain {
            id: registration.id,
            name: registration.name,
            driver: DriverKind::Qemu,
            disks: probe.disks,
            config: probe.config,
            labels: Labels::new(),
            capabilities: probe.capabilities,
        };
        lab.apply(None, DomainRegistered { domain, claims: Vec::new() }.into());
        lab
    }

    pub fn apply(&mut self, operation: Option<OperationId>, event: Event) {
        self.seq += 1;
        // Through the stored form, as the real log does.
        let event = Event::decode(event.kind(), event.schema(), &event.encode().unwrap()).unwrap();
        let envelope = Envelope {
            seq: self.seq,
            id: EventId::from_uuid(uuid::Uuid::now_v7()),
            stream: StreamId::System,
            version: self.seq,
            at: Timestamp::now(),
            actor: Actor::Engine,
            origin: Origin { uid: 0, host: "lab".into(), pid: 1, via: "test".into(), sudo_user: None },
            epoch: 1,
            operation,
            cause: None,
            key: None,
            event,
            hash: Hash([0; 32]),
        };
        self.state.apply(&envelope);
        assert_eq!(self.state.illegal, None);
    }

    pub fn config(&self) -> QemuConfig {
        serde_json::from_value(self.state.domain.as_ref().unwrap().config.clone()).unwrap()
    }

    /// What the machine opens.
    pub fn opens(&self, disk: &DiskName) -> PathBuf {
        let adopted = self.state.layers.disks.get(disk).and_then(|d| d.active_layer()).is_some();
        match self.keep {
            PathWish::Keep if adopted => self.config().layers.join("active").join(disk.as_str()),
            _ => self.disks.iter().find(|(name, _)| name == disk).unwrap().1.clone(),
        }
    }

    /// The machine writes something.
    pub fn write(&self, command: &str) {
        for (disk, _) in &self.disks {
            io(&self.opens(disk), command);
        }
    }

    pub fn now(&self) -> BTreeMap<DiskName, u64> {
        self.disks.iter().map(|(disk, _)| (disk.clone(), content(&self.opens(disk)))).collect()
    }

    pub async fn observe(&self) -> Observation {
        self.driver.observe(&self.state).await.unwrap()
    }

    pub fn create_request(&mut self, name: &str) -> SnapshotCreateRequested {
        let snapshot = SnapshotId::from_uuid(uuid::Uuid::now_v7());
        self.names.insert(name.to_owned(), snapshot);
        SnapshotCreateRequested {
            snapshot,
            name: SnapshotName::new(name).unwrap(),
            description: None,
            labels: Labels::new(),
            disks: self.disks.iter().map(|(disk, _)| disk.clone()).collect(),
            memory: MemoryKind::No,
            place: Place::Usual,
            quiesce: false,
            before_revert: false,
            request: RequestTerms::default(),
        }
    }

    pub async fn create(&mut self, name: &str) {
        let request = self.create_request(name);
        assert_eq!(self.operate(request.into(), None, Wish::Forward).await, Ended::Done);
    }

    pub fn revert_request(&self, name: &str) -> Event {
        SnapshotRevertRequested {
            snapshot: self.names[name],
            run_state: None,
            keep: None,
            request: RequestTerms::default(),
        }
        .into()
    }

    pub async fn revert(&mut self, name: &str) {
        let request = self.revert_request(name);
        assert_eq!(self.operate(request, None, Wish::Forward).await, Ended::Done);
        assert_eq!(self.now(), self.contents[&self.names[name]], "after the revert to {name}");
    }

    pub fn delete_request(&self, names: &[&str]) -> Event {
        let ids: Vec<SnapshotId> = names.iter().map(|name| self.names[*name]).collect();
        SnapshotDeleteRequested {
            snapshots: ids.clone(),
            named: ids,
            scope: DeleteScope::Named,
            what: DeleteWhat::Snapshot,
            merge: MergeWish::Auto,
            reasons: vec![],
            request: RequestTerms::default(),
        }
        .into()
    }

    pub async fn delete(&mut self, names: &[&str]) {
        let request = self.delete_request(names);
        assert_eq!(self.operate(request, None, Wish::Forward).await, Ended::Done);
    }

    /// The first merge that can be done.
    pub async fn next_merge(&self) -> Option<MergePlan> {
        let seen = self.observe().await;
        verdicts(
            &self.state,
            &seen,
            MergePolicy { copy_bytes_max: u64::MAX, put_off: PutOff::Take, margin_bytes: 0 },
        )
        .into_iter()
        .find_map(|verdict| match verdict {
            Verdict::Merge(plan) => Some(plan),
            Verdict::Defer { .. } => None,
        })
    }

    /// Merges until nothing is left to do; says what was done.
    pub async fn merge_all(&mut self) -> Vec<MergePlan> {
        let mut done = Vec::new();
        while let Some(plan) = self.next_merge().await {
            let request = MergeStarted { plan: plan.clone() }.into();
            assert_eq!(self.operate(request, None, Wish::Forward).await, Ended::Done);
            self.check().await;
            done.push(plan);
            assert!(done.len() < 50);
        }
        done
    }

    /// Carries a request through, as the engine does; with a crash at hook number `crash` and a recovery after it.
    pub async fn operate(&mut self, request: Event, crash: Option<usize>, wish: Wish) -> Ended {
        let hooks = CrashAt { at: crash, seen: Mutex::default() };
        self.operate_with(request, &hooks, wish).await
    }

    pub async fn operate_with(&mut self, event: Event, hooks: &CrashAt, wish: Wish) -> Ended {
        let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
        let request = Request::of(&event).unwrap();
        if let Request::Create(create) = &request
            && self.read_before_create
        {
            let now = self.now();
            let held = now.into_iter().filter(|(disk, _)| create.disks.contains(disk)).collect();
            self.contents.insert(create.snapshot, held);
        }
        self.apply(Some(operation), event);
        let seen = self.observe().await;
        let plan = match self.driver.plan(operation, &request, &self.state, &seen) {
            Ok(plan) => plan,
            Err(failure) => {
                assert!(failure.refused, "{failure}");
                self.apply(Some(operation), OperationFailed { failure: failure.clone() }.into());
                return Ended::Failed(failure);
            }
        };
        self.apply(Some(operation), OperationPlanned { steps: plan.steps.clone() }.into());
        for (index, step) in plan.steps.iter().enumerate() {
            self.apply(Some(operation), OperationStepStarted { step: index }.into());
            let done = self.step(operation, &request, index, step, hooks).await;
            let (how, report) = match done {
                Some(Ok(report)) => (HowFinished::Executed, report),
                Some(Err(error)) => {
                    assert_eq!(error.class, ErrorClass::Permanent, "{}: {error}", step.name);
                    self.go_back(operation, &request, index, &plan.steps, &error.failure).await;
                    return Ended::Failed(error.failure);
                }
                None => match self.recover(operation, &request, index, step, wish).await {
                    Ok(done) => done,
                    Err(failure) => {
                        self.go_back(operation, &request, index, &plan.steps, &failure).await;
                        return Ended::Failed(failure);
                    }
                },
            };
            self.finish(operation, index, step, how, report);
        }
        self.succeed(operation, &request);
        Ended::Done
    }

    /// `None` for a crash.
    async fn step(
        &self,
        operation: OperationId,
        request: &Request,
        index: usize,
        step: &Step,
        hooks: &CrashAt,
    ) -> Option<Result<StepReport, DriverError>> {
        let context = self.context(operation, request, index, hooks);
        until_crash(self.driver.execute(&context, step)).await
    }

    pub fn context<'a>(
        &'a self,
        operation: OperationId,
        request: &'a Request,
        index: usize,
        hooks: &'a CrashAt,
    ) -> StepContext<'a> {
        StepContext {
            state: &self.state,
            operation,
            request,
            index,
            head: Head { seq: self.seq, hash: Hash([0; 32]) },
            now: Timestamp::now(),
            hooks,
            progress: hooks,
            call_off: CallOff::default(),
        }
    }

    async fn recover(
        &self,
        operation: OperationId,
        request: &Request,
        index: usize,
        step: &Step,
        wish: Wish,
    ) -> Result<(HowFinished, StepReport), Failure> {
        // Whatever the crash left, the machine could be started now.
        for (disk, _) in &self.disks {
            content(&self.opens_now(disk));
        }
        if let Some(again) = self.second_crash {
            let hooks = CrashAt { at: Some(again), seen: Mutex::default() };
            match self.recover_once(operation, request, index, step, wish, &hooks).await {
                Some(recovered) => return recovered,
                None => println!("cut off again in the recovery of '{}' ({again})", step.name),
            }
        }
        let hooks = CrashAt::default();
        self.recover_once(operation, request, index, step, wish, &hooks).await.unwrap()
    }

    async fn recover_once(
        &self,
        operation: OperationId,
        request: &Request,
        index: usize,
        step: &Step,
        wish: Wish,
        hooks: &CrashAt,
    ) -> Option<Result<(HowFinished, StepReport), Failure>> {
        self.driver.settle(&self.state, operation).await.unwrap();
        if let Some(happens) = &self.after_crash {
            happens();
        }
        let seen = self.observe().await;
        let context = self.context(operation, request, index, hooks);
        let resolution = self.driver.resolve(&context, step, &seen);
        let back = Failure::new(snaptree_engine::operation::Code::Cancelled, "as wished");
        match resolution {
            Resolution::Done(report) => return Some(Ok((HowFinished::Observed, report))),
            Resolution::NotDone | Resolution::HalfDone(Remedy::Finish | Remedy::EitherWay)
                if wish == Wish::Back && can_undo(step, &seen) =>
            {
                return Some(Err(back));
            }
            Resolution::NotDone | Resolution::HalfDone(Remedy::Finish | Remedy::EitherWay) => {}
            Resolution::HalfDone(Remedy::TakeBack(failure)) => return Some(Err(failure)),
            Resolution::HalfDone(Remedy::AskSomeone(failure)) => panic!("someone is asked: {failure}"),
        }
        let report = until_crash(self.driver.execute(&context, step)).await?.unwrap();
        Some(Ok((HowFinished::Executed, report)))
    }

    /// After a crash the log may not know yet that the disk was adopted.
    fn opens_now(&self, disk: &DiskName) -> PathBuf {
        let path = self.disks.iter().find(|(name, _)| name == disk).unwrap().1.clone();
        let link = self.config().layers.join("active").join(disk.as_str());
        if self.keep == PathWish::Keep && link.exists() { link } else { path }
    }

    async fn go_back(
        &mut self,
        operation: OperationId,
        request: &Request,
        from: usize,
        steps: &[Step],
        failure: &Failure,
    ) {
        for index in (0..=from).rev() {
            self.apply(
                Some(operation),
                OperationUndoStarted { step: index, failure: failure.clone() }.into(),
            );
            let hooks = CrashAt { at: self.second_crash, seen: Mutex::default() };
            let context = self.context(operation, request, index, &hooks);
            if until_crash(self.driver.undo(&context, &steps[index])).await.is_none() {
                println!("cut off again while '{}' was taken back", steps[index].name);
                self.driver.settle(&self.state, operation).await.unwrap();
                for (disk, _) in &self.disks {
                    content(&self.opens_now(disk));
                }
            }
            let hooks = CrashAt::default();
            let context = self.context(operation, request, index, &hooks);
            self.driver.undo(&context, &steps[index]).await.unwrap();
            // Taking back twice must be harmless.
            let report = self.driver.undo(&context, &steps[index]).await.unwrap();
            self.apply(
                Some(operation),
                OperationUndoFinished { step: index, changes: report.changes }.into(),
            );
        }
        self.apply(Some(operation), OperationFailed { failure: failure.clone() }.into());
    }

    fn finish(
        &mut self,
        operation: OperationId,
        index: usize,
        step: &Step,
        how: HowFinished,
        report: StepReport,
    ) {
        let finished =
            OperationStepFinished { step: index, how, changes: report.changes, learnt: report.learnt };
        // The deletes come first, as they are one commit with the step's end.
        if let Poison::AtFinish(snapshots) = &step.poison {
            for id in snapshots {
                let name = self.state.tree.get(*id).unwrap().name.clone();
                self.apply(Some(operation), SnapshotDeleted { snapshot: *id, name, stays: false }.into());
                self.contents.remove(id);
            }
        }
        self.apply(Some(operation), finished.into());
    }

    fn succeed(&mut self, operation: OperationId, request: &Request) {
        let open = self.state.operation(operation).unwrap().clone();
        match request {
            Request::Create(r) => {
                let learnt: Learnt = open.learnt.clone();
                let snapshot = Snapshot {
                    id: r.snapshot,
                    name: r.name.clone(),
                    description: r.description.clone(),
                    parent: None,
                    created: learnt.taken.unwrap(),
                    state: learnt.state.unwrap(),
                    memory: r.memory,
                    disks: r.disks.clone(),
                    labels: Labels::new(),
                    hold: None,
                    made_by: Actor::Engine,
                    made_in: Some(operation),
                    lost: false,
                    native: None,
                    left_out: Vec::new(),
                    real_name: None,
                };
                self.apply(Some(operation), SnapshotCreated { snapshot }.into());
            }
            Request::Revert(r) => {
                self.apply(Some(operation), SnapshotReverted { snapshot: r.snapshot }.into());
            }
            _ => {}
        }
        self.apply(Some(operation), OperationSucceeded {}.into());
    }

    /// The end of a step that was executed.
    pub fn finish_step(&mut self, operation: OperationId, index: usize, step: &Step, report: StepReport) {
        self.finish(operation, index, step, HowFinished::Executed, report);
    }

    /// Every snapshot reads as when it was taken.
    pub fn check_snapshots(&self) {
        for (id, disks) in &self.contents {
            if !self.state.tree.contains(*id) {
                continue;
            }
            for (disk, expected) in disks {
                let (_, layer) = self.state.layers.disks[disk].layer_of(*id).unwrap();
                assert_eq!(
                    content(&layer.file),
                    *expected,
                    "snapshot {id} on {disk}: {}",
                    layer.file.display()
                );
            }
        }
    }

    /// The invariants: contents, files, links, and that planning sees no drift.
    pub async fn check(&mut self) {
        self.check_snapshots();
        for (disk, layers) in &self.state.layers.disks {
            for (id, layer) in &layers.layers {
                let mode = std::fs::metadata(&layer.file).unwrap().permissions().mode();
                let open = mode & 0o222 != 0;
                assert_eq!(
                    open,
                    layers.active.as_ref() == Some(id),
                    "{disk}: mode of {}",
                    layer.file.display()
                );
            }
        }
        self.check_files();
        // A plan that is refused for drift would say so here.
        let seen = self.observe().await;
        let request = Request::Create(self.create_request("probe"));
        self.names.remove("probe");
        let operation = OperationId::from_uuid(uuid::Uuid::now_v7());
        let planned = self.driver.plan(operation, &request, &self.state, &seen);
        assert!(planned.is_ok(), "{:?}", planned.err());
        assert!(seen.foreign_dependants.is_empty(), "{:?}", seen.foreign_dependants);
    }

    /// No file without the log knowing it, none missing.
    fn check_files(&self) {
        let layers = self.config().layers;
        let known: BTreeSet<PathBuf> = self
            .state
            .layers
            .disks
            .values()
            .flat_map(|disk| disk.layers.values().map(|layer| layer.file.clone()))
            .collect();
        for file in &known {
            assert!(file.is_file(), "{} is missing", file.display());
            run("qemu-img", &["info", "--backing-chain", file.to_str().unwrap()]);
        }
        let generation = self.state.layers.generation.clone().filter(|name| !name.is_empty());
        if layers.exists() {
            for entry in std::fs::read_dir(&layers).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let ours = known.contains(&path) || name == "active" || Some(&name) == generation.as_ref();
                assert!(ours, "{} was left behind", path.display());
            }
        }
        if let Some(generation) = generation {
            assert_eq!(std::fs::read_link(layers.join("active")).unwrap(), Path::new(&generation));
            let manifest = std::fs::read(layers.join("active/manifest.json")).unwrap();
            let manifest: snaptree_drivers::qemu::Manifest = serde_json::from_slice(&manifest).unwrap();
            let live: BTreeSet<_> =
                manifest.snapshots.iter().filter(|s| !s.tombstone).map(|s| s.id).collect();
            let dead: BTreeSet<_> = manifest.snapshots.iter().filter(|s| s.tombstone).map(|s| s.id).collect();
            assert_eq!(live, self.state.tree.iter().map(|s| s.id).collect());
            assert_eq!(dead, self.state.tombstones.keys().copied().collect());
            assert_eq!(manifest.current, self.state.tree.current().map(|s| s.id));
        } else {
            assert!(!layers.exists(), "the layers folder was left behind");
        }
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".snaptree-"), "{name} was left behind");
        }
        let run = self.dir.path().join("run");
        assert!(!run.exists() || std::fs::read_dir(run).unwrap().count() == 0, "a lock was left behind");
    }
}

fn can_undo(step: &Step, seen: &Observation) -> bool {
    use snaptree_engine::operation::Reversal;
    match step.reversal {
        Reversal::Undoable => true,
        Reversal::ForwardOnly => false,
        // Before the switch.
        Reversal::PointOfNoReturn => step.data["turn"]["previous"].as_str() == seen.generation.as_deref(),
    }
}

/// Drives a future until it ends or a hook crashes it; then it is abandoned where it stood.
async fn until_crash<F: Future>(future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    std::future::poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(poll) => poll.map(Some),
        Err(thrown) if thrown.is::<Crash>() => std::task::Poll::Ready(None),
        Err(thrown) => resume_unwind(thrown),
    })
    .await
}
