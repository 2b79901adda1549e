//! N: one name, one owner.

mod by_hand;

use std::path::Path;
use std::sync::Barrier;

use serde_json::{Value, json};
use snaptree_tests::crowd::{Crowd, gather};
use snaptree_tests::daemon::{Daemon, post};
use snaptree_tests::program::Program;

/// Asks everything at the same moment; the statuses and bodies, in order.
fn at_once(socket: &Path, asks: &[(String, Value)]) -> Vec<(u16, Value)> {
    let start = &Barrier::new(asks.len());
    std::thread::scope(|scope| {
        let ask = |(path, body)| {
            scope.spawn(move || {
                start.wait();
                post(socket, path, body)
            })
        };
        let asked: Vec<_> = asks.iter().map(|(path, body)| ask((path, body))).collect();
        asked.into_iter().map(|asked| asked.join().expect("an answer")).collect()
    })
}

/// One is done, and all others are told who has it.
fn one_of(answers: &[(u16, Value)], words: &str) {
    let done = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(done, 1, "{answers:?}");
    for (_, body) in answers.iter().filter(|(status, _)| *status != 200) {
        let error = &body["error"];
        assert_eq!(error["exit"], 4, "{body}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(words)), "{body}");
    }
}

fn names(program: &Program) -> Vec<String> {
    let listed = program.json(0, &["domain", "list"]);
    let domains = listed["domains"].as_array().expect("a list");
    domains.iter().map(|domain| domain["name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn n1_twelve_registrations_of_one_name_at_once_make_one_domain() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    let _daemon = Daemon::start(&program);
    let ask = ("/v1/domains".to_owned(), json!({ "name": "dup", "driver": "sim" }));
    one_of(&at_once(&program.state.join("snaptree.sock"), &vec![ask; 12]), "'dup' is registered already");
    assert_eq!(names(&program), ["dup"]);
}

#[test]
fn n1_eight_renames_to_one_name_at_once_leave_it_to_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    let _daemon = Daemon::start(&program);
    let rename = |index: i32| {
        let added = program.json(0, &["domain", "add", &format!("d{index}"), "--driver", "sim"]);
        let path = format!("/v1/domains/{}/commands", added["id"].as_str().expect("an id"));
        (path, json!({ "command": { "command": "set", "name": "same" } }))
    };
    let asks: Vec<(String, Value)> = (0..8).map(rename).collect();
    one_of(&at_once(&program.state.join("snaptree.sock"), &asks), "'same' is registered already");
    assert_eq!(names(&program).iter().filter(|name| *name == "same").count(), 1);
    // A name that was given up is free, and one that is held is told of before anything is asked of the driver.
    program.json(0, &["domain", "set", "same", "--name", "other"]);
    program.json(0, &["domain", "add", "same", "--driver", "sim"]);
    let refused = program.json(4, &["domain", "set", "other", "--name", "same"]);
    assert_eq!(refused["error"]["code"], "exists");
}

#[test]
fn n_a_policy_that_is_defined_many_times_at_once_is_one() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    let _daemon = Daemon::start(&program);
    let ask = |last: usize| {
        let source =
            format!("name = \"nightly\"\ndomains = [\"web\"]\nschedule = \"daily\"\n[keep]\nlast = {last}\n");
        ("/v1/policies".to_owned(), json!({ "ask": "set", "source": source }))
    };
    let asks: Vec<(String, Value)> = (1..=8).map(ask).collect();
    let answers = at_once(&program.state.join("snaptree.sock"), &asks);
    assert!(answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
    let listed = program.json(0, &["policy", "list"]);
    assert_eq!(listed["policies"].as_array().map(Vec::len), Some(1), "{listed}");
}

#[cfg(feature = "lab")]
mod images {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use snaptree_tests::images::{make_qcow2, text, tool};

    use super::*;

    struct Scene {
        dir: tempfile::TempDir,
        program: Program,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a folder");
            let program = Program::new(dir.path().join("s"));
            make_qcow2(&dir.path().join("d.qcow2"));
            Self { dir, program }
        }

        fn image(&self) -> PathBuf {
            self.dir.path().join("d.qcow2")
        }

        /// Registers a domain for each of these paths at once.
        fn register(&self, paths: &[PathBuf]) -> Vec<(u16, Value)> {
            let ask = |(index, path): (usize, &PathBuf)| {
                let body = json!({ "name": format!("d{index}"), "driver": "qemu", "disks": [["vda", path]] });
                ("/v1/domains".to_owned(), body)
            };
            let asks: Vec<(String, Value)> = paths.iter().enumerate().map(ask).collect();
            at_once(&self.program.state.join("snaptree.sock"), &asks)
        }
    }

    #[test]
    fn n1_eight_registrations_of_one_image_at_once_make_one_domain() {
        let scene = Scene::new();
        let _daemon = Daemon::start(&scene.program);
        one_of(&scene.register(&vec![scene.image(); 8]), "already belongs to domain 'd");
        assert_eq!(names(&scene.program).len(), 1);
    }

    #[test]
    fn n1_an_image_that_is_reached_by_other_paths_at_once_has_one_owner() {
        let scene = Scene::new();
        let link = scene.dir.path().join("link.qcow2");
        symlink(scene.image(), &link).expect("a link");
        let bound = scene.dir.path().join("bound");
        std::fs::create_dir(&bound).expect("a folder");
        tool("mount", &["--bind", text(scene.dir.path()), text(&bound)]);
        let daemon = Daemon::start(&scene.program);
        let paths = [scene.image(), link.clone(), bound.join("d.qcow2"), bound.join("link.qcow2")];
        let answers = scene.register(&[paths.clone(), paths].concat());
        daemon.end();
        tool("umount", &[text(&bound)]);
        one_of(&answers, "already belongs to domain 'd");
        assert_eq!(names(&scene.program).len(), 1);
    }

    #[test]
    fn n_an_image_is_free_again_when_its_domain_is_removed() {
        let scene = Scene::new();
        let disk = format!("vda={}", scene.image().display());
        let add = |name: &str, code: i32| {
            scene.program.json(code, &["domain", "add", name, "--driver", "qemu", "--disk", &disk])
        };
        add("web", 0);
        let refused = add("db", 4);
        assert!(refused["error"]["message"].as_str().is_some_and(|m| m.contains("'web'")), "{refused}");
        scene.program.json(0, &["domain", "remove", "web", "--keep-layers"]);
        add("db", 0);
    }
}

/// The long run is `--bin crowd`.
#[test]
fn n_a_crowd_of_clients_leaves_no_name_with_two_owners_and_loses_no_snapshot() {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    let images = if cfg!(feature = "lab") { 2 } else { 0 };
    let crowd = Crowd { clients: 16, domains: 20, images, requests: 400, seed: 7 };
    let figures = gather(dir.path(), &program, crowd);
    assert_eq!(figures.accepted + figures.refused, 400);
    assert!(figures.refused > 10 && figures.snapshots > 50, "{figures:?}");
}
