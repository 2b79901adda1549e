//! H6: what is no file on a disk, as an image or below one, and tools that hang.

#![cfg(feature = "lab")]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use snaptree_tests::images::{text, tool};
use snaptree_tests::running::wait_until;
use snaptree_tests::wrapped::Wrapped;

use crate::foreign_data::{Single, overlay};

fn pipe(at: &Path) {
    tool("mkfifo", &[text(at)]);
}

/// Registers an image that names `base` as what it is built upon.
fn refused_upon(base: &str, format: &str) -> String {
    let single = Single::new("");
    let args = ["rebase", "-u", "-f", "qcow2", "-F", format, "-b", base, text(&single.image)];
    tool("qemu-img", &args);
    refused(&single, &single.image)
}

fn refused(single: &Single, image: &Path) -> String {
    let disk = format!("vda={}", text(image));
    let begun = Instant::now();
    let said = single.refused(&["domain", "add", "m", "--driver", "qemu", "--disk", &disk]);
    assert!(begun.elapsed() < Duration::from_secs(10), "nobody waited: {said}");
    said
}

#[test]
fn h6_a_pipe_a_device_or_a_file_of_the_kernels_below_an_image_is_refused_before_it_is_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let (fifo, socket) = (folder.path().join("p"), folder.path().join("s"));
    pipe(&fifo);
    let _listens = UnixListener::bind(&socket).expect("a socket");
    for base in [
        text(&fifo),
        text(&socket),
        "/dev/zero",
        "/dev/stdin",
        "/proc/kmsg",
        "/proc/self/fd/0",
        "/sys/power/state",
    ] {
        if !Path::new(base).exists() {
            continue;
        }
        for format in ["raw", "qcow2"] {
            let said = refused_upon(base, format);
            assert!(said.contains("is built upon"), "{base} as {format}: {said}");
        }
    }
}

#[test]
fn h_a_pipe_two_files_down_or_as_the_image_itself_is_refused_too() {
    let single = Single::new("");
    let fifo = single.beside("p");
    pipe(&fifo);
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", text(&fifo), text(&single.image)]);
    let top = single.beside("top.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", text(&single.image), text(&top), "1M"],
    );
    assert!(refused(&single, &top).contains("is built upon"));
    for image in [fifo.as_path(), Path::new("/dev/zero"), Path::new("/dev/stdin"), Path::new("/proc/kmsg")] {
        assert!(refused(&single, image).contains("only files can be disks"), "{}", image.display());
    }
}

#[test]
fn h_a_base_that_became_a_pipe_since_is_told_and_nothing_waits_for_it() {
    let single = Single::new("");
    std::fs::rename(&single.image, single.beside("golden.qcow2")).expect("moved");
    overlay(&single.beside("golden.qcow2"), &single.image);
    single.add();
    std::fs::remove_file(single.beside("golden.qcow2")).expect("removed");
    pipe(&single.beside("golden.qcow2"));
    let begun = Instant::now();
    let said = single.refused(&["create", "m", "s1"]);
    assert!(said.contains("golden.qcow2"), "{said}");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn h6_a_tool_that_hangs_ends_with_the_program_that_was_killed() {
    let single = Single::new("");
    let wrapped = Wrapped::new(
        &single.beside("tools"),
        "if [ \"$1\" = check ]; then echo $$ > \"$FOLDER/pid.new\"; mv \"$FOLDER/pid.new\" \"$FOLDER/pid\"; exec sleep 600; fi\n\
         exec qemu-img \"$@\"",
    );
    let disk = format!("vda={}", text(&single.image));
    let args = ["domain", "add", "m", "--driver", "qemu", "--disk", &disk];
    let mut child = wrapped.on(&single.program).command(&args).spawn().expect("it starts");
    let pid = single.beside("tools/pid");
    wait_until("the tool runs", || pid.exists());
    let pid = std::fs::read_to_string(pid).expect("its number").trim().to_owned();
    child.kill().expect("killed");
    child.wait().expect("ended");
    wait_until("the tool is gone", || !Path::new("/proc").join(&pid).exists());
    // And nothing is left in the way.
    single.add();
}
