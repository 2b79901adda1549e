//! The database's own file, without what SQLite keeps beside it.

use std::fs;
use std::path::Path;

use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::Program;

/// A state of which only the database's file was kept.
fn alone(program: &Program, at: &Path) -> Program {
    fs::create_dir(at).expect("a folder");
    fs::copy(program.state.join("snaptree.db"), at.join("snaptree.db")).expect("a copy");
    Program::new(at)
}

fn same(program: &Program, copy: &Program) {
    for args in [&["audit", "head"][..], &["list", "web"], &["domain", "list"]] {
        assert_eq!(program.json(0, args), copy.json(0, args), "{args:?}");
    }
}

#[test]
fn h5_a_copy_of_the_database_alone_is_whole_after_the_last_process() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    same(&program, &alone(&program, &dir.path().join("a")));
    program.json(0, &["create", "web", "s1"]);
    same(&program, &alone(&program, &dir.path().join("b")));
    let daemon = Daemon::start(&program);
    program.json(0, &["create", "web", "s2"]);
    daemon.end();
    same(&program, &alone(&program, &dir.path().join("c")));
    // After one that was killed, the next that ends brings it home.
    let daemon = Daemon::start(&program);
    program.json(0, &["create", "web", "s3"]);
    daemon.kill();
    program.json(0, &["create", "web", "s4"]);
    same(&program, &alone(&program, &dir.path().join("d")));
}

#[test]
fn h_a_command_that_is_refused_leaves_the_database_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "s1"]);
    program.json(4, &["create", "web", "s1"]);
    same(&program, &alone(&program, &dir.path().join("a")));
}

#[cfg(feature = "lab")]
#[test]
fn h5_a_database_that_lost_what_its_layers_know_is_told_by_verify() {
    use snaptree_tests::images::make_qcow2;
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    make_qcow2(&dir.path().join("d.qcow2"));
    let disk = format!("vda={}", dir.path().join("d.qcow2").display());
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    program.json(0, &["create", "web", "s1"]);
    let sound = program.json(0, &["audit", "verify"]);
    assert_eq!((&sound["ok"], sound["differences"].as_array().map(Vec::len)), (&true.into(), Some(0)));
    let older = alone(&program, &dir.path().join("old"));
    program.json(0, &["create", "web", "s2"]);
    let told = older.json(1, &["audit", "verify"]);
    let difference = told["differences"][0].as_str().expect("words");
    assert!(difference.contains("the layers of domain 'web' know of event"), "{difference}");
}
