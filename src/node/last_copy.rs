//! Keeps a command from removing what no other peer is known to hold, unless it says so.
//!
//! Relies on what the mesh knows: leases of peers that say they hold an object in full. A peer that
//! has been away longer than its lease does not count.

use anyhow::ensure;

use super::size::ByteSize;
use doppler_store::ShardId;

/// Counts the objects (with the bytes of them that are held here) that are whole at no other peer.
///
/// # Errors
/// If there are any and `allowed` is false.
pub fn guard(
    what: &str,
    objects: &[(ShardId, u64)],
    is_elsewhere: impl Fn(ShardId) -> bool,
    allowed: bool,
) -> anyhow::Result<usize> {
    let last = objects.iter().filter(|(shard, bytes)| *bytes > 0 && !is_elsewhere(*shard));
    let (count, bytes) =
        last.fold((0, 0u64), |(count, sum), (_, bytes)| (count + 1, sum.saturating_add(*bytes)));
    let (are, them) = if count == 1 { ("is", "it") } else { ("are", "them") };
    ensure!(
        allowed || count == 0,
        "{what}: {count} of {} ({}) {are} held by no other peer that this node knows of; \
         give --last-copy to remove {them} all the same",
        super::size::count(objects.len(), "object"),
        ByteSize(bytes)
    );
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_copies_go_only_if_that_is_said() {
        let shard = |byte| ShardId::from([byte; 32]);
        let objects = [(shard(1), 1024), (shard(2), 2048), (shard(3), 4096), (shard(4), 0)];
        let elsewhere = |id| id == shard(3);
        let refused = guard("m", &objects, elsewhere, false).unwrap_err().to_string();
        for word in ["m: 2 of 4 objects", "3.00 KiB", "are held by no other peer", "--last-copy"] {
            assert!(refused.contains(word), "{word:?} is not in {refused:?}");
        }
        assert_eq!(guard("m", &objects, elsewhere, true).unwrap(), 2);
        assert_eq!(guard("m", &objects, |_| true, false).unwrap(), 0);
        assert!(
            guard("m", &objects[..1], elsewhere, false)
                .unwrap_err()
                .to_string()
                .contains("1 of 1 object (1.00 KiB) is held")
        );
    }
}
