//! Timing whole processes, side by side in one run, since machines are noisy.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process does nothing that has nothing to do.
const IDLE: Duration = Duration::from_millis(300);

/// Runs a command to its end and says how long it took.
///
/// # Panics
/// It fails.
pub fn time(command: &mut Command) -> Duration {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let status = command.status().expect("it starts");
    let took = start.elapsed();
    assert!(status.success(), "{command:?}: {status}");
    took
}

/// Brings what earlier work left to be written to the disk, so that it does not slow down what is measured next.
///
/// # Panics
/// It fails.
pub fn quiet() {
    time(&mut Command::new("sync"));
}

/// How long processors have worked for this process so far: what a loaded machine does not change.
///
/// # Panics
/// It cannot be read.
pub fn processor_time() -> Duration {
    processor_time_of("self")
}

/// Waits until a process has nothing to do: a machine that boots competes with its own block jobs.
///
/// # Panics
/// It has ended, or does not come to rest.
pub fn until_idle(process: u32) {
    let process = process.to_string();
    let mut last = None;
    crate::running::wait_until("the process has nothing to do", || {
        std::thread::sleep(IDLE);
        let now = Some(processor_time_of(&process));
        std::mem::replace(&mut last, now) == now
    });
}

/// By `/proc/PID/stat`.
fn processor_time_of(process: &str) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).expect("Linux, and a process");
    let fields = stat.rsplit_once(") ").expect("a name in parentheses").1;
    // Fields 14 and 15, in hundredths of a second (proc(5); USER_HZ is 100 on every architecture that we build for).
    let ticks = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().expect("a number"));
    Duration::from_millis(ticks.sum::<u64>() * 10)
}

/// The times of one thing that was measured several times.
#[derive(Clone, Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Adds one.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The median, in milliseconds.
    pub fn median_ms(&self) -> f64 {
        self.quantile_ms(1, 2)
    }

    fn quantile_ms(&self, numerator: usize, denominator: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort();
        sorted.get((sorted.len().saturating_sub(1)) * numerator / denominator).map_or(0.0, as_ms)
    }

    /// Prints median, lowest, highest, and the ratio to `base`.
    pub fn print(&self, what: &str, base: Option<&Self>) {
        let ratio =
            base.map_or_else(String::new, |base| format!("  x{:.2}", self.median_ms() / base.median_ms()));
        println!(
            "{what:<58} {:>8.2} ms  ({:.2} to {:.2}, n={}){ratio}",
            self.median_ms(),
            self.quantile_ms(0, 1),
            self.quantile_ms(1, 1),
            self.0.len()
        );
    }
}

fn as_ms(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
