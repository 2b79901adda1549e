//! What snapshots on a host do, in a few lines, to compare with.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use snaptree_tests::program::Program;
use snaptree_tests::random::Random;
use snaptree_tests::vsphere::{Model, Simulator};

/// Deepest chain that the model builds; hosts end at 32.
const DEPTH_MAX: usize = 20;

#[derive(Clone, Debug, Default)]
struct Host {
    /// By name: the parent, and whether a revert leaves the machine running.
    snapshots: BTreeMap<String, (Option<String>, bool)>,
    current: Option<String>,
    on: bool,
}

impl Host {
    fn parent(&self, name: &str) -> Option<String> {
        self.snapshots[name].0.clone()
    }

    fn depth(&self) -> usize {
        std::iter::successors(self.current.clone(), |name| self.parent(name)).count()
    }

    fn create(&mut self, name: &str, memory: bool) {
        self.snapshots.insert(name.to_owned(), (self.current.clone(), memory && self.on));
        self.current = Some(name.to_owned());
    }

    fn revert(&mut self, name: &str, start: bool) {
        self.current = Some(name.to_owned());
        self.on = start || self.snapshots[name].1;
    }

    fn remove(&mut self, name: &str) {
        let (parent, _) = self.snapshots.remove(name).expect("it is there");
        for (of, _) in self.snapshots.values_mut().filter(|(of, _)| of.as_deref() == Some(name)) {
            of.clone_from(&parent);
        }
        if self.current.as_deref() == Some(name) {
            self.current = parent;
        }
    }

    fn below(&self, name: &str) -> Vec<String> {
        let children = self.snapshots.iter().filter(|(_, (parent, _))| parent.as_deref() == Some(name));
        children.flat_map(|(child, _)| [self.below(child), vec![child.clone()]].concat()).collect()
    }

    fn as_listed(&self) -> Value {
        let parents = self.snapshots.iter().map(|(name, (parent, _))| (name.clone(), json!(parent)));
        json!({ "current": self.current, "parents": parents.collect::<serde_json::Map<_, _>>() })
    }
}

fn listed(current: &Value, snapshots: &Value) -> Value {
    let snapshots = snapshots.as_array().expect("a list");
    let name = |snapshot: &Value| snapshot["name"].as_str().expect("a name").to_owned();
    let parents: serde_json::Map<_, _> = snapshots.iter().map(|s| (name(s), s["parent"].clone())).collect();
    assert_eq!(parents.len(), snapshots.len(), "a name is there twice: {snapshots:?}");
    json!({ "current": current, "parents": parents })
}

/// The log and the host tell the same of a domain: names, parents and the current one.
pub fn agree(program: &Program, simulator: &Simulator, domain: &str, what: &str) {
    let shown = program.json(0, &["domain", "show", domain]);
    let machine = shown["config"]["name"].as_str().expect("the machine's name");
    let seen = &simulator.seen()[machine];
    let list = program.json(0, &["list", domain]);
    let ours = listed(&list["current"], &list["snapshots"]);
    assert_eq!(listed(&seen["current"], &seen["snapshots"]), ours, "{what}: {seen}");
}

/// Random operations through the program, compared with the model after each, and with the host now and then.
/// `SNAPTREE_OPERATIONS` says how many, `SNAPTREE_SEED` which.
pub fn random_operations(model: Model, seed: u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (operations, seed) =
        (number("SNAPTREE_OPERATIONS").unwrap_or(25), number("SNAPTREE_SEED").unwrap_or(seed));
    println!("SNAPTREE_SEED={seed}");
    let folder = tempfile::tempdir().expect("a folder");
    let (program, simulator) = super::one_machine(folder.path(), model, 10);
    let machine = simulator.machines[0].clone();
    let mut random = Random::new(seed);
    let mut host = Host { on: simulator.seen()[&machine]["power"] == "poweredOn", ..Host::default() };
    for index in 0..operations {
        let asked = act(&program, &mut host, &mut random, index);
        let list = program.json(0, &["list", "vm"]);
        assert_eq!(listed(&list["current"], &list["snapshots"]), host.as_listed(), "{index}: {asked}");
        if index % 10 == 9 || index + 1 == operations {
            let seen = &simulator.seen()[&machine];
            assert_eq!(
                listed(&seen["current"], &seen["snapshots"]),
                host.as_listed(),
                "{index}: {asked}: {seen}"
            );
            assert_eq!(seen["power"] == "poweredOn", host.on, "{index}: {asked}: {seen}");
        }
    }
    println!("{operations} operations, {} snapshots left", host.snapshots.len());
}

fn act(program: &Program, host: &mut Host, random: &mut Random, index: u64) -> String {
    let names: Vec<String> = host.snapshots.keys().cloned().collect();
    let ask = |args: &[&str]| {
        program.json(0, args);
        args.join(" ")
    };
    match random.below(if names.is_empty() { 5 } else { 12 }) {
        // A name and a text that a host would take for escapes, or for XML.
        0..4 if host.depth() < DEPTH_MAX => {
            let name = format!("s{index} 100% <&> %41");
            let memory = random.chance(50);
            host.create(&name, memory);
            let content = if memory { "--memory" } else { "--disk-only" };
            ask(&["create", "vm", &name, content, "--description", "a\n\"b\" <c/> snaptree:x"])
        }
        0..5 => {
            host.on = !host.on;
            if host.on { ask(&["domain", "start", "vm"]) } else { ask(&["domain", "stop", "vm", "--force"]) }
        }
        5..8 => {
            let name = random.pick(&names).clone();
            let start = random.chance(40);
            host.revert(&name, start);
            if start { ask(&["revert", "vm", &name, "--running"]) } else { ask(&["revert", "vm", &name]) }
        }
        8 => {
            let name = random.pick(&names).clone();
            host.below(&name).iter().for_each(|below| host.remove(below));
            ask(&["delete", "vm", &name, "--children-only", "--yes"])
        }
        9 => {
            let name = random.pick(&names).clone();
            host.below(&name).iter().for_each(|below| host.remove(below));
            host.remove(&name);
            ask(&["delete", "vm", &name, "--children", "--yes"])
        }
        10 => {
            let name = random.pick(&names).clone();
            let new = format!("{index} renamed");
            let kept = host.snapshots.remove(&name).expect("it is there");
            host.snapshots.insert(new.clone(), kept);
            for (parent, _) in host.snapshots.values_mut().filter(|(of, _)| of.as_deref() == Some(&*name)) {
                *parent = Some(new.clone());
            }
            if host.current.as_deref() == Some(&*name) {
                host.current = Some(new.clone());
            }
            ask(&["edit", "vm", &name, "--name", &new])
        }
        _ => {
            let name = random.pick(&names).clone();
            host.remove(&name);
            ask(&["delete", "vm", &name])
        }
    }
}
