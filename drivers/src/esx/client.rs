//! One host, spoken to: its session, its calls.
//!
//! # The session
//! ```text
//!   none --login--> open --NotAuthenticated--> none          (the call is made once more, in a new session)
//!                    |
//!                    +--a call's reply is lost--> fenced --logout--> none
//! ```
//! A call that changes something and whose reply did not come may still be on its way. Its session is ended before
//! anybody looks what became of it ([`Client::fence`]): whatever of it arrives later is then not authenticated, and
//! has no effect. So what is seen after that stays so.
//!
//! Architecture Invariant: a call that changes something is sent once. It is sent again only where it cannot have been
//! carried out: the host itself said so (`NotAuthenticated`, at most once; HTTP 429), or there was no connection.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, COOKIE, HeaderMap, SET_COOKIE};
use reqwest::redirect::Policy;
use reqwest::{StatusCode, Url};
use snaptree_engine::HostName;
use snaptree_engine::driver::DriverError;
use snaptree_engine::operation::{Code, Failure};
use tokio::sync::Mutex;
use tracing::instrument;

use super::fault::CallError;
use super::host::HostConfig;
use super::secret::Secret;
use super::soap::{BYTES_MAX, Element, Fault, Moref, Request, SoapError, body};
use super::tls::{self, Shown};
use super::vim::Content;

/// The version that is spoken until the host has said its own.
const VERSION_FIRST: &str = "6.0";
/// Largest cookie, in bytes.
const COOKIE_BYTES_MAX: usize = 4_096;
/// The session's cookie.
const COOKIE_NAME: &str = "vmware_soap_session";

/// How often a call is made in all while the host is busy, and the first pause; it doubles.
const TRIES_MAX: u32 = 5;
const PAUSE_MIN: Duration = Duration::from_millis(200);

/// How long calls may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallTimes {
    /// To connect.
    pub connect: Duration,
    /// From the request to the end of its reply.
    pub call: Duration,
}

impl Default for CallTimes {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), call: Duration::from_secs(60) }
    }
}

/// Whether a call changes something, so that it must not be made twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It only reads.
    None,
    /// It changes something.
    Some,
}

/// A host that is spoken to.
pub struct Client {
    /// Its name in the log.
    pub host: HostName,
    /// What the log keeps of it.
    pub config: HostConfig,
    http: reqwest::Client,
    url: Url,
    shown: Shown,
    /// How long a call may take with all its tries.
    patience: Duration,
    session: Mutex<Session>,
}

#[derive(Default)]
struct Session {
    open: Option<Open>,
    /// Sessions in which a call may still be on its way.
    fenced: Vec<Open>,
}

/// A session's cookie. It is a secret while the session lasts.
#[derive(Clone, PartialEq, Eq)]
struct Cookie(String);

#[derive(Clone)]
struct Open {
    cookie: Cookie,
    content: Arc<Content>,
    user: Arc<str>,
}

impl Client {
    /// Prepares to speak to a host; nothing is sent yet.
    ///
    /// # Errors
    /// Its address, or the certificates that are to vouch for it, cannot be used.
    pub fn new(host: HostName, config: HostConfig, times: CallTimes) -> Result<Self, Failure> {
        let url = config.address()?;
        let shown = Shown::default();
        let http = reqwest::Client::builder()
            .user_agent(concat!("snaptree/", env!("CARGO_PKG_VERSION")))
            .tls_backend_preconfigured(tls::config(&config.trust, &shown)?)
            .redirect(Policy::none())
            .no_proxy()
            .connect_timeout(times.connect)
            .timeout(times.call)
            .build()
            .map_err(|error| Failure::new(Code::Io, format!("cannot speak HTTPS: {error}")))?;
        Ok(Self { host, config, http, url, shown, patience: times.call, session: Mutex::default() })
    }

    /// What the host has where; logs in if nobody has.
    ///
    /// # Errors
    /// It cannot be reached, or does not let us in.
    pub async fn content(&self) -> Result<Arc<Content>, CallError> {
        Ok(self.open().await?.content)
    }

    /// Who we are there, in the host's own words.
    ///
    /// # Errors
    /// As [`Client::content`].
    pub async fn user(&self) -> Result<Arc<str>, CallError> {
        Ok(self.open().await?.user)
    }

    /// Makes a call, in a session; a session that has ended is opened anew, once.
    ///
    /// # Errors
    /// [`CallError`]; it tells whether the call may have had its effect.
    #[instrument(skip_all, fields(host = %self.host, method = request.method()))]
    pub async fn call(&self, request: &Request, effect: Effect) -> Result<Element, CallError> {
        let open = self.open().await?;
        let first = self.ask(request, &open, effect).await;
        if !matches!(&first, Err(CallError::Fault(fault)) if fault.kind == NOT_AUTHENTICATED) {
            return first;
        }
        tracing::debug!("the session has ended");
        self.forget(&open.cookie).await;
        let open = self.open().await?;
        match self.ask(request, &open, effect).await {
            // In a session that is new and still stands it is a right that lacks; another call may have ended it, too.
            Err(CallError::Fault(fault)) if fault.kind == NOT_AUTHENTICATED => {
                match self.is_open(&open.cookie).await {
                    true => Err(CallError::NotAllowed(fault)),
                    false => Err(CallError::Fault(fault)),
                }
            }
            second => second,
        }
    }

    async fn is_open(&self, cookie: &Cookie) -> bool {
        self.session.lock().await.open.as_ref().is_some_and(|open| open.cookie == *cookie)
    }

    /// Whether a call may still be on its way.
    pub async fn has_fenced(&self) -> bool {
        !self.session.lock().await.fenced.is_empty()
    }

    /// Ends the sessions in which a call may still be on its way. What is seen afterwards stays so.
    ///
    /// # Errors
    /// The host does not answer; nothing may be concluded yet.
    pub async fn fence(&self) -> Result<(), CallError> {
        let mut session = self.session.lock().await;
        while let Some(fenced) = session.fenced.last().cloned() {
            tracing::debug!(host = %self.host, "a session is ended, since a call's reply was lost in it");
            self.log_out(&fenced).await?;
            session.fenced.retain(|other| other.cookie != fenced.cookie);
        }
        Ok(())
    }

    /// Logs out. A host that does not answer forgets the session by itself.
    pub async fn close(&self) {
        let mut session = self.session.lock().await;
        let open = session.open.take();
        let all: Vec<Open> = session.fenced.drain(..).chain(open).collect();
        for open in all {
            if let Err(error) = self.log_out(&open).await {
                tracing::debug!(host = %self.host, %error, "the session was not ended");
            }
        }
    }

    /// How a failed call reads to a user.
    pub fn told(&self, error: CallError, effect: Effect) -> DriverError {
        error.told(&self.host, effect, self.shown.thumbprint())
    }

    async fn log_out(&self, open: &Open) -> Result<(), CallError> {
        let request = Request::new("Logout", &open.content.session_manager);
        match self.post(&request, &open.content.api_version, Some(&open.cookie), Effect::None).await {
            Ok(_) => Ok(()),
            Err(CallError::Fault(fault)) if fault.kind == NOT_AUTHENTICATED => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The open session. Several who need one wait for the one who opens it.
    async fn open(&self) -> Result<Open, CallError> {
        let mut session = self.session.lock().await;
        if let Some(open) = &session.open {
            return Ok(open.clone());
        }
        let password = self.config.password.read().await.map_err(|error| CallError::Ours(error.failure))?;
        let opened = self.log_in(&password).await.map_err(|error| error.without(&password))?;
        tracing::debug!(host = %self.host, user = self.config.user, "logged in");
        session.open = Some(opened.clone());
        Ok(opened)
    }

    async fn log_in(&self, password: &Secret) -> Result<Open, CallError> {
        let content = self.service_content().await?;
        let request = Request::new("Login", &content.session_manager)
            .text("userName", &self.config.user)
            .text("password", password.expose());
        let (reply, headers) = self.post(&request, &content.api_version, None, Effect::None).await?;
        let cookie = cookie_of(&headers).ok_or(CallError::Reply(SoapError::Lacks("a session")))?;
        let known = reply.child("returnval").and_then(|session| session.text_of("userName"));
        let user = known.unwrap_or(&self.config.user).into();
        Ok(Open { cookie, content: Arc::new(content), user })
    }

    async fn service_content(&self) -> Result<Content, CallError> {
        let request =
            Request::new("RetrieveServiceContent", &Moref::new("ServiceInstance", "ServiceInstance"));
        let (reply, _) = self.post(&request, VERSION_FIRST, None, Effect::None).await?;
        Ok(Content::of(&reply)?)
    }

    async fn forget(&self, cookie: &Cookie) {
        let mut session = self.session.lock().await;
        session.open.take_if(|open| open.cookie == *cookie);
    }

    async fn ask(&self, request: &Request, open: &Open, effect: Effect) -> Result<Element, CallError> {
        let asked = self.post(request, &open.content.api_version, Some(&open.cookie), effect).await;
        if let (Err(error), Effect::Some) = (&asked, effect)
            && error.may_have_had_effect()
        {
            let mut session = self.session.lock().await;
            session.open.take_if(|other| other.cookie == open.cookie);
            if !session.fenced.iter().any(|other| other.cookie == open.cookie) {
                session.fenced.push(open.clone());
            }
        }
        let (reply, _) = asked?;
        match not_authenticated(&reply) {
            Some(fault) => Err(CallError::Fault(fault)),
            None => Ok(reply),
        }
    }

    /// Sends a request, and again a little later while the host says that it is busy, or cannot be connected to: nothing
    /// was begun then. All tries together take no longer than one call may.
    ///
    /// A request that changes something is sent again only where it cannot have been carried out; a 503 to one may come
    /// from a proxy that has passed it on.
    async fn post(
        &self,
        request: &Request,
        version: &str,
        cookie: Option<&Cookie>,
        effect: Effect,
    ) -> Result<(Element, HeaderMap), CallError> {
        let until = Instant::now() + self.patience;
        let mut pause = PAUSE_MIN;
        for _ in 1..TRIES_MAX {
            match self.post_once(request, version, cookie).await {
                Err(error) if error.is_busy(effect) && Instant::now() + pause < until => {
                    tracing::debug!(host = %self.host, %error, "tried again later");
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answered => return answered,
            }
        }
        self.post_once(request, version, cookie).await
    }

    /// Sends a request, and reads the answer within the limits of time and bytes.
    async fn post_once(
        &self,
        request: &Request,
        version: &str,
        cookie: Option<&Cookie>,
    ) -> Result<(Element, HeaderMap), CallError> {
        let mut post = self
            .http
            .post(self.url.clone())
            .header(CONTENT_TYPE, "text/xml; charset=\"utf-8\"")
            .header("SOAPAction", format!("\"urn:vim25/{version}\""));
        if let Some(Cookie(value)) = cookie {
            post = post.header(COOKIE, format!("{COOKIE_NAME}={value}"));
        }
        let mut answer =
            post.body(request.envelope()).send().await.map_err(|error| CallError::sending(&error))?;
        let status = answer.status();
        if !matches!(status, StatusCode::OK | StatusCode::INTERNAL_SERVER_ERROR) {
            return Err(CallError::Status(status.as_u16()));
        }
        let headers = answer.headers().clone();
        let mut text = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|error| CallError::reading(&error))? {
            if text.len() + chunk.len() > BYTES_MAX {
                return Err(SoapError::TooLarge { max: BYTES_MAX, unit: "bytes" }.into());
            }
            text.extend_from_slice(&chunk);
        }
        let reply = match body(&text) {
            Ok(reply) => reply,
            Err(_) if status == StatusCode::INTERNAL_SERVER_ERROR => {
                return Err(CallError::Status(status.as_u16()));
            }
            Err(error) => return Err(error.into()),
        };
        tracing::trace!(method = request.method(), bytes = text.len(), "answered");
        match reply.name.as_str() {
            "Fault" => Err(CallError::Fault(Fault::of_call(&reply))),
            _ => Ok((reply, headers)),
        }
    }
}

/// The fault's type that says that there is no session, or no right.
const NOT_AUTHENTICATED: &str = "NotAuthenticated";

/// A host that reads properties without a session answers, and says of each that it may not be read.
fn not_authenticated(reply: &Element) -> Option<Fault> {
    let objects = reply.all("returnval").flat_map(|result| result.all("objects").chain([result]));
    let mut missing = objects.flat_map(|object| object.all("missingSet"));
    missing.find_map(|missing| {
        let fault = Fault::of_method(missing.child("fault")?);
        (fault.kind == NOT_AUTHENTICATED).then_some(fault)
    })
}

fn cookie_of(headers: &HeaderMap) -> Option<Cookie> {
    let mut values = headers.get_all(SET_COOKIE).into_iter().filter_map(|value| value.to_str().ok());
    let pair = |value: &str| {
        let value = value.split(';').next()?.trim().strip_prefix(COOKIE_NAME)?.trim().strip_prefix('=')?;
        Some(value.trim().to_owned()).filter(|value| !value.is_empty() && value.len() <= COOKIE_BYTES_MAX)
    };
    values.find_map(pair).map(Cookie)
}
