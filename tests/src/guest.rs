//! The 512-byte guest on a real QEMU: it counts in memory and on its disk, and prints both.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::images::{text, tool};

/// Assembles a guest of `lab/qemu/`.
///
/// # Panics
/// The assembler fails, or it is no boot sector.
pub fn boot_sector(source: &str) -> Vec<u8> {
    boot_sector_with(source, &[])
}

/// The same with symbols that the source leaves open.
///
/// # Panics
/// The assembler fails, or it is no boot sector.
pub fn boot_sector_with(source: &str, symbols: &[(&str, u64)]) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let [object, binary] = ["guest.o", "guest.bin"].map(|name| folder.path().join(name));
    let source = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/lab/qemu")).join(source);
    let symbols: Vec<String> =
        symbols.iter().map(|(name, value)| format!("--defsym={name}={value}")).collect();
    let mut words = vec!["--32", "-o", text(&object), text(&source)];
    words.extend(symbols.iter().map(String::as_str));
    tool("as", &words);
    tool(
        "ld",
        &["-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", text(&binary), text(&object)],
    );
    let sector = std::fs::read(&binary).expect("the boot sector");
    assert_eq!(sector.len(), 512, "a boot sector");
    sector
}

/// Makes a qcow2 image of 1 MiB that boots the guest.
///
/// # Panics
/// The assembler or qemu-img fails.
pub fn make_image(path: &Path) {
    image_of(boot_sector("counter.S"), path);
}

/// Makes a qcow2 image of 1 MiB that boots such a sector.
///
/// # Panics
/// It cannot be made.
pub fn image_of(mut sector: Vec<u8>, path: &Path) {
    let folder = tempfile::tempdir().expect("a folder");
    let plain = folder.path().join("plain");
    sector.resize(1 << 20, 0);
    std::fs::write(&plain, sector).expect("the raw image");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&plain), text(path)]);
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    serial: BufReader<ChildStdout>,
}

impl Guest {
    fn command(image: &Path) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg", "-machine", "pc,i8042=off", "-m", "16", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-serial", "stdio"])
            .arg("-blockdev")
            .arg(format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", text(image)))
            .args(["-device", "virtio-blk-pci,drive=d0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        command
    }

    /// Starts a machine on that image.
    ///
    /// # Panics
    /// QEMU cannot be started.
    pub fn start(image: &Path) -> Self {
        let mut child = Self::command(image).stderr(Stdio::inherit()).spawn().expect("QEMU starts");
        let serial = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, serial }
    }

    /// What QEMU says when it cannot start on that image.
    ///
    /// # Panics
    /// It starts.
    pub fn refused(image: &Path) -> String {
        let mut guest = Self::command(image).stderr(Stdio::piped()).spawn().expect("QEMU starts");
        let mut first = String::new();
        BufReader::new(guest.stdout.take().expect("a pipe")).read_line(&mut first).expect("a pipe");
        if !first.is_empty() {
            guest.kill().expect("QEMU ends");
            panic!("QEMU started, and the guest printed {first:?}");
        }
        let output = guest.wait_with_output().expect("QEMU ends");
        assert!(!output.status.success(), "QEMU ended without an error");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The disk's counter in the next line that the guest prints.
    ///
    /// # Panics
    /// The machine ends before that.
    pub fn next_disk_counter(&mut self) -> u32 {
        loop {
            let mut line = String::new();
            let read = self.serial.read_line(&mut line).expect("the serial line");
            assert!(read > 0, "the machine ended");
            if let Some((_, counter)) = line.trim().split_once(" D=") {
                return u32::from_str_radix(counter, 16).expect("a counter");
            }
        }
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
