//! A store under bad conditions: no space, no permission, a wrong clock. It works
//! correctly or reports a clear error, and loses nothing.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use doppler_store::{
    DiskOptions, DiskTier, Ladder, LadderOptions, ModelId, RangeReader, ReadRequest, ShardId,
    StoreError, Tier,
};
use rand::RngExt;
use rand::rngs::StdRng;

use super::support::*;
use crate::small::Small;

const ROOMY: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

async fn all_there(disk: &DiskTier, objects: &[Bytes]) {
    for bytes in objects {
        let whole = range(0, bytes.len() as u64);
        let got = disk.read(ShardId::of(bytes), whole).await.unwrap();
        assert_eq!(got.unwrap().bytes(), bytes);
    }
}

fn objects(rng: &mut StdRng, count: usize, size: u64) -> Vec<Bytes> {
    (0..count).map(|_| random(rng, size)).collect()
}

#[tokio::test]
async fn a_full_disk_evicts_unpinned_objects_is_reported_and_loses_nothing() {
    let Some(small) = Small::mount(24 * MIB) else { return };
    let mut rng = fresh_rng();
    let data = small.at.join("data");
    let disk = open(&data, ROOMY);
    assert!(disk.stats().reserve_held);
    let pinned = objects(&mut rng, 3, 2 * MIB);
    for bytes in &pinned {
        disk.put(bytes.clone(), true).await.unwrap();
    }
    // Each unpinned object replaces the one before: the disk is the budget.
    let mut last = Vec::new();
    for bytes in objects(&mut rng, 12, 2 * MIB) {
        disk.put(bytes.clone(), false).await.unwrap();
        last = vec![bytes];
    }
    assert!(disk.stats().evictions > 0);
    all_there(&disk, &pinned).await;
    all_there(&disk, &last).await;
    // When only pinned objects are left, the error says so, and no temporary file remains.
    disk.collect(Some(0), false).await.unwrap();
    small.fill(0);
    let more = random(&mut rng, 2 * MIB);
    let error = disk.put(more.clone(), true).await.unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error}");
    assert_eq!(error.label(), "disk_full");
    let size = 2 * MIB + more_outboard();
    let needed = format!("bytes are missing ({size} bytes needed");
    for word in ["the disk is full", &needed, "doppler-node gc"] {
        assert!(error.to_string().contains(word), "{word:?} is not in {error}");
    }
    let wanted = vec![(ShardId::of(&more), 2 * MIB), (ShardId::of(&pinned[0]), 2 * MIB)];
    let error = disk.check_space(wanted).await.unwrap_err();
    let StoreError::Full { lack: Some(lack), .. } = error else { panic!("{error}") };
    assert_eq!(lack.needed, size, "what is here needs nothing");
    assert!(lack.available < MIB, "{lack}");
    let kept = disk.keep(proved(&more, range(0, 4 * G))).await;
    assert!(matches!(kept, Err(StoreError::Full { .. })), "{kept:?}");
    let file = small.at.join("elsewhere.bin");
    assert!(fs::write(&file, &more).is_err(), "it is full");
    assert_eq!(disk.stats().used_bytes, disk.stats().pinned_bytes);
    assert_eq!(fs::read_dir(data.join("tmp")).unwrap().count(), 0);
    all_there(&disk, &pinned).await;
    // A reader still gets the bytes.
    let source = Arc::new(Source::new([more.clone()]));
    let ladder = Ladder::new(
        LadderOptions { ram_budget: 0 },
        Some(Arc::new(disk.clone())),
        Some(source),
        vec![],
    );
    let request = ReadRequest::token(ShardId::of(&more), range(5, 9 * G));
    let found = ladder.read(request).await.unwrap();
    assert_eq!((found.tier, found.bytes), (Tier::Peer, part(&more, range(5, 9 * G))));
    ladder.flush().await.unwrap();
    assert_eq!(ladder.stats().not_kept, 1);
    // Damage is recorded even now: that is what the reserve is for.
    flip_in_place(&object_file(&data, ShardId::of(&pinned[0]), ""), 3 * G);
    let checkup = disk.check(ShardId::of(&pinned[0])).await.unwrap().unwrap();
    assert_eq!(checkup.damaged, [range(3 * G, 4 * G)]);
    drop((ladder, disk));

    // Reopened on the full disk, the store can be read and cleaned.
    small.fill(0);
    let disk = open(&data, ROOMY);
    all_there(&disk, &pinned[1..]).await;
    assert!(disk.is_pinned(ShardId::of(&pinned[0])));
    disk.unpin(ShardId::of(&pinned[1])).await.unwrap();
    let done = disk.collect(Some(0), false).await.unwrap();
    assert_eq!(done.evicted.len(), 1);
    fs::remove_file(small.at.join("ballast")).unwrap();
    assert!(disk.collect(None, false).await.unwrap().reserve_held, "set aside again");
    disk.put(more.clone(), true).await.unwrap();
    all_there(&disk, &[more, pinned[2].clone()]).await;
}

#[tokio::test]
async fn pins_are_written_down_on_a_full_disk() {
    let Some(small) = Small::mount(24 * MIB) else { return };
    let (data, bytes) = (small.at.join("data"), random(&mut fresh_rng(), 2 * MIB));
    let (shard, model) = (ShardId::of(&bytes), ModelId::of(b"a model"));
    let disk = open(&data, ROOMY);
    disk.put(bytes, false).await.unwrap();
    assert!(disk.stats().reserve_held);
    small.fill(0);
    // What a pin protects must not go, so it takes the reserve.
    for _ in 0..2 {
        disk.pin_model(model, "m".to_owned(), vec![(shard, 2 * MIB)]).await.unwrap();
        assert!(open(as_if_killed(&data).path(), ROOMY).is_pinned(shard));
        disk.unpin_model(model).await.unwrap();
        disk.pin(shard).await.unwrap();
        assert!(open(as_if_killed(&data).path(), ROOMY).is_pinned(shard));
        disk.unpin(shard).await.unwrap();
    }
    assert!(!open(as_if_killed(&data).path(), ROOMY).is_pinned(shard));
}

/// Bytes of the outboard of an object of 2 MiB: a node of 64 bytes for each group but one.
const fn more_outboard() -> u64 {
    (2 * MIB / G - 1) * 64
}

fn flip_in_place(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test]
async fn a_new_store_on_a_full_disk_is_refused_by_name() {
    let Some(small) = Small::mount(2 * MIB) else { return };
    small.fill(0);
    let data = small.at.join("data");
    match DiskTier::open(&data, DiskOptions { budget: ROOMY }) {
        Err(error) => {
            assert!(matches!(error, StoreError::Full { .. }), "{error}");
            assert!(error.to_string().contains(data.to_str().unwrap()), "{error}");
        }
        // Directories may need no space; then the first write fails.
        Ok(disk) => {
            let error = disk.put(Bytes::from(vec![1; 1 << 18]), false).await.unwrap_err();
            assert!(matches!(error, StoreError::Full { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn a_read_only_data_directory_is_refused_and_one_that_becomes_so_still_reads() {
    let Some(small) = Small::mount(32 * MIB) else { return };
    let mut rng = fresh_rng();
    let data = small.at.join("data");
    let stored = objects(&mut rng, 3, MIB);
    {
        let disk = open(&data, ROOMY);
        for bytes in &stored {
            disk.put(bytes.clone(), true).await.unwrap();
        }
        disk.flush().await.unwrap();
    }
    if !small.remount("ro") {
        println!("skipped: the tmpfs cannot be made read-only");
        return;
    }
    let error = DiskTier::open(&data, DiskOptions { budget: ROOMY }).err().unwrap();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert!(error.to_string().contains(data.to_str().unwrap()), "{error}");
    assert!(small.remount("rw"));
    let disk = open(&data, ROOMY);
    all_there(&disk, &stored).await;
}

#[tokio::test]
async fn a_wrong_clock_changes_nothing() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects = objects(&mut rng, 6, 3 * G);
    let cost = 3 * G + 2 * 64;
    let disk = open(dir.path(), 6 * cost);
    for bytes in &objects {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    all_there(&disk, &objects[..1]).await;
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let hour = Duration::from_secs(3600);
    shift_times(killed.path(), &mut |_| {
        if rng.random() { SystemTime::now() + hour } else { SystemTime::now() - hour }
    });
    let again = open(killed.path(), 6 * cost);
    all_there(&again, &objects).await;
    drop(again);
    shift_times(killed.path(), &mut |_| SystemTime::UNIX_EPOCH);
    // The order of use is counted in uses, not in time.
    let again = open(killed.path(), 6 * cost);
    let done = again.collect(Some(3 * cost), false).await.unwrap();
    let evicted: Vec<_> = done.evicted.iter().map(|(shard, _)| *shard).collect();
    let expected: Vec<_> = objects[1..4].iter().map(|bytes| ShardId::of(bytes)).collect();
    assert_eq!(evicted, expected);
}

/// Sets the modification time of every file below `dir`.
fn shift_times(dir: &Path, to: &mut dyn FnMut(&Path) -> SystemTime) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            shift_times(&path, to);
        } else {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_modified(to(&path)).unwrap();
        }
    }
}
