//! Access to a data directory's store: through the node that runs on it, or directly if no node
//! does.
//!
//! The directory's lock decides: only the process that holds it may touch the store.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tokio::runtime::Runtime;

use super::client::Client;
use doppler_store::StoreError;
use doppler_store::disk::{DiskOptions, DiskTier};

/// How the store is accessed.
pub enum StoreAccess {
    Node(Client),
    Here { disk: DiskTier, runtime: Runtime, data: PathBuf },
}

impl StoreAccess {
    /// # Errors
    /// If the directory holds no store, cannot be read, or belongs to a process that takes no
    /// commands.
    pub fn open(data: &Path) -> anyhow::Result<Self> {
        let objects = data.join("objects");
        match std::fs::metadata(&objects) {
            Ok(found) if found.is_dir() => {}
            Err(error)
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Err(error).with_context(|| format!("cannot read {}", objects.display()));
            }
            _ => bail!(
                "{0} holds no store (a node makes one: doppler-node join --swarm NAME --data {0})",
                data.display()
            ),
        }
        // Not the node's budget: maintenance of a store must not evict anything by itself.
        match DiskTier::open(data, DiskOptions { budget: u64::MAX }) {
            Ok(disk) => Ok(Self::Here { disk, runtime: runtime()?, data: data.to_owned() }),
            Err(locked @ StoreError::Locked { .. }) => match Client::find(data)? {
                Some(client) => Ok(Self::Node(client)),
                None => bail!("{locked}; that process takes no commands"),
            },
            Err(error) => Err(error.into()),
        }
    }
}

fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}
