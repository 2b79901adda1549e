//! Every field from outside has a length, and a name can be seen.

use serde_json::{Value, json};
use snaptree_tests::daemon::{Daemon, post};
use snaptree_tests::program::Program;

/// Too long for whatever has a limit, and short enough for a command line and a body.
fn long() -> String {
    "x".repeat(100_000)
}

fn state() -> (tempfile::TempDir, Program) {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    program.json(0, &["domain", "add", "web", "--driver", "sim"]);
    program.json(0, &["create", "web", "s1"]);
    (dir, program)
}

#[test]
fn h7_what_is_too_long_is_refused_on_the_command_line() {
    let (dir, program) = state();
    let long = long();
    let disk = format!("vda={long}");
    let file = dir.path().join("long.toml");
    std::fs::write(&file, format!("name = \"{long}\"\n")).expect("a file");
    let refused: &[&[&str]] = &[
        &["create", "web", "s2", "--key", &long],
        &["create", "web", "s2", "--key", "a\nb"],
        &["create", "web", &long],
        &["create", "web", "s2", "--description", &long],
        &["create", "web", "s2", "--label", &format!("a={long}")],
        &["edit", "web", "s1", "--description", &long],
        &["hold", "web", "s1", "--reason", &long],
        &["delete", "web", "s1", "--reason", &long],
        &["domain", "set", "web", "--name", &long],
        &["domain", "add", "db", "--driver", "sim", "--disk", &disk],
        &["domain", "add", "db", "--driver", "qemu", "--disk", &disk],
        &["domain", "add", "db", "--driver", "qemu", "--disk", "vda=/x", "--launch", &long],
        &["domain", "add", "db", "--driver", "virtualbox", "--vm", &long],
        &["policy", "set", file.to_str().expect("a path of the tests")],
    ];
    let before = program.json(0, &["audit", "head"]);
    for args in refused {
        let ran = program.run(args);
        assert!(matches!(ran.code, Some(2 | 4)), "{}: {ran:?}", args[..2].join(" "));
    }
    assert_eq!(program.json(0, &["audit", "head"]), before);
    // What has just the length is taken.
    program.json(0, &["create", "web", "s2", "--key", &"k".repeat(255)]);
}

#[test]
fn h7_what_is_too_long_is_refused_by_the_daemon() {
    let (_dir, program) = state();
    let _daemon = Daemon::start(&program);
    let socket = program.state.join("snaptree.sock");
    let commands = "/v1/domains/web/commands";
    let (long, create) = (long(), |name: &str| json!({ "command": "create", "name": name }));
    let reasons: Vec<&str> = vec!["r"; 1_000];
    let asks: [(&str, Value); 7] = [
        (commands, json!({ "command": create("s2"), "key": long })),
        (commands, json!({ "command": create("s2"), "key": "" })),
        (commands, json!({ "command": create("\u{200b}") })),
        (
            commands,
            json!({ "command": { "command": "set", "name": null, "access": { "runs": { "launch": long } } } }),
        ),
        (
            commands,
            json!({ "command": { "command": "delete", "snapshots": [{ "name": "s1" }], "reasons": reasons } }),
        ),
        ("/v1/domains", json!({ "name": "db", "driver": "sim", "disks": [["vda", format!("/{long}")]] })),
        ("/v1/domains", json!({ "name": "db", "driver": "virtualbox", "vm": long })),
    ];
    for (path, ask) in &asks {
        let (status, body) = post(&socket, path, ask);
        let told = ask.to_string().chars().take(80).collect::<String>();
        assert!(
            status != 200 && matches!(body["error"]["exit"].as_u64(), Some(2 | 4)),
            "{told}: {status} {body}"
        );
    }
}

#[test]
fn h7_a_name_of_which_nothing_is_seen_is_refused() {
    let (_dir, program) = state();
    for name in ["\u{200b}", "\u{202e}\u{2066}", "\u{feff}\u{a0}", "\u{e0041}"] {
        for args in [
            &["create", "web", name][..],
            &["edit", "web", "s1", "--name", name],
            &["domain", "set", "web", "--name", name],
            &["domain", "add", name, "--driver", "sim"],
        ] {
            let refused = program.json(4, args);
            let message = refused["error"]["message"].as_str().expect("words");
            assert!(message.contains("that can be seen"), "{args:?}: {message}");
        }
        let xml = format!("<domainsnapshot><name>{name}</name></domainsnapshot>");
        let file = program.state.join("x.xml");
        std::fs::write(&file, xml).expect("a file");
        let ran = program.run(&["create", "web", "--xml", file.to_str().expect("a path of the tests")]);
        assert!(matches!(ran.code, Some(2 | 4)), "{ran:?}");
    }
    // Invisible characters among others have their uses: joiners of scripts, and of pictures.
    program.json(0, &["create", "web", "a\u{200d}b"]);
}
