//! How a disk is written: what QEMU was told of the image that the machine writes, so that one that takes its place is
//! told the same.
//!
//! QEMU says how a node is cached and what becomes of zeroes, and keeps the rest to itself. Whether a guest's discards
//! reach the file is found by asking for a change that it refuses in either case, with one reason or another; how a file
//! is read and written (`aio`), by asking for what may be so already, which changes nothing, and from QEMU's own command
//! line. Limits on a disk's speed and the thread that serves it belong to the device, and stay with it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use snaptree_engine::driver::DriverError;

use super::graph::{Graph, Mode, Node};
use super::monitor::{Monitor, file_node};

/// What a probe asks for besides, and no node grants.
const REFUSED: &str = "node-name=snaptree-asks";
/// QEMU's refusal of `detect-zeroes=unmap` for a node whose discards go nowhere.
const NO_DISCARD: &str = "without setting discard operation to unmap";

/// What becomes of a guest's discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Discard {
    Unmap,
    Ignore,
}

impl Discard {
    const fn word(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Ignore => "ignore",
        }
    }
}

/// How a node is written.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Written {
    discard: Discard,
    mode: Mode,
}

/// How an image and its file are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    image: Written,
    file: Written,
    /// QEMU's word for how the file is read and written; none for its default.
    aio: Option<String>,
    read_only: bool,
}

impl Options {
    fn image(&self, node: &str, file: &str) -> Value {
        json!({ "driver": "qcow2", "node-name": node, "file": file, "discard": self.image.discard.word(),
            "detect-zeroes": self.image.mode.detect_zeroes, "cache": self.image.mode.cache })
    }

    fn file(&self, node: &str, file: &Path) -> Value {
        let mut options = json!({ "driver": "file", "node-name": node, "filename": file,
            "discard": self.file.discard.word(), "cache": self.file.mode.cache });
        if let Some(aio) = &self.aio {
            options["aio"] = json!(aio);
        }
        options
    }
}

impl Monitor {
    /// How the machine writes an image.
    pub(super) async fn options_of(&mut self, graph: &Graph, image: &Node) -> Result<Options, DriverError> {
        let written = self.written(image).await?;
        let file = image.file_node.as_deref().and_then(|name| graph.node(name));
        let (file, aio) = match file {
            Some(file) => (self.written(file).await?, self.aio(file).await?),
            None => (Written { discard: Discard::Unmap, mode: written.mode.clone() }, None),
        };
        Ok(Options { image: written, file, aio, read_only: image.read_only })
    }

    async fn written(&mut self, node: &Node) -> Result<Written, DriverError> {
        Ok(Written { discard: self.discard(&node.name).await?, mode: node.mode.clone() })
    }

    async fn discard(&mut self, node: &str) -> Result<Discard, DriverError> {
        let said = self.reopen_by_hand(node, &format!("detect-zeroes=unmap,{REFUSED}")).await?;
        Ok(if said.contains(NO_DISCARD) { Discard::Ignore } else { Discard::Unmap })
    }

    async fn aio(&mut self, file: &Node) -> Result<Option<String>, DriverError> {
        for aio in ["native", "io_uring"] {
            if self.reopen_by_hand(&file.name, &format!("aio={aio}")).await?.is_empty() {
                return Ok(Some(aio.to_owned()));
            }
        }
        let line =
            self.process().and_then(|process| fs::read(format!("/proc/{}/cmdline", process.pid())).ok());
        Ok(line.and_then(|line| aio_of(&String::from_utf8_lossy(&line), &file.named)))
    }

    /// Changes some options of a node, and leaves all others; what QEMU says against it. There is no QMP command that
    /// leaves what is not named.
    async fn reopen_by_hand(&mut self, node: &str, options: &str) -> Result<String, DriverError> {
        let line = format!("qemu-io {node} \"reopen -o {options}\"");
        let said = self.act("human-monitor-command", json!({ "command-line": line })).await?;
        Ok(said.as_str().unwrap_or_default().trim().to_owned())
    }

    /// Opens an overlay that is to be put upon what the machine writes: two nodes, `node` and `node-f`.
    pub(super) async fn add_overlay(
        &mut self,
        node: &str,
        file: &Path,
        options: &Options,
    ) -> Result<(), DriverError> {
        let below = file_node(node);
        self.act("blockdev-add", options.file(&below, file)).await?;
        let mut add = options.image(node, &below);
        add["read-only"] = json!(options.read_only);
        add["backing"] = Value::Null;
        self.act("blockdev-add", add).await.map(|_| ())
    }

    /// Opens a frozen layer, and what is below it. Its file is opened for writing only while a job writes it.
    pub(super) async fn add_frozen(
        &mut self,
        node: &str,
        file: &Path,
        options: &Options,
    ) -> Result<(), DriverError> {
        let below = file_node(node);
        let mut add = options.file(&below, file);
        add["auto-read-only"] = json!(true);
        self.act("blockdev-add", add).await?;
        let mut add = options.image(node, &below);
        add["read-only"] = json!(true);
        self.act("blockdev-add", add).await.map(|_| ())
    }

    /// Puts an overlay of [`add_overlay`](Self::add_overlay) upon another node.
    pub(super) async fn put_upon(
        &mut self,
        node: &Node,
        backing: &str,
        options: &Options,
    ) -> Result<(), DriverError> {
        let mut reopen = options.image(&node.name, node.file_node.as_deref().unwrap_or_default());
        reopen["read-only"] = json!(node.read_only);
        reopen["backing"] = json!(backing);
        self.act("blockdev-reopen", json!({ "options": [reopen] })).await.map(|_| ())
    }

    /// A frozen layer that the machine will write is written as what it writes now. Where that cannot be, it is so again
    /// when the machine is started anew.
    pub(super) async fn write_like(&mut self, base: &str, root: &str) -> Result<(), DriverError> {
        let graph = self.graph().await?;
        let (Some(base), Some(root)) = (graph.node(base), graph.node(root)) else { return Ok(()) };
        let (wanted, found) = (self.written(root).await?, self.written(base).await?);
        if wanted == found {
            return Ok(());
        }
        let on = |on: bool| if on { "on" } else { "off" };
        let options = format!(
            "discard={},detect-zeroes={},cache.direct={},cache.no-flush={}",
            wanted.discard.word(),
            wanted.mode.detect_zeroes,
            on(wanted.mode.cache.direct),
            on(wanted.mode.cache.no_flush),
        );
        let said = self.reopen_by_hand(&base.name, &options).await?;
        if !said.is_empty() {
            tracing::warn!(
                said,
                node = base.name,
                "QEMU keeps other options for the layer that is written now"
            );
        }
        Ok(())
    }
}

/// What QEMU's command line says of how a file is read and written, where it is the file of a `-drive`.
fn aio_of(line: &str, named: &Path) -> Option<String> {
    let mut words = line.split('\0');
    while let Some(word) = words.next() {
        if !matches!(word, "-drive" | "--drive") {
            continue;
        }
        let options = options_in(words.next()?);
        let value = |keys: [&str; 2]| {
            options.iter().rev().find(|(key, _)| keys.contains(&key.as_str())).map(|(_, value)| value.clone())
        };
        if value(["file", "file.filename"]).is_some_and(|file| Path::new(&file) == named) {
            return value(["aio", "file.aio"]);
        }
    }
    None
}

/// A list of options; a comma in a value is doubled.
fn options_in(word: &str) -> Vec<(String, String)> {
    let mut options = vec![String::new()];
    let mut rest = word.chars().peekable();
    while let Some(next) = rest.next() {
        match (next, rest.peek()) {
            (',', Some(',')) => {
                rest.next();
                options.last_mut().into_iter().for_each(|option| option.push(','));
            }
            (',', _) => options.push(String::new()),
            _ => options.last_mut().into_iter().for_each(|option| option.push(next)),
        }
    }
    let pair =
        |option: &String| option.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    options.iter().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_how_a_file_is_read() {
        let line =
            "qemu\0-drive\0file=/vm/a,,b.qcow2,format=qcow2,aio=native\0-drive\0file=/vm/c.qcow2\0-drive";
        let aio = |file: &str| aio_of(line, Path::new(file));
        assert_eq!(aio("/vm/a,b.qcow2").as_deref(), Some("native"));
        assert_eq!(aio("/vm/c.qcow2"), None);
        assert_eq!(aio("/vm/d.qcow2"), None);
    }
}
