//! The daemon does the work; this process asks it over its socket, and waits.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use snaptree_engine::command::Command;
use snaptree_engine::driver::{PowerWish, Progress as _, Watch as _};
use snaptree_engine::engine::Submitted;
use snaptree_engine::reconcile::drift::Drift;
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::{DomainId, OperationId};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

use super::Office;
use super::here::INTERRUPTED;
use crate::exit::{Exit, FromDaemon, Trouble, is_of_one_domain};
use crate::progress::Shown;
use crate::render;
use crate::wire::{
    Accounts, Ask, Asked, Drifted, Failed, HostAnswer, HostAsk, Line, PolicyAnswer, PolicyAsk, Powering,
    Registered, Registering, SUDO_USER_HEADER, Status,
};

/// Largest answer, and largest line of one, that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A daemon that answers on its socket.
pub struct There {
    socket: PathBuf,
    ending: AtomicBool,
}

/// The real place of a socket: a state directory may have a link to one that lies elsewhere.
pub fn real_place(socket: &Path) -> PathBuf {
    std::fs::read_link(socket).unwrap_or_else(|_| socket.to_owned())
}

/// Finds the daemon that listens on `socket`; none if the file is not there, or nobody answers on it.
///
/// # Errors
/// Somebody listens there, and this user may not ask.
pub async fn find(socket: &Path) -> Result<Option<There>> {
    let socket = real_place(socket);
    match UnixStream::connect(&socket).await {
        Ok(_) => Ok(Some(There { socket, ending: AtomicBool::new(false) })),
        Err(error) if error.kind() == ErrorKind::PermissionDenied && socket.exists() => {
            let message =
                format!("a daemon has the state, and its socket {} is not for you", socket.display());
            Err(Trouble::new(Exit::Refused, "permission", message)
                .hint("members of the group snaptree may use it")
                .into())
        }
        // Gone, stale, or a path that no socket can have; or in a folder that is closed to this user.
        Err(_) => Ok(None),
    }
}

impl There {
    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How it stands.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn status(&self) -> Result<Status> {
        self.ask(Method::GET, "/v1/status", &()).await
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>> {
        let gone = |error: &dyn std::error::Error| {
            cut(format!("the daemon at {} does not answer: {error}", self.socket.display()))
        };
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| gone(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| gone(&error))?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "snaptree");
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Ok(name) = std::env::var("SUDO_USER") {
            let value = axum::http::HeaderValue::from_str(&name);
            request =
                value.into_iter().fold(request, |request, value| request.header(SUDO_USER_HEADER, value));
        }
        let response =
            sender.send_request(request.body(Full::new(body))?).await.map_err(|error| gone(&error))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status();
        let text = whole(response).await?;
        match serde_json::from_slice::<Failed>(&text) {
            Ok(failed) => Err(FromDaemon(failed.error).into()),
            Err(_) => bail!("the daemon at {} answered {status}", self.socket.display()),
        }
    }

    /// Asks once, and reads the whole answer.
    ///
    /// # Errors
    /// It does not answer, or with a failure.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let body = if method == Method::GET { Bytes::new() } else { serde_json::to_vec(body)?.into() };
        let text = whole(self.send(method, path, body).await?).await?;
        serde_json::from_slice(&text).context("the daemon's answer cannot be read: is it of another version?")
    }

    /// Reads lines until the last one; none if there is no last one.
    async fn read(&self, mut response: Response<Incoming>, shown: &Shown) -> Result<Option<Driven>> {
        let mut buffer = Vec::new();
        loop {
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                let line = serde_json::from_slice::<Line>(&line)
                    .context("the daemon's answer cannot be read: is it of another version?")?;
                match line {
                    Line::Event(event) => {
                        if let Ok(envelope) = event.envelope() {
                            shown.happened(&envelope);
                        }
                    }
                    Line::Progress(progress) => shown.step_progress(progress),
                    Line::Lagged(_) => {}
                    Line::Waits(why) => shown.say(&why),
                    Line::Driven(driven) => return Ok(Some(*driven)),
                    Line::Error(error) => return Err(FromDaemon(error).into()),
                }
            }
            match response.frame().await {
                Some(Ok(frame)) => buffer.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(_)) | None => return Ok(None),
            }
            if buffer.len() > ANSWER_BYTES_MAX {
                bail!("the daemon's answer is larger than {ANSWER_BYTES_MAX} bytes");
            }
        }
    }

    /// Reads an answer in pieces; the first Ctrl-C calls `operation` off, the second ends this process.
    async fn wait(&self, response: Response<Incoming>, operation: Option<OperationId>) -> Result<Driven> {
        let shown = Shown::on_stderr();
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let answer = self.read(response, &shown);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                biased;
                last = &mut answer => {
                    shown.end();
                    return last?.ok_or_else(|| cut("the daemon ended before this did").into());
                }
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if self.ending.swap(true, Ordering::SeqCst) {
                shown.end();
                render::note("ended at once; the daemon goes on with what is open");
                std::process::exit(INTERRUPTED);
            }
            shown.say(
                "calling it off: what can be taken back is, the rest is carried through \
                 (Ctrl-C again leaves it to the daemon)",
            );
            if let Some(operation) = operation {
                // Only the acceptance is waited for; how it ends is told to whoever follows it.
                if let Err(error) =
                    self.send(Method::POST, &format!("/v1/operations/{operation}/cancel"), Bytes::new()).await
                {
                    shown.say(&format!("{error:#}"));
                }
            }
        }
    }
}

/// Nobody can say yet what became of what was asked.
fn cut(message: impl Into<String>) -> Trouble {
    Trouble::new(Exit::Attention, "cut", message)
        .hint("`snaptree op list --open` lists what is open, `snaptree recover` or a new daemon finishes it")
}

async fn whole(response: Response<Incoming>) -> Result<Bytes> {
    let body = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let collected = body.collect().await;
    Ok(collected.map_err(|error| cut(format!("the daemon's answer was cut short: {error}")))?.to_bytes())
}

#[async_trait]
impl Office for There {
    async fn submit(&self, domain: DomainId, command: &Command, key: Option<&str>) -> Result<Submitted> {
        let ask = Ask { command: command.clone(), key: key.map(str::to_owned) };
        let asked: Asked = self.ask(Method::POST, &format!("/v1/domains/{domain}/commands"), &ask).await?;
        Ok(match (asked.operation, asked.repeated) {
            (Some(operation), true) => Submitted::Repeated(operation),
            (Some(operation), false) => Submitted::Operation(operation),
            (None, _) => Submitted::Recorded,
        })
    }

    async fn finish(&self, _domain: DomainId, operation: OperationId) -> Result<Driven> {
        let path = format!("/v1/operations/{operation}/follow");
        self.wait(self.send(Method::GET, &path, Bytes::new()).await?, Some(operation)).await
    }

    async fn cancel(&self, _domain: DomainId, operation: OperationId) -> Result<Driven> {
        let path = format!("/v1/operations/{operation}/cancel");
        self.wait(self.send(Method::POST, &path, Bytes::new()).await?, None).await
    }

    async fn reconcile(&self, domain: DomainId) -> Result<Driven> {
        let path = format!("/v1/domains/{domain}/reconcile");
        self.wait(self.send(Method::POST, &path, Bytes::new()).await?, None).await
    }

    async fn recover(&self) -> Result<Accounts> {
        self.ask(Method::POST, "/v1/recover", &()).await
    }

    async fn drift(&self, domain: DomainId) -> Result<Drift> {
        Ok(self.ask::<Drifted>(Method::POST, &format!("/v1/domains/{domain}/drift"), &()).await?.findings)
    }

    async fn drift_all(&self, domains: &[DomainId]) -> Result<Vec<(DomainId, Result<Drift>)>> {
        let mut drifts = Vec::with_capacity(domains.len());
        for domain in domains {
            match self.drift(*domain).await {
                Err(error) if !is_of_one_domain(&error) => return Err(error),
                told => drifts.push((*domain, told)),
            }
        }
        Ok(drifts)
    }

    async fn power(&self, domain: DomainId, wish: PowerWish) -> Result<()> {
        self.ask(Method::POST, &format!("/v1/domains/{domain}/power"), &Powering { wish }).await
    }

    async fn register(&self, registering: Registering) -> Result<Registered> {
        self.ask(Method::POST, "/v1/domains", &registering).await
    }

    async fn host(&self, ask: HostAsk) -> Result<HostAnswer> {
        self.ask(Method::POST, "/v1/hosts", &ask).await
    }

    async fn policy(&self, ask: PolicyAsk) -> Result<PolicyAnswer> {
        self.ask(Method::POST, "/v1/policies", &ask).await
    }

    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    fn works_on_alone(&self) -> bool {
        true
    }
}
