//! What happens at the engine's named places: nothing, unless a test or the demo asks for it.

use std::sync::Arc;

use anyhow::Result;
use snaptree_drivers::sim::SimDriver;
use snaptree_engine::driver::{Hooks, NoHooks};

/// The hooks of this process.
///
/// # Errors
/// `SNAPTREE_FAULT` was given and cannot be read (only with the feature `fault-points`).
#[cfg(not(feature = "fault-points"))]
pub fn of_process() -> Result<Arc<dyn Hooks>> {
    Ok(Arc::new(NoHooks))
}

/// The hooks of this process.
///
/// # Errors
/// `SNAPTREE_FAULT` was given and cannot be read (only with the feature `fault-points`).
#[cfg(feature = "fault-points")]
pub fn of_process() -> Result<Arc<dyn Hooks>> {
    match std::env::var("SNAPTREE_FAULT") {
        Ok(text) => match text.strip_prefix("trace=") {
            Some(path) => Ok(Arc::new(fault::Trace(path.into()))),
            None => Ok(Arc::new(fault::Fault::parse(&text)?)),
        },
        Err(_) => Ok(Arc::new(NoHooks)),
    }
}

/// The simulated hypervisor as users have it: it answers at once.
#[cfg(not(feature = "fault-points"))]
pub fn slowed(driver: SimDriver) -> SimDriver {
    driver
}

/// The simulated hypervisor; each step takes `SNAPTREE_SIM_STEP_MS` (only with the feature `fault-points`).
#[cfg(feature = "fault-points")]
pub fn slowed(driver: SimDriver) -> SimDriver {
    match std::env::var("SNAPTREE_SIM_STEP_MS").ok().and_then(|text| text.parse().ok()) {
        Some(ms) => driver.with_faults(Arc::new(fault::Slow(std::time::Duration::from_millis(ms)))),
        None => driver,
    }
}

/// Says so and stops for good at a place, to be killed there.
#[derive(Debug)]
pub struct StopAt(pub String);

impl Hooks for StopAt {
    fn reached(&self, name: &str) {
        if name == self.0 {
            println!("reached {name}");
            loop {
                std::thread::park();
            }
        }
    }
}

#[cfg(feature = "fault-points")]
mod fault {
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU64, Ordering};

    use anyhow::{Context as _, Result, bail};
    use async_trait::async_trait;
    use nix::sys::signal::{Signal, raise};
    use snaptree_drivers::sim::{self, FaultPoint, Faults};
    use snaptree_engine::driver::Hooks;

    /// Nothing goes wrong, and every step takes so long.
    pub(super) struct Slow(pub(super) std::time::Duration);

    #[async_trait]
    impl Faults for Slow {
        fn fault(&self, _point: &FaultPoint) -> Option<sim::Fault> {
            None
        }

        async fn latency(&self, _point: &FaultPoint) {
            tokio::time::sleep(self.0).await;
        }
    }

    /// `trace=PATH`: writes there what was reached, a line each.
    #[derive(Debug)]
    pub(super) struct Trace(pub(super) PathBuf);

    impl Hooks for Trace {
        fn reached(&self, name: &str) {
            let file = OpenOptions::new().create(true).append(true).open(&self.0);
            if let Err(error) = file.and_then(|mut file| writeln!(file, "{name}")) {
                tracing::error!(%error, path = %self.0.display(), "what was reached cannot be written");
            }
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Deed {
        Kill,
        Stop,
        Abort,
    }

    /// `NAME[@N]=kill|stop|abort`: does it when NAME is reached for the N-th time.
    #[derive(Debug)]
    pub(super) struct Fault {
        name: String,
        nth: u64,
        deed: Deed,
        reached: AtomicU64,
    }

    impl Fault {
        pub(super) fn parse(text: &str) -> Result<Self> {
            let (place, deed) =
                text.rsplit_once('=').context("SNAPTREE_FAULT is NAME[@N]=kill|stop|abort")?;
            let (name, nth) = match place.rsplit_once('@') {
                Some((name, nth)) => (name, nth.parse().context("SNAPTREE_FAULT: N is no number")?),
                None => (place, 1),
            };
            let deed = match deed {
                "kill" => Deed::Kill,
                "stop" => Deed::Stop,
                "abort" => Deed::Abort,
                other => bail!("SNAPTREE_FAULT: '{other}' is none of kill, stop, abort"),
            };
            Ok(Self { name: name.to_owned(), nth, deed, reached: AtomicU64::new(0) })
        }
    }

    impl Hooks for Fault {
        fn reached(&self, name: &str) {
            if name != self.name || self.reached.fetch_add(1, Ordering::SeqCst) + 1 != self.nth {
                return;
            }
            let signal = match self.deed {
                Deed::Kill => Signal::SIGKILL,
                Deed::Stop => Signal::SIGSTOP,
                Deed::Abort => panic!("SNAPTREE_FAULT: {name}"),
            };
            // Neither signal can be refused by the process that raises it.
            let _ = raise(signal);
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn faults_are_read() {
            let fault = Fault::parse("append.after@3=kill").unwrap();
            assert_eq!((fault.name.as_str(), fault.nth, fault.deed), ("append.after", 3, Deed::Kill));
            assert_eq!(Fault::parse("step.done.take 'a=b'=stop").unwrap().name, "step.done.take 'a=b'");
            assert!(Fault::parse("x").is_err());
            assert!(Fault::parse("x=explode").is_err());
        }
    }
}
