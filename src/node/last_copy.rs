//! Keeps a command from removing what no other peer is known to hold, unless it says so.
//!
//! Relies on what the mesh knows: leases of peers that say they hold an object in full, and are
//! neither missing nor about to leave. Two owners that remove the last two copies within a second
//! of each other are not kept from it; eviction, which nobody decides, goes by `Kept::may_go`.

use super::service::Service;
use super::size::ByteSize;
use doppler_store::{Replicas, ShardId};

impl Service {
    /// Whether each of these objects is held whole by another peer that counts.
    pub(super) fn are_elsewhere(&self, shards: impl Iterator<Item = ShardId>) -> Vec<bool> {
        let list: Vec<_> = shards.map(|shard| (shard, 0, Replicas::DEFAULT)).collect();
        self.mesh.copies(&list, None).iter().map(|kept| !kept.holders.is_empty()).collect()
    }
}

/// A command would remove what no other peer is known to hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what}: {count} of {} ({}) {} held by no other peer that this node knows of; \
     give --last-copy to remove {} all the same",
    super::size::count(*objects, "object"),
    ByteSize(*bytes),
    if *count == 1 { "is" } else { "are" },
    if *count == 1 { "it" } else { "them" }
)]
pub struct LastCopy {
    what: String,
    /// Last copies, of so many objects, and their bytes.
    count: usize,
    objects: usize,
    bytes: u64,
}

/// Counts the objects (with the bytes of them that are held here) that are whole nowhere else.
///
/// # Errors
/// [`LastCopy`] if there are any and `allowed` is false.
pub fn guard(
    what: &str,
    objects: &[(ShardId, u64)],
    are_elsewhere: &[bool],
    allowed: bool,
) -> anyhow::Result<usize> {
    let held = objects.iter().zip(are_elsewhere).filter(|((_, bytes), _)| *bytes > 0);
    let last = held.filter(|(_, is_elsewhere)| !**is_elsewhere);
    let (count, bytes) = last
        .fold((0, 0u64), |(count, sum), ((_, bytes), _)| (count + 1, sum.saturating_add(*bytes)));
    if count > 0 && !allowed {
        let (what, objects) = (what.to_owned(), objects.len());
        return Err(LastCopy { what, count, objects, bytes }.into());
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_copies_go_only_if_that_is_said() {
        let shard = |byte| ShardId::from([byte; 32]);
        let objects = [(shard(1), 1024), (shard(2), 2048), (shard(3), 4096), (shard(4), 0)];
        let elsewhere = [false, false, true, false];
        let refused = guard("m", &objects, &elsewhere, false).unwrap_err().to_string();
        for word in ["m: 2 of 4 objects", "3.00 KiB", "are held by no other peer", "--last-copy"] {
            assert!(refused.contains(word), "{word:?} is not in {refused:?}");
        }
        assert_eq!(guard("m", &objects, &elsewhere, true).unwrap(), 2);
        assert_eq!(guard("m", &objects, &[true; 4], false).unwrap(), 0);
        let one = guard("m", &objects[..1], &elsewhere, false).unwrap_err().to_string();
        assert!(one.contains("1 of 1 object (1.00 KiB) is held"));
    }
}
