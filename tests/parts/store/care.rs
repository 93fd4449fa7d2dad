//! Store maintenance: collection, checks, repair, deadlines, pins in RAM, and what
//! a scan may evict.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use doppler_store::disk::{ImportMethod, Kept};
use doppler_store::{
    DiskTier, Ladder, LadderOptions, Priority, RangeReader, ReadError, ReadRequest, ShardId,
    ShardServe, Tier,
};
use futures::FutureExt;
use rand::RngExt;

use super::support::*;

const ROOMY: u64 = 1 << 30;
/// What an object of four groups counts against the budget: its bytes and three nodes.
const COST: u64 = 4 * G + 3 * 64;

async fn read_whole(disk: &DiskTier, bytes: &Bytes) {
    let got = disk.read(ShardId::of(bytes), range(0, bytes.len() as u64)).await.unwrap().unwrap();
    assert_eq!(got.bytes(), bytes);
}

fn ladder_on(disk: DiskTier, source: &Arc<Source>) -> Ladder {
    let ladder = Ladder::new(LadderOptions { ram_budget: 0 }, Some(Arc::new(disk)), None, vec![]);
    ladder.set_peers(Arc::clone(source) as _);
    ladder
}

#[tokio::test]
async fn a_collection_honours_pins_and_the_order_of_use() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (0..5).map(|_| random(&mut rng, 4 * G)).collect();
    let ids: Vec<_> = objects.iter().map(|bytes| ShardId::of(bytes)).collect();
    let disk = open(dir.path(), ROOMY);
    for (n, bytes) in objects.iter().enumerate() {
        disk.put(bytes.clone(), n == 0).await.unwrap();
    }
    // An object that is read twice is hot; one that is read once, in two parts, is not.
    for _ in 0..2 {
        read_whole(&disk, &objects[1]).await;
    }
    for part in [range(0, 2 * G), range(2 * G, 4 * G)] {
        disk.read(ids[2], part).await.unwrap().unwrap();
    }
    let nothing = disk.collect(None, false).await.unwrap();
    assert!(nothing.evicted.is_empty() && nothing.used_bytes == 5 * COST);

    let dry = disk.collect(Some(3 * COST), true).await.unwrap();
    assert_eq!(dry.evicted, [(ids[3], COST), (ids[4], COST)]);
    assert_eq!((dry.freed_bytes, dry.used_bytes), (2 * COST, 3 * COST));
    assert_eq!(disk.complete().len(), 5, "a dry run evicts nothing");
    let done = disk.collect(Some(3 * COST), false).await.unwrap();
    assert_eq!(done.evicted, dry.evicted);
    assert!(!object_file(dir.path(), ids[3], "").exists());

    let done = disk.collect(Some(2 * COST), false).await.unwrap();
    assert_eq!(done.evicted, [(ids[2], COST)], "the hot one stays");
    let done = disk.collect(Some(0), false).await.unwrap();
    assert_eq!(done.evicted, [(ids[1], COST)]);
    assert_eq!((done.used_bytes, done.pinned_bytes), (COST, COST), "the pinned one stays");
    assert!(done.reserve_held);
    read_whole(&disk, &objects[0]).await;

    // Hot objects are still hot after a restart.
    for (n, bytes) in objects.iter().enumerate().skip(1) {
        disk.put(bytes.clone(), false).await.unwrap();
        for _ in 0..if n == 1 { 2 } else { 1 } {
            read_whole(&disk, bytes).await;
        }
    }
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), ROOMY);
    again.collect(Some(2 * COST), false).await.unwrap();
    assert!(again.is_whole(ids[0]) && again.is_whole(ids[1]));
}

#[tokio::test]
async fn a_scan_over_more_than_fits_leaves_hot_objects_on_disk() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let hot: Vec<_> = (0..3).map(|_| random(&mut rng, 4 * G)).collect();
    let scan: Vec<_> = (0..20).map(|_| random(&mut rng, 4 * G)).collect();
    let source = Arc::new(Source::new(scan.iter().chain(&hot).cloned()));
    let disk = open(dir.path(), 5 * COST);
    let ladder = ladder_on(disk.clone(), &source);
    for bytes in hot.iter().chain(&hot) {
        let request = ReadRequest::token(ShardId::of(bytes), range(0, 4 * G));
        ladder.read(request).await.unwrap();
        ladder.flush().await.unwrap();
    }
    for bytes in &hot {
        read_whole(&disk, bytes).await;
    }
    // In pieces, as an engine reads experts.
    for bytes in &scan {
        for group in 0..4 {
            let part = range(group * G, (group + 1) * G);
            ladder.read(ReadRequest::token(ShardId::of(bytes), part)).await.unwrap();
        }
        ladder.flush().await.unwrap();
    }
    assert!(hot.iter().all(|bytes| disk.is_whole(ShardId::of(bytes))));
    assert!(disk.stats().evictions >= 18, "{:?}", disk.stats());
}

#[tokio::test]
async fn use_in_ram_keeps_an_object_on_disk() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (0..8).map(|_| random(&mut rng, 4 * G)).collect();
    let nobody = Arc::new(Source::new([]));
    let disk = open(dir.path(), 4 * COST);
    let options = LadderOptions { ram_budget: ROOMY };
    let ladder = Ladder::new(options, Some(Arc::new(disk.clone())), Some(nobody), vec![]);
    disk.put(objects[0].clone(), false).await.unwrap();
    let request = ReadRequest::token(ShardId::of(&objects[0]), range(0, G));
    for tier in [Tier::Disk, Tier::Ram] {
        assert_eq!(ladder.read(request).await.unwrap().tier, tier);
    }
    for bytes in &objects[1..] {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    assert!(disk.is_whole(ShardId::of(&objects[0])));
    assert!(!disk.is_whole(ShardId::of(&objects[1])));
}

#[tokio::test]
async fn a_check_finds_every_damaged_range_and_a_wrong_outboard() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let whole = random(&mut rng, 40 * G + 77);
    let half = random(&mut rng, 30 * G);
    let small = random(&mut rng, 5);
    let shard = ShardId::of(&whole);
    let disk = open(dir.path(), ROOMY);
    disk.put(whole.clone(), true).await.unwrap();
    disk.put(small.clone(), false).await.unwrap();
    disk.keep(proved(&half, range(3 * G, 20 * G))).await.unwrap();
    disk.flush().await.unwrap();
    for bytes in [&whole, &half, &small] {
        let checkup = disk.check(ShardId::of(bytes)).await.unwrap().unwrap();
        assert!(checkup.damaged.is_empty() && !checkup.outboard_rewritten, "{checkup:?}");
        assert_eq!(checkup.size, bytes.len() as u64);
    }
    assert_eq!(disk.check(ShardId::of(b"?")).await.unwrap(), None);

    let obao = object_file(dir.path(), shard, ".obao");
    let good = fs::read(&obao).unwrap();
    flip(&obao, rng.random_range(0..good.len()));
    let checkup = disk.check(shard).await.unwrap().unwrap();
    assert!(checkup.damaged.is_empty() && checkup.outboard_rewritten);
    assert_eq!(fs::read(&obao).unwrap(), good);

    let file = object_file(dir.path(), shard, "");
    for at in [7 * G + 3, 8 * G, 30 * G + 1, 40 * G + 76] {
        flip(&file, at as usize);
    }
    flip(&object_file(dir.path(), ShardId::of(&half), ".part"), (5 * G) as usize);
    flip(&object_file(dir.path(), ShardId::of(&small), ""), 4);
    let checkup = disk.check(shard).await.unwrap().unwrap();
    let bad = [range(7 * G, 9 * G), range(30 * G, 31 * G), range(40 * G, 40 * G + 77)];
    assert_eq!(checkup.damaged, bad);
    assert_eq!((checkup.checked_bytes, checkup.damaged_bytes()), (40 * G + 77, 3 * G + 77));
    let checkup = disk.check(ShardId::of(&half)).await.unwrap().unwrap();
    assert_eq!(checkup.damaged, [range(5 * G, 6 * G)]);
    assert_eq!(checkup.checked_bytes, 17 * G, "only what is held");
    let checkup = disk.check(ShardId::of(&small)).await.unwrap().unwrap();
    assert_eq!(checkup.damaged, [range(0, 5)]);
    let stats = disk.stats();
    assert_eq!((stats.quarantines, stats.damaged_bytes), (3, 4 * G + 77 + 5));
    assert!(disk.complete().is_empty());

    // The quarantined groups are fetched from peers, and the objects check out again.
    let source = Arc::new(Source::new([whole.clone(), half.clone(), small.clone()]));
    let ladder = ladder_on(disk.clone(), &source);
    assert_eq!(ladder.repair(shard).await.unwrap(), 3 * G + 77);
    assert_eq!(source.asked_ranges(), bad);
    assert_eq!(ladder.repair(ShardId::of(&half)).await.unwrap(), 14 * G);
    assert_eq!(ladder.repair(ShardId::of(&small)).await.unwrap(), 5);
    assert_eq!(ladder.repair(shard).await.unwrap(), 0);
    for bytes in [&whole, &half, &small] {
        let checkup = disk.check(ShardId::of(bytes)).await.unwrap().unwrap();
        assert_eq!(checkup.checked_bytes, bytes.len() as u64);
        assert!(checkup.damaged.is_empty());
        read_whole(&disk, bytes).await;
    }
    assert!(disk.is_pinned(shard));
}

#[tokio::test]
async fn damage_done_while_stopped_is_reported_and_pins_are_kept() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let cut = random(&mut rng, 9 * G);
    let emptied = random(&mut rng, 3 * G);
    let gone = random(&mut rng, 2 * G);
    let disk = open(dir.path(), ROOMY);
    for (bytes, pin) in [(&cut, true), (&emptied, true), (&gone, false)] {
        disk.put(bytes.clone(), pin).await.unwrap();
    }
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let path = |bytes: &Bytes| object_file(killed.path(), ShardId::of(bytes), "");
    fs::write(path(&cut), &cut[..4 * G as usize + 9]).unwrap();
    fs::write(path(&emptied), b"").unwrap();
    fs::write(path(&gone), b"").unwrap();
    for _ in 0..2 {
        // Opened again: no new damage is reported, and nothing is lost.
        let again = open(killed.path(), ROOMY);
        let damage = again.damage_at_open();
        assert!(again.complete().is_empty());
        assert!(again.is_pinned(ShardId::of(&cut)) && again.is_pinned(ShardId::of(&emptied)));
        assert!(!again.list().await.unwrap().iter().any(|o| o.shard == ShardId::of(&gone)));
        if !damage.is_empty() {
            let lost: u64 = damage.iter().map(|checkup| checkup.damaged_bytes()).sum();
            assert_eq!((damage.len(), lost), (3, 5 * G + 3 * G), "{damage:?}");
        }
    }
    let source = Arc::new(Source::new([cut.clone(), emptied.clone()]));
    let again = open(killed.path(), ROOMY);
    let ladder = ladder_on(again.clone(), &source);
    for bytes in [&cut, &emptied] {
        assert!(ladder.repair(ShardId::of(bytes)).await.unwrap() > 0);
        read_whole(&again, bytes).await;
        assert!(again.is_pinned(ShardId::of(bytes)));
    }
}

#[tokio::test]
async fn two_stores_repair_each_other_while_readers_get_correct_bytes() {
    let mut rng = fresh_rng();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let bytes = random(&mut rng, 50 * G + 11);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let stores = [0, 1].map(|n| {
        let disk = Some(Arc::new(open(dirs[n].path(), ROOMY)));
        Ladder::new(LadderOptions { ram_budget: 0 }, disk, None, vec![])
    });
    for (n, store) in stores.iter().enumerate() {
        store.set_peers(Arc::new(Neighbour(stores[1 - n].clone())));
        store.put(bytes.clone(), true).await.unwrap();
    }
    // Different groups are damaged in each store, so together they have everything.
    for round in 0..3 {
        let mut places: Vec<u64> = (0..50).collect();
        for dir in &dirs {
            for _ in 0..4 {
                let group = places.swap_remove(rng.random_range(0..places.len()));
                let at = group * G + rng.random_range(0..G);
                flip(&object_file(dir.path(), shard, ""), at as usize);
            }
        }
        for store in &stores {
            let start = rng.random_range(0..size);
            let want = range(start, rng.random_range(start + 1..=size));
            let found = store.read(ReadRequest::token(shard, want)).await.unwrap();
            assert_eq!(found.bytes, part(&bytes, want), "round {round}");
            let all = store.read(ReadRequest::token(shard, range(0, size))).await.unwrap();
            assert_eq!(all.bytes, bytes, "round {round}");
            // Serving finds damage too, and refuses instead of sending wrong bytes.
            let _ = store.encode(shard, range(0, G)).await;
        }
        for (store, dir) in stores.iter().zip(&dirs) {
            store.flush().await.unwrap();
            store.repair(shard).await.unwrap();
            assert_eq!(store.complete(), [shard], "round {round}");
            assert_eq!(fs::read(object_file(dir.path(), shard, "")).unwrap(), bytes);
        }
    }
    let stats = stores[0].stats();
    assert!(stats.disk_tier.unwrap().quarantines >= 3, "{stats:?}");
}

#[tokio::test]
async fn damage_found_by_serving_is_repaired_in_the_background() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 9 * G);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::new([bytes.clone()]));
    let ladder = ladder_on(open(dir.path(), ROOMY), &source);
    ladder.put(bytes.clone(), false).await.unwrap();
    let mut changes = ladder.changes();
    changes.mark_unchanged();
    flip(&object_file(dir.path(), shard, ""), 3 * G as usize);
    let error = ladder.encode(shard, range(2 * G, 5 * G)).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    while ladder.complete() != [shard] {
        changes.changed().await.unwrap();
    }
    assert_eq!(source.asked_ranges(), [range(3 * G, 4 * G)]);
    assert!(ladder.encode(shard, range(2 * G, 5 * G)).await.is_ok());
    assert_eq!(fs::read(object_file(dir.path(), shard, "")).unwrap(), bytes);
}

#[tokio::test]
async fn a_read_ends_at_its_deadline_whatever_it_waits_for() {
    let mut rng = fresh_rng();
    let bytes = random(&mut rng, 8 * G);
    let shard = ShardId::of(&bytes);
    let source = Arc::new(Source::held_back([bytes.clone()]));
    let dir = tempfile::tempdir().unwrap();
    let ladder = Ladder::new(
        LadderOptions { ram_budget: ROOMY },
        Some(Arc::new(open(dir.path(), ROOMY))),
        None,
        vec![],
    );
    ladder.set_peers(Arc::clone(&source) as _);
    let soon = Some(Instant::now() + Duration::from_millis(400));
    let hurried = ReadRequest { deadline: soon, ..ReadRequest::token(shard, range(0, G)) };
    // The source never answers. A patient reader of the same range is not affected.
    let mut patient = ladder.read(ReadRequest::token(shard, range(0, G)));
    assert!((&mut patient).now_or_never().is_none());
    let error = ladder.read(hurried).await.unwrap_err();
    assert!(matches!(error, ReadError::Deadline { .. }), "{error}");
    let asked = source.asked.lock().unwrap().iter().any(|request| request.deadline == soon);
    assert!(asked, "the source gets the deadline");
    // The deadline has already passed: no source is asked.
    let before = source.asked_ranges().len();
    let late = ReadRequest { priority: Priority::Bulk, range: range(G, 2 * G), ..hurried };
    let error = ladder.read(late).await.unwrap_err();
    assert!(matches!(error, ReadError::Deadline { .. }), "{error}");
    assert_eq!(source.asked_ranges().len(), before);
    source.gate.add_permits(10);
    assert_eq!(patient.await.unwrap().bytes, part(&bytes, range(0, G)));
    // What RAM holds is returned even after the deadline.
    assert_eq!(ladder.read(hurried).await.unwrap().tier, Tier::Ram);
}

#[tokio::test]
async fn a_range_pinned_in_ram_stays_there() {
    let mut rng = fresh_rng();
    let wanted = random(&mut rng, 4 * G);
    let others: Vec<_> = (0..20).map(|_| random(&mut rng, 2 * G)).collect();
    let source = Arc::new(Source::new(others.iter().cloned().chain([wanted.clone()])));
    let ladder = Ladder::new(LadderOptions { ram_budget: 6 * G }, None, None, vec![]);
    ladder.set_peers(source);
    let request = ReadRequest::token(ShardId::of(&wanted), range(3, 4 * G));
    assert_eq!(ladder.pin_in_ram(request).await.unwrap().tier, Tier::Peer);
    let more = ReadRequest::token(ShardId::of(&others[0]), range(0, 2 * G));
    let too_much = {
        ladder.pin_in_ram(more).await.unwrap();
        ladder.pin_in_ram(ReadRequest { shard: ShardId::of(&others[1]), ..more }).await
    };
    assert!(matches!(too_much, Err(ReadError::Refused(_))), "{too_much:?}");
    assert!(ladder.unpin_in_ram(more.shard, more.range));
    for bytes in others.iter().chain(&others) {
        let read = ReadRequest::token(ShardId::of(bytes), range(0, 2 * G));
        assert_eq!(ladder.read(read).await.unwrap().bytes, bytes);
    }
    assert_eq!(ladder.read(request).await.unwrap().tier, Tier::Ram);
    assert!(ladder.unpin_in_ram(request.shard, request.range));
    assert!(!ladder.unpin_in_ram(request.shard, request.range));
}

#[tokio::test]
async fn a_file_on_another_file_system_is_copied() {
    let mut rng = fresh_rng();
    let here = tempfile::tempdir().unwrap();
    let Ok(there) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: there is no /dev/shm to import from");
        return;
    };
    if device(here.path()) == device(there.path()) {
        println!("skipped: /dev/shm and the temporary directory are on one file system");
        return;
    }
    let bytes = random(&mut rng, 5 * G + 1);
    let source = there.path().join("shard_00000.bin");
    fs::write(&source, &bytes).unwrap();
    let mut permissions = fs::metadata(&source).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&source, permissions).unwrap();
    let disk = open(here.path(), ROOMY);
    let imported = disk.import(source.clone(), ShardId::of(&bytes), false).await.unwrap();
    assert_eq!(imported.how, Some(ImportMethod::Copied));
    let kept = object_file(here.path(), ShardId::of(&bytes), "");
    assert!(!fs::metadata(&kept).unwrap().permissions().readonly(), "it can be repaired");
    fs::remove_file(&source).unwrap();
    read_whole(&disk, &bytes).await;
}

#[tokio::test]
async fn a_linked_file_that_its_owner_rewrites_is_detected_and_repaired_in_a_copy() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 20 * G);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let owned = dir.path().join("shard_00000.bin");
    fs::write(&owned, &bytes).unwrap();
    let data = dir.path().join("data");
    let disk = open(&data, ROOMY);
    let imported = disk.import(owned.clone(), shard, true).await.unwrap();
    let source = Arc::new(Source::new([bytes.clone()]));
    let ladder = ladder_on(disk.clone(), &source);
    // Rewritten in place and shorter: missing and changed groups are both detected.
    let rewritten = random(&mut rng, 12 * G);
    fs::write(&owned, &rewritten).unwrap();
    let found = ladder.read(ReadRequest::token(shard, range(1, size))).await.unwrap();
    assert_eq!(found.bytes, part(&bytes, range(1, size)));
    ladder.flush().await.unwrap();
    ladder.repair(shard).await.unwrap();
    read_whole(&disk, &bytes).await;
    assert_eq!(fs::read(&owned).unwrap(), rewritten, "the owner's file is not touched");
    if imported.how == Some(ImportMethod::Linked) {
        assert_eq!(ladder.stats().repaired_reads, 1);
        assert_ne!(device(&owned).1, device(&object_file(&data, shard, "")).1);
    }
}

#[tokio::test]
async fn a_pin_survives_a_size_that_was_only_claimed() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let bytes = random(&mut rng, 20 * G + 5);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    disk.keep(proved_as(&bytes, range(0, 2 * G), size + 3 * G)).await.unwrap();
    disk.pin(shard).await.unwrap();
    assert_eq!(disk.keep(proved(&bytes, range(19 * G, size))).await.unwrap(), Kept::Part);
    assert!(disk.is_pinned(shard));
    disk.flush().await.unwrap();
    assert!(open(as_if_killed(dir.path()).path(), ROOMY).is_pinned(shard));
}
