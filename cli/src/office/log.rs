//! The log as the daemon reads it out: for those who may use its socket and not read its files.

use anyhow::Result;
use async_trait::async_trait;
use hyper::Method;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use snaptree_engine::driver::Head;
use snaptree_engine::event::Envelope;
use snaptree_engine::log::{
    Append, Checkpoint, DomainRow, EventFilter, EventLog, LogError, OperationFilter, OperationRow, SeqAt,
};
use snaptree_engine::{DomainName, PolicyName, StreamId};

use super::there::There;
use crate::exit::FromDaemon;
use crate::wire::{EventLine, HeadView, Question};

/// A daemon's log, for reading.
pub struct ReadOut(pub There);

impl ReadOut {
    async fn ask<T: DeserializeOwned>(&self, question: Question) -> Result<T, LogError> {
        self.0.ask(Method::POST, "/v1/log", &question).await.map_err(|error| told(&error))
    }

    /// Asks page by page: `question` is given the last event of the page before, and how many are wanted.
    async fn events(
        &self,
        count: usize,
        question: impl Fn(Option<&Envelope>, usize) -> Question,
    ) -> Result<Vec<Envelope>, LogError> {
        let mut events: Vec<Envelope> = Vec::new();
        while events.len() < count {
            let wanted = (count - events.len()).min(PAGE_ROWS);
            let lines: Vec<EventLine> = self.ask(question(events.last(), wanted)).await?;
            let is_last = lines.len() < wanted;
            for line in lines {
                events.push(line.envelope().map_err(|error| told(&error))?);
            }
            if is_last {
                break;
            }
        }
        Ok(events)
    }
}

/// How many rows are asked for at once.
const PAGE_ROWS: usize = 256;

fn told(error: &anyhow::Error) -> LogError {
    if let Some(FromDaemon(error)) = error.downcast_ref::<FromDaemon>()
        && error.code == "damaged"
    {
        return LogError::Damaged(error.message.clone());
    }
    LogError::Backend {
        message: "the daemon could not read its log out".to_owned(),
        source: format!("{error:#}").into(),
    }
}

#[async_trait]
impl EventLog for ReadOut {
    async fn append(&self, _append: Append) -> Result<Vec<Envelope>, LogError> {
        Err(LogError::ReadOnly("the daemon has the state, and alone writes it".to_owned()))
    }

    async fn read_stream(
        &self,
        stream: &StreamId,
        version: u64,
        seq_max: u64,
        count: usize,
    ) -> Result<Vec<Envelope>, LogError> {
        self.events(count, |last, count| {
            let version = last.map_or(version, |last| last.version);
            Question::Stream { stream: stream.clone(), version, seq_max, count }
        })
        .await
    }

    async fn read(&self, seq: u64, filter: &EventFilter, count: usize) -> Result<Vec<Envelope>, LogError> {
        self.events(count, |last, count| {
            let seq = last.map_or(seq, |last| last.seq);
            Question::Events { seq, count, filter: filter.clone() }
        })
        .await
    }

    async fn head(&self) -> Result<Head, LogError> {
        self.ask::<HeadView>(Question::Head).await?.head().map_err(|error| told(&error))
    }

    async fn by_key(&self, stream: &StreamId, key: &str) -> Result<Option<Envelope>, LogError> {
        let question = Question::ByKey { stream: stream.clone(), key: key.to_owned() };
        let line: Option<EventLine> = self.ask(question).await?;
        line.map(|line| line.envelope().map_err(|error| told(&error))).transpose()
    }

    async fn checkpoint(
        &self,
        stream: &StreamId,
        projector: u32,
        seq_max: u64,
    ) -> Result<Option<Checkpoint>, LogError> {
        let stream = stream.clone();
        self.ask(Question::Checkpoint { stream, projector, seq_max }).await
    }

    async fn save_checkpoint(&self, _checkpoint: Checkpoint) -> Result<(), LogError> {
        Ok(())
    }

    async fn domains(&self, seq_max: u64) -> Result<Vec<DomainRow>, LogError> {
        self.ask(Question::Domains { seq_max }).await
    }

    async fn domain_by_name(&self, name: &DomainName) -> Result<Option<DomainRow>, LogError> {
        self.ask(Question::DomainByName { name: name.clone() }).await
    }

    async fn policies(&self) -> Result<Vec<PolicyName>, LogError> {
        self.ask(Question::Policies).await
    }

    async fn operations(
        &self,
        filter: &OperationFilter,
        count: usize,
    ) -> Result<Vec<OperationRow>, LogError> {
        if count <= PAGE_ROWS || filter.after.is_some() {
            return self.ask(Question::Operations { filter: *filter, count }).await;
        }
        let mut rows: Vec<OperationRow> = Vec::new();
        loop {
            let after = Some(rows.last().map_or(0, |last| last.seq));
            let filter = OperationFilter { after, ..*filter };
            let page: Vec<OperationRow> = self.ask(Question::Operations { filter, count: PAGE_ROWS }).await?;
            let is_last = page.len() < PAGE_ROWS;
            rows.extend(page);
            if is_last {
                rows.drain(..rows.len().saturating_sub(count));
                return Ok(rows);
            }
        }
    }

    async fn seq_at(&self, at: Timestamp) -> Result<SeqAt, LogError> {
        self.ask(Question::SeqAt { at }).await
    }
}
