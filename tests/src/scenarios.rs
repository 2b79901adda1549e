//! The kinds of operations that are killed: what stands before each, the command, and what the model says of it.

use crate::lab::{DISKS, Lab, Model};

/// One kind of operation.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// In words.
    pub name: &'static str,
    /// The machine's disks.
    pub disks: &'static [&'static str],
    /// What stands before it.
    pub prepare: fn(&mut Lab),
    /// The operation.
    pub command: &'static [&'static str],
    /// What the model says of it.
    pub apply: fn(&mut Model),
}

/// Whether an interrupted operation had taken place once it was recovered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tree {
    /// It had not, and was asked for again.
    Before,
    /// It had.
    After,
}

/// Writes, and takes a snapshot of everything.
pub fn snapshot(lab: &mut Lab, name: &str, pattern: u8) {
    let disks: Vec<&'static str> = lab.model.active.keys().copied().collect();
    for (disk, count) in disks.iter().zip([12, 5]) {
        lab.write(disk, usize::from(pattern) % 64, count, pattern);
    }
    lab.program.json(0, &["create", "web", name]);
    lab.model.create(name, &disks);
}

/// a <- b <- c, and b <- d; the machine stands on d.
pub fn branched(lab: &mut Lab) {
    snapshot(lab, "a", 1);
    snapshot(lab, "b", 2);
    snapshot(lab, "c", 3);
    lab.program.json(0, &["revert", "web", "b"]);
    lab.model.revert("b");
    snapshot(lab, "d", 4);
    lab.write("vda", 9, 3, 99);
}

/// a <- b <- c; the machine stands on c.
pub fn chain(lab: &mut Lab) {
    snapshot(lab, "a", 1);
    snapshot(lab, "b", 2);
    snapshot(lab, "c", 3);
    lab.write("vda", 1, 40, 98);
}

impl Scenario {
    /// The same with one disk.
    #[must_use]
    pub fn with_one_disk(self) -> Self {
        Self { disks: &DISKS[..1], ..self }
    }

    /// Recovers, and expects that nothing is open, that the tree is the one before or the one after the operation,
    /// that everything reads as that says, and that the operation can be asked for again where it did not take place.
    ///
    /// # Panics
    /// Anything else.
    pub fn recover(&self, lab: &mut Lab, what: &str) -> Tree {
        let recovered = lab.program.json(0, &["recover"]);
        expect_nothing_open(lab, &format!("{what}, after {recovered}"));
        let mut after = lab.model.clone();
        (self.apply)(&mut after);
        let tree = if lab.tree_is(&after) {
            lab.model = after;
            lab.check(what);
            Tree::After
        } else {
            lab.check(what);
            lab.program.json(0, self.command);
            (self.apply)(&mut lab.model);
            lab.check(&format!("{what}, asked for again"));
            Tree::Before
        };
        assert_eq!(lab.program.json(0, &["audit", "verify"])["ok"], true, "{what}");
        // And life goes on.
        snapshot(lab, "afterwards", 50);
        lab.check(&format!("{what}, a snapshot afterwards"));
        tree
    }
}

/// Expects that every operation has an outcome, and that none waits for somebody.
///
/// # Panics
/// One has none.
pub fn expect_nothing_open(lab: &Lab, what: &str) {
    let listed = lab.program.json(0, &["op", "list"]);
    for operation in listed["operations"].as_array().expect("operations") {
        assert!(operation["outcome"].is_string(), "{what}: {operation}");
        assert_ne!(operation["outcome"], "needs-attention", "{what}: {operation}");
    }
}

/// The first create: the image is adopted.
pub const FIRST_CREATE: Scenario = Scenario {
    name: "the first create, with adoption",
    disks: &DISKS,
    prepare: |lab| lab.write("vda", 0, 4, 7),
    command: &["create", "web", "new"],
    apply: |model| {
        let disks: Vec<&'static str> = model.active.keys().copied().collect();
        model.create("new", &disks);
    },
};

/// A later create.
pub const CREATE: Scenario = Scenario { name: "a create", prepare: branched, ..FIRST_CREATE };

/// A revert to another branch.
pub const REVERT: Scenario = Scenario {
    name: "a revert",
    disks: &DISKS,
    prepare: branched,
    command: &["revert", "web", "a"],
    apply: |model| model.revert("a"),
};

/// A delete that is pulled into two dependants.
pub const DELETE_SEVERAL: Scenario = Scenario {
    name: "a delete with several dependants",
    disks: &DISKS,
    prepare: branched,
    command: &["delete", "web", "b"],
    apply: |model| model.delete("b"),
};

/// A delete in the middle of a chain.
pub const DELETE_ONE: Scenario = Scenario {
    name: "a delete with one dependant",
    disks: &DISKS,
    prepare: chain,
    command: &["delete", "web", "b"],
    apply: |model| model.delete("b"),
};

/// A delete whose tombstone is in the registered image.
pub const DELETE_ROOT: Scenario = Scenario {
    name: "a delete of the root pushed into the registered image",
    disks: &DISKS,
    prepare: chain,
    command: &["delete", "web", "a"],
    apply: |model| model.delete("a"),
};

/// A delete that leaves several tombstones in a row.
pub const DELETE_BRANCH: Scenario = Scenario {
    name: "a delete of a branch with several tombstones in a row",
    disks: &DISKS,
    prepare: chain,
    command: &["delete", "web", "a", "--children", "--yes"],
    apply: |model| ["c", "b", "a"].iter().for_each(|name| model.delete(name)),
};

/// A delete of the current snapshot.
pub const DELETE_CURRENT: Scenario = Scenario {
    name: "a delete of the current one",
    disks: &DISKS,
    prepare: branched,
    command: &["delete", "web", "d"],
    apply: |model| model.delete("d"),
};
