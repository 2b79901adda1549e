//! What the daemon answers: see [`crate::wire`] for the routes.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use http_body_util::channel::{Channel, Sender};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::de::DeserializeOwned;
use snaptree_engine::engine::{EngineError, Submitted};
use snaptree_engine::log::{OpenOnly, OperationFilter, OperationRow};
use snaptree_engine::project::DomainState;
use snaptree_engine::reconcile::dispatch::{Wish, account_since};
use snaptree_engine::reconcile::recovery::{accounts, unrecovered};
use snaptree_engine::reconcile::worker::Driven;
use snaptree_engine::{DomainId, DomainName, OperationId};
use snaptree_policies::runner::ClockState;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::follow::{PassFailed, Until, follow, reconcile as follow_reconcile};
use super::peer::Peer;
use super::{Daemon, open, questions};
use crate::exit::{Exit, Trouble, told};
use crate::office;
use crate::wire::{
    Account, Accounts, Ask, Asked, ClockView, Drifted, Failed, HostAnswer, HostAsk, LeftOut, Line,
    PolicyAnswer, PolicyAsk, Powering, QueueView, Registered, Registering, Status, WireError,
};

/// Largest body of a request, in bytes.
const BODY_BYTES_MAX: usize = 1 << 20;
/// Largest head of a request, in bytes, and most lines of it.
const HEAD_BYTES_MAX: usize = 16 << 10;
const HEADERS_MAX: usize = 64;
/// How long a head, and then a body, may take to arrive.
const ARRIVAL_MAX: Duration = Duration::from_secs(10);
/// How long whoever asked may take to read a line.
const READ_MAX: Duration = Duration::from_secs(60);
/// How many connections are served at once.
const CONNECTIONS_MAX: usize = 512;
/// How many at once are told that those are too many.
const TURNED_AWAY_MAX: usize = 128;
/// How many lines wait for whoever asked.
const LINES_MAX: usize = 16;

type Shared = State<Arc<Daemon>>;

/// The daemon's server.
pub struct Server {
    accepting: JoinHandle<()>,
    ending: watch::Sender<bool>,
    slots: Arc<Semaphore>,
}

impl Server {
    /// Begins to listen.
    pub fn start(daemon: Arc<Daemon>, listener: UnixListener) -> Self {
        let ending = watch::Sender::new(false);
        let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let accepting =
            tokio::spawn(accept(router(daemon), listener, Arc::clone(&slots), ending.subscribe()));
        Self { accepting, ending, slots }
    }

    /// Ends: no new connection, and answers under way have so long.
    pub async fn stop(self, patience: Duration) {
        self.accepting.abort();
        self.ending.send_replace(true);
        let all = u32::try_from(CONNECTIONS_MAX).unwrap_or(u32::MAX);
        // Who is not served by then finds the connection closed.
        let _ = tokio::time::timeout(patience, self.slots.acquire_many(all)).await;
    }
}

async fn accept(
    router: Router,
    listener: UnixListener,
    slots: Arc<Semaphore>,
    ending: watch::Receiver<bool>,
) {
    let turned_away = Arc::new(Semaphore::new(TURNED_AWAY_MAX));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // No more files can be opened, for instance; whoever is served now frees some.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            // Whoever comes when so many are being turned away finds the connection closed.
            if let Ok(turn) = Arc::clone(&turned_away).try_acquire_owned() {
                tokio::spawn(async move {
                    turn_away(stream).await;
                    drop(turn);
                });
            }
            continue;
        };
        let router = router.clone();
        let ending = ending.clone();
        tokio::spawn(async move {
            serve(router, stream, ending).await;
            drop(slot);
        });
    }
}

async fn serve(router: Router, stream: UnixStream, mut ending: watch::Receiver<bool>) {
    let peer = match stream.peer_cred() {
        Ok(cred) => Peer::from(cred),
        Err(error) => {
            tracing::warn!(%error, "nobody knows who asks");
            return;
        }
    };
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(ARRIVAL_MAX);
    builder.max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let done = tokio::select! {
        done = &mut connection => done,
        () = asked_to_end(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = done {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn asked_to_end(ending: &mut watch::Receiver<bool>) {
    // Fails if the server is gone, and that is the same.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Tells one too many that it is one too many.
///
/// A client takes no answer before it has asked, and one that is still writing when the connection is closed may never
/// see what was answered. So the head is read first, and what follows is read and thrown away until the client is done.
async fn turn_away(stream: UnixStream) {
    if let Err(error) = tokio::time::timeout(ARRIVAL_MAX, answer_busy(stream)).await {
        tracing::debug!(%error, "one too many did not ask in time");
    }
}

async fn answer_busy(mut stream: UnixStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    while head.len() < HEAD_BYTES_MAX && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let failed = Failed { error: busy() };
    let body = serde_json::to_string(&failed).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(BODY_BYTES_MAX as u64);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}

fn busy() -> WireError {
    let trouble = Trouble::new(Exit::Refused, "busy", format!("{CONNECTIONS_MAX} others are being served"))
        .hint("try again");
    WireError::from(&told(&trouble.into()))
}

fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/domains", post(register))
        .route("/v1/domains/{domain}/commands", post(command))
        .route("/v1/domains/{domain}/reconcile", post(reconcile))
        .route("/v1/domains/{domain}/drift", post(drift))
        .route("/v1/domains/{domain}/power", post(power))
        .route("/v1/operations/{operation}/follow", get(follow_operation))
        .route("/v1/operations/{operation}/cancel", post(cancel))
        .route("/v1/recover", post(recover))
        .route("/v1/log", post(questions::answer))
        .route("/v1/hosts", post(host))
        .route("/v1/policies", post(policy))
        .fallback(|| async { Failure::from(Trouble::not_found("there is no such route; see the README")) })
        .method_not_allowed_fallback(|| async {
            let told = told(&Trouble::usage("this route has another method; see the README").into());
            (StatusCode::METHOD_NOT_ALLOWED, Json(Failed { error: WireError::from(&told) }))
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), no_more))
        .layer(DefaultBodyLimit::disable())
        .with_state(daemon)
}

/// Nothing new begins while the daemon ends.
async fn no_more(State(daemon): Shared, request: Request, next: Next) -> Response {
    if daemon.dispatcher.is_stopping() {
        return Failure::from(stopping()).into_response();
    }
    next.run(request).await
}

/// The answer while the daemon ends.
pub fn stopping() -> Trouble {
    Trouble::new(
        Exit::Refused,
        "stopping",
        "the daemon is ending; what is open goes on when it is started again",
    )
    .hint("try again when `snaptree serve` is up, or once it has ended")
}

/// What a handler failed with.
pub struct Failure(WireError);

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(WireError::from(&told(&error.into())))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match (self.0.code.as_str(), Exit::of_code(self.0.exit)) {
            ("stopping" | "busy", _) => StatusCode::SERVICE_UNAVAILABLE,
            ("too-large", _) => StatusCode::PAYLOAD_TOO_LARGE,
            ("too-slow", _) => StatusCode::REQUEST_TIMEOUT,
            (_, Exit::Usage) => StatusCode::BAD_REQUEST,
            (_, Exit::NotFound) => StatusCode::NOT_FOUND,
            (_, Exit::Refused | Exit::Attention) => StatusCode::CONFLICT,
            (_, Exit::Done | Exit::Failed) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(Failed { error: self.0 })).into_response()
    }
}

/// A request's body, read within limits of bytes and time.
pub struct Read<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Read<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Failure> {
        let body = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX);
        let late = || Trouble::new(Exit::Usage, "too-slow", "the request's body did not arrive in time");
        let bytes = tokio::time::timeout(ARRIVAL_MAX, body).await.map_err(|_| late())?.map_err(|_| {
            let message =
                format!("the request's body has more than {BODY_BYTES_MAX} bytes, or was cut short");
            Trouble::new(Exit::Usage, "too-large", message)
        })?;
        let value = serde_json::from_slice(&bytes)
            .map_err(|error| Trouble::usage(format!("the request's body cannot be read: {error}")))?;
        Ok(Self(value))
    }
}

type Answer<T> = Result<Json<T>, Failure>;

async fn status(State(daemon): Shared) -> Answer<Status> {
    let queue = daemon.dispatcher.queue();
    Ok(Json(Status {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        state: daemon.dir.clone(),
        up_s: daemon.since.elapsed().as_secs(),
        queue: QueueView { running: queue.running, waiting: queue.waiting },
        connections: daemon.engine.connections(),
        open: open(&daemon.engine).await?,
        sick_policies: daemon.known.sick(&daemon.engine).await?,
        clock: ClockState::read(&daemon.engine).await?.doubt.map(ClockView::from),
    }))
}

async fn register(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    Read(registering): Read<Registering>,
) -> Answer<Registered> {
    let paths = registering.disks.iter().map(|(_, path)| path).chain(&registering.layers);
    if let Some(path) = paths.into_iter().find(|path| path.is_relative() && !path.as_os_str().is_empty()) {
        let message = format!("the path {} is relative, and the daemon is elsewhere", path.display());
        return Err(Trouble::usage(message).hint("give absolute paths").into());
    }
    let requester = peer.requester(&headers);
    Ok(Json(office::register(&daemon.engine, &requester, registering).await?))
}

async fn command(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    Read(ask): Read<Ask>,
) -> Answer<Asked> {
    let domain = daemon.engine.find_domain(&domain).await?;
    let requester = peer.requester(&headers);
    let command = office::with_owners(&daemon.engine, ask.command).await?;
    let submitted = daemon.dispatcher.submit(&requester, domain, &command, ask.key.as_deref()).await?;
    Ok(Json(match submitted {
        Submitted::Operation(operation) => Asked { operation: Some(operation), repeated: false },
        Submitted::Repeated(operation) => Asked { operation: Some(operation), repeated: true },
        Submitted::Recorded => Asked { operation: None, repeated: false },
    }))
}

async fn host(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    Read(ask): Read<HostAsk>,
) -> Answer<HostAnswer> {
    Ok(Json(office::host(&daemon.engine, &peer.requester(&headers), ask).await?))
}

async fn policy(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    Read(ask): Read<PolicyAsk>,
) -> Answer<PolicyAnswer> {
    let answer = office::policy(&daemon.engine, &daemon.known, &peer.requester(&headers), &ask).await?;
    for run in &answer.runs {
        daemon.work_on(run.domain);
    }
    if !matches!(ask, PolicyAsk::Retain { .. }) {
        daemon.policies.look_now();
    }
    Ok(Json(answer))
}

async fn drift(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    Path(domain): Path<String>,
    headers: HeaderMap,
) -> Answer<Drifted> {
    let domain = daemon.engine.find_domain(&domain).await?;
    let findings = daemon.engine.drift(&peer.requester(&headers), domain).await?;
    Ok(Json(Drifted { findings }))
}

async fn power(
    State(daemon): Shared,
    Path(domain): Path<String>,
    Read(powering): Read<Powering>,
) -> Answer<()> {
    let domain = daemon.engine.find_domain(&domain).await?;
    daemon.engine.power(domain, powering.wish).await?;
    // What waited for the machine to be off, or on, may go on.
    daemon.dispatcher.wake(domain);
    Ok(Json(()))
}

async fn reconcile(State(daemon): Shared, Path(domain): Path<String>) -> Result<Response, Failure> {
    let domain = daemon.engine.find_domain(&domain).await?;
    Ok(lines(|sender| follow_reconcile(daemon, domain, sender)))
}

async fn follow_operation(State(daemon): Shared, Path(id): Path<String>) -> Result<Response, Failure> {
    let row = find(&daemon, &id).await?;
    Ok(lines(|sender| follow(daemon, row.domain, row.id, Until::Settled, sender)))
}

async fn cancel(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let row = find(&daemon, &id).await?;
    let by = peer.requester(&headers).actor;
    daemon.dispatcher.call_off(by, row.domain, row.id).await?;
    Ok(lines(|sender| follow(daemon, row.domain, row.id, Until::Ended, sender)))
}

async fn find(daemon: &Daemon, id: &str) -> Result<OperationRow, Failure> {
    let unknown = || Trouble::not_found("there is no such operation").hint("`snaptree op list` lists them");
    let operation: OperationId = id.parse().map_err(|_| unknown())?;
    let filter = OperationFilter { operation: Some(operation), ..OperationFilter::default() };
    let mut rows = daemon.engine.log().operations(&filter, 1).await?;
    Ok(rows.pop().ok_or_else(unknown)?)
}

/// What came of the operations that were open, and of whatever came after the first of them was asked for.
async fn since_open(daemon: &Daemon, state: &DomainState) -> Result<Driven, EngineError> {
    let Some(domain) = &state.domain else { return Ok(Driven { carried: Vec::new(), state: state.clone() }) };
    let first = match state.open.first() {
        Some(first) => daemon.engine.operation_events(first.id).await?.into_iter().next(),
        None => None,
    };
    let before = first.map_or(state.version, |request| request.version.saturating_sub(1));
    account_since(&daemon.engine, domain.id, before, u64::MAX).await
}

async fn recover(
    State(daemon): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Answer<Accounts> {
    let requester = peer.requester(&headers);
    let filter = OperationFilter { open: Some(OpenOnly), ..OperationFilter::default() };
    let mut domains: BTreeMap<DomainId, DomainName> = BTreeMap::new();
    for row in daemon.engine.log().operations(&filter, usize::MAX >> 1).await? {
        domains.insert(row.domain, row.domain_name);
    }
    let mut came_to = Accounts::default();
    let mut passes = Vec::with_capacity(domains.len());
    for (domain, name) in domains {
        match daemon.engine.load(domain).await {
            Ok(state) => {
                daemon.engine.retry_what_may_pass(&requester, &state).await?;
                passes.push((name, state, daemon.dispatcher.run(domain, Wish::Drive)));
            }
            Err(error) if error.spares_others() => came_to.left_out.push(LeftOut::new(name, error)),
            Err(error) => return Err(error.into()),
        }
    }
    for (name, state, pass) in passes {
        let Some(pass) = pass.await else { return Err(stopping().into()) };
        let recovered = match &pass.came_to {
            Ok(driven) => {
                // What was under way already when this was asked is not in the account of the pass, but in the log.
                let mut since = since_open(&daemon, &state).await?;
                for carried in &mut since.carried {
                    let of_pass = driven.carried.iter().find(|one| one.operation.id == carried.operation.id);
                    carried.found = of_pass.and_then(|one| one.found.clone());
                }
                accounts(&state, &since)
            }
            Err(EngineError::Driver(error)) => unrecovered(&state, &error.failure),
            Err(error) if error.spares_others() => {
                came_to.left_out.push(LeftOut::new(name, PassFailed(pass)));
                continue;
            }
            Err(_) => return Err(PassFailed(pass).into()),
        };
        came_to.operations.extend(recovered.iter().map(Account::from));
    }
    Ok(Json(came_to))
}

/// Sends lines to whoever asked.
pub struct Lines(Sender<Bytes, Infallible>);

impl Lines {
    /// Sends a line.
    ///
    /// # Errors
    /// Nobody reads it.
    pub async fn send(&mut self, line: &Line) -> Result<(), Gone> {
        let mut text = serde_json::to_vec(line).map_err(|_| Gone)?;
        text.push(b'\n');
        let sent = tokio::time::timeout(READ_MAX, self.0.send_data(text.into())).await;
        sent.map_err(|_| Gone)?.map_err(|_| Gone)
    }
}

/// Whoever asked does not read any more.
#[derive(Clone, Copy, Debug)]
pub struct Gone;

/// An answer that `tell` gives line by line.
fn lines<F>(tell: impl FnOnce(Lines) -> F) -> Response
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, body) = Channel::new(LINES_MAX);
    tokio::spawn(tell(Lines(sender)));
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::new(body)).into_response()
}
