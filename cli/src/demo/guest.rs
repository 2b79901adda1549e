//! The machine of the demo: it writes random content, and tells what its disk and its snapshots read as.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest, Sha256};
use snaptree_drivers::sim::{BLOCKS, SimDriver};
use snaptree_engine::domain::DriverKind;
use snaptree_engine::engine::Engine;
use snaptree_engine::project::DomainState;
use snaptree_engine::{DiskName, SnapshotName};
use snaptree_store::Store;

/// What the guest sees as its disk's size.
const DISK_BYTES: u64 = 64 << 20;
/// What it writes at once.
const WRITE_BYTES: usize = 2 << 20;
/// The image that is registered.
const IMAGE: &str = "web.qcow2";

/// The machine, and what everything of it should read as.
pub struct Guest {
    driver: DriverKind,
    dir: PathBuf,
    writes: u64,
    active: Option<String>,
    taken: BTreeMap<String, String>,
    ever: usize,
    comparisons: usize,
}

impl Guest {
    /// A machine in `dir` that was never on.
    ///
    /// # Errors
    /// Its disk cannot be made.
    pub fn new(driver: DriverKind, dir: &Path) -> Result<Self> {
        let guest = Self {
            driver,
            dir: dir.to_owned(),
            writes: 0,
            active: None,
            taken: BTreeMap::new(),
            ever: 0,
            comparisons: 0,
        };
        if driver == DriverKind::Qemu {
            let size = DISK_BYTES.to_string();
            tool(
                Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(guest.image()).arg(size),
            )?;
        }
        Ok(guest)
    }

    /// How many snapshots there ever were.
    pub const fn snapshots(&self) -> usize {
        self.ever
    }

    /// How many contents were compared.
    pub const fn comparisons(&self) -> usize {
        self.comparisons
    }

    /// The registered path, which whoever starts the machine opens.
    fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }

    /// The arguments that register it.
    pub fn registration(&self) -> Vec<&'static str> {
        match self.driver {
            DriverKind::Qemu => vec!["--driver", "qemu", "--disk", "vda=web.qcow2"],
            _ => vec!["--driver", "sim"],
        }
    }

    /// Which hypervisor it is on.
    pub const fn driver(&self) -> DriverKind {
        self.driver
    }

    /// The named place in the step that makes a revert (with QEMU also a create) true, before or after it has.
    pub const fn place(&self, turn: Turn) -> &'static str {
        match (self.driver, turn) {
            (DriverKind::Qemu, Turn::Before) => "qemu.switch.locked",
            (DriverKind::Qemu, Turn::After) => "qemu.switch.renamed",
            (_, Turn::Before) => "sim.revert.before",
            (_, Turn::After) => "sim.revert.after",
        }
    }

    /// Writes random data where nothing, or older data, was.
    ///
    /// # Errors
    /// The disk cannot be written.
    pub async fn write(&mut self) -> Result<String> {
        self.writes += 1;
        let said = match self.driver {
            DriverKind::Qemu => self.write_qemu()?,
            _ => self.write_sim().await?,
        };
        self.active = Some(self.active_sha256().await?);
        Ok(said)
    }

    fn write_qemu(&self) -> Result<String> {
        // Each write overlaps half of the one before, so that layers do cover one another.
        let offset = self.writes * (WRITE_BYTES as u64) / 2;
        let data = self.dir.join("data");
        std::fs::write(&data, random(WRITE_BYTES)?)?;
        let command = format!("write -q -s {} {offset} {WRITE_BYTES}", data.display());
        tool(Command::new("qemu-io").args(["-f", "qcow2", "-c", &command]).arg(self.image()))?;
        std::fs::remove_file(data)?;
        Ok(format!("the machine writes 2 MiB of random data through {IMAGE}"))
    }

    async fn write_sim(&self) -> Result<String> {
        let state = self.state().await?;
        let (sim, disk) = (self.sim(), vda()?);
        for block in random(16)? {
            let value = random(8)?.iter().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
            let block = (u64::from(block) * 4 + self.writes) % BLOCKS;
            sim.write(&state, &disk, block, value)?;
        }
        Ok("the machine writes 16 random blocks".to_owned())
    }

    /// Notes that a snapshot was taken of what the disk reads as now.
    pub fn took(&mut self, name: &str) {
        if let Some(active) = &self.active {
            self.ever += 1;
            self.taken.insert(name.to_owned(), active.clone());
        }
    }

    /// Notes that a snapshot was deleted.
    pub fn deleted(&mut self, name: &str) {
        self.taken.remove(name);
    }

    /// Notes that the disk should read as a snapshot now.
    pub fn reverted(&mut self, name: &str) {
        self.active = self.taken.get(name).cloned();
    }

    /// Compares every snapshot with what it read as when it was taken.
    ///
    /// # Errors
    /// One differs, is missing, or cannot be read.
    pub async fn compare_snapshots(&mut self) -> Result<usize> {
        let state = self.state().await?;
        let there: Vec<&str> = state.tree.iter().map(|snapshot| snapshot.name.as_str()).collect();
        let expected: Vec<&str> = self.taken.keys().map(String::as_str).collect();
        let sorted = |mut names: Vec<&str>| {
            names.sort_unstable();
            names.join(", ")
        };
        ensure!(
            sorted(there.clone()) == sorted(expected.clone()),
            "there should be {expected:?}, and there are {there:?}"
        );
        for (name, expected) in &self.taken {
            let found = self.snapshot_sha256(&state, name)?;
            self.comparisons += 1;
            ensure!(found == *expected, "snapshot '{name}' reads as {found}, and was taken as {expected}");
        }
        Ok(self.taken.len())
    }

    /// Compares every snapshot and the machine's disk.
    ///
    /// # Errors
    /// One differs, or cannot be read.
    pub async fn compare_all(&mut self) -> Result<usize> {
        let snapshots = self.compare_snapshots().await?;
        let found = self.active_sha256().await?;
        self.comparisons += 1;
        if let Some(expected) = &self.active {
            ensure!(found == *expected, "the machine's disk reads as {found}, and should as {expected}");
        }
        Ok(snapshots)
    }

    /// Which of the two the disk reads as: as it was, or as the snapshot.
    ///
    /// # Errors
    /// It reads as neither.
    pub async fn reads_as(&mut self, snapshot: &str) -> Result<Turn> {
        let found = self.active_sha256().await?;
        self.comparisons += 1;
        if self.taken.get(snapshot) == Some(&found) {
            return Ok(Turn::After);
        }
        ensure!(self.active.as_ref() == Some(&found), "the machine's disk reads as neither old nor new");
        Ok(Turn::Before)
    }

    async fn active_sha256(&self) -> Result<String> {
        match self.driver {
            DriverKind::Qemu => self.image_sha256(&self.image()),
            _ => Ok(self.sim().content_sha256(&self.state().await?, &vda()?)?),
        }
    }

    fn snapshot_sha256(&self, state: &DomainState, name: &str) -> Result<String> {
        let snapshot = state.tree.by_name(&SnapshotName::new(name)?);
        let id = snapshot.with_context(|| format!("snapshot '{name}' is not there"))?.id;
        if self.driver == DriverKind::Sim {
            return Ok(self.sim().snapshot_sha256(state, id, &vda()?)?);
        }
        let layer = state.layers.disks.get(&vda()?).and_then(|disk| disk.layer_of(id));
        self.image_sha256(&layer.with_context(|| format!("no layer reads as '{name}'"))?.1.file)
    }

    /// What a guest would read of an image, as `qemu-img convert` gives it.
    fn image_sha256(&self, image: &Path) -> Result<String> {
        let raw = self.dir.join("content.raw");
        tool(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw))?;
        let mut file = File::open(&raw)?;
        file.seek(SeekFrom::Start(0))?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            digest.update(&buffer[..read]);
        }
        std::fs::remove_file(raw)?;
        let mut hex = String::with_capacity(64);
        for byte in digest.finalize() {
            write!(hex, "{byte:02x}")?;
        }
        Ok(hex)
    }

    fn sim(&self) -> SimDriver {
        SimDriver::new(self.dir.join("state"))
    }

    /// The domain as the log tells it.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn state(&self) -> Result<DomainState> {
        let store = Store::open_reader(&self.dir.join("state"))?;
        let engine = Engine::new(std::sync::Arc::new(store));
        let id = engine.find_domain("web").await?;
        Ok(engine.load(id).await?)
    }
}

/// On which side of the point of no return something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing has changed for the machine.
    Before,
    /// Everything has.
    After,
}

fn vda() -> Result<DiskName> {
    Ok(DiskName::new("vda")?)
}

fn random(bytes: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; bytes];
    File::open("/dev/urandom")?.read_exact(&mut data)?;
    Ok(data)
}

fn tool(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if done.status.success() {
        return Ok(());
    }
    std::io::stderr().write_all(&done.stderr)?;
    bail!("{name} ended with {}", done.status)
}
