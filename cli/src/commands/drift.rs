//! `snaptree drift`

use std::collections::BTreeSet;

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::reconcile::drift::Finding;

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
}

/// Compares the hypervisors with the log.
///
/// # Errors
/// The state cannot be used, or a hypervisor cannot be asked.
pub async fn run(context: &Context, args: DriftArgs) -> Result<Exit> {
    let Writer { engine, requester } = open(context, &args.writer)?;
    let domains = match &args.domain {
        Some(domain) => vec![engine.find_domain(domain).await?],
        None => engine.domains().await?.into_iter().map(|row| row.id).collect(),
    };
    let mut drifts = Vec::new();
    for domain in domains {
        let findings = engine.drift(&requester, domain).await?;
        drifts.push(Drift { domain: domain_name(&engine.load(domain).await?), findings });
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
    if drift.findings.is_empty() {
        return format!("{name}: {}\n", look.paint.good("the hypervisor and the log agree"));
    }
    let line = |finding: &Finding| format!("{name}: {}\n", look.paint.bad(safe(&finding.to_string())));
    drift.findings.iter().map(line).collect()
}
