//! Reading QEMU's block graph: which images are open, and which of them stand upon one another. Pure.
//!
//! `query-named-block-nodes` tells what each node is, and `x-debug-query-block-graph` how they hang together; no
//! stable command tells that before QEMU 10.1.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Most nodes that a machine may have.
const NODES_MAX: usize = 65_536;

/// Drivers of nodes that pass on what is below them: a limit on its speed, reads that are kept, and what jobs put above
/// a disk while they work (QEMU's `is_filter`).
const FILTERS: [&str; 9] = [
    "blkdebug",
    "blklogwrites",
    "commit_top",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
];

/// An open node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qemu) struct Node {
    /// QEMU's name of it.
    pub(in crate::qemu) name: String,
    /// The file, as QEMU would open it again.
    pub(in crate::qemu) named: PathBuf,
    /// The node of the file below a format; none for the file's own node.
    pub(in crate::qemu) file_node: Option<String>,
    /// Whether it is open for reading alone.
    pub(in crate::qemu) read_only: bool,
    /// Whether it has dirty bitmaps.
    pub(in crate::qemu) has_bitmaps: bool,
    /// How it is written.
    pub(in crate::qemu) mode: Mode,
}

/// How a node is written, as far as QEMU says so without being asked twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::qemu) struct Mode {
    /// What becomes of zeroes that are written: `off`, `on` or `unmap`.
    pub(in crate::qemu) detect_zeroes: String,
    /// How the host caches it.
    pub(in crate::qemu) cache: Cache,
}

/// How the host caches what is written, in the words of QEMU's `cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::qemu) struct Cache {
    /// Past the host's page cache.
    #[serde(default)]
    pub(in crate::qemu) direct: bool,
    /// Flushes are ignored.
    #[serde(default)]
    pub(in crate::qemu) no_flush: bool,
}

/// Whether a machine writes a medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::qemu) enum Access {
    /// It may.
    Writes,
    /// It only reads it.
    Reads,
}

/// A device of the machine, or a chip of its firmware, with a medium in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qemu) struct Device {
    /// QEMU's name: that of the drive, or the device's path.
    pub(in crate::qemu) name: String,
    /// Whether it writes the medium.
    pub(in crate::qemu) access: Access,
    /// The names of the nodes of its images, and of the filters above them, topmost first.
    pub(in crate::qemu) chain: Vec<String>,
    /// What is in it, as QEMU names it.
    pub(in crate::qemu) medium: String,
    /// The ids of the block jobs that work on one of these nodes.
    pub(in crate::qemu) jobs: Vec<String>,
}

/// All that is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::qemu) struct Graph {
    /// Every node that has a file, formats before the files below them.
    pub(in crate::qemu) nodes: Vec<Node>,
    /// What they are open for.
    pub(in crate::qemu) devices: Vec<Device>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Named {
    node_name: String,
    drv: String,
    file: String,
    ro: bool,
    #[serde(default)]
    dirty_bitmaps: Vec<serde::de::IgnoredAny>,
    #[serde(default, rename = "detect_zeroes")]
    detect_zeroes: String,
    #[serde(default)]
    cache: Cache,
}

#[derive(Deserialize)]
struct Edges {
    nodes: Vec<Vertex>,
    edges: Vec<Edge>,
}

#[derive(Deserialize)]
struct Vertex {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

#[derive(Deserialize)]
struct Edge {
    parent: u64,
    child: u64,
    name: String,
    #[serde(default)]
    perm: Vec<String>,
}

impl Graph {
    /// Reads the answers to `query-named-block-nodes` (flat) and `x-debug-query-block-graph`.
    pub(in crate::qemu) fn parse(named: &Value, edges: &Value) -> Result<Self, String> {
        let named = Vec::<Named>::deserialize(named).map_err(|error| error.to_string())?;
        let edges = Edges::deserialize(edges).map_err(|error| error.to_string())?;
        if named.len() > NODES_MAX || edges.nodes.len() > NODES_MAX || edges.edges.len() > 4 * NODES_MAX {
            return Err(format!("it has more than {NODES_MAX} block nodes"));
        }
        let named: BTreeMap<&str, &Named> =
            named.iter().map(|node| (node.node_name.as_str(), node)).collect();
        let tree = Tree::new(&edges);
        let mut nodes: Vec<Node> =
            edges.nodes.iter().filter_map(|vertex| tree.node(vertex, &named)).collect();
        nodes.sort_by_key(|node| node.file_node.is_none());
        let devices =
            edges.nodes.iter().filter(|vertex| vertex.kind == "block-backend" && !vertex.name.is_empty());
        let devices = devices.filter_map(|device| tree.device(device, &edges, &named)).collect();
        Ok(Self { nodes, devices })
    }

    /// A node by its name.
    pub(in crate::qemu) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// The image that a device's image is built upon.
    pub(in crate::qemu) fn below(&self, name: &str) -> Option<&Node> {
        self.devices.iter().find_map(|device| {
            let at = device.chain.iter().position(|in_chain| in_chain == name)?;
            device.chain.iter().skip(at + 1).find_map(|name| self.node(name))
        })
    }

    /// Whether a device stands on the node, through whatever is between.
    pub(in crate::qemu) fn is_attached(&self, node: &Node) -> bool {
        let attached = |name: &str| {
            self.devices.iter().flat_map(|device| &device.chain).any(|in_chain| in_chain == name)
        };
        let above = self.nodes.iter().filter(|above| above.file_node.as_deref() == Some(&node.name));
        attached(&node.name) || above.map(|above| above.name.as_str()).any(attached)
    }

    /// Every node that has a file open by that name.
    pub(in crate::qemu) fn of_file(&self, named: &Path) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.named == named)
    }
}

struct Tree<'a> {
    vertices: BTreeMap<u64, &'a Vertex>,
    children: BTreeMap<u64, BTreeMap<&'a str, u64>>,
}

impl<'a> Tree<'a> {
    fn new(edges: &'a Edges) -> Self {
        let mut children: BTreeMap<u64, BTreeMap<&str, u64>> = BTreeMap::new();
        for edge in &edges.edges {
            children.entry(edge.parent).or_default().insert(&edge.name, edge.child);
        }
        Self { vertices: edges.nodes.iter().map(|vertex| (vertex.id, vertex)).collect(), children }
    }

    fn child(&self, parent: u64, roles: &[&str]) -> Option<u64> {
        let children = self.children.get(&parent)?;
        roles.iter().find_map(|role| children.get(role)).copied()
    }

    /// The name of an image is that of the file below it: its own has QEMU's options in it, where they are unusual.
    fn node(&self, vertex: &Vertex, named: &BTreeMap<&str, &Named>) -> Option<Node> {
        let found = named.get(vertex.name.as_str())?;
        let is_format = match found.drv.as_str() {
            "qcow2" | "raw" => true,
            "file" | "host_device" => false,
            // What a job puts in the way while it works, a throttle.
            _ => return None,
        };
        let below = self.child(vertex.id, &["file"]).and_then(|id| self.vertices.get(&id));
        let below = below.filter(|_| is_format).and_then(|below| named.get(below.name.as_str()));
        Some(Node {
            name: found.node_name.clone(),
            named: PathBuf::from(&below.unwrap_or(found).file),
            file_node: is_format.then(|| below.map(|below| below.node_name.clone()).unwrap_or_default()),
            read_only: found.ro,
            has_bitmaps: !found.dirty_bitmaps.is_empty(),
            mode: Mode { detect_zeroes: found.detect_zeroes.clone(), cache: found.cache },
        })
    }

    /// A device that has a medium.
    fn device(&self, device: &Vertex, edges: &Edges, named: &BTreeMap<&str, &Named>) -> Option<Device> {
        let root = edges.edges.iter().find(|edge| edge.parent == device.id && edge.name == "root")?;
        let ids = self.chain(root.child, named);
        let name = |id: &u64| self.vertices.get(id).map(|vertex| vertex.name.clone());
        let is_job = |id: &u64| self.vertices.get(id).is_some_and(|vertex| vertex.kind == "block-job");
        let on_it = edges.edges.iter().filter(|edge| is_job(&edge.parent) && ids.contains(&edge.child));
        let jobs: BTreeSet<String> = on_it.filter_map(|edge| name(&edge.parent)).collect();
        let chain: Vec<String> = ids.iter().filter_map(name).collect();
        let known = || chain.iter().filter_map(|name| named.get(name.as_str()));
        let image = known().find(|node| !FILTERS.contains(&node.drv.as_str())).or_else(|| known().next());
        let writes = root.perm.iter().any(|perm| perm == "write");
        Some(Device {
            name: device.name.clone(),
            access: if writes { Access::Writes } else { Access::Reads },
            medium: image.map(|node| node.file.clone()).unwrap_or_default(),
            chain,
            jobs: jobs.into_iter().collect(),
        })
    }

    /// From a device's root down, by what each node is built upon, or is a filter of.
    fn chain(&self, root: u64, named: &BTreeMap<&str, &Named>) -> Vec<u64> {
        let mut ids = Vec::new();
        let mut seen = BTreeSet::new();
        let mut next = Some(root);
        while let Some(id) = next.filter(|id| seen.insert(*id)) {
            ids.push(id);
            let node = self.vertices.get(&id).and_then(|vertex| named.get(vertex.name.as_str()));
            let children = self.children.get(&id);
            let is_filter = node.is_some_and(|node| FILTERS.contains(&node.drv.as_str()))
                || (children.is_some_and(|children| children.len() == 1) && !self.is_leaf_format(id));
            next = self.child(id, if is_filter { &["backing", "file"] } else { &["backing"] });
        }
        ids
    }

    /// Whether what stands below is a file's own node, so that this is an image and no filter.
    fn is_leaf_format(&self, id: u64) -> bool {
        self.child(id, &["file"]).is_some_and(|file| !self.children.contains_key(&file))
    }
}
