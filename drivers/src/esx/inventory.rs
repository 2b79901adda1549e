//! Finding machines on a host, and telling what there is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use snaptree_engine::domain::{Disk, RunState};
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use uuid::Uuid;

use super::client::{Client, Effect};
use super::fault::CallError;
use super::name::unescaped;
use super::soap::{Element, Moref, Request, SoapError};
use super::vim::{Object, Query, run_state};
use crate::disks::{ListedDisk, named};

/// Deepest folder of an inventory.
const FOLDERS_MAX: usize = 64;
/// What is read of a machine that is to be registered.
const ABOUT: [&str; 6] = [
    "name",
    "config.uuid",
    "config.instanceUuid",
    "config.template",
    "config.hardware.device",
    "capability.snapshotOperationsSupported",
];

/// A machine that a host has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Its object there.
    pub vm: String,
    /// Its name.
    pub name: String,
    /// Its inventory path, as `domain add --vm` takes it; none for a machine in a vApp.
    pub path: Option<String>,
    /// Its instance UUID, or its BIOS UUID where it has none.
    pub uuid: Option<String>,
    /// How it is powered.
    pub power: RunState,
    /// Whether it is a template, of which there are no snapshots.
    pub template: bool,
}

/// A machine that is to be registered.
#[derive(Clone, Debug, PartialEq)]
pub struct About {
    /// Its object.
    pub vm: Moref,
    /// Its name.
    pub name: String,
    /// Its instance UUID, or its BIOS UUID where it has none.
    pub uuid: Option<String>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Whether it is a template.
    pub template: bool,
}

/// Every machine of a host, in the order of their names.
///
/// # Errors
/// The host cannot be asked.
pub async fn list(client: &Client) -> Result<Vec<Found>, CallError> {
    let content = client.content().await?;
    let manager = content.view_manager.as_ref().ok_or(SoapError::Lacks("a view manager"))?;
    let request = Request::new("CreateContainerView", manager)
        .reference("container", &content.root)
        .text("type", "VirtualMachine")
        .text("type", "Folder")
        .text("type", "Datacenter")
        .flag("recursive", true);
    let made = client.call(&request, Effect::None).await?;
    let view = made.moref_of("returnval").ok_or(SoapError::Lacks("a view"))?;
    let query = Query::of(
        "VirtualMachine",
        &["name", "parent", "runtime.powerState", "config.uuid", "config.instanceUuid", "config.template"],
    )
    .and("Folder", &["name", "parent"])
    .and("Datacenter", &["name", "parent"])
    .view(&view);
    let read = query.read(client).await;
    // The host drops it with the session otherwise.
    if let Err(error) = client.call(&Request::new("DestroyView", &view), Effect::None).await {
        tracing::debug!(%error, "a view was left behind");
    }
    Ok(found(&read?))
}

fn found(objects: &[Object]) -> Vec<Found> {
    let folders: BTreeMap<&Moref, (&str, Option<Moref>)> = objects
        .iter()
        .filter(|object| object.object.object != "VirtualMachine")
        .map(|object| (&object.object, (object.text("name").unwrap_or_default(), parent(object))))
        .collect();
    let machines = objects.iter().filter(|object| object.object.object == "VirtualMachine");
    let mut found: Vec<Found> = machines
        .map(|machine| {
            let name = machine.text("name").unwrap_or_default();
            let mut parts = vec![name];
            let mut above = parent(machine);
            let in_folder = above.is_some();
            while let Some(folder) = above.take().filter(|_| parts.len() < FOLDERS_MAX) {
                // The root is in no path.
                let Some((name, next)) = folders.get(&folder) else { break };
                parts.push(name);
                above = next.clone();
            }
            parts.reverse();
            Found {
                vm: machine.object.id.clone(),
                name: unescaped(name),
                path: in_folder.then(|| parts.join("/")),
                uuid: uuid(machine),
                power: run_state(machine.text("runtime.powerState")),
                template: machine.get("config.template").and_then(Element::flag) == Some(true),
            }
        })
        .collect();
    found.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    found
}

fn parent(object: &Object) -> Option<Moref> {
    object.get("parent").and_then(Element::moref)
}

fn uuid(object: &Object) -> Option<String> {
    object.text("config.instanceUuid").or_else(|| object.text("config.uuid")).map(str::to_owned)
}

/// The machine that a user names by its inventory path, its UUID (instance or BIOS) or its name.
///
/// # Errors
/// There is none, or several, or the host cannot be asked.
pub async fn find(client: &Client, wanted: &str) -> Result<Moref, DriverError> {
    let told = |error| client.told(error, Effect::None);
    if wanted.parse::<Uuid>().is_ok() {
        return by_uuid(client, wanted).await.map_err(told)?.ok_or_else(|| none(client, wanted));
    }
    if wanted.contains('/') {
        let content = client.content().await.map_err(told)?;
        let request = Request::new("FindByInventoryPath", &content.search_index)
            .text("inventoryPath", wanted.trim_start_matches('/'));
        let reply = client.call(&request, Effect::None).await.map_err(told)?;
        return machine(&reply).ok_or_else(|| none(client, wanted));
    }
    let mut named: Vec<Found> = list(client).await.map_err(told)?;
    named.retain(|found| found.name == wanted);
    match named.as_slice() {
        [] => Err(none(client, wanted)),
        [one] => Ok(Moref::new("VirtualMachine", one.vm.as_str())),
        several => {
            let paths: Vec<&str> = several.iter().filter_map(|found| found.path.as_deref()).collect();
            let message = format!("host '{}' has {} machines of that name", client.host, several.len());
            Err(refused(Code::Invalid, message).hint(format!("name one by its path: {}", paths.join(", "))))
        }
    }
}

/// The machine of that UUID: by its instance UUID, which is unique, else by its BIOS UUID, which copies share.
///
/// # Errors
/// The host cannot be asked.
pub async fn by_uuid(client: &Client, uuid: &str) -> Result<Option<Moref>, CallError> {
    let content = client.content().await?;
    for instance in [true, false] {
        let request = Request::new("FindByUuid", &content.search_index)
            .text("uuid", uuid)
            .flag("vmSearch", true)
            .flag("instanceUuid", instance);
        if let Some(found) = machine(&client.call(&request, Effect::None).await?) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn machine(reply: &Element) -> Option<Moref> {
    reply.moref_of("returnval").filter(|found| found.object == "VirtualMachine")
}

fn none(client: &Client, wanted: &str) -> DriverError {
    let shown: String = wanted.chars().filter(|c| !c.is_control()).take(80).collect();
    refused(Code::NotFound, format!("host '{}' has no machine '{shown}'", client.host)).hint(format!(
        "`snaptree host discover {}` lists them; a path is like DC0/vm/folder/NAME",
        client.host
    ))
}

fn refused(code: Code, message: String) -> DriverError {
    Failure::new(code, message).refused().into()
}

/// What is to be known of a machine to register it.
///
/// # Errors
/// The host cannot be asked, or has no such machine any more.
pub async fn about(client: &Client, vm: &Moref) -> Result<About, CallError> {
    let object = Query::of("VirtualMachine", &ABOUT).object(vm).one(client).await?;
    let mut about = About {
        vm: vm.clone(),
        name: unescaped(object.text("name").unwrap_or_default()),
        uuid: uuid(&object),
        disks: Vec::new(),
        template: object.get("config.template").and_then(Element::flag) == Some(true),
    };
    if let Some(devices) = object.get("config.hardware.device") {
        about.disks = named(&[], disks(devices));
    }
    Ok(about)
}

/// A machine's disks. Those that snapshots leave out come last.
pub fn disks(devices: &Element) -> Vec<ListedDisk> {
    let disks = devices.children.iter().filter(|device| device.xsi_type.as_deref() == Some("VirtualDisk"));
    let listed = |device: &Element| {
        let bytes = device.text_of("capacityInBytes").and_then(|bytes| bytes.parse().ok());
        let kilobytes =
            || device.text_of("capacityInKB").and_then(|kb| kb.parse::<u64>().ok()).map(|kb| kb << 10);
        Some(ListedDisk {
            place: device.text_of("key")?.to_owned(),
            size_bytes: bytes.or_else(kilobytes),
            left_out: device.child("backing").and_then(left_out).map(str::to_owned),
        })
    };
    let mut listed: Vec<ListedDisk> = disks.filter_map(listed).collect();
    listed.sort_by_key(|disk| disk.left_out.is_some());
    listed
}

/// Why snapshots leave a disk out, by what it is kept in (vSphere API: `VirtualDiskMode`,
/// `VirtualDiskCompatibilityMode`).
fn left_out(backing: &Element) -> Option<&'static str> {
    match (backing.text_of("diskMode"), backing.text_of("compatibilityMode")) {
        (_, Some("physicalMode")) => Some("a raw device in physical mode"),
        (Some("independent_nonpersistent"), _) => {
            Some("independent, and what was written to it is dropped when the machine is switched off")
        }
        (Some(mode), _) if mode.starts_with("independent") => Some("independent"),
        _ => None,
    }
}
