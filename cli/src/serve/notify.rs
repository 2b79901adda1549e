//! Telling people what became of runs: by the program that a policy names, and by POST to the address that it names.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use reqwest::redirect::Policy as Redirects;
use reqwest::{Client, StatusCode};
use snaptree_policies::file::{Notify, Webhook};
use snaptree_policies::runner::Notable;

use crate::programs::{Input, Program, run};

/// The pauses before an address is tried again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];

/// Largest file that holds an address.
const FILE_BYTES_MAX: u64 = 4_096;

/// What is told, for programs: the README documents it.
fn document(notable: &Notable, at: Timestamp) -> serde_json::Value {
    serde_json::json!({
        "policy": notable.policy(),
        "domain": notable.domain(),
        "occasion": notable.occasion(),
        "suspended": matches!(notable, Notable::Suspended { .. }),
        "message": notable.to_string(),
        "at": at,
    })
}

/// Tells of `notable` in the background. What does not get through is logged.
pub fn tell(notify: &Notify, notable: &Notable, at: Timestamp) {
    let notify = Arc::new(notify.clone());
    let document = document(notable, at);
    if notify.command.is_some() {
        tokio::spawn(by_program(Arc::clone(&notify), notable.clone(), document.clone()));
    }
    if notify.webhook.is_some() || notify.webhook_file.is_some() {
        let policy = notable.policy().clone();
        tokio::spawn(async move {
            if let Err(error) = by_post(&notify, &document).await {
                tracing::warn!(%policy, "the webhook was not told: {error:#}");
            }
        });
    }
}

fn time_max(notify: &Notify) -> Duration {
    Duration::from_secs(u64::from(notify.timeout.seconds()))
}

async fn by_program(notify: Arc<Notify>, notable: Notable, document: serde_json::Value) {
    let Some(command) = &notify.command else { return };
    let domain = notable.domain().map_or("", |domain| domain.as_str());
    let program = Program {
        path: command.program(),
        arguments: command.arguments(),
        environment: vec![
            ("SNAPTREE_POLICY", notable.policy().to_string()),
            ("SNAPTREE_DOMAIN", domain.to_owned()),
            ("SNAPTREE_OUTCOME", document["occasion"].as_str().unwrap_or_default().to_owned()),
        ],
        input: Input::Text(format!("{document}\n")),
        time_max: time_max(&notify),
    };
    if let Err(failure) = run(program).await {
        tracing::warn!(policy = %notable.policy(), "a notification did not get through: {failure}");
    }
}

/// Whether an address is tried again.
enum Again {
    Perhaps(anyhow::Error),
    Never(anyhow::Error),
}

async fn by_post(notify: &Notify, document: &serde_json::Value) -> Result<()> {
    let address = match (&notify.webhook, &notify.webhook_file) {
        (Some(webhook), _) => webhook.clone(),
        (None, Some(file)) => address_in(file)?,
        (None, None) => return Ok(()),
    };
    let client = client(time_max(notify))?;
    let mut pauses = PAUSES.iter();
    loop {
        match post(&client, &address, document).await {
            Ok(()) => return Ok(()),
            Err(Again::Never(error)) => return Err(error),
            Err(Again::Perhaps(error)) => match pauses.next() {
                Some(pause) => tokio::time::sleep(*pause).await,
                None => return Err(error.context(format!("{} tries", PAUSES.len() + 1))),
            },
        }
    }
}

/// The address in a file. What is wrong with it is told without what it says.
fn address_in(file: &Path) -> Result<Webhook> {
    let mut text = String::new();
    let opened = std::fs::File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let read = opened.take(FILE_BYTES_MAX).read_to_string(&mut text);
    read.with_context(|| format!("cannot read {}", file.display()))?;
    match text.trim().parse() {
        Ok(address) => Ok(address),
        Err(_) => bail!("{} holds no address that begins with https:// or http://", file.display()),
    }
}

fn client(time_max: Duration) -> Result<Client> {
    // Another part of the program may have chosen it already; it is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        .user_agent(concat!("snaptree/", env!("CARGO_PKG_VERSION")))
        .redirect(Redirects::none())
        .timeout(time_max);
    builder.build().context("cannot speak HTTPS")
}

async fn post(client: &Client, address: &Webhook, document: &serde_json::Value) -> Result<(), Again> {
    let sent = client.post(String::from(address.clone())).json(document).send().await;
    // The address may be a secret.
    let answer = sent.map_err(|error| Again::Perhaps(error.without_url().into()))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let error = anyhow::anyhow!("it answered {status}");
    let passes = status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    Err(if passes { Again::Perhaps(error) } else { Again::Never(error) })
}
