//! Machines that are gone, or made anew under their names.

use std::fs;

use serde_json::json;
use snaptree_tests::daemon::Daemon;
use snaptree_tests::program::Program;
#[cfg(feature = "lab")]
use snaptree_tests::virtualbox::{Vbox, is_left_out};
#[cfg(feature = "lab")]
use snaptree_tests::vsphere::{Model, Simulator};

#[test]
fn a3_a_domain_is_forgotten_with_its_open_operations_and_nobody_is_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "one"]);
    let cut = program.with_fault("sim.create.before=kill").run(&["create", "web", "two"]);
    assert_eq!(cut.code, None, "{cut:?}");
    let id = program.json(0, &["domain", "show", "web"])["id"].as_str().expect("an id").to_owned();
    fs::write(folder.path().join(format!("sim/{id}.json")), "{broken").expect("damaged");
    assert_eq!(program.json(4, &["domain", "remove", "web", "--keep-layers"])["error"]["code"], "invalid");

    let forgotten = program.json(0, &["domain", "remove", "web", "--metadata"]);
    assert_eq!(forgotten["outcome"], "succeeded");
    assert_eq!(forgotten["abandoned"][0]["kind"], "create", "{forgotten}");
    // What was abandoned is over, and the name is free.
    assert_eq!(program.json(0, &["op", "list", "--open"])["operations"], json!([]));
    assert_eq!(program.json(0, &["recover"])["operations"], json!([]));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    assert_eq!(program.json(0, &["list", "web"])["snapshots"], json!([]));
    assert_eq!(program.json(0, &["audit", "verify"])["ok"], true);
}

#[test]
fn a3_a_daemon_forgets_a_domain_whose_hypervisor_cannot_be_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path());
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "zero"]);
    let cut = program.with_fault("sim.create.before=kill").run(&["create", "web", "one"]);
    assert_eq!(cut.code, None, "{cut:?}");
    let id = program.json(0, &["domain", "show", "web"])["id"].as_str().expect("an id").to_owned();
    fs::write(folder.path().join(format!("sim/{id}.json")), "{broken").expect("damaged");
    let daemon = Daemon::start(&program);
    // The worker is at it now and then; in between the domain can be let go of.
    let removed =
        std::iter::repeat_with(|| program.run(&["domain", "remove", "web", "--metadata", "--json"]))
            .take(100)
            .find(|ran| ran.code != Some(4))
            .expect("the worker rests at times");
    assert_eq!((removed.code, &removed.json()["abandoned"][0]["kind"]), (Some(0), &json!("create")));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "one"]);
    daemon.end();
    assert_eq!(program.json(0, &["op", "list", "--open"])["operations"], json!([]));
}

#[cfg(feature = "lab")]
#[test]
fn a3_a_qemu_domain_is_forgotten_when_its_image_is_gone() {
    use snaptree_tests::images::tool;
    let folder = tempfile::tempdir().expect("a folder");
    let program = Program::new(folder.path().join("state"));
    let image = folder.path().join("d.qcow2");
    let path = image.to_str().expect("a path");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", path, "16M"]);
    let disk = format!("vda={path}");
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    program.json(0, &["create", "web", "one"]);
    fs::remove_file(&image).expect("removed");
    fs::remove_dir_all(folder.path().join(".snaptree")).expect("removed");
    let forgotten = program.json(0, &["domain", "remove", "web", "--metadata"]);
    assert_eq!(forgotten["left"].as_array().map(Vec::len), Some(2), "{forgotten}");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", path, "16M"]);
    program.json(0, &["domain", "add", "web", "--driver", "qemu", "--disk", &disk]);
    program.json(0, &["create", "web", "one"]);
}

#[cfg(feature = "lab")]
#[test]
fn a1_a_virtualbox_machine_that_is_not_registered_any_more_is_told_of_and_a_new_one_takes_its_place() {
    if is_left_out() {
        return;
    }
    let vbox = Vbox::new();
    vbox.machine("web", 1, 4);
    let program = vbox.snaptree();
    program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    program.json(0, &["create", "web", "one"]);
    let settings = vbox.settings("web").display().to_string();

    // Its files are there, and VirtualBox does not know it.
    vbox.must(&["unregistervm", "web"]);
    let drift = program.json(5, &["drift"]);
    let finding = &drift["domains"][0]["findings"][0];
    assert_eq!(finding["finding"], "machine-gone", "{drift}");
    assert!(finding["help"].as_str().expect("help").contains("registervm"), "{finding}");
    assert_eq!(program.json(0, &["domain", "show", "web"])["drift"][0]["finding"], "machine-gone");
    let told = program.run(&["create", "web", "two"]);
    assert!(told.code != Some(0) && told.stderr.contains("not registered"), "{told:?}");
    vbox.must(&["registervm", &settings]);
    assert_eq!(program.json(0, &["drift"])["domains"][0]["findings"], json!([]));
    assert_eq!(program.json(0, &["list", "web"])["current"], "one");

    // Made anew under its name, at the same place.
    vbox.must(&["unregistervm", "web", "--delete"]);
    vbox.machine("web", 1, 4);
    assert_eq!(program.json(5, &["drift", "web"])["domains"][0]["findings"][0]["finding"], "machine-gone");
    program.json(0, &["domain", "remove", "web", "--metadata"]);
    program.json(0, &["domain", "add", "web", "--driver", "virtualbox", "--vm", "web"]);
    program.json(0, &["create", "web", "one"]);
}

#[cfg(feature = "lab")]
#[test]
fn a3_an_esx_machine_is_forgotten_while_its_host_is_unreachable() {
    let folder = tempfile::tempdir().expect("a folder");
    let simulator = Simulator::start(folder.path(), Model::Esx, 1, 0);
    let settings = "[esx]\ncall-timeout = \"1s\"\nconnect-timeout = \"1s\"\n[retry]\nattempts = 1\n";
    let program =
        Program::new(folder.path().join("state")).with_settings(&folder.path().join("settings"), settings);
    simulator.add_to(&program, folder.path());
    program.json(0, &["domain", "add", "vm", "--host", "lab", "--vm", &simulator.machines[0]]);
    drop(simulator);
    program.json(0, &["domain", "remove", "vm", "--metadata"]);
    program.json(0, &["host", "remove", "lab"]);
}
