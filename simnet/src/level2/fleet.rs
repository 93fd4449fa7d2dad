//! A fleet of real nodes: each a mesh and a store on disk, on one [`Network`].
//!
//! What the engine and the commands do elsewhere, a node does here by itself: it learns models, fetches
//! their manifests and registers their objects. A model is random objects; its manifest is their ids.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use doppler_ids::{ByteRange, ModelId, ShardId};
use doppler_mesh::{Mesh, MeshHandle, MeshOptions, SwarmKey, Timing};
use doppler_store::disk::{DiskOptions, DiskTier};
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::signature::SignedModel;
use doppler_store::{Priority, RangeReader, ReadRequest};
use futures::future::join_all;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::network::{Lines, Network, address_of};
use crate::rng::Rng;

/// Nodes whose addresses the others are given.
const GIVEN: usize = 2;
/// Bytes of a node's disk and RAM.
const DISK: u64 = 1 << 30;
const RAM: u64 = 1 << 20;

/// A model of random bytes.
#[derive(Debug, Clone)]
pub struct Model {
    pub id: ModelId,
    pub signed: SignedModel,
    pub manifest: Bytes,
    pub objects: Vec<Bytes>,
}

impl Model {
    /// Objects of these sizes.
    ///
    /// # Panics
    /// If its name were no name, which it is.
    pub fn random(seed: u64, sizes: &[usize]) -> Self {
        let mut rng = Rng::fork(seed, "model", 0);
        let mut object = |size: usize| -> Bytes {
            let words = (0..size.div_ceil(8)).flat_map(|_| rng.next().to_le_bytes());
            words.take(size).collect::<Vec<u8>>().into()
        };
        let objects: Vec<Bytes> = sizes.iter().map(|size| object(*size)).collect();
        let ids = objects.iter().flat_map(|object| *ShardId::of(object).as_bytes());
        let manifest: Bytes = ids.collect::<Vec<u8>>().into();
        let id = ModelId::of(&manifest);
        let signed = SignedModel::sign(&[7; 32], id, "random", manifest.len() as u64);
        let signed = signed.expect("it has a name");
        Self { id, signed, manifest, objects }
    }

    pub fn ids(&self) -> Vec<ShardId> {
        ids_in(&self.manifest)
    }

    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.len() as u64).sum()
    }
}

/// The ids that a manifest lists.
fn ids_in(manifest: &[u8]) -> Vec<ShardId> {
    let (ids, _) = manifest.as_chunks::<32>();
    ids.iter().map(|id| ShardId::from(*id)).collect()
}

/// How the nodes of a fleet are started.
#[derive(Clone)]
pub struct FleetOptions {
    pub nodes: usize,
    pub lines: Lines,
    pub timing: Timing,
    pub swarm_key: Option<SwarmKey>,
}

/// A running node. Dropping it stops it.
pub struct Node {
    pub mesh: MeshHandle,
    pub ladder: Ladder,
    learning: JoinHandle<()>,
}

impl Node {
    /// Reads a whole object and keeps it.
    ///
    /// # Errors
    /// If nobody in reach has it.
    pub async fn read(&self, shard: ShardId, size: usize) -> io::Result<Bytes> {
        let range = ByteRange::new(0, size as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let request = ReadRequest { shard, range, priority: Priority::Bulk, deadline: None };
        let found = self.ladder.read(request).await.map_err(io::Error::other)?;
        Ok(found.bytes)
    }

    /// What its disk holds whole.
    pub fn whole(&self) -> BTreeSet<ShardId> {
        let disk = self.ladder.disk();
        disk.map(|disk| disk.complete().into_iter().collect()).unwrap_or_default()
    }
}

/// Ends nodes. Their directories are free for the next life once this returns.
async fn end_all(nodes: Vec<Node>) {
    let ending = nodes.into_iter().map(|mut node| async move {
        node.learning.abort();
        // An error means that it was aborted, or panicked. It has ended in any case.
        let _ = (&mut node.learning).await;
        node.mesh.shutdown().await;
        // Closing the store's index blocks.
        let _ = tokio::task::spawn_blocking(move || drop(node)).await;
    });
    join_all(ending).await;
}

impl Drop for Node {
    fn drop(&mut self) {
        self.learning.abort();
    }
}

/// Nodes and the network between them.
pub struct Fleet {
    pub network: Arc<Network>,
    options: FleetOptions,
    /// `None` while a node is down.
    nodes: Vec<Option<Node>>,
    dirs: Vec<TempDir>,
}

impl Fleet {
    /// Starts every node.
    ///
    /// # Errors
    /// If a directory or a node cannot be made.
    pub async fn start(options: FleetOptions) -> io::Result<Self> {
        let network = Network::new(options.nodes, options.lines);
        let dirs = (0..options.nodes).map(|_| tempfile::tempdir()).collect::<io::Result<_>>()?;
        let nodes = (0..options.nodes).map(|_| None).collect();
        let mut fleet = Self { network, options, nodes, dirs };
        for node in 0..fleet.nodes.len() {
            fleet.boot(node).await?;
        }
        Ok(fleet)
    }

    /// Starts a node, with what its disk holds and under the identity that it always had.
    ///
    /// # Errors
    /// If it runs already or its directory cannot be opened.
    pub async fn boot(&mut self, node: usize) -> io::Result<()> {
        self.network.revive(node);
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&(node as u64 + 1).to_le_bytes());
        seed[8..16].copy_from_slice(&self.options.lines.seed.to_le_bytes());
        let given = (0..GIVEN.min(self.nodes.len())).filter(|other| *other != node);
        let options = MeshOptions {
            listen: vec![address_of(node).with_port(0)],
            bootstrap: given.map(address_of).collect(),
            timing: self.options.timing,
            swarm_key: self.options.swarm_key.clone(),
            carrier: Some(self.network.carrier(node)),
            ..MeshOptions::new("level 2", seed)
        };
        self.nodes[node] = Some(start(options, self.dirs[node].path()).await?);
        Ok(())
    }

    /// The nodes that run.
    pub fn up(&self) -> impl Iterator<Item = (usize, &Node)> {
        self.nodes.iter().enumerate().filter_map(|(at, node)| Some((at, node.as_ref()?)))
    }

    /// A node that runs.
    ///
    /// # Panics
    /// If it does not.
    pub fn node(&self, node: usize) -> &Node {
        self.nodes[node].as_ref().expect("the node runs")
    }

    /// Kills nodes at once: they say nothing to anybody, and their disks stay.
    pub async fn kill(&mut self, nodes: &[usize]) {
        nodes.iter().for_each(|node| self.network.kill(*node));
        let gone: Vec<Node> = nodes.iter().filter_map(|node| self.nodes[*node].take()).collect();
        end_all(gone).await;
    }

    /// Stops every node in good order.
    pub async fn stop(mut self) {
        end_all(self.nodes.iter_mut().filter_map(Option::take).collect()).await;
    }

    /// A node publishes a model that it holds, and pins it.
    ///
    /// # Errors
    /// If it cannot be stored or announced.
    pub async fn publish(&self, node: usize, model: &Model) -> io::Result<()> {
        let node = self.node(node);
        for object in model.objects.iter().chain([&model.manifest]) {
            node.ladder.put(object.clone(), true).await.map_err(io::Error::other)?;
        }
        node.mesh.register_model(model.id, model.ids()).map_err(io::Error::other)?;
        node.mesh.publish(model.signed.clone()).map_err(io::Error::other)
    }

    /// Waits until every running node sees what `is_so` asks for. False if that takes longer than
    /// `patience`.
    pub async fn until(&self, patience: Duration, is_so: impl Fn(&Node) -> bool) -> bool {
        let all: Vec<usize> = self.up().map(|(at, _)| at).collect();
        self.until_at(&all, patience, is_so).await
    }

    /// The same, of these nodes.
    pub async fn until_at(
        &self,
        nodes: &[usize],
        patience: Duration,
        is_so: impl Fn(&Node) -> bool,
    ) -> bool {
        for node in nodes.iter().map(|node| self.node(*node)) {
            let mut changes = node.mesh.watch_changes();
            let wait = async {
                while !is_so(node) && changes.changed().await.is_ok() {
                    changes.borrow_and_update();
                }
            };
            if tokio::time::timeout(patience, wait).await.is_err() {
                return false;
            }
        }
        true
    }
}

async fn start(options: MeshOptions, dir: &Path) -> io::Result<Node> {
    let disk = DiskTier::open(dir, DiskOptions { budget: DISK }).map_err(io::Error::other)?;
    let (sizes, disk) = (LadderOptions { ram_budget: RAM }, Some(Arc::new(disk)));
    let ladder = Ladder::new(sizes, disk, None, Vec::new());
    let mesh = Mesh::start(options, Arc::new(ladder.clone())).await.map_err(io::Error::other)?;
    ladder.set_peers(Arc::new(mesh.clone()));
    let learning = tokio::spawn(learn(mesh.clone(), ladder.clone()));
    Ok(Node { mesh, ladder, learning })
}

/// Fetches the manifest of every model that is announced, and registers its objects.
async fn learn(mesh: MeshHandle, ladder: Ladder) {
    let (mut models, mut changes) = (mesh.watch_models(), mesh.watch_changes());
    let mut known = BTreeSet::new();
    loop {
        let announced = models.borrow_and_update().clone();
        changes.borrow_and_update();
        for signed in announced.iter() {
            if known.contains(&signed.model) {
                continue;
            }
            let (shard, size) = (signed.model.manifest(), signed.manifest_size);
            let manifest = ladder.get_whole(shard, size, Priority::Token, None).await;
            if let Ok(manifest) = manifest
                && mesh.register_model(signed.model, ids_in(&manifest)).is_ok()
            {
                known.insert(signed.model);
            }
        }
        // What could not be fetched is tried again when something has changed.
        let is_missing = announced.iter().any(|signed| !known.contains(&signed.model));
        let next = tokio::select! {
            next = models.changed() => next,
            next = changes.changed(), if is_missing => next,
        };
        if next.is_err() {
            return;
        }
    }
}
