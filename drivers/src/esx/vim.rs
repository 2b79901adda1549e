//! The objects and properties of vim25 that Snaptree reads.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snaptree_engine::domain::RunState;

use super::client::{Client, Effect};
use super::fault::CallError;
use super::soap::{Element, Moref, Request, SoapError};

/// How many objects a page has. A host may make it fewer.
const PAGE_OBJECTS: usize = 100;
/// Most pages of one answer.
const PAGES_MAX: usize = 10_000;

/// Where a host has what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// The folder in which everything is.
    pub root: Moref,
    /// Reads properties.
    pub property_collector: Moref,
    /// Logs in and out.
    pub session_manager: Moref,
    /// Finds machines.
    pub search_index: Moref,
    /// Makes views of many objects.
    pub view_manager: Option<Moref>,
    /// What it is, in its own words.
    pub product: String,
    /// The version of its API, such as `8.0.1.0`.
    pub api_version: String,
    /// `HostAgent` for an ESXi, `VirtualCenter` for a vCenter.
    pub api_type: String,
}

impl Content {
    /// Reads the answer of `RetrieveServiceContent`.
    ///
    /// # Errors
    /// It lacks something.
    pub fn of(reply: &Element) -> Result<Self, SoapError> {
        let content = reply.child("returnval").ok_or(SoapError::Lacks("the service content"))?;
        let about = content.child("about").ok_or(SoapError::Lacks("what the host is"))?;
        let object = |name: &'static str| content.moref_of(name).ok_or(SoapError::Lacks(name));
        let said = |name: &str| about.text_of(name).unwrap_or_default().chars().take(100).collect::<String>();
        let api_version = said("apiVersion");
        // It becomes part of a header.
        if api_version.is_empty()
            || !api_version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
        {
            return Err(SoapError::Lacks("a version of the API"));
        }
        let full = said("fullName");
        let product = if full.is_empty() { said("name") } else { full };
        Ok(Self {
            root: object("rootFolder")?,
            property_collector: object("propertyCollector")?,
            session_manager: object("sessionManager")?,
            search_index: object("searchIndex")?,
            view_manager: content.moref_of("viewManager"),
            product,
            api_version,
            api_type: said("apiType"),
        })
    }

    /// Whether its API is of that version or newer.
    pub fn is_at_least(&self, major: u32, minor: u32) -> bool {
        let mut numbers = self.api_version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
    }
}

/// An object with those of its properties that were asked for and that it has.
#[derive(Clone, Debug)]
pub struct Object {
    /// Which one.
    pub object: Moref,
    properties: BTreeMap<String, Element>,
}

impl Object {
    fn of(element: &mut Element) -> Option<Self> {
        let object = element.moref_of("obj")?;
        let mut properties = BTreeMap::new();
        for property in element.children.extract_if(.., |child| child.name == "propSet") {
            let name = property.text_of("name").unwrap_or_default().to_owned();
            if let Some(value) = property.children.into_iter().find(|child| child.name == "val") {
                properties.insert(name, value);
            }
        }
        Some(Self { object, properties })
    }

    /// A property; none if it is not set.
    pub fn get(&self, path: &str) -> Option<&Element> {
        self.properties.get(path)
    }

    /// A property that is text; none if it is not set, or empty.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.get(path).map(|value| value.text.as_str()).filter(|text| !text.is_empty())
    }
}

/// What is to be read: objects, and which properties of which kinds of them.
#[derive(Debug)]
pub struct Query {
    properties: String,
    objects: String,
}

impl Query {
    /// These properties of objects of that kind.
    pub fn of(kind: &str, paths: &[&str]) -> Self {
        Self { properties: String::new(), objects: String::new() }.and(kind, paths)
    }

    /// And these of that kind.
    #[must_use]
    pub fn and(mut self, kind: &str, paths: &[&str]) -> Self {
        let paths: String = paths.iter().map(|path| format!("<pathSet>{path}</pathSet>")).collect();
        self.properties.push_str(&format!("<propSet><type>{kind}</type>{paths}</propSet>"));
        self
    }

    /// Of this object.
    #[must_use]
    pub fn object(self, object: &Moref) -> Self {
        self.object_and(object, "")
    }

    /// Of this object, and of what `selection` leads to from it.
    #[must_use]
    pub fn object_and(mut self, object: &Moref, selection: &str) -> Self {
        let (kind, id) = (
            quick_xml::escape::escape(object.object.as_str()),
            quick_xml::escape::escape(object.id.as_str()),
        );
        self.objects.push_str(&format!(
            "<objectSet><obj type=\"{kind}\">{id}</obj><skip>false</skip>{selection}</objectSet>"
        ));
        self
    }

    /// Of what a view shows.
    #[must_use]
    pub fn view(mut self, view: &Moref) -> Self {
        let id = quick_xml::escape::escape(view.id.as_str());
        self.objects.push_str(&format!(
            "<objectSet><obj type=\"ContainerView\">{id}</obj><skip>true</skip>{}</objectSet>",
            traversal("ContainerView", "view")
        ));
        self
    }

    /// Reads it, page by page.
    ///
    /// # Errors
    /// The host cannot be asked, or an object is gone.
    pub async fn read(&self, client: &Client) -> Result<Vec<Object>, CallError> {
        let collector = &client.content().await?.property_collector;
        let mut request = Request::new("RetrievePropertiesEx", collector).raw(&format!(
            "<specSet>{}{}</specSet><options><maxObjects>{PAGE_OBJECTS}</maxObjects></options>",
            self.properties, self.objects
        ));
        let mut objects = Vec::new();
        for _ in 0..PAGES_MAX {
            let mut reply = client.call(&request, Effect::None).await?;
            let Some(result) = reply.children.iter_mut().find(|child| child.name == "returnval") else {
                break;
            };
            let found = result.children.iter_mut().filter(|child| child.name == "objects");
            objects.extend(found.filter_map(Object::of));
            let Some(token) = result.text_of("token") else { break };
            request = Request::new("ContinueRetrievePropertiesEx", collector).text("token", token);
        }
        Ok(objects)
    }

    /// Reads the one object that was asked for.
    ///
    /// # Errors
    /// As [`Query::read`], or there is none.
    pub async fn one(&self, client: &Client) -> Result<Object, CallError> {
        let found = self.read(client).await?.into_iter().next();
        Ok(found.ok_or(SoapError::Lacks("the object that was asked for"))?)
    }
}

/// The part of a query that leads from objects of a kind to others.
pub fn traversal(kind: &str, path: &str) -> String {
    format!(
        "<selectSet xsi:type=\"TraversalSpec\"><name>{path}</name><type>{kind}</type><path>{path}</path><skip>false</skip></selectSet>"
    )
}

/// How a machine is powered.
pub fn run_state(power: Option<&str>) -> RunState {
    match power {
        Some("poweredOn") => RunState::Running,
        // As libvirt has it: the machine is there, and its memory is kept.
        Some("suspended") => RunState::Paused,
        _ => RunState::Off,
    }
}

/// A snapshot in a machine's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The object.
    pub snapshot: Moref,
    /// The one that it stands upon.
    pub parent: Option<Moref>,
    /// Its name, as it is kept: with escapes.
    pub name: String,
    /// What is written about it.
    pub description: String,
    /// Its number; it grows with each snapshot of the machine.
    pub number: i64,
    /// When it was taken, by the host's clock.
    pub taken: Option<Timestamp>,
    /// What a revert brings the machine to.
    pub state: RunState,
    /// Whether the guest was brought to rest.
    pub quiesced: bool,
}

/// A machine's snapshots, parents before their children, and the current one.
pub fn snapshots(info: &Element) -> (Vec<Listed>, Option<Moref>) {
    let mut listed = Vec::new();
    let mut waiting: Vec<(&Element, Option<Moref>)> =
        info.all("rootSnapshotList").map(|root| (root, None)).collect();
    waiting.reverse();
    while let Some((element, parent)) = waiting.pop() {
        let Some(snapshot) = element.moref_of("snapshot") else { continue };
        let at = waiting.len();
        waiting.extend(element.all("childSnapshotList").map(|child| (child, Some(snapshot.clone()))));
        waiting[at..].reverse();
        listed.push(Listed {
            snapshot,
            parent,
            name: element.text_of("name").unwrap_or_default().to_owned(),
            description: element.text_of("description").unwrap_or_default().to_owned(),
            number: element.text_of("id").and_then(|id| id.parse().ok()).unwrap_or(i64::MAX),
            taken: element.text_of("createTime").and_then(|time| time.parse().ok()),
            state: run_state(element.text_of("state")),
            quiesced: element.flag_of("quiesced") == Some(true),
        });
    }
    (listed, info.moref_of("currentSnapshot"))
}

/// How far a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// It waits for its turn.
    Queued,
    /// It is at work.
    Running,
    /// It has ended well.
    Success,
    /// It has ended otherwise.
    Error,
}

/// A task of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id there.
    pub id: String,
    /// What it does, such as `VirtualMachine.createSnapshot`.
    pub what: String,
    /// How far it is.
    pub state: TaskState,
    /// When it was asked for, by the host's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued: Option<Timestamp>,
    /// Who asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

impl Task {
    /// Reads a `TaskInfo`.
    pub fn of(id: &str, info: &Element) -> Option<Self> {
        let state = match info.text_of("state")? {
            "queued" => TaskState::Queued,
            "running" => TaskState::Running,
            "success" => TaskState::Success,
            _ => TaskState::Error,
        };
        Some(Self {
            id: id.to_owned(),
            what: info.text_of("descriptionId").unwrap_or_default().to_owned(),
            state,
            queued: info.text_of("queueTime").and_then(|time| time.parse().ok()),
            user: info.child("reason").and_then(|reason| reason.text_of("userName")).map(str::to_owned),
        })
    }

    /// Whether it has not ended.
    pub const fn is_at_work(&self) -> bool {
        matches!(self.state, TaskState::Queued | TaskState::Running)
    }

    /// Whether it is of the kinds that change what this driver looks at. The part before the dot differs: some hosts
    /// name the snapshot, others its machine.
    pub fn concerns_snapshots(&self) -> bool {
        let verb = self.what.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
        [
            "createsnapshot",
            "revertto",
            "removesnapshot",
            "removeallsnapshots",
            "consolidate",
            "poweron",
            "poweroff",
        ]
        .iter()
        .any(|known| verb.starts_with(known))
    }

    /// Whether it is a revert.
    pub fn is_revert(&self) -> bool {
        let verb = self.what.rsplit('.').next().unwrap_or_default();
        verb.to_ascii_lowercase().starts_with("revertto")
    }
}
