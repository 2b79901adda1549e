//! A machine that Snaptree starts, with whatever drives a test wants, and a second monitor for the test.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use snaptree_tests::images::{text, tool};
use snaptree_tests::program::Program;

/// The disk `vda` as a plain drive.
pub const DRIVE: &str = "-drive file={vda},format={vda.format},if=virtio";

/// The machine `web`, registered with a disk `vda`; it is off. Killed when dropped.
pub struct Rig {
    pub program: Program,
    pub folder: PathBuf,
    /// The registered image.
    pub image: PathBuf,
    pid_file: PathBuf,
    monitor: PathBuf,
}

impl Rig {
    /// With these drives among QEMU's arguments; `{folder}` is the test's folder.
    pub fn new(folder: &Path, drives: &str) -> Self {
        let image = folder.join("vda.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "16M"]);
        let program = Program::new(folder.join("state"));
        let monitor = folder.join("second");
        let launch = launch(folder, drives);
        let disk = format!("vda={}", text(&image));
        let add = ["domain", "add", "web", "--driver", "qemu", "--disk", &disk, "--launch", &launch];
        let id = program.json(0, &add)["id"].as_str().expect("the domain's id").to_owned();
        let pid_file = folder.join("state/run").join(format!("{id}.pid"));
        Self { program, folder: folder.to_owned(), image, pid_file, monitor }
    }

    /// A launch command with these drives.
    pub fn launch(&self, drives: &str) -> String {
        launch(&self.folder, drives)
    }

    /// Starts the machine with other drives than Snaptree would, under the names that Snaptree gave it.
    pub fn start_by_hand(&self, drives: &str) {
        let qmp = self.pid_file.with_extension("qmp");
        let words = launch(&self.folder, drives)
            .replace("{vda}", text(&self.image))
            .replace("{vda.format}", "qcow2")
            .replace("{qmp}", text(&qmp))
            .replace("{pidfile}", text(&self.pid_file))
            .replace("{incoming}", "");
        let mut words = words.split_whitespace();
        let mut command = Command::new(words.next().expect("QEMU"));
        command.args(words).arg("-daemonize").stdin(std::process::Stdio::null());
        assert!(command.status().expect("QEMU starts").success());
    }

    /// The same, started.
    pub fn started(folder: &Path, drives: &str) -> Self {
        let rig = Self::new(folder, drives);
        rig.program.json(0, &["domain", "start", "web"]);
        rig
    }

    /// An image beside the machine's.
    pub fn beside(folder: &Path, name: &str, format: &str, size: &str) {
        tool("qemu-img", &["create", "-q", "-f", format, text(&folder.join(name)), size]);
    }

    /// Asks QEMU by the second monitor.
    pub fn ask(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let stream = UnixStream::connect(&self.monitor).expect("the second monitor");
        let mut lines = BufReader::new(stream.try_clone().expect("the socket")).lines();
        let mut tell = |what: Value| {
            (&stream).write_all(format!("{what}\n").as_bytes()).expect("QEMU hears");
            loop {
                let line = lines.next().expect("QEMU lives").expect("a line");
                let answer: Value = serde_json::from_str(&line).expect("JSON");
                if let Some(found) = answer.get("return") {
                    return Ok(found.clone());
                }
                if let Some(error) = answer.get("error") {
                    return Err(error["desc"].as_str().unwrap_or_default().to_owned());
                }
            }
        };
        tell(json!({ "execute": "qmp_capabilities" })).expect("capabilities");
        match arguments {
            Value::Null => tell(json!({ "execute": command })),
            arguments => tell(json!({ "execute": command, "arguments": arguments })),
        }
    }

    /// All that QEMU says of the machine's disks, and how guests' discards end; without the names of nodes and files,
    /// which snapshots change.
    pub fn written_how(&self) -> Vec<Value> {
        let mut drives = self.ask("query-block", Value::Null).expect("query-block");
        let drives = drives.as_array_mut().expect("a list");
        drives.retain(|drive| drive.get("inserted").is_some());
        for drive in drives.iter_mut() {
            let root = self.image_of(drive["inserted"]["node-name"].as_str().expect("a node"));
            let inserted = drive["inserted"].as_object_mut().expect("a medium");
            for names in ["node-name", "file", "image", "backing_file", "backing_file_depth", "children"] {
                inserted.remove(names);
            }
            // A filter has no options; what is below it has.
            inserted.insert("below".to_owned(), self.node(&root));
            for node in [root.clone(), format!("{root} file")] {
                inserted.insert(format!("discard {}", node.contains(' ')), json!(self.discards(&node)));
            }
            // Whether writes are answered from the cache is the guest's driver's to say, and the firmware has one for virtio.
            if drive["qdev"].as_str().is_some_and(|device| device.contains("virtio")) {
                drive["inserted"]["cache"].as_object_mut().expect("a cache").remove("writeback");
            }
            // Its number is that of the start.
            drive.as_object_mut().expect("a drive").remove("qdev");
        }
        std::mem::take(drives)
    }

    /// The image below filters.
    fn image_of(&self, root: &str) -> String {
        let nodes = self.nodes();
        let is_image =
            |name: &str| nodes.iter().any(|node| node["node-name"] == name && node["drv"] == "qcow2");
        let mut name = root.to_owned();
        while !is_image(&name) {
            name = self.below(&name, "file").expect("an image");
        }
        name
    }

    fn nodes(&self) -> Vec<Value> {
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true })).expect("the nodes");
        nodes.as_array().expect("a list").clone()
    }

    fn node(&self, name: &str) -> Value {
        let node = self.nodes().into_iter().find(|node| node["node-name"] == name).expect("the node");
        json!({ "cache": node["cache"], "zeroes": node["detect_zeroes"], "ro": node["ro"] })
    }

    fn below(&self, name: &str, role: &str) -> Option<String> {
        let graph = self.ask("x-debug-query-block-graph", Value::Null).expect("the graph");
        let vertices = graph["nodes"].as_array().expect("nodes");
        let id = vertices.iter().find(|vertex| vertex["name"] == name)?["id"].clone();
        let edge =
            graph["edges"].as_array()?.iter().find(|edge| edge["parent"] == id && edge["name"] == role)?;
        let child = vertices.iter().find(|vertex| vertex["id"] == edge["child"])?;
        Some(child["name"].as_str()?.to_owned())
    }

    /// Whether discards of a node (or, behind a blank, of its file) are carried out; asked in a way that changes nothing.
    fn discards(&self, node: &str) -> bool {
        let node = match node.split_once(' ') {
            Some((image, _)) => self.below(image, "file").expect("its file"),
            None => node.to_owned(),
        };
        let line = format!("qemu-io {node} \"reopen -o detect-zeroes=unmap,node-name=other\"");
        let said = self.ask("human-monitor-command", json!({ "command-line": line })).expect("HMP");
        let said = said.as_str().expect("text");
        assert!(said.contains("discard") || said.contains("node-name"), "{said}");
        !said.contains("without setting discard")
    }

    /// The process of QEMU, if it runs.
    pub fn pid(&self) -> Option<u32> {
        let pid = std::fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()?;
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        line.contains(text(&self.monitor)).then_some(pid)
    }
}

fn launch(folder: &Path, drives: &str) -> String {
    format!(
        "qemu-system-x86_64 -accel tcg -machine pc,i8042=off -m 16 -nodefaults -no-user-config -display none \
         -qmp unix:{},server=on,wait=off -qmp unix:{{qmp}},server=on,wait=off -pidfile {{pidfile}} {} {{incoming}}",
        text(&folder.join("second")),
        drives.replace("{folder}", text(folder)),
    )
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            Command::new("kill").args(["-9", &pid.to_string()]).status().ok();
            while self.pid().is_some() {
                std::thread::yield_now();
            }
        }
    }
}
