//! What a host says of machines: read afresh, of many at once.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::SnapshotId;
use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{DriverError, Observation, SeenSnapshot};
use snaptree_engine::operation::{Code, Failure};
use snaptree_engine::project::DomainState;
use snaptree_engine::tree::SnapshotState;

use super::client::{Client, Effect};
use super::config::EsxConfig;
use super::fault::CallError;
use super::inventory::{self, by_uuid};
use super::name::{helper, unescaped, unmarked};
use super::soap::{Element, Moref};
use super::vim::{Listed, Object, Query, Task, run_state, snapshots, traversal};
use crate::disks::{ListedDisk, named};

/// How many machines are asked about in one request; the host answers in pages.
pub const MACHINES_AT_ONCE: usize = 500;
/// Longest question of a host that is repeated, in characters.
const QUESTION_CHARS_MAX: usize = 300;

const PATHS: [&str; 10] = [
    "config.hardware.device",
    "config.instanceUuid",
    "config.uuid",
    "guest.toolsRunningStatus",
    "recentTask",
    "runtime.bootTime",
    "runtime.connectionState",
    "runtime.consolidationNeeded",
    "runtime.powerState",
    "snapshot",
];
const QUESTION: &str = "runtime.question";

/// A machine, as its host says it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// How it is powered.
    pub power: RunState,
    /// Its snapshots, parents first.
    pub snapshots: Vec<Listed>,
    /// The one that it stands on. None is legal also where there are snapshots.
    pub current: Option<Moref>,
    /// Its UUIDs.
    pub uuids: Vec<String>,
    /// Its disks; none where the host does not say.
    pub disks: Option<Vec<ListedDisk>>,
    /// The rest.
    pub detail: Detail,
}

/// What this driver adds to an [`Observation`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Detail {
    /// When the machine was switched on last.
    pub booted: Option<String>,
    /// Whether disks are left that no snapshot needs any more.
    pub consolidation_needed: bool,
    /// What the machine waits for an answer to.
    pub question: Option<String>,
    /// `connected`, if its host is there.
    pub connection: Option<String>,
    /// Whether VMware Tools run in the guest; none if the host does not say.
    pub tools_run: Option<bool>,
    /// The tasks that work on it, or did lately.
    pub tasks: Vec<Task>,
    /// Who we are there.
    pub user: String,
    /// Per snapshot of ours every object with its mark, the oldest first.
    pub marks: BTreeMap<SnapshotId, Vec<Mark>>,
}

/// An object that carries a snapshot's mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The object.
    pub native: String,
    /// When it was taken.
    pub taken: Option<Timestamp>,
    /// What a revert brings the machine to.
    pub state: RunState,
    /// Whether the guest was brought to rest.
    pub quiesced: bool,
}

impl Detail {
    /// Of an observation.
    ///
    /// # Errors
    /// It is none of this driver's.
    pub fn of(observation: &Observation) -> Result<Self, Failure> {
        Self::deserialize(&observation.detail).map_err(|error| {
            Failure::new(Code::Invalid, format!("the observation is none of this driver's: {error}"))
        })
    }
}

impl Machine {
    fn of(object: &Object, tasks: &BTreeMap<String, Task>, user: &str) -> Self {
        let (snapshots, current) = object.get("snapshot").map(snapshots).unwrap_or_default();
        let recent = object.get("recentTask").map(|recent| recent.children.as_slice()).unwrap_or_default();
        let question = object.get(QUESTION).and_then(|question| question.text_of("text"));
        let question = question.map(|text| text.chars().take(QUESTION_CHARS_MAX).collect());
        let tools = object.text("guest.toolsRunningStatus");
        let mut marks: BTreeMap<SnapshotId, Vec<(i64, Mark)>> = BTreeMap::new();
        for listed in &snapshots {
            if let Some(id) = unmarked(&listed.description).1 {
                let mark = Mark {
                    native: listed.snapshot.id.clone(),
                    taken: listed.taken,
                    state: listed.state,
                    quiesced: listed.quiesced,
                };
                marks.entry(id).or_default().push((listed.number, mark));
            }
        }
        let oldest_first = |mut marks: Vec<(i64, Mark)>| {
            marks.sort_by_key(|(number, _)| *number);
            marks.into_iter().map(|(_, mark)| mark).collect()
        };
        let detail = Detail {
            booted: object.text("runtime.bootTime").map(str::to_owned),
            consolidation_needed: object.get("runtime.consolidationNeeded").and_then(Element::flag)
                == Some(true),
            question,
            connection: object.text("runtime.connectionState").map(str::to_owned),
            tools_run: tools.map(|status| status != "guestToolsNotRunning"),
            tasks: recent.iter().filter_map(|task| tasks.get(&task.text).cloned()).collect(),
            user: user.to_owned(),
            marks: marks.into_iter().map(|(id, marks)| (id, oldest_first(marks))).collect(),
        };
        Self {
            power: run_state(object.text("runtime.powerState")),
            snapshots,
            current,
            disks: object.get("config.hardware.device").map(inventory::disks),
            uuids: ["config.instanceUuid", "config.uuid"]
                .into_iter()
                .filter_map(|path| object.text(path).map(str::to_owned))
                .collect(),
            detail,
        }
    }

    /// The objects that carry a snapshot's mark, the oldest first.
    pub fn marks(&self, snapshot: SnapshotId) -> &[Mark] {
        self.detail.marks.get(&snapshot).map_or(&[], Vec::as_slice)
    }

    /// Whether a snapshot is listed.
    pub fn lists(&self, native: &str) -> bool {
        self.snapshots.iter().any(|listed| listed.snapshot.id == native)
    }

    /// As the engine knows an observation.
    ///
    /// # Errors
    /// None; the signature is serde's.
    pub fn observation(&self, state: &DomainState, at: Timestamp) -> Result<Observation, Failure> {
        let adopted: BTreeMap<&str, SnapshotId> =
            state.tree.iter().filter_map(|known| Some((known.native.as_deref()?, known.id))).collect();
        let seen = |listed: &Listed| {
            let native = listed.snapshot.id.as_str();
            let name = unescaped(&listed.name);
            let (description, mark) = unmarked(&listed.description);
            // Of several with one mark the oldest is ours.
            let is_ours = |id: &SnapshotId| self.marks(*id).first().is_some_and(|mark| mark.native == native);
            let id = mark.filter(is_ours).or_else(|| adopted.get(native).copied());
            let state = match (listed.state, mark) {
                (RunState::Off, _) => SnapshotState::Shutoff,
                (state, _) => state.into(),
            };
            SeenSnapshot {
                id,
                native: native.to_owned(),
                parent: listed.parent.as_ref().map(|parent| parent.id.clone()),
                // The host merges whatever it deletes.
                stays: None,
                helper: if id.is_none() { helper(&name).map(str::to_owned) } else { None },
                name,
                description,
                taken: listed.taken,
                state: Some(state),
            }
        };
        let known = state.domain.as_ref().map_or(&[][..], |domain| domain.disks.as_slice());
        let disks = self.disks.clone().map(|disks| named(known, disks));
        Ok(Observation {
            at,
            run_state: self.power,
            in_use: Vec::new(),
            files: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            memory: BTreeMap::new(),
            foreign_dependants: BTreeMap::new(),
            disks,
            inside: BTreeMap::new(),
            generation: None,
            room: None,
            snapshots: self.snapshots.iter().map(seen).collect(),
            current: self.current.as_ref().map(|current| current.id.clone()),
            detail: serde_json::to_value(&self.detail)
                .map_err(|error| Failure::new(Code::Invalid, error.to_string()))?,
        })
    }
}

/// Reads machines of one host. One that is gone is not in the answer.
///
/// # Errors
/// The host cannot be asked.
pub async fn machines(client: &Client, wanted: &[Moref]) -> Result<BTreeMap<Moref, Machine>, CallError> {
    let user = client.user().await?;
    let mut found = BTreeMap::new();
    for part in wanted.chunks(MACHINES_AT_ONCE) {
        let mut part = part.to_vec();
        while !part.is_empty() {
            match read(client, &part).await {
                Ok(objects) => {
                    found.extend(of_objects(&objects, &user));
                    break;
                }
                // One that is gone fails the whole request, and says which one it is.
                Err(CallError::Fault(fault)) if fault.kind == "ManagedObjectNotFound" => {
                    let before = part.len();
                    let gone = fault.detail.moref_of("obj");
                    part.retain(|machine| Some(machine) != gone.as_ref());
                    if part.len() == before {
                        return Err(CallError::Fault(fault));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

async fn read(client: &Client, machines: &[Moref]) -> Result<Vec<Object>, CallError> {
    let paths: Vec<&str> = PATHS.into_iter().chain([QUESTION]).collect();
    let tasks = traversal("VirtualMachine", "recentTask");
    let query = Query::of("VirtualMachine", &paths).and("Task", &["info"]);
    machines.iter().fold(query, |query, machine| query.object_and(machine, &tasks)).read(client).await
}

fn of_objects(objects: &[Object], user: &str) -> BTreeMap<Moref, Machine> {
    let is_machine = |object: &&Object| object.object.object == "VirtualMachine";
    let task = |object: &Object| {
        let task = Task::of(&object.object.id, object.get("info")?)?;
        Some((object.object.id.clone(), task))
    };
    let tasks: BTreeMap<String, Task> = objects.iter().filter_map(task).collect();
    objects
        .iter()
        .filter(is_machine)
        .map(|object| (object.object.clone(), Machine::of(object, &tasks, user)))
        .collect()
}

/// Reads one registered machine. Where its object is gone, or is another machine now, it is looked for by its UUID.
///
/// # Errors
/// The host cannot be asked, or does not have it.
pub async fn machine(client: &Client, config: &EsxConfig) -> Result<(Moref, Machine), DriverError> {
    let told = |error| client.told(error, Effect::None);
    let known = config.machine();
    let found = machines(client, std::slice::from_ref(&known)).await.map_err(told)?.remove(&known);
    if let Some(machine) = found.filter(|machine| is_meant(machine, config)) {
        return Ok((known, machine));
    }
    let elsewhere = match &config.uuid {
        Some(uuid) => by_uuid(client, uuid).await.map_err(told)?,
        None => None,
    };
    if let Some(elsewhere) = elsewhere {
        let found =
            machines(client, std::slice::from_ref(&elsewhere)).await.map_err(told)?.remove(&elsewhere);
        if let Some(machine) = found {
            tracing::debug!(host = %client.host, vm = %elsewhere, was = %known, "the machine is another object now");
            return Ok((elsewhere, machine));
        }
    }
    Err(gone(client, config))
}

/// Whether an object is still the machine that was registered.
pub fn is_meant(machine: &Machine, config: &EsxConfig) -> bool {
    config.uuid.as_ref().is_none_or(|uuid| machine.uuids.iter().any(|other| other.eq_ignore_ascii_case(uuid)))
}

/// The host does not have a machine any more.
pub fn gone(client: &Client, config: &EsxConfig) -> DriverError {
    DriverError::permanent(
        Code::NotFound,
        format!(
            "host '{}' does not have the machine '{}' ({}) any more",
            client.host, config.name, config.vm
        ),
    )
    .hint("if it is gone for good, let go of the domain with `snaptree domain remove --metadata`")
}
