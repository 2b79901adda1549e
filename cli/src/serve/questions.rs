//! Answers questions to the log, for those who may use the socket and not read the state directory.
//!
//! An answer of many rows is read and sent page by page, each when the one before was taken: it costs the daemon a few
//! pages, however long it is and however slowly it is read.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use http_body_util::channel::{Channel, Sender};
use serde::Serialize;
use snaptree_engine::StreamId;
use snaptree_engine::event::Envelope;
use snaptree_engine::log::{EventFilter, EventLog, OperationFilter, OperationRow};

use super::Daemon;
use super::http::{Failure, Read};
use crate::wire::{EventLine, HeadView, Question};

/// Most rows of one answer.
const ROWS_MAX: usize = 100_000;
/// How many rows are read, and sent, at once.
const PAGE_ROWS: usize = 256;
/// How many pages wait for whoever asked.
const PAGES_MAX: usize = 2;
/// How long whoever asked may take to read a page.
const READ_MAX: Duration = Duration::from_secs(60);

/// Answers one question.
///
/// # Errors
/// The log cannot be read.
pub async fn answer(
    State(daemon): State<Arc<Daemon>>,
    Read(question): Read<Question>,
) -> Result<Response, Failure> {
    let log = Arc::clone(daemon.engine.log());
    Ok(match question {
        Question::Stream { stream, version, seq_max, count } => {
            let from = From::Version(stream, version, seq_max);
            paged(Events { log, from, left: count.min(ROWS_MAX) }).await?
        }
        Question::Events { seq, count, filter } => {
            paged(Events { log, from: From::Seq(seq, filter), left: count.min(ROWS_MAX) }).await?
        }
        Question::Head => json(HeadView::from(log.head().await?)),
        Question::ByKey { stream, key } => {
            let found = log.by_key(&stream, &key).await?;
            json(found.as_ref().map(EventLine::of).transpose()?)
        }
        Question::Checkpoint { stream, projector, seq_max } => {
            json(log.checkpoint(&stream, projector, seq_max).await?)
        }
        Question::Domains { seq_max } => json(log.domains(seq_max).await?),
        Question::DomainByName { name } => json(log.domain_by_name(&name).await?),
        Question::Policies => json(log.policies().await?),
        Question::Operations { filter, count } if count <= PAGE_ROWS => {
            json(log.operations(&filter, count).await?)
        }
        Question::Operations { filter, count } => paged(operations(log, filter, count).await?).await?,
        Question::SeqAt { at } => json(log.seq_at(at).await?),
    })
}

fn json(value: impl Serialize) -> Response {
    Json(value).into_response()
}

/// Rows that are read page by page.
trait Pages: Send + 'static {
    /// What a row is written as.
    type Row: Serialize + Send;

    /// The next page; an empty one after the last.
    fn next(&mut self) -> impl Future<Output = anyhow::Result<Vec<Self::Row>>> + Send;
}

/// Where events are read from.
enum From {
    /// A stream, after a version and up to an event.
    Version(StreamId, u64, u64),
    /// The log, after an event.
    Seq(u64, EventFilter),
}

struct Events {
    log: Arc<dyn EventLog>,
    from: From,
    left: usize,
}

impl Pages for Events {
    type Row = EventLine;

    async fn next(&mut self) -> anyhow::Result<Vec<EventLine>> {
        let count = self.left.min(PAGE_ROWS);
        if count == 0 {
            return Ok(Vec::new());
        }
        let page: Vec<Envelope> = match &mut self.from {
            From::Version(stream, version, seq_max) => {
                let page = self.log.read_stream(stream, *version, *seq_max, count).await?;
                *version = page.last().map_or(*version, |last| last.version);
                page
            }
            From::Seq(seq, filter) => {
                let page = self.log.read(*seq, filter, count).await?;
                *seq = page.last().map_or(*seq, |last| last.seq);
                page
            }
        };
        // A short page was the last.
        self.left = if page.len() < count { 0 } else { self.left - count };
        page.iter().map(EventLine::of).collect()
    }
}

/// The newest operations, in the order of their requests.
struct Operations {
    log: Arc<dyn EventLog>,
    filter: OperationFilter,
    /// How many older ones are left out.
    skip: usize,
    is_last: bool,
}

async fn operations(
    log: Arc<dyn EventLog>,
    filter: OperationFilter,
    count: usize,
) -> anyhow::Result<Operations> {
    let from = OperationFilter { after: Some(filter.after.unwrap_or(0)), ..filter };
    let mut all = Operations { log: Arc::clone(&log), filter: from, skip: 0, is_last: false };
    let mut many: usize = 0;
    while !all.is_last {
        many += all.next().await?.len();
    }
    let skip = if filter.after.is_some() { 0 } else { many.saturating_sub(count) };
    Ok(Operations { log, filter: from, skip, is_last: false })
}

impl Pages for Operations {
    type Row = OperationRow;

    async fn next(&mut self) -> anyhow::Result<Vec<OperationRow>> {
        while !self.is_last {
            let mut page = self.log.operations(&self.filter, PAGE_ROWS).await?;
            self.is_last = page.len() < PAGE_ROWS;
            self.filter.after = page.last().map_or(self.filter.after, |last| Some(last.seq));
            let skipped = self.skip.min(page.len());
            self.skip -= skipped;
            page.drain(..skipped);
            if !page.is_empty() {
                return Ok(page);
            }
        }
        Ok(Vec::new())
    }
}

/// An array of all rows. What fails before the first page was sent is answered as a failure; what fails later cuts the
/// answer short, so that nobody takes it for whole.
async fn paged(mut pages: impl Pages) -> Result<Response, Failure> {
    let mut page = pages.next().await?;
    let (mut sender, body) = Channel::<Bytes, io::Error>::new(PAGES_MAX);
    tokio::spawn(async move {
        let mut before = "[";
        while !page.is_empty() {
            let Ok(text) = written(before, &page) else {
                return sender.abort(io::ErrorKind::InvalidData.into());
            };
            if !is_sent(&mut sender, text).await {
                return;
            }
            before = ",";
            page = match pages.next().await {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(error = &*error as &dyn std::error::Error, "an answer was cut short");
                    return sender.abort(io::Error::other("the log cannot be read"));
                }
            };
        }
        let end: &[u8] = if before == "[" { b"[]" } else { b"]" };
        is_sent(&mut sender, end.to_vec()).await;
    });
    Ok(([(CONTENT_TYPE, "application/json")], Body::new(body)).into_response())
}

fn written(before: &str, page: &[impl Serialize]) -> serde_json::Result<Vec<u8>> {
    let mut text = before.as_bytes().to_vec();
    for (number, row) in page.iter().enumerate() {
        if number > 0 {
            text.push(b',');
        }
        serde_json::to_writer(&mut text, row)?;
    }
    Ok(text)
}

/// Whether whoever asked still reads.
async fn is_sent(sender: &mut Sender<Bytes, io::Error>, text: Vec<u8>) -> bool {
    let sent = tokio::time::timeout(READ_MAX, sender.send_data(text.into())).await;
    matches!(sent, Ok(Ok(())))
}
