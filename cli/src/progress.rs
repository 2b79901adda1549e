//! A progress bar on stderr, where that is a terminal.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use snaptree_engine::driver::{Progress, StepProgress, Watch};
use snaptree_engine::event::{Envelope, Event};
use snaptree_engine::operation::Request;

use crate::render::note;
use crate::render::text::safe;

/// How often the bar moves by itself.
const TICK: Duration = Duration::from_millis(100);

/// Shows what the engine does.
pub struct Shown {
    bar: Option<ProgressBar>,
    place: Mutex<Place>,
}

/// Where the operation in hand stands.
#[derive(Debug, Default)]
struct Place {
    what: String,
    steps: Vec<String>,
    step: String,
}

impl Shown {
    /// A bar on a terminal, nothing elsewhere.
    pub fn on_stderr() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(spinner());
            bar.enable_steady_tick(TICK);
            bar
        });
        Self { bar, place: Mutex::default() }
    }

    /// Says something above the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// The end of the line, by what is known. What is being done takes what is left of the line, and is cut there: a line
/// that wraps would be drawn anew below itself each time.
fn measured(progress: StepProgress) -> ProgressStyle {
    let template = match progress {
        StepProgress::Bytes { .. } => {
            "{spinner} {wide_msg} [{bar:12}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} left"
        }
        StepProgress::Percent(_) => "{spinner} {wide_msg} [{bar:12}] {percent:>3}% {eta} left",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Place {
    /// Follows an event; says whether the line changed.
    fn follow(&mut self, event: &Event) -> bool {
        if let Some(request) = Request::of(event) {
            *self = Self { what: request.kind().to_owned(), ..Self::default() };
            return true;
        }
        match event {
            Event::OperationPlanned(e) => {
                self.steps = e.steps.iter().map(|step| safe(&step.name).into_owned()).collect();
            }
            Event::OperationStepStarted(e) => self.step = self.step_line("", e.step),
            Event::OperationUndoStarted(e) => self.step = self.step_line("taking back ", e.step),
            Event::OperationAttemptFailed(e) => {
                self.step = format!("{} (again soon: {})", self.step, safe(&e.failure.message));
            }
            _ => return false,
        }
        true
    }

    fn step_line(&self, doing: &str, index: usize) -> String {
        let name = self.steps.get(index).map_or("", String::as_str);
        format!("{doing}step {}/{} {name}", index + 1, self.steps.len().max(index + 1))
    }

    fn line(&self) -> String {
        if self.what.is_empty() { self.step.clone() } else { format!("{}: {}", self.what, self.step) }
    }
}

impl Progress for Shown {
    fn step_progress(&self, progress: StepProgress) {
        let Some(bar) = &self.bar else { return };
        let (done, total) = match progress {
            StepProgress::Bytes { done, total } => (done, total),
            StepProgress::Percent(percent) => (u64::from(percent), 100),
        };
        if bar.length() != Some(total) {
            bar.set_length(total);
            bar.set_style(measured(progress));
            // The rate and the time left are those of this step.
            bar.reset_eta();
        }
        bar.set_position(done);
    }
}

impl Watch for Shown {
    fn happened(&self, envelope: &Envelope) {
        tracing::info!(seq = envelope.seq, kind = envelope.event.kind(), "appended");
        let Some(bar) = &self.bar else { return };
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.follow(&envelope.event) {
            if matches!(envelope.event, Event::OperationStepStarted(_)) {
                bar.set_style(spinner());
                bar.unset_length();
            }
            bar.set_message(place.line());
        }
    }
}

#[cfg(test)]
mod tests {
    use snaptree_engine::event::{OperationPlanned, OperationStepStarted};
    use snaptree_engine::operation::{Poison, Reversal, Step};

    use super::*;

    #[test]
    fn the_line_names_the_step() {
        let step = |name: &str| Step {
            name: name.to_owned(),
            reversal: Reversal::Undoable,
            poison: Poison::Nothing,
            data: serde_json::Value::Null,
        };
        let mut place = Place::default();
        assert!(
            place.follow(&OperationPlanned { steps: vec![step("prepare"), step("sw\u{1b}itch")] }.into())
        );
        assert!(place.follow(&OperationStepStarted { step: 1 }.into()));
        assert_eq!(place.line(), "step 2/2 sw\\u{1b}itch");
    }
}
