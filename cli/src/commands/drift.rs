//! `snaptree drift`

use std::collections::BTreeSet;

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::SnapshotName;
use snaptree_engine::reconcile::drift::{self, Finding};

use super::carry::open;
use crate::args::inspect::DriftArgs;
use crate::context::{Context, Writer};
use crate::exit::Exit;
use crate::render;
use crate::render::text::{Look, safe};
use crate::render::view::domain_name;

/// What differs, domain by domain.
#[derive(Serialize)]
struct Drifts {
    domains: Vec<Drift>,
}

#[derive(Serialize)]
struct Drift {
    domain: String,
    findings: BTreeSet<Finding>,
    adopted: Vec<SnapshotName>,
}

/// Compares the hypervisors with the log.
///
/// # Errors
/// The state cannot be used, or a hypervisor cannot be asked.
pub async fn run(context: &Context, args: DriftArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let domains: Vec<_> = match &args.domain {
        Some(domain) => vec![engine.find_domain(domain).await?],
        None => engine.domains().await?.into_iter().map(|row| row.id).collect(),
    };
    let mut drifts = Vec::new();
    for (domain, drift::Drift { findings, adopted }) in office.drift_all(&domains).await? {
        drifts.push(Drift { domain: domain_name(&engine.load(domain).await?), findings, adopted });
    }
    let agree = drifts.iter().all(|drift| drift.findings.is_empty());
    if context.json {
        render::json(&Drifts { domains: drifts })?;
    } else {
        render::print(&drifts.iter().map(|drift| told(drift, &Look::of_stdout())).collect::<String>())?;
    }
    Ok(if agree { Exit::Done } else { Exit::Attention })
}

fn told(drift: &Drift, look: &Look) -> String {
    let name = look.paint.name(safe(&drift.domain));
    let adopted = |snapshot: &SnapshotName| {
        let snapshot = safe(snapshot.as_str());
        format!("{name}: took over snapshot '{snapshot}', which somebody made at the hypervisor\n")
    };
    let mut text: String = drift.adopted.iter().map(adopted).collect();
    if drift.findings.is_empty() {
        text.push_str(&format!("{name}: {}\n", look.paint.good("the hypervisor and the log agree")));
    }
    let line = |finding: &Finding| format!("{name}: {}\n", look.paint.bad(safe(&finding.to_string())));
    text.extend(drift.findings.iter().map(line));
    text
}
