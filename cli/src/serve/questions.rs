//! Answers questions to the log, for those who may use the socket and not read the state directory.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use snaptree_engine::event::Envelope;

use super::Daemon;
use super::http::{Failure, Read};
use crate::wire::{EventLine, HeadView, Question};

/// Most rows of one answer.
const ROWS_MAX: usize = 100_000;

/// Answers one question.
///
/// # Errors
/// The log cannot be read.
pub async fn answer(
    State(daemon): State<Arc<Daemon>>,
    Read(question): Read<Question>,
) -> Result<Response, Failure> {
    let log = daemon.engine.log();
    Ok(match question {
        Question::Stream { stream, version, seq_max, count } => {
            lines(log.read_stream(&stream, version, seq_max, count.min(ROWS_MAX)).await?)?
        }
        Question::Events { seq, count, filter } => lines(log.read(seq, &filter, count.min(ROWS_MAX)).await?)?,
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
        Question::Operations { filter, count } => json(log.operations(&filter, count.min(ROWS_MAX)).await?),
        Question::SeqAt { at } => json(log.seq_at(at).await?),
    })
}

fn json(value: impl Serialize) -> Response {
    Json(value).into_response()
}

fn lines(events: Vec<Envelope>) -> Result<Response, Failure> {
    let lines = events.iter().map(EventLine::of).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(json(lines))
}
