//! Starting and ending a machine.

use std::time::Duration;

use snaptree_engine::domain::RunState;
use snaptree_engine::driver::{CallOff, DriverError, NoWatch, PowerWish};
use snaptree_engine::operation::Code;
use tokio::time::{Instant, sleep};

use super::client::{Client, Effect};
use super::fault::of_task;
use super::observe::machines;
use super::soap::{Moref, Request};
use super::task::{Ended, Watched, begin, end};

/// How long a guest may take to shut down.
const SHUTDOWN_MAX: Duration = Duration::from_secs(120);
/// How often it is looked whether it has.
const POLL: Duration = Duration::from_millis(500);

/// Starts or ends a machine; one that is as wished is left alone.
///
/// # Errors
/// The host cannot do it, or the guest does not shut down.
pub async fn power(client: &Client, vm: &Moref, now: RunState, wish: PowerWish) -> Result<(), DriverError> {
    match (wish, now) {
        (PowerWish::Start, RunState::Running) | (PowerWish::Shutdown | PowerWish::End, RunState::Off) => {
            Ok(())
        }
        (PowerWish::Start, _) => task(client, &Request::new("PowerOnVM_Task", vm)).await,
        (PowerWish::End, _) => task(client, &Request::new("PowerOffVM_Task", vm)).await,
        (PowerWish::Shutdown, _) => shut_down(client, vm).await,
    }
}

async fn task(client: &Client, request: &Request) -> Result<(), DriverError> {
    let task = begin(client, request).await.map_err(|error| client.told(error, Effect::Some))?;
    let watched = Watched { progress: &NoWatch, call_off: CallOff::default() };
    match end(client, &task, watched).await? {
        Ended::Well => Ok(()),
        Ended::Badly(fault) => Err(of_task(&fault, &client.host)),
    }
}

async fn shut_down(client: &Client, vm: &Moref) -> Result<(), DriverError> {
    let request = Request::new("ShutdownGuest", vm);
    client.call(&request, Effect::Some).await.map_err(|error| client.told(error, Effect::Some))?;
    let deadline = Instant::now() + SHUTDOWN_MAX;
    loop {
        let found = machines(client, std::slice::from_ref(vm)).await;
        let found = found.map_err(|error| client.told(error, Effect::None))?.remove(vm);
        if found.is_some_and(|machine| machine.power == RunState::Off) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let message = format!("the guest did not shut down within {} s", SHUTDOWN_MAX.as_secs());
            return Err(DriverError::permanent(Code::Timeout, message).hint("--force ends it at once"));
        }
        sleep(POLL).await;
    }
}
