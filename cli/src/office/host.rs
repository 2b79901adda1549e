//! Requests about hosts, carried out by this process.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use async_trait::async_trait;
use serde_json::Value;
use snaptree_drivers::esx::{EsxConfig, EsxDriver, HostBook, HostConfig};
use snaptree_engine::decide::ACCESS_BYTES_MAX;
use snaptree_engine::domain::DriverKind;
use snaptree_engine::driver::{DriverError, ErrorClass};
use snaptree_engine::engine::{Engine, EngineError, Requester};
use snaptree_engine::event::HostAdded;
use snaptree_engine::hosts::{Known, hosts};
use snaptree_engine::log::EventLog;
use snaptree_engine::operation::Code;
use snaptree_engine::{DomainName, HostName};

use crate::config::Config;
use crate::exit::{Exit, Trouble};
use crate::wire::{HostAnswer, HostAsk};

/// The hosts of a log.
pub struct LogHosts(pub Arc<dyn EventLog>);

#[async_trait]
impl HostBook for LogHosts {
    async fn find(&self, host: &HostName) -> Result<Option<Value>, DriverError> {
        let unreadable = |error| DriverError::new(ErrorClass::Transient, Code::Io, format!("{error}"));
        let found = hosts(&*self.0).await.map_err(unreadable)?.remove(host);
        Ok(found.filter(|host| host.driver == DriverKind::Esx).map(|host| host.config))
    }
}

/// Carries out a request about a host.
///
/// # Errors
/// It was rejected, the host does not answer, or the state cannot be used.
pub async fn host(engine: &Engine, requester: &Requester, ask: HostAsk) -> Result<HostAnswer> {
    let driver = EsxDriver::new(Arc::new(LogHosts(Arc::clone(engine.log()))), Config::load()?.esx);
    let answer = match ask {
        HostAsk::Add { host, config, known } => add(engine, requester, &driver, host, config, known).await,
        HostAsk::Remove { host } => remove(engine, requester, &host).await,
        HostAsk::Discover { host } => {
            engine.host(&host).await?;
            let found = driver.discover(&host).await.map_err(EngineError::Driver);
            found.map(|machines| HostAnswer { machines, ..HostAnswer::default() }).map_err(Into::into)
        }
    };
    driver.close().await;
    answer
}

async fn add(
    engine: &Engine,
    requester: &Requester,
    driver: &EsxDriver,
    host: HostName,
    config: HostConfig,
    known: Known,
) -> Result<HostAnswer> {
    config.address().map_err(DriverError::from).map_err(EngineError::Driver)?;
    if known == Known::Refuse && engine.hosts().await?.contains_key(&host) {
        let message = format!("a host '{host}' is registered already");
        return Err(Trouble::new(Exit::Refused, "exists", message)
            .hint("choose another name, or change it with --replace")
            .into());
    }
    let kept = config.to_value().map_err(DriverError::from).map_err(EngineError::Driver)?;
    if kept.to_string().len() > ACCESS_BYTES_MAX {
        let message = format!("what is kept of a host has at most {ACCESS_BYTES_MAX} bytes");
        return Err(Trouble::new(Exit::Refused, "invalid", message).into());
    }
    let introduced = driver.introduce(&host, config).await.map_err(EngineError::Driver)?;
    engine.add_host(requester, HostAdded { host, driver: DriverKind::Esx, config: kept }, known).await?;
    Ok(HostAnswer { introduced: Some(introduced), machines: Vec::new() })
}

async fn remove(engine: &Engine, requester: &Requester, host: &HostName) -> Result<HostAnswer> {
    let domains: Vec<DomainName> = domains_on(engine, host).await?.into_values().collect();
    if let Some(one) = domains.first() {
        let message = match domains.len() {
            1 => format!("domain '{one}' is on host '{host}'"),
            many => format!("domain '{one}' and {} more are on host '{host}'", many - 1),
        };
        return Err(Trouble::new(Exit::Refused, "in-use", message)
            .hint("let go of them first, with `snaptree domain remove`")
            .into());
    }
    engine.remove_host(requester, host).await?;
    Ok(HostAnswer::default())
}

/// The registered machines of a host, by their objects there.
///
/// # Errors
/// The state cannot be read.
pub async fn domains_on(engine: &Engine, host: &HostName) -> Result<BTreeMap<String, DomainName>> {
    let mut found = BTreeMap::new();
    for row in engine.domains().await? {
        let state = engine.load_as_far_as_known(row.id).await?;
        let config = state.domain.as_ref().filter(|domain| domain.driver == DriverKind::Esx);
        if let Some(config) = config.and_then(|domain| EsxConfig::of(domain).ok())
            && config.host == *host
        {
            found.insert(config.vm, row.name);
        }
    }
    Ok(found)
}
