//! The ladder: which tier answers, which tiers keep what was read, who shares a
//! fetch, and what is served.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use doppler_store::verified::{SERVE_BYTES_MAX, decode};
use doppler_store::{
    DirReader, DirShard, Ladder, LadderOptions, Priority, RangeReader, ReadError, ReadRequest,
    ShardId, ShardServe, StoreError, Tier,
};
use futures::FutureExt;
use rand::RngExt;

use super::support::*;

const ROOMY: u64 = 1 << 30;

fn ladder(ram_budget: u64, dir: Option<&tempfile::TempDir>, source: &Arc<Source>) -> Ladder {
    let disk = dir.map(|dir| Arc::new(open(dir.path(), ROOMY)));
    let ladder = Ladder::new(LadderOptions { ram_budget }, disk, None, vec![]);
    ladder.set_peers(Arc::clone(source) as _);
    ladder
}

fn bulk(shard: ShardId, range: doppler_store::ByteRange) -> ReadRequest {
    ReadRequest { priority: Priority::Bulk, ..ReadRequest::token(shard, range) }
}

#[tokio::test]
async fn bytes_from_peers_are_kept_in_ram_and_on_disk() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 30 * G + 9);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::new([bytes.clone()]));
    let want = range(5 * G + 3, 12 * G - 1);
    {
        let ladder = ladder(ROOMY, Some(&dir), &source);
        for tier in [Tier::Peer, Tier::Ram, Tier::Ram] {
            let found = ladder.read(ReadRequest::token(shard, want)).await.unwrap();
            assert_eq!((found.tier, found.bytes), (tier, part(&bytes, want)));
        }
        ladder.flush().await.unwrap();
        let stats = ladder.stats();
        assert_eq!((stats.peer.hits, stats.disk.hits, stats.ram.hits), (1, 0, 2));
        assert_eq!(stats.peer.bytes, 7 * G, "whole groups");
    }
    let ladder = ladder(ROOMY, Some(&dir), &source);
    for tier in [Tier::Disk, Tier::Ram] {
        let found = ladder.read(ReadRequest::token(shard, want)).await.unwrap();
        assert_eq!((found.tier, found.bytes), (tier, part(&bytes, want)));
    }
    assert_eq!(source.asked_ranges().len(), 1, "asked once in two runs");
    // A longer read takes what is on disk from there and requests only the rest.
    let longer = range(4 * G, 15 * G + 1);
    let found = ladder.read(ReadRequest::token(shard, longer)).await.unwrap();
    assert_eq!((found.tier, found.bytes), (Tier::Peer, part(&bytes, longer)));
    assert_eq!(source.asked_ranges()[1..], [range(4 * G, 5 * G), range(12 * G, 16 * G)]);
}

#[tokio::test]
async fn long_reads_are_cut_into_wire_requests() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 3 * SERVE_BYTES_MAX + 5 * G + 1);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let source = Arc::new(Source::new([bytes.clone()]));
    let ladder = ladder(0, Some(&dir), &source);
    let want = range(G + 5, size);
    let found = ladder.read(ReadRequest::token(shard, want)).await.unwrap();
    assert_eq!(found.bytes, part(&bytes, want));
    let asked = source.asked_ranges();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|piece| piece.len() <= SERVE_BYTES_MAX && piece.start() % G == 0));
    let all = ladder.get_whole(shard, size, Priority::Bulk, None).await.unwrap();
    assert_eq!(all, bytes);
    ladder.flush().await.unwrap();
    assert_eq!(ladder.complete(), [shard]);
}

#[tokio::test]
async fn many_readers_share_one_fetch_and_a_dropped_one_breaks_nothing() {
    let mut rng = fresh_rng();
    let bytes = random(&mut rng, 8 * G);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::held_back([bytes.clone()]));
    let ladder = ladder(ROOMY, None, &source);
    let want = range(G, 3 * G);
    let mut readers: Vec<_> =
        (0..10).map(|_| ladder.read(ReadRequest::token(shard, want))).collect();
    for reader in &mut readers {
        assert!(reader.now_or_never().is_none(), "held back");
    }
    drop(readers.swap_remove(0)); // the one that started the fetch
    drop(readers.pop());
    source.gate.add_permits(100);
    for reader in readers {
        let found = reader.await.unwrap();
        assert_eq!((found.tier, found.bytes), (Tier::Peer, part(&bytes, want)));
    }
    assert_eq!(source.asked_ranges(), [want]);
    assert_eq!(ladder.stats().peer.bytes, 2 * G);
}

#[tokio::test]
async fn a_fetch_without_waiters_is_cancelled() {
    let mut rng = fresh_rng();
    let bytes = random(&mut rng, 8 * G);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::held_back([bytes.clone()]));
    let ladder = ladder(ROOMY, None, &source);
    let request = ReadRequest::token(shard, range(0, G));
    let mut readers = [ladder.read(request), ladder.read(request)];
    for reader in &mut readers {
        assert!(reader.now_or_never().is_none());
    }
    let [first, second] = readers;
    drop(first);
    assert_eq!(source.dropped.available_permits(), 0);
    drop(second);
    assert_eq!(source.dropped.available_permits(), 1);
    source.gate.add_permits(1);
    assert_eq!(ladder.read(request).await.unwrap().bytes, part(&bytes, range(0, G)));
}

#[tokio::test]
async fn an_urgent_reader_does_not_wait_behind_a_patient_fetch() {
    let mut rng = fresh_rng();
    let bytes = random(&mut rng, 8 * G);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::held_back([bytes.clone()]));
    let ladder = ladder(ROOMY, None, &source);
    let mut patient = ladder.read(bulk(shard, range(0, G)));
    assert!((&mut patient).now_or_never().is_none());
    let deadline = Some(Instant::now() + Duration::from_secs(60));
    let urgent = ReadRequest { deadline, ..ReadRequest::token(shard, range(0, G)) };
    let mut urgent = ladder.read(urgent);
    assert!((&mut urgent).now_or_never().is_none());
    let asked: Vec<_> = source.asked.lock().unwrap().iter().map(|r| r.priority).collect();
    assert_eq!(asked, [Priority::Bulk, Priority::Token]);
    source.gate.add_permits(2);
    assert!(urgent.await.is_ok() && patient.await.is_ok());
}

#[tokio::test]
async fn a_bulk_scan_does_not_flush_ram() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let hot = random(&mut rng, 2 * G);
    let scan: Vec<_> = (0..6).map(|_| random(&mut rng, 2 * G)).collect();
    let source = Arc::new(Source::new(scan.iter().cloned().chain([hot.clone()])));
    let ladder = ladder(4 * G, Some(&dir), &source);
    let hot_read = ReadRequest::token(ShardId::of(&hot), range(0, 2 * G));
    ladder.read(hot_read).await.unwrap();
    for bytes in &scan {
        let found = ladder.read(bulk(ShardId::of(bytes), range(0, 2 * G))).await.unwrap();
        assert_eq!(found.bytes, bytes);
    }
    assert_eq!(ladder.read(hot_read).await.unwrap().tier, Tier::Ram);
    // Nor does one pass of reads that someone waits for; two passes do evict.
    let pass = || async {
        for bytes in &scan {
            ladder.read(ReadRequest::token(ShardId::of(bytes), range(0, 2 * G))).await.unwrap();
        }
    };
    pass().await;
    assert_eq!(ladder.read(hot_read).await.unwrap().tier, Tier::Ram);
    for bytes in &scan[..2] {
        for _ in 0..2 {
            ladder.read(ReadRequest::token(ShardId::of(bytes), range(0, 2 * G))).await.unwrap();
        }
    }
    ladder.flush().await.unwrap();
    assert_eq!(ladder.read(hot_read).await.unwrap().tier, Tier::Disk);
    let stats = ladder.stats();
    assert!(stats.ram_used_bytes <= 4 * G && stats.ram_evictions > 0, "{stats:?}");
    assert_eq!(ladder.complete().len(), 7, "all of it is on disk");
}

#[tokio::test]
async fn a_flipped_byte_on_disk_is_repaired_while_the_read_succeeds() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 10 * G + 3);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let source = Arc::new(Source::new([bytes.clone()]));
    let ladder = ladder(0, Some(&dir), &source);
    ladder.put(bytes.clone(), true).await.unwrap();
    let bad = rng.random_range(0..10);
    flip(&object_file(dir.path(), shard, ""), (bad * G) as usize + 1);
    let found = ladder.read(ReadRequest::token(shard, range(0, size))).await.unwrap();
    assert_eq!((found.tier, found.bytes), (Tier::Peer, bytes.clone()));
    assert_eq!(source.asked_ranges(), [range(bad * G, (bad + 1) * G)], "only the bad group");
    ladder.flush().await.unwrap();
    assert_eq!(ladder.complete(), [shard]);
    assert_eq!(ladder.stats().repaired_reads, 1);
    assert_eq!(std::fs::read(object_file(dir.path(), shard, "")).unwrap(), bytes);
    // Without a peer to repair it from, the read reports the damage.
    flip(&object_file(dir.path(), shard, ""), 0);
    let alone = Arc::new(Source::new([]));
    ladder.set_peers(Arc::clone(&alone) as _);
    let error = ladder.read(ReadRequest::token(shard, range(0, 1))).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
}

#[tokio::test]
async fn what_is_held_is_served_with_its_proof() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let nobody = Arc::new(Source::new([]));
    let bytes = random(&mut rng, 9 * G + 100);
    let size = bytes.len() as u64;
    for disk in [Some(&dir), None] {
        let ladder = ladder(ROOMY, disk, &nobody);
        let mut changes = ladder.changes();
        changes.mark_unchanged();
        let shard = ladder.put(bytes.clone(), true).await.unwrap();
        assert!(changes.has_changed().unwrap());
        assert_eq!(ladder.complete(), [shard]);
        let want = range(2 * G + 1, 6 * G);
        let encoded = ladder.encode(shard, want).await.unwrap();
        assert_eq!(encoded.size, size);
        let got = decode(shard, size, want, &mut &encoded.bytes[..]).await.unwrap();
        assert_eq!(got.slice(want).unwrap(), part(&bytes, want));
        let error = ladder.encode(ShardId::of(b"?"), want).await.unwrap_err();
        assert_eq!(error.label(), "not_found");
        let error = ladder.encode(shard, range(0, size + 1)).await.unwrap_err();
        assert_eq!(error.label(), "out_of_range");
        let error = ladder.encode(shard, range(0, SERVE_BYTES_MAX + 1)).await.unwrap_err();
        assert_eq!(error.label(), "refused");
    }
    // A partial object serves what it holds, and is not listed as complete.
    let half = random(&mut rng, 9 * G);
    let source = Arc::new(Source::new([half.clone()]));
    let ladder = ladder(ROOMY, Some(&dir), &source);
    let shard = ShardId::of(&half);
    ladder.read(ReadRequest::token(shard, range(0, 2 * G))).await.unwrap();
    ladder.flush().await.unwrap();
    assert!(ladder.encode(shard, range(G, 2 * G)).await.is_ok());
    assert_eq!(ladder.encode(shard, range(G, 3 * G)).await.unwrap_err().label(), "not_found");
    assert!(!ladder.complete().contains(&shard));
}

#[tokio::test]
async fn sizes_that_a_manifest_contradicts_are_refused() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 9 * G + 100);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let liar = Source { lie: Some(size + 1), ..Source::new([bytes.clone()]) };
    let ladder = ladder(ROOMY, Some(&dir), &Arc::new(liar));
    ladder.expect_sizes([(shard, size)]);
    let error = ladder.read(ReadRequest::token(shard, range(0, G))).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    ladder.set_peers(Arc::new(Source::new([bytes.clone()])));
    assert!(ladder.read(ReadRequest::token(shard, range(0, G))).await.is_ok());
    let cut = ladder.get_whole(shard, size - 1, Priority::Token, None).await.unwrap_err();
    assert!(matches!(cut, ReadError::Corrupt { .. }), "{cut}");
    let huge = ladder.read(ReadRequest::token(shard, range(0, 1 << 40))).await.unwrap_err();
    assert!(matches!(huge, ReadError::OutOfRange { .. }), "{huge}");
    let empty = ladder.get_whole(ShardId::of(b""), 0, Priority::Token, None).await.unwrap();
    assert!(empty.is_empty());
}

#[tokio::test]
async fn local_directories_are_read_before_peers() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let good = random(&mut rng, 4 * G);
    let bad = random(&mut rng, 4 * G);
    let shards = [("good.bin", &good), ("bad.bin", &bad)].map(|(name, bytes)| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        DirShard { shard: ShardId::of(bytes), path, size: bytes.len() as u64 }
    });
    flip(&shards[1].path, 7);
    let source = Arc::new(Source::new([bad.clone()]));
    let ladder = Ladder::new(
        LadderOptions { ram_budget: ROOMY },
        None,
        None,
        vec![Arc::new(DirReader::new(shards))],
    );
    let request = |bytes: &Bytes| ReadRequest::token(ShardId::of(bytes), range(1, 9));
    for tier in [Tier::Disk, Tier::Ram] {
        let found = ladder.read(request(&good)).await.unwrap();
        assert_eq!((found.tier, found.bytes), (tier, part(&good, range(1, 9))));
    }
    let error = ladder.read(request(&bad)).await.unwrap_err();
    assert!(error.to_string().contains("bad.bin"), "{error}");
    let unknown = random(&mut rng, 10);
    let error = ladder.read(request(&unknown)).await.unwrap_err();
    assert_eq!(error.label(), "not_found");
    ladder.set_peers(source);
    assert_eq!(ladder.read(request(&bad)).await.unwrap().tier, Tier::Peer);
}

#[tokio::test]
async fn without_a_disk_stored_objects_count_against_ram() {
    let mut rng = fresh_rng();
    let nobody = Arc::new(Source::new([]));
    let ladder = ladder(10 * G, None, &nobody);
    let bytes = random(&mut rng, 8 * G);
    let shard = ladder.put(bytes.clone(), true).await.unwrap();
    ladder.put(bytes.clone(), true).await.unwrap();
    let found = ladder.read(ReadRequest::token(shard, range(0, 8 * G))).await.unwrap();
    assert_eq!((found.tier, found.bytes), (Tier::Ram, bytes));
    let error = ladder.put(random(&mut rng, 3 * G), true).await.unwrap_err();
    assert!(matches!(error, StoreError::Memory { available, .. } if available == 2 * G));
    let import = ladder.import_file("x".into(), shard, true).await;
    assert!(matches!(import, Err(StoreError::NoDisk(_))));
}
