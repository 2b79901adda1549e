//! The hosts that a log knows: ESXi and vCenter, which many domains share.
//!
//! They are kept in the stream of the installation. What is kept of one is its driver's; the log knows where a password
//! comes from, and never the password.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::command::reject;
use crate::domain::DriverKind;
use crate::engine::{CONFLICTS_MAX, Engine, EngineError, Requester};
use crate::event::{Actor, Event, HostAdded, HostRemoved};
use crate::ids::{HostName, StreamId};
use crate::log::{EventLog, LogError, NewEvent};
use crate::operation::Code;

/// How many events are read at once.
const PAGE_EVENTS: usize = 1_024;

/// A host, as the log tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// Its name.
    pub name: HostName,
    /// Who speaks to it.
    pub driver: DriverKind,
    /// Where it is and who we are there; only the driver reads it.
    pub config: serde_json::Value,
    /// When that was said last.
    pub at: Timestamp,
    /// By whom.
    pub by: Actor,
}

/// Whether a host of that name may be there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Known {
    /// It is refused.
    Refuse,
    /// It is spoken to otherwise from then on.
    Replace,
}

/// All hosts, in the order of their names.
///
/// # Errors
/// The store failed.
pub async fn hosts(log: &dyn EventLog) -> Result<BTreeMap<HostName, Host>, LogError> {
    Ok(read(log).await?.0)
}

/// The hosts, and the version of the stream that they are in.
async fn read(log: &dyn EventLog) -> Result<(BTreeMap<HostName, Host>, u64), LogError> {
    let (mut hosts, mut version) = (BTreeMap::new(), 0);
    loop {
        let page = log.read_stream(&StreamId::System, version, u64::MAX, PAGE_EVENTS).await?;
        for envelope in &page {
            version = envelope.version;
            match &envelope.event {
                Event::HostAdded(HostAdded { host, driver, config }) => {
                    let (name, config) = (host.clone(), config.clone());
                    let (driver, at, by) = (*driver, envelope.at, envelope.actor.clone());
                    hosts.insert(host.clone(), Host { name, driver, config, at, by });
                }
                Event::HostRemoved(HostRemoved { host }) => {
                    hosts.remove(host);
                }
                _ => {}
            }
        }
        if page.len() < PAGE_EVENTS {
            return Ok((hosts, version));
        }
    }
}

impl Engine {
    /// All hosts, in the order of their names.
    ///
    /// # Errors
    /// The store failed.
    pub async fn hosts(&self) -> Result<BTreeMap<HostName, Host>, EngineError> {
        Ok(hosts(&*self.log).await?)
    }

    /// The host of that name.
    ///
    /// # Errors
    /// There is none, or the store failed.
    pub async fn host(&self, name: &HostName) -> Result<Host, EngineError> {
        self.hosts().await?.remove(name).ok_or_else(|| unknown(name))
    }

    /// Registers a host, or changes what is kept of one.
    ///
    /// # Errors
    /// It is known and is not to be, or the store failed.
    pub async fn add_host(
        &self,
        requester: &Requester,
        added: HostAdded,
        known: Known,
    ) -> Result<(), EngineError> {
        self.change_hosts(requester, |hosts| {
            if known == Known::Refuse && hosts.contains_key(&added.host) {
                let message = format!("a host '{}' is registered already", added.host);
                return Err(reject(Code::Exists, message)
                    .hint("choose another name, or change it with --replace")
                    .into());
            }
            Ok(added.clone().into())
        })
        .await
    }

    /// Forgets a host. Whether domains are on it is the caller's to see.
    ///
    /// # Errors
    /// There is none of that name, or the store failed.
    pub async fn remove_host(&self, requester: &Requester, name: &HostName) -> Result<(), EngineError> {
        self.change_hosts(requester, |hosts| match hosts.contains_key(name) {
            true => Ok(HostRemoved { host: name.clone() }.into()),
            false => Err(unknown(name)),
        })
        .await
    }

    /// Appends what `decide` makes of the hosts; thought over when somebody else wrote first.
    async fn change_hosts(
        &self,
        requester: &Requester,
        decide: impl Fn(&BTreeMap<HostName, Host>) -> Result<Event, EngineError>,
    ) -> Result<(), EngineError> {
        let mut conflicts = 0;
        loop {
            let (hosts, version) = read(&*self.log).await?;
            let event = NewEvent::of_itself(StreamId::System, decide(&hosts)?);
            match self.append(requester, vec![(StreamId::System, version)], vec![event]).await {
                Err(LogError::Conflict { .. }) if conflicts < CONFLICTS_MAX => conflicts += 1,
                other => return Ok(other.map(|_| ())?),
            }
        }
    }
}

fn unknown(name: &HostName) -> EngineError {
    reject(Code::NotFound, format!("there is no host '{name}'"))
        .hint("`snaptree host list` lists them, `snaptree host add` registers one")
        .into()
}
