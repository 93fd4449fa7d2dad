//! Repair: fetches the missing groups of a damaged object from peers.
//!
//! A reader that meets damage gets correct bytes at once (see `ladder`). The rest
//! of the object is fetched here, in the background or for `fsck --repair`. At
//! most [`REPAIRS_MAX`] objects are repaired in the background at a time; others
//! are left for the next reader or the next check.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::disk::Kept;
use super::ladder::{Inner, Ladder, lock};
use super::verified::{SERVE_BYTES_MAX, align};
use super::{ByteRange, Priority, ReadError, ReadRequest, ShardId, ShardSource};

/// The most objects repaired in the background at a time.
const REPAIRS_MAX: usize = 4;

impl Ladder {
    /// Fetches and stores the missing groups of an object that the disk tier knows. They are
    /// durable when this returns. Returns the bytes fetched.
    pub async fn repair(&self, shard: ShardId) -> Result<u64, ReadError> {
        self.inner.repair(shard, None).await
    }
}

impl Inner {
    /// Repairs an object in the background, except for a range that is being stored already.
    pub fn repair_in_background(self: &Arc<Self>, shard: ShardId, except: Option<ByteRange>) {
        {
            let mut repairing = lock(&self.repairing);
            if repairing.len() >= REPAIRS_MAX || !repairing.insert(shard) {
                return;
            }
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            match this.repair(shard, except).await {
                Ok(0) => {}
                Ok(bytes) => tracing::info!(%shard, bytes, "repaired from peers"),
                Err(error) => tracing::warn!(%shard, %error, "damaged and not repaired"),
            }
            lock(&this.repairing).remove(&shard);
        });
    }

    async fn repair(&self, shard: ShardId, except: Option<ByteRange>) -> Result<u64, ReadError> {
        let (Some(disk), Some(peers)) = (&self.disk, self.peers()) else {
            return Err(ReadError::Refused(
                "repair needs a data directory and connected peers".to_owned(),
            ));
        };
        let Some(held) = disk.groups(shard).await else { return Ok(0) };
        let size = match self.expected_size(shard).unwrap_or(held.size()) {
            0 if shard == ShardId::of(b"") => {
                disk.put(Bytes::new(), false).await?;
                return Ok(0);
            }
            0 => self.size_at_peers(&peers, shard).await?,
            known => known,
        };
        let Some(whole) = ByteRange::new(0, size) else { return Ok(0) };
        let pieces = if held.size() == size {
            held.runs(whole, SERVE_BYTES_MAX)
        } else {
            // The bytes on disk claim a size that was never proved.
            super::groups::Groups::none(size).runs(whole, SERVE_BYTES_MAX)
        };
        let except = except.and_then(|range| align(range, size));
        let mut fetched = 0;
        for (piece, held) in pieces {
            if held || except.is_some_and(|except| except.contains(&piece)) {
                continue;
            }
            let (priority, deadline) = (Priority::Bulk, None);
            let request = ReadRequest { shard, range: piece, priority, deadline };
            let proved = self.fetch_only(&peers, request).await?;
            if disk.keep(proved).await? == Kept::SizeConflict {
                let detail = format!("peers disagree that it has {size} bytes");
                return Err(ReadError::Corrupt { shard, detail });
            }
            fetched += piece.len();
            self.counts.repaired_bytes.fetch_add(piece.len(), Ordering::Relaxed);
        }
        if fetched > 0 && !disk.is_whole(shard) {
            disk.flush().await?;
        }
        Ok(fetched)
    }

    /// What a peer says of a size that nobody here knows. The object's last group proves it.
    async fn size_at_peers(
        &self,
        peers: &Arc<dyn ShardSource>,
        shard: ShardId,
    ) -> Result<u64, ReadError> {
        let Some(range) = ByteRange::new(0, 1) else { return Ok(0) };
        let (priority, deadline) = (Priority::Bulk, None);
        let request = ReadRequest { shard, range, priority, deadline };
        Ok(self.fetch_only(peers, request).await?.size())
    }
}
