//! Telling people what became of runs, by the program that a policy names.

use std::process::Stdio;
use std::time::Duration;

use snaptree_policies::file::Notify;
use snaptree_policies::runner::Notable;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// What the program reads on its standard input, and its environment says.
fn document(notable: &Notable) -> serde_json::Value {
    serde_json::json!({
        "policy": notable.policy(),
        "domain": notable.domain(),
        "occasion": notable.occasion(),
        "suspended": matches!(notable, Notable::Suspended { .. }),
        "message": notable.to_string(),
    })
}

/// Tells of `notable`. A notification that does not get through is logged, and not tried again.
pub async fn tell(notify: Notify, notable: Notable) {
    let Some(command) = &notify.command else { return };
    let timeout = Duration::from_secs(u64::from(notify.timeout.seconds()));
    let told = tokio::time::timeout(timeout, run(command.program(), command.arguments(), &notable)).await;
    let problem = match told {
        Ok(Ok(status)) if status.success() => return,
        Ok(Ok(status)) => status.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it took longer than {}", notify.timeout),
    };
    tracing::warn!(
        policy = %notable.policy(),
        program = command.program(),
        problem,
        "a notification did not get through"
    );
}

async fn run(
    program: &str,
    arguments: &[String],
    notable: &Notable,
) -> std::io::Result<std::process::ExitStatus> {
    let document = document(notable);
    let mut child = Command::new(program)
        .args(arguments)
        .env("SNAPTREE_POLICY", notable.policy().as_str())
        .env("SNAPTREE_DOMAIN", notable.domain().map_or("", |domain| domain.as_str()))
        .env("SNAPTREE_OUTCOME", document["occasion"].as_str().unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read it need not.
        let _ = stdin.write_all(format!("{document}\n").as_bytes()).await;
    }
    child.wait().await
}
