//! Where the state is, and how it is opened.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Result;
use jiff::Timestamp;
use snaptree_drivers::esx::EsxDriver;
use snaptree_drivers::qemu::QemuDriver;
use snaptree_drivers::sim::SimDriver;
use snaptree_drivers::virtualbox::VirtualboxDriver;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::Hooks;
use snaptree_engine::engine::Engine;
use snaptree_engine::log::{ClockOrder, EventFilter};
use snaptree_engine::project::DomainState;
use snaptree_engine::{DomainId, StreamId};
use snaptree_store::{DATABASE_FILE, LockWait, Store, StoreError};

use crate::args::{Global, WriterArgs};
use crate::config::Config;
use crate::exit::{Exit, NO_STATE_HINT, Trouble};
use crate::hooks;
use crate::office::there::{self, There};
use crate::office::{Here, LogHosts, Office, Policies, ReadOut};
use crate::programs::HookPrograms;
use crate::render::note;
use crate::render::text::{Look, safe};
use crate::requester::this_user;
use crate::serve::socket::{SOCKET_FILE, SYSTEM_FOLDER, SYSTEM_STATE};
use crate::when::{Moment, local_now, moment};

/// Where drivers keep what lives as long as an operation, in the state directory.
const RUN_FOLDER: &str = "run";

/// How long logging out of hosts may take.
const LOGOUT_MAX: Duration = Duration::from_secs(2);

/// How long a wait for the lock stays unmentioned.
const QUIET: Duration = Duration::from_secs(1);

/// What every command works with.
#[derive(Clone, Debug)]
pub struct Context {
    /// The state directory.
    pub dir: PathBuf,
    /// Whether JSON is wanted.
    pub json: bool,
    /// The socket at which the daemon that has it may be found.
    pub socket: PathBuf,
    /// What speaks to hosts; it keeps their sessions until the program ends.
    hosts: Arc<OnceLock<EsxDriver>>,
}

/// The state, opened for reading.
pub struct Reader {
    /// The engine over it.
    pub engine: Engine,
    /// Its files; none where the daemon reads them out.
    files: Option<Arc<Store>>,
}

/// The state, opened for requests: by this process, or by the daemon that has it.
pub struct Writer {
    /// The engine over it, for reading.
    pub engine: Engine,
    /// Where requests are carried out.
    pub office: Box<dyn Office>,
}

/// Whether a state directory may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It is made.
    Make,
    /// It is an error.
    Refuse,
}

/// The prefix of the log that is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Its last event; `u64::MAX` for now.
    pub seq: u64,
    /// The moment itself, for what expires.
    pub at: Timestamp,
    /// Whether the clock went back before it; none for now.
    pub clock: Option<ClockOrder>,
}

impl Prefix {
    /// Whether it is not simply now.
    pub const fn is_past(&self) -> bool {
        self.clock.is_some()
    }
}

impl Context {
    /// From the command line, the environment, and the system's daemon if there is one.
    ///
    /// # Errors
    /// No directory is named and none can be found.
    pub async fn new(global: &Global) -> Result<Self> {
        let json = global.json;
        let named = global.state.clone().or_else(|| from_environment("SNAPTREE_STATE"));
        if let Some(dir) = named {
            let dir = std::path::absolute(dir)?;
            return Ok(Self { socket: dir.join(SOCKET_FILE), dir, json, hosts: Arc::default() });
        }
        let system = Path::new(SYSTEM_FOLDER).join(SOCKET_FILE);
        // One that is not for this user is none: the user has a state of their own.
        if let Ok(Some(daemon)) = there::find(&system).await {
            return Ok(Self {
                dir: daemon.status().await?.state,
                json,
                socket: system,
                hosts: Arc::default(),
            });
        }
        let dir = std::path::absolute(default_dir()?)?;
        Ok(Self { socket: dir.join(SOCKET_FILE), dir, json, hosts: Arc::default() })
    }

    /// Where that cannot be told, opening it tells why.
    fn exists(&self) -> bool {
        self.dir.join(DATABASE_FILE).try_exists().unwrap_or(true)
    }

    fn no_state(&self) -> Trouble {
        Trouble::not_found(format!("no state at {}", self.dir.display())).hint(NO_STATE_HINT)
    }

    /// Opens the state for reading: no lock, no waiting. Where this user may not read its files and may ask the
    /// daemon, that reads them out.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub async fn reader(&self) -> Result<Reader> {
        let error = match Store::open_reader(&self.dir) {
            Ok(store) => {
                let store = Arc::new(store);
                return Ok(Reader { engine: Engine::new(store.clone()), files: Some(store) });
            }
            Err(error) => error,
        };
        let unreadable = matches!(
            error,
            StoreError::Missing { .. }
                | StoreError::NotReadable { .. }
                | StoreError::Io { .. }
                | StoreError::Database { .. }
        );
        if unreadable && let Ok(Some(daemon)) = self.daemon().await {
            return Ok(Reader { engine: Engine::new(Arc::new(ReadOut(daemon))), files: None });
        }
        Err(match error {
            StoreError::Missing { .. } => self.no_state().into(),
            other => anyhow::Error::from(other),
        })
    }

    /// Opens the state for looking at hypervisors, too: for dry runs.
    ///
    /// # Errors
    /// There is none, or it or the settings cannot be read.
    pub async fn planner(&self) -> Result<Reader> {
        let Reader { engine, files } = self.reader().await?;
        let engine = self.with_config(engine, Config::load()?);
        Ok(Reader { engine, files })
    }

    /// The daemon that has the state; none if there is none.
    ///
    /// # Errors
    /// There is one, and this user may not ask it.
    pub async fn daemon(&self) -> Result<Option<There>> {
        there::find(&self.socket).await
    }

    /// Opens the state for requests.
    ///
    /// # Errors
    /// Another process has it for longer than we wait, or it or the settings cannot be used.
    pub async fn writer(&self, args: &WriterArgs, missing: Missing) -> Result<Writer> {
        let deadline = Instant::now() + args.lock_timeout;
        let mut told = false;
        loop {
            if let Some(daemon) = self.daemon().await? {
                return Ok(Writer { engine: self.reader().await?.engine, office: Box::new(daemon) });
            }
            if missing == Missing::Refuse && !self.exists() {
                return Err(self.no_state().into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = LockWait { timeout: left.min(QUIET) };
            match Store::open_writer(&self.dir, wait) {
                // Whoever has it may be a daemon that is about to listen.
                Err(StoreError::Locked { holder, .. }) if left > QUIET => {
                    if !std::mem::replace(&mut told, true) {
                        let (place, holder) = (self.dir.display().to_string(), holder.to_string());
                        note(&format!("waiting for {}: {} has it", safe(&place), safe(&holder)));
                    }
                }
                Err(StoreError::Locked { dir, holder, .. }) => {
                    let waited = args.lock_timeout;
                    return Err(StoreError::Locked { dir, holder, waited }.into());
                }
                other => return self.writer_on(other?, hooks::of_process()?),
            }
        }
    }

    /// Opens the state for requests by this process alone, with other hooks.
    ///
    /// # Errors
    /// As [`Context::writer`].
    pub fn writer_here(&self, args: &WriterArgs, hooks: Arc<dyn Hooks>) -> Result<Writer> {
        if !self.exists() {
            return Err(self.no_state().into());
        }
        self.writer_on(Store::open_writer(&self.dir, LockWait { timeout: args.lock_timeout })?, hooks)
    }

    fn writer_on(&self, store: Store, hooks: Arc<dyn Hooks>) -> Result<Writer> {
        let engine = self.engine_on(store, hooks)?;
        let office =
            Box::new(Here { engine: engine.clone(), requester: this_user(), policies: Policies::default() });
        Ok(Writer { engine, office })
    }

    /// The engine over a store that this process has for itself.
    ///
    /// # Errors
    /// The settings cannot be read.
    pub fn engine_on(&self, store: Store, hooks: Arc<dyn Hooks>) -> Result<Engine> {
        Ok(self.with_config(Engine::new(Arc::new(store)), Config::load()?).with_hooks(hooks))
    }

    /// The simulated hypervisor of this state directory.
    pub fn sim(&self) -> SimDriver {
        hooks::slowed(SimDriver::new(self.dir.clone()))
    }

    /// Ends the sessions on hosts. One that does not answer in time ends it by itself.
    pub async fn close(&self) {
        if let Some(hosts) = self.hosts.get() {
            // Whoever told the program to end does not wait for a host.
            let _ = tokio::time::timeout(LOGOUT_MAX, hosts.close()).await;
        }
    }

    fn with_config(&self, engine: Engine, config: Config) -> Engine {
        let qemu = QemuDriver::new(self.dir.join(RUN_FOLDER))
            .tool_times(config.qemu)
            .job_speed(config.job_speed_bytes)
            .left_out(config.left_out_disks);
        let book = || EsxDriver::new(Arc::new(LogHosts(Arc::clone(engine.log()))), config.esx);
        let hosts = self.hosts.get_or_init(book).clone();
        let virtualbox = VirtualboxDriver::new(config.manage, self.dir.join(RUN_FOLDER));
        engine
            .with_settings(config.settings)
            .with_driver(DriverKind::Esx, Arc::new(hosts))
            .with_hook_runner(Arc::new(HookPrograms::new(self.dir.join(RUN_FOLDER))))
            .with_driver(DriverKind::Sim, Arc::new(self.sim()))
            .with_driver(DriverKind::Qemu, Arc::new(qemu))
            .with_driver(DriverKind::Virtualbox, Arc::new(virtualbox))
    }
}

impl Reader {
    /// The files of the log.
    ///
    /// # Errors
    /// This user may not read them.
    pub fn files(&self) -> Result<&Store> {
        let refused = || {
            Trouble::new(
                Exit::Failed,
                "permission",
                "this needs the files of the state, and they are not for you",
            )
            .hint("ask somebody who may read the state directory")
        };
        Ok(self.files.as_deref().ok_or_else(refused)?)
    }

    /// A number that changes when the log has grown.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn version(&self) -> Result<u64> {
        match &self.files {
            Some(files) => Ok(files.data_version()?),
            None => Ok(self.engine.log().head().await?.seq),
        }
    }

    /// The prefix of the log that `--at` asks for.
    ///
    /// # Errors
    /// The text is no moment, the log does not reach so far, or cannot be read.
    pub async fn prefix(&self, at: Option<&str>) -> Result<Prefix> {
        let Some(text) = at else {
            return Ok(Prefix { seq: u64::MAX, at: Timestamp::now(), clock: None });
        };
        match moment(text, &local_now())? {
            Moment::Time(at) => {
                let found = self.engine.seq_at(at).await?;
                Ok(Prefix { seq: found.seq, at, clock: Some(found.clock) })
            }
            Moment::Seq(seq) => {
                let head = self.engine.log().head().await?.seq;
                if seq > head {
                    let message = format!("the log has no event {seq}; its last is {head}");
                    return Err(Trouble::not_found(message).into());
                }
                let event = match seq.checked_sub(1) {
                    Some(before) => self.engine.log().read(before, &EventFilter::default(), 1).await?,
                    None => Vec::new(),
                };
                let at = event.first().map_or(Timestamp::UNIX_EPOCH, |event| event.at);
                Ok(Prefix { seq, at, clock: Some(ClockOrder::Monotone) })
            }
        }
    }

    /// A domain as it was at the end of a prefix.
    ///
    /// # Errors
    /// There was none of that name, or the log cannot be read.
    pub async fn domain(&self, wanted: &str, prefix: Prefix) -> Result<DomainState> {
        match self.engine.find_domain_at(wanted, prefix.seq).await {
            Ok(id) => Ok(self.engine.load_at(id, prefix.seq).await?),
            Err(unknown) if prefix.is_past() => {
                Err(self.registered_later(wanted).await?.unwrap_or(unknown.into()))
            }
            Err(unknown) => Err(unknown.into()),
        }
    }

    /// The refusal where a domain is registered now, and was not at the moment that was asked about.
    async fn registered_later(&self, wanted: &str) -> Result<Option<anyhow::Error>> {
        let Ok(id) = self.engine.find_domain(wanted).await else { return Ok(None) };
        let first = self.engine.log().read_stream(&StreamId::Domain(id), 0, u64::MAX, 1).await?;
        let Some(first) = first.first() else { return Ok(None) };
        let since = Look::of_stdout().time(first.at);
        let message =
            format!("{} was not registered then: it is since {since} (event {})", safe(wanted), first.seq);
        let hint = format!("ask about a time after that, or `--at seq:{}`", first.seq);
        Ok(Some(Trouble::not_found(message).hint(hint).into()))
    }

    /// A domain as it is.
    ///
    /// # Errors
    /// There is none of that name, or the log cannot be read.
    pub async fn find(&self, wanted: &str) -> Result<DomainId> {
        Ok(self.engine.find_domain(wanted).await?)
    }
}

fn from_environment(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn default_dir() -> Result<PathBuf> {
    if nix::unistd::geteuid().is_root() {
        return Ok(PathBuf::from(SYSTEM_STATE));
    }
    // The base directory specification: a relative path there is to be ignored.
    let absolute = |name: &str| from_environment(name).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|base| base.join("snaptree"))
        .ok_or_else(|| {
            Trouble::usage("no state directory: HOME is not set").hint("name one with --state").into()
        })
}
