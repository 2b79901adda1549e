//! D: what somebody else keeps in an image.

#![cfg(feature = "lab")]

mod inside;
mod unclosed;

use std::path::{Path, PathBuf};

use serde_json::Value;
use snaptree_tests::images::{text, tool};
use snaptree_tests::program::Program;

/// A machine of one image, `d.qcow2`, which was made in some way of its own.
pub struct Single {
    pub folder: tempfile::TempDir,
    pub program: Program,
    pub image: PathBuf,
}

impl Single {
    /// Makes the image with these options of `qemu-img create -o`, and registers nothing yet.
    pub fn new(options: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("d.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([text(&image), "16M"]);
        tool("qemu-img", &args);
        Self { program: Program::new(folder.path().join("state")), folder, image }
    }

    /// Registers it as `m`.
    pub fn add(&self) -> Value {
        let disk = format!("vda={}", text(&self.image));
        self.program.json(0, &["domain", "add", "m", "--driver", "qemu", "--disk", &disk])
    }

    /// A file beside the image.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes through the registered path.
    pub fn write(&self, at: &str, pattern: u8) {
        write(&self.image, at, pattern);
    }

    /// What the machine writes now.
    pub fn active(&self) -> PathBuf {
        std::fs::canonicalize(&self.image).expect("the registered path opens")
    }

    /// What is refused with that exit code, in one text with its hint.
    pub fn refused(&self, args: &[&str]) -> String {
        self.ended(4, args)
    }

    /// What a command that ends with that exit code says.
    pub fn ended(&self, code: i32, args: &[&str]) -> String {
        let ran = self.program.run(args);
        assert_eq!(ran.code, Some(code), "{args:?}: {ran:?}");
        format!("{}{}", ran.stdout, ran.stderr)
    }

    /// What `drift` finds.
    pub fn drift(&self) -> String {
        let ran = self.program.run(&["drift", "m"]);
        format!("{}{}", ran.stdout, ran.stderr)
    }
}

pub fn write(image: &Path, at: &str, pattern: u8) {
    tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P {pattern} {at}"), text(image)]);
}

/// What an image reads as at a place.
pub fn reads(image: &Path, at: &str, pattern: u8) {
    let read =
        tool("qemu-io", &["-r", "-U", "-f", "qcow2", "-c", &format!("read -P {pattern} {at}"), text(image)]);
    let said = String::from_utf8_lossy(&read.stdout);
    assert!(!said.contains("failed"), "{} at {at}: {said}", image.display());
}

/// Makes an overlay upon an image, as `virsh snapshot-create-as --disk-only` does.
pub fn overlay(on: &Path, at: &Path) {
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(on), text(at)]);
}

/// What `qemu-img info` says of an image.
pub fn info(image: &Path) -> Value {
    let told = tool("qemu-img", &["info", "-U", "--output=json", text(image)]);
    serde_json::from_slice(&told.stdout).expect("JSON")
}
