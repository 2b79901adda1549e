//! `snaptree drift`

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::Serialize;
use snaptree_engine::reconcile::drift::{self, Finding};
use snaptree_engine::{DomainId, DomainName, SnapshotName};

use super::carry::open;
use crate::args::inspect::DriftArgs;
use crate::context::{Context, Writer};
use crate::exit::Exit;
use crate::render;
use crate::render::text::{Look, safe};
use crate::render::view::domain_name;
use crate::wire::LeftOut;

/// What differs, domain by domain.
#[derive(Serialize)]
struct Drifts {
    domains: Vec<Drift>,
    left_out: Vec<LeftOut>,
}

#[derive(Serialize)]
struct Drift {
    domain: String,
    findings: BTreeSet<Finding>,
    adopted: Vec<SnapshotName>,
    disks: Vec<String>,
}

impl Drift {
    fn new(domain: String, found: drift::Drift) -> Self {
        let drift::Drift { findings, adopted, disks } = found;
        Self { domain, findings, adopted, disks }
    }
}

/// Compares the hypervisors with the log. A domain that cannot be looked at is told of beside the others.
///
/// # Errors
/// The state cannot be used, or the one domain that was named cannot be looked at.
pub async fn run(context: &Context, args: DriftArgs) -> Result<Exit> {
    let Writer { engine, office } = open(context, &args.writer).await?;
    let mut drifts = Drifts { domains: Vec::new(), left_out: Vec::new() };
    match &args.domain {
        Some(domain) => {
            let id = engine.find_domain(domain).await?;
            let found = office.drift(id).await?;
            drifts.domains.push(Drift::new(domain_name(&engine.load(id).await?), found));
        }
        None => {
            let rows = engine.domains().await?;
            let ids: Vec<DomainId> = rows.iter().map(|row| row.id).collect();
            let names: BTreeMap<DomainId, DomainName> =
                rows.into_iter().map(|row| (row.id, row.name)).collect();
            for (domain, looked) in office.drift_all(&ids).await? {
                let name = names.get(&domain).map(ToString::to_string).unwrap_or_default();
                match looked {
                    Ok(found) => drifts.domains.push(Drift::new(name, found)),
                    Err(error) => drifts.left_out.push(LeftOut::new(name, error)),
                }
            }
        }
    }
    if context.json {
        render::json(&drifts)?;
    } else {
        let look = Look::of_stdout();
        let mut text: String = drifts.domains.iter().map(|drift| told(drift, &look)).collect();
        text.extend(drifts.left_out.iter().map(|left| render::list::left_out(left, &look)));
        render::print(&text)?;
    }
    Ok(match (drifts.domains.iter().all(|drift| drift.findings.is_empty()), drifts.left_out.is_empty()) {
        (false, _) => Exit::Attention,
        (true, false) => Exit::Failed,
        (true, true) => Exit::Done,
    })
}

fn told(drift: &Drift, look: &Look) -> String {
    let name = look.paint.name(safe(&drift.domain));
    let adopted = |snapshot: &SnapshotName| {
        let snapshot = safe(snapshot.as_str());
        format!("{name}: took over snapshot '{snapshot}', which somebody made at the hypervisor\n")
    };
    let mut text: String = drift.adopted.iter().map(adopted).collect();
    text.extend(drift.disks.iter().map(|change| format!("{name}: {}\n", safe(change))));
    if drift.findings.is_empty() {
        text.push_str(&format!("{name}: {}\n", look.paint.good("the hypervisor and the log agree")));
    }
    let line = |finding: &Finding| format!("{name}: {}\n", look.paint.bad(safe(&finding.to_string())));
    text.extend(drift.findings.iter().map(line));
    text
}
