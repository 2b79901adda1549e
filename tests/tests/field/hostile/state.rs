//! The state directory and Snaptree's own folders, where somebody else may have been.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use snaptree_tests::program::{Program, Ran};

/// Who has nothing and may nothing.
#[cfg(feature = "lab")]
const NOBODY: u32 = 65534;

fn open_up(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("its mode");
}

/// A state with one domain, in a folder of its own.
fn state() -> (tempfile::TempDir, Program) {
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    program.json(0, &["domain", "add", "web", "--driver", "sim", "--disk", "vda"]);
    (dir, program)
}

fn refused(ran: &Ran, code: i32, words: &[&str]) {
    assert_eq!(ran.code, Some(code), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{word}: {ran:?}");
    }
}

#[test]
fn h7_a_link_in_the_lock_s_place_is_not_written_through() {
    let (dir, program) = state();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").expect("a file");
    fs::remove_file(program.state.join("lock")).expect("the lock");
    symlink(&victim, program.state.join("lock")).expect("a link");
    refused(&program.run(&["create", "web", "s1"]), 1, &["lock is a symbolic link"]);
    assert_eq!(fs::read_to_string(&victim).expect("the file"), "precious");
    // Only the lock is refused: what is there can be read.
    assert_eq!(program.run(&["list", "web"]).code, Some(0));
}

#[test]
fn h_a_link_or_a_pipe_in_the_database_s_place_is_refused() {
    let (dir, program) = state();
    let database = program.state.join("snaptree.db");
    let elsewhere = dir.path().join("elsewhere.db");
    fs::rename(&database, &elsewhere).expect("it is moved");
    symlink(&elsewhere, &database).expect("a link");
    refused(&program.run(&["create", "web", "s1"]), 1, &["symbolic link"]);
    fs::remove_file(&database).expect("the link");
    snaptree_tests::images::tool("mkfifo", &[database.to_str().expect("a path of the tests")]);
    refused(&program.run(&["create", "web", "s1"]), 1, &["no regular file"]);
}

#[test]
fn h7_a_state_directory_that_others_may_write_is_refused_with_what_mends_it() {
    let (_dir, program) = state();
    for (mode, who) in [(0o777, "everybody"), (0o770, "a group"), (0o1777, "everybody")] {
        open_up(&program.state, mode);
        let told = [who, "chmod go-w", program.state.to_str().expect("a path of the tests")];
        refused(&program.run(&["create", "web", "s1"]), 4, &told);
        refused(&program.run(&["serve"]), 4, &told);
    }
    open_up(&program.state, 0o755);
    program.json(0, &["create", "web", "s1"]);
}

#[cfg(feature = "lab")]
#[test]
fn h7_a_state_directory_of_somebody_else_is_refused() {
    let (_dir, program) = state();
    std::os::unix::fs::chown(&program.state, Some(NOBODY), None).expect("root may");
    refused(&program.run(&["create", "web", "s1"]), 4, &["belongs to nobody", "chown -R root"]);
}

#[cfg(feature = "lab")]
#[test]
fn h7_layers_are_not_put_where_a_link_of_somebody_else_leads() {
    use snaptree_tests::images::make_qcow2;
    let dir = tempfile::tempdir().expect("a folder");
    let program = Program::new(dir.path().join("s"));
    let (vm, victim) = (dir.path().join("vm"), dir.path().join("victim"));
    fs::create_dir(&vm).and_then(|()| fs::create_dir(&victim)).expect("folders");
    make_qcow2(&vm.join("d.qcow2"));
    let disk = format!("vda={}", vm.join("d.qcow2").display());
    let add = ["domain", "add", "web", "--driver", "qemu", "--disk", &disk];
    let ours = vm.join(".snaptree");
    symlink(&victim, &ours).expect("a link");
    refused(&program.run(&add), 4, &[".snaptree is not a folder, but a symbolic link"]);
    fs::remove_file(&ours).expect("the link");
    // Nor where it is put there later, in the place of either folder.
    program.json(0, &add);
    symlink(&victim, &ours).expect("a link");
    refused(&program.run(&["create", "web", "s1"]), 4, &["a symbolic link"]);
    fs::remove_file(&ours).expect("the link");
    program.json(0, &["create", "web", "s1"]);
    let layers = fs::read_dir(&ours).expect("layers").next().expect("one").expect("an entry").path();
    open_up(&layers, 0o777);
    refused(&program.run(&["create", "web", "s2"]), 4, &["everybody", "chmod go-w"]);
    open_up(&layers, 0o755);
    fs::rename(&layers, vm.join("moved")).expect("it is moved");
    symlink(vm.join("moved"), &layers).expect("a link");
    refused(&program.run(&["create", "web", "s2"]), 4, &["a symbolic link"]);
    assert_eq!(fs::read_dir(&victim).expect("a folder").count(), 0);
}

/// The build directory may be closed to others, so they run a copy.
#[cfg(feature = "lab")]
fn as_nobody(copy: &Path, program: &Program, args: &[&str]) -> Ran {
    use std::os::unix::process::CommandExt;
    let open = copy.parent().expect("a folder");
    open_up(open, 0o755);
    // By another process: one that is being written here would be open in whatever another test starts just now.
    if !copy.exists() {
        let binary = program.command(&[]).get_program().to_owned();
        snaptree_tests::images::tool(
            "cp",
            &[binary.to_str().expect("a path"), copy.to_str().expect("a path")],
        );
    }
    open_up(copy, 0o755);
    let mut command = std::process::Command::new(copy);
    command.args(args).env("SNAPTREE_STATE", &program.state).env("HOME", "/").uid(NOBODY).gid(NOBODY);
    Ran::of(&command.output().expect("it starts"))
}

#[cfg(feature = "lab")]
#[test]
fn h8_who_may_not_read_a_state_is_told_so_and_who_may() {
    let (dir, program) = state();
    open_up(dir.path(), 0o755);
    let binary = tempfile::tempdir().expect("a folder");
    let copy = binary.path().join("snaptree");
    for (mode, database) in [(0o711, 0o600), (0o700, 0o600), (0o755, 0o600), (0o755, 0o640)] {
        open_up(&program.state, mode);
        open_up(&program.state.join("snaptree.db"), database);
        let who =
            if database == 0o640 { "user root and members of the group root may" } else { "user root may" };
        for command in [&["list", "web"][..], &["log"], &["audit", "verify"]] {
            let ran = as_nobody(&copy, &program, command);
            refused(&ran, 1, &["you may not read the state", who]);
            assert!(!ran.stderr.contains("-wal"), "{ran:?}");
        }
        // Nor is one that is closed told of as missing to whoever wants to write.
        let ran = as_nobody(&copy, &program, &["create", "web", "s1"]);
        assert!(!ran.stderr.contains("no state"), "{ran:?}");
        assert_eq!(ran.code, Some(1), "{ran:?}");
    }
}
