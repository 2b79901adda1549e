//! Reading QEMU's block graph: which images are open, and which of them stand upon one another. Pure.
//!
//! `query-named-block-nodes` tells what each node is, and `x-debug-query-block-graph` how they hang together; no
//! stable command tells that before QEMU 10.1.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

/// Most nodes that a machine may have.
const NODES_MAX: usize = 65_536;

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
}

/// All that is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::qemu) struct Graph {
    /// Every node that has a file, formats before the files below them.
    pub(in crate::qemu) nodes: Vec<Node>,
    /// Per device: the names of its images, topmost first.
    pub(in crate::qemu) chains: Vec<Vec<String>>,
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
        let chains =
            devices.filter_map(|device| Some(tree.chain(tree.child(device.id, &["root"])?))).collect();
        Ok(Self { nodes, chains })
    }

    /// A node by its name.
    pub(in crate::qemu) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Whether a device stands on the node, through whatever is between.
    pub(in crate::qemu) fn is_attached(&self, node: &Node) -> bool {
        let attached = |name: &str| self.chains.iter().flatten().any(|in_chain| in_chain == name);
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
        })
    }

    /// From a device's root down, by what each node is built upon, or is a filter of.
    fn chain(&self, root: u64) -> Vec<String> {
        let mut names = Vec::new();
        let mut seen = BTreeSet::new();
        let mut next = Some(root);
        while let Some(id) = next.filter(|id| seen.insert(*id)) {
            if let Some(vertex) = self.vertices.get(&id) {
                names.push(vertex.name.clone());
            }
            let children = self.children.get(&id);
            let is_filter = children.is_some_and(|children| children.len() == 1) && !self.is_leaf_format(id);
            next = self.child(id, if is_filter { &["backing", "file"] } else { &["backing"] });
        }
        names
    }

    /// Whether what stands below is a file's own node, so that this is an image and no filter.
    fn is_leaf_format(&self, id: u64) -> bool {
        self.child(id, &["file"]).is_some_and(|file| !self.children.contains_key(&file))
    }
}
