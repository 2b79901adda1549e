//! Many clients of one daemon that register, rename, create and delete at random, and what has to be true afterwards: no
//! name and no image has two owners, and no snapshot is lost whose create was told as succeeded.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use snaptree_engine::engine::Engine;
use snaptree_engine::log::{EventLog, OF_THE_LOG, OperationFilter};
use snaptree_engine::operation::Outcome;
use snaptree_engine::{DomainId, OperationId};
use snaptree_store::Store;

use crate::daemon::{Daemon, post};
use crate::images::make_qcow2;
use crate::program::Program;
use crate::random::Random;

/// How many of everything.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    /// Clients at once.
    pub clients: usize,
    /// Simulated machines that are registered before.
    pub domains: usize,
    /// Disk images that clients register; they need qemu-img.
    pub images: usize,
    /// Requests of all clients together.
    pub requests: usize,
    /// What the clients draw from.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Requests that were accepted.
    pub accepted: usize,
    /// Requests that were refused: a name or an image that is taken, a snapshot that goes already.
    pub refused: usize,
    /// Domains at the end.
    pub domains: usize,
    /// Snapshots at the end.
    pub snapshots: usize,
}

/// What one client was told.
#[derive(Debug, Default)]
struct Told {
    figures: Figures,
    /// By name: where, and the operation that takes it.
    created: BTreeMap<String, (DomainId, OperationId)>,
    /// The operation that deletes it.
    deleted: BTreeMap<String, OperationId>,
}

struct Scene<'a> {
    socket: PathBuf,
    crowd: Crowd,
    images: &'a [PathBuf],
    /// Simulated machines.
    domains: Mutex<Vec<DomainId>>,
}

impl Scene<'_> {
    fn domain(&self, random: &mut Random) -> DomainId {
        *random.pick(&self.domains.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn command(&self, domain: DomainId, command: &Value) -> (u16, Value) {
        post(&self.socket, &format!("/v1/domains/{domain}/commands"), &json!({ "command": command }))
    }

    /// One client's requests, and then a wait for all that they began.
    fn client(&self, number: usize) -> Told {
        let mut random = Random::new(self.crowd.seed.wrapping_add(number as u64));
        let mut told = Told::default();
        for round in 0..self.crowd.requests / self.crowd.clients {
            let (status, body) = self.request(&mut random, &mut told, &format!("c{number}-{round}"));
            match status {
                200 => told.figures.accepted += 1,
                _ => {
                    assert_eq!(body["error"]["exit"], 4, "{status} {body}");
                    told.figures.refused += 1;
                }
            }
        }
        let begun = told.created.values().map(|(_, operation)| operation).chain(told.deleted.values());
        begun.for_each(|operation| self.wait(*operation));
        told
    }

    fn request(&self, random: &mut Random, told: &mut Told, fresh: &str) -> (u16, Value) {
        // Few names, so that clients meet.
        let name = format!("n{}", random.below(self.crowd.domains + 50));
        let operation = |body: &Value| body["operation"].as_str().and_then(|id| id.parse().ok());
        match random.below(10) {
            0 if !self.images.is_empty() => {
                let image = random.pick(self.images);
                let ask = json!({ "name": name, "driver": "qemu", "disks": [["vda", image]] });
                post(&self.socket, "/v1/domains", &ask)
            }
            0 | 1 => {
                let (status, body) =
                    post(&self.socket, "/v1/domains", &json!({ "name": name, "driver": "sim" }));
                if let Some(id) = body["domain"]["id"].as_str().and_then(|id| id.parse().ok()) {
                    self.domains.lock().unwrap_or_else(PoisonError::into_inner).push(id);
                }
                (status, body)
            }
            2 | 3 => self.command(self.domain(random), &json!({ "command": "set", "name": name })),
            4 | 5 if told.created.len() > told.deleted.len() => {
                let left = told.created.keys().filter(|name| !told.deleted.contains_key(*name));
                let left: Vec<String> = left.cloned().collect();
                let snapshot = random.pick(&left).clone();
                let domain = told.created[&snapshot].0;
                let ask = json!({ "command": "delete", "snapshots": [{ "name": snapshot }] });
                let (status, body) = self.command(domain, &ask);
                if let Some(operation) = operation(&body) {
                    told.deleted.insert(snapshot, operation);
                }
                (status, body)
            }
            _ => {
                let domain = self.domain(random);
                let (status, body) = self.command(domain, &json!({ "command": "create", "name": fresh }));
                if let Some(operation) = operation(&body) {
                    told.created.insert(fresh.to_owned(), (domain, operation));
                }
                (status, body)
            }
        }
    }

    /// Until an operation has ended: the daemon closes the answer then.
    fn wait(&self, operation: OperationId) {
        let mut stream = UnixStream::connect(&self.socket).expect("it listens");
        let ask =
            format!("GET /v1/operations/{operation}/follow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).expect("it is asked");
        stream.read_to_end(&mut Vec::new()).expect("its answer");
    }
}

/// Lets the crowd at a daemon in `dir`, and checks everything afterwards.
///
/// # Panics
/// Something has two owners, or was lost.
pub fn gather(dir: &Path, program: &Program, crowd: Crowd) -> Figures {
    let daemon = Daemon::start(program);
    let socket = program.state.join("snaptree.sock");
    let images: Vec<PathBuf> = (0..crowd.images)
        .flat_map(|number| {
            let image = dir.join(format!("d{number}.qcow2"));
            let link = dir.join(format!("link{number}.qcow2"));
            make_qcow2(&image);
            symlink(&image, &link).expect("a link");
            [image, link]
        })
        .collect();
    let domains = (0..crowd.domains).map(|number| {
        let ask = json!({ "name": format!("n{number}"), "driver": "sim" });
        let (_, body) = post(&socket, "/v1/domains", &ask);
        body["domain"]["id"].as_str().and_then(|id| id.parse().ok()).expect("it is registered")
    });
    let domains = Mutex::new(domains.collect());
    let scene = Scene { socket, crowd, images: &images, domains };
    let told: Vec<Told> = std::thread::scope(|scope| {
        let scene = &scene;
        let clients: Vec<_> =
            (0..crowd.clients).map(|number| scope.spawn(move || scene.client(number))).collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect()
    });
    daemon.end();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(check(program, &told))
}

async fn check(program: &Program, told: &[Told]) -> Figures {
    let store = Arc::new(Store::open_reader(&program.state).expect("the state"));
    let engine = Engine::new(store.clone());
    let mut figures = Figures::default();
    let (mut names, mut images) = (BTreeSet::new(), BTreeSet::new());
    let mut states = BTreeMap::new();
    for row in store.domains(OF_THE_LOG).await.expect("the domains") {
        let state = engine.load(row.id).await.expect("its state");
        assert!(state.open.is_empty(), "{}: {:?}", row.name, state.open);
        figures.domains += 1;
        figures.snapshots += state.tree.iter().count();
        let disks = state.domain.iter().flat_map(|domain| &domain.disks);
        for image in disks.filter_map(|disk| disk.path.as_ref()) {
            let image = image.canonicalize().expect("the image");
            assert!(images.insert(image.clone()), "{} has two owners", image.display());
        }
        assert!(names.insert(row.name.clone()), "two domains are named '{}'", row.name);
        states.insert(row.id, state);
    }
    for client in told {
        figures.accepted += client.figures.accepted;
        figures.refused += client.figures.refused;
        for (name, (domain, operation)) in &client.created {
            let succeeded = has_succeeded(&store, *operation).await;
            let deleted = match client.deleted.get(name) {
                Some(delete) => has_succeeded(&store, *delete).await,
                None => false,
            };
            let there = states[domain].tree.iter().any(|snapshot| snapshot.name.as_str() == name);
            assert_eq!(there, succeeded && !deleted, "{name} of {domain}: {succeeded}, {deleted}");
        }
    }
    figures
}

async fn has_succeeded(store: &Store, operation: OperationId) -> bool {
    let filter = OperationFilter { operation: Some(operation), ..OperationFilter::default() };
    let rows = store.operations(&filter, 1).await.expect("its row");
    rows.first().and_then(|row| row.outcome) == Some(Outcome::Succeeded)
}
