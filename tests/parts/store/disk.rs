//! The disk tier: durability, damage, budgets, pins, import.

use std::fs;

use bytes::Bytes;
use doppler_store::disk::{ImportMethod, Kept};
use doppler_store::{DiskOptions, DiskTier, Imported, ReadError, ShardId, StoreError};
use rand::RngExt;

use super::support::*;

const ROOMY: u64 = 1 << 30;

async fn read_all(disk: &DiskTier, bytes: &Bytes) -> Option<Bytes> {
    let whole = range(0, bytes.len() as u64);
    disk.read(ShardId::of(bytes), whole).await.unwrap().map(|proved| proved.bytes().clone())
}

#[tokio::test]
async fn what_was_put_survives_a_kill_at_any_size() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let sizes = [0, 1, 1000, G - 1, G, G + 1, 2 * G, 7 * G + 13, 100 * G];
    let objects: Vec<_> = sizes.map(|size| random(&mut rng, size)).to_vec();
    for (n, bytes) in objects.iter().enumerate() {
        assert_eq!(disk.put(bytes.clone(), n % 2 == 0).await.unwrap(), ShardId::of(bytes));
    }
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), ROOMY);
    assert_eq!(again.complete().len(), sizes.len());
    assert_eq!(again.stats().used_bytes, disk.stats().used_bytes);
    for (n, bytes) in objects.iter().enumerate() {
        let shard = ShardId::of(bytes);
        assert!(again.is_whole(shard));
        assert_eq!(again.is_pinned(shard), n % 2 == 0);
        let size = bytes.len() as u64;
        if size > 0 {
            assert_eq!(read_all(&again, bytes).await.as_ref(), Some(bytes));
            let start = rng.random_range(0..size);
            let want = range(start, rng.random_range(start + 1..=size));
            let proved = again.read(shard, want).await.unwrap().unwrap();
            assert_eq!(proved.slice(want).unwrap(), part(bytes, want));
            let past = again.read(shard, range(0, size + 1)).await;
            assert!(matches!(past, Err(ReadError::OutOfRange { .. })));
        }
    }
    assert!(again.read(ShardId::of(b"never stored"), range(0, 1)).await.unwrap().is_none());
}

#[tokio::test]
async fn ranges_make_a_partial_object_and_the_last_one_makes_it_whole() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let bytes = random(&mut rng, 40 * G + 77);
    let size = bytes.len() as u64;
    let shard = ShardId::of(&bytes);
    let mut changes = disk.changes();
    changes.mark_unchanged();
    assert_eq!(disk.keep(proved(&bytes, range(3 * G, 9 * G))).await.unwrap(), Kept::Part);
    assert_eq!(disk.keep(proved(&bytes, range(5 * G, 6 * G))).await.unwrap(), Kept::Already);
    assert!(disk.read(shard, range(3 * G, 9 * G + 1)).await.unwrap().is_none());
    let got = disk.read(shard, range(4 * G, 8 * G)).await.unwrap().unwrap();
    assert_eq!(got.bytes(), &part(&bytes, range(4 * G, 8 * G)));
    assert!(disk.complete().is_empty() && !changes.has_changed().unwrap());

    // Nothing is reported durable yet, so a kill may lose these ranges, but nothing else.
    let killed = as_if_killed(dir.path());
    assert!(open(killed.path(), ROOMY).read(shard, range(3 * G, 4 * G)).await.unwrap().is_none());
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), ROOMY);
    assert!(again.read(shard, range(3 * G, 9 * G)).await.unwrap().is_some());
    assert_eq!(again.stats().part_objects, 1);

    // The rest arrives in any order, in the reopened store.
    let mut starts: Vec<u64> = (0..41).collect();
    while !starts.is_empty() {
        let group = starts.swap_remove(rng.random_range(0..starts.len()));
        let piece = proved(&bytes, range(group * G, ((group + 1) * G).min(size)));
        again.keep(piece).await.unwrap();
    }
    assert_eq!(again.complete(), [shard]);
    assert_eq!(read_all(&again, &bytes).await.as_ref(), Some(&bytes));
    assert_eq!(fs::read(object_file(killed.path(), shard, "")).unwrap(), bytes);
    assert!(!object_file(killed.path(), shard, ".have").exists());
    let twice = as_if_killed(killed.path());
    assert_eq!(read_all(&open(twice.path(), ROOMY), &bytes).await.as_ref(), Some(&bytes));
}

#[tokio::test]
async fn the_index_is_only_a_cache() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let whole = random(&mut rng, 5 * G + 1);
    let half = random(&mut rng, 9 * G);
    disk.put(whole.clone(), true).await.unwrap();
    disk.keep(proved(&half, range(G, 4 * G))).await.unwrap();
    disk.flush().await.unwrap();
    let used = disk.stats().used_bytes;
    for damage in ["none", "gone", "garbage", "emptied"] {
        let killed = as_if_killed(dir.path());
        let index = killed.path().join("index");
        match damage {
            "gone" => fs::remove_dir_all(&index).unwrap(),
            "garbage" => {
                fs::write(index.join("db"), random(&mut rng, 100_000)).unwrap();
                fs::write(index.join("conf"), random(&mut rng, 64)).unwrap();
            }
            "emptied" => fs::write(index.join("db"), b"").unwrap(),
            _ => {}
        }
        let again = open(killed.path(), ROOMY);
        assert_eq!(read_all(&again, &whole).await.as_ref(), Some(&whole), "{damage}");
        assert!(again.is_pinned(ShardId::of(&whole)), "{damage}");
        let piece = again.read(ShardId::of(&half), range(G, 4 * G)).await.unwrap();
        assert_eq!(piece.unwrap().bytes(), &part(&half, range(G, 4 * G)), "{damage}");
        assert_eq!(again.stats().used_bytes, used, "{damage}");
    }
}

#[tokio::test]
async fn a_flipped_byte_is_quarantined_and_can_be_fetched_again() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 20 * G + 5);
    let shard = ShardId::of(&bytes);
    let disk = open(dir.path(), ROOMY);
    disk.put(bytes.clone(), true).await.unwrap();
    let bad_group = rng.random_range(0..21);
    let at = (bad_group * G) as usize + rng.random_range(0..5);
    flip(&object_file(dir.path(), shard, ""), at);
    let group = range(bad_group * G, ((bad_group + 1) * G).min(bytes.len() as u64));

    let error = disk.read(shard, range(0, bytes.len() as u64)).await.unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { .. }), "{error}");
    assert!(disk.complete().is_empty(), "it is no longer whole");
    assert!(disk.is_pinned(shard), "still pinned");
    assert_eq!(disk.stats().quarantines, 1);
    assert!(disk.read(shard, group).await.unwrap().is_none());
    for other in (0..21).filter(|n| *n != bad_group) {
        let other = range(other * G, ((other + 1) * G).min(bytes.len() as u64));
        assert!(disk.read(shard, other).await.unwrap().is_some());
    }
    // The quarantine survives a kill.
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), ROOMY);
    assert!(again.complete().is_empty() && again.is_pinned(shard));
    assert_eq!(again.keep(proved(&bytes, group)).await.unwrap(), Kept::Whole);
    assert_eq!(read_all(&again, &bytes).await.as_ref(), Some(&bytes));
}

#[tokio::test]
async fn a_damaged_outboard_is_rebuilt_from_sound_bytes() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 20 * G + 5);
    let shard = ShardId::of(&bytes);
    open(dir.path(), ROOMY).put(bytes.clone(), false).await.unwrap();
    let obao = object_file(dir.path(), shard, ".obao");
    let good = fs::read(&obao).unwrap();
    for damage in ["flipped", "cut", "gone"] {
        let killed = as_if_killed(dir.path());
        let obao = object_file(killed.path(), shard, ".obao");
        match damage {
            "flipped" => flip(&obao, rng.random_range(0..good.len())),
            "cut" => fs::write(&obao, &good[..good.len() - 1]).unwrap(),
            _ => fs::remove_file(&obao).unwrap(),
        }
        let disk = open(killed.path(), ROOMY);
        assert_eq!(read_all(&disk, &bytes).await.as_ref(), Some(&bytes), "{damage}");
        assert_eq!(disk.complete(), [shard], "{damage}");
        assert_eq!(fs::read(&obao).unwrap(), good, "{damage}");
        assert_eq!(disk.stats().quarantines, 0);
    }
}

#[tokio::test]
async fn truncated_garbled_or_removed_files_claim_nothing_false() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let bytes = random(&mut rng, 20 * G + 5);
    let shard = ShardId::of(&bytes);
    disk.put(bytes.clone(), false).await.unwrap();
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let file = object_file(killed.path(), shard, "");
    fs::write(&file, &bytes[..12 * G as usize + 100]).unwrap();
    let again = open(killed.path(), ROOMY);
    assert!(again.complete().is_empty());
    let sound = again.read(shard, range(0, 12 * G)).await.unwrap();
    assert_eq!(sound.unwrap().bytes(), &part(&bytes, range(0, 12 * G)), "what is sound is kept");
    assert!(again.read(shard, range(12 * G, 13 * G)).await.unwrap().is_none());

    // Truncated within the last group, which the outboard's length cannot reveal.
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let killed = as_if_killed(killed.path());
    fs::write(object_file(killed.path(), shard, ""), &bytes[..bytes.len() - 1]).unwrap();
    fs::copy(object_file(dir.path(), shard, ".obao"), object_file(killed.path(), shard, ".obao"))
        .unwrap();
    let again = open(killed.path(), ROOMY);
    assert!(again.read(shard, range(0, 20 * G)).await.unwrap().is_some());
    let last = proved(&bytes, range(20 * G, 20 * G + 5));
    assert_eq!(again.keep(last).await.unwrap(), Kept::Whole);

    // A partial object whose have-file is damaged is verified group by group.
    let half = random(&mut rng, 9 * G);
    disk.keep(proved(&half, range(G, 4 * G))).await.unwrap();
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    flip(&object_file(killed.path(), ShardId::of(&half), ".have"), 20);
    let again = open(killed.path(), ROOMY);
    assert!(again.read(ShardId::of(&half), range(G, 4 * G)).await.unwrap().is_some());
    assert!(again.read(ShardId::of(&half), range(0, G)).await.unwrap().is_none());

    // Files removed while the store is open.
    fs::remove_file(object_file(dir.path(), shard, "")).unwrap();
    fs::remove_file(object_file(dir.path(), shard, ".obao")).unwrap();
    let fresh = open(as_if_killed(dir.path()).path(), ROOMY);
    assert!(fresh.read(shard, range(0, 1)).await.unwrap().is_none());
    assert!(disk.read(shard, range(0, 1)).await.unwrap().is_none());
    assert!(disk.complete().is_empty());
}

#[tokio::test]
async fn the_budget_evicts_the_least_recently_used_and_never_the_pinned() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    // Each object: 4 groups and 3 nodes.
    let cost = 4 * G + 3 * 64;
    let objects: Vec<_> = (0..5).map(|_| random(&mut rng, 4 * G)).collect();
    let ids: Vec<_> = objects.iter().map(|bytes| ShardId::of(bytes)).collect();
    let disk = open(dir.path(), 3 * cost);
    disk.put(objects[0].clone(), true).await.unwrap();
    disk.put(objects[1].clone(), false).await.unwrap();
    disk.keep(proved(&objects[2], range(0, 4 * G))).await.unwrap();
    assert_eq!(disk.stats().used_bytes, 3 * cost);
    assert!(read_all(&disk, &objects[1]).await.is_some());
    disk.keep(proved(&objects[3], range(0, 4 * G))).await.unwrap();
    assert!(disk.is_whole(ids[1]) && !disk.is_whole(ids[2]), "the one used longer ago is evicted");
    assert!(!object_file(dir.path(), ids[2], "").exists());
    assert_eq!((disk.stats().evictions, disk.stats().used_bytes), (1, 3 * cost));

    disk.pin(ids[1]).await.unwrap();
    assert!(matches!(disk.pin(ids[2]).await, Err(StoreError::NotHeld(_))));
    disk.put(objects[4].clone(), true).await.unwrap();
    assert!(!disk.is_whole(ids[3]));
    let error = disk.put(objects[3].clone(), true).await.unwrap_err();
    let StoreError::Budget { needed, available, budget } = error else { panic!("{error}") };
    assert_eq!((needed, available, budget), (cost, 0, 3 * cost));
    assert!(disk.keep(proved(&objects[3], range(0, G))).await.is_err());
    let new = ids[3];
    assert!(disk.check_room([(new, 1)]).is_err());
    assert!(disk.check_room([(ids[0], 4 * G), (ids[1], 4 * G)]).is_ok(), "pinned already");
    disk.unpin(ids[0]).await.unwrap();
    assert!(disk.check_room([(new, 4 * G)]).is_ok());
    assert!(disk.check_room([(new, 4 * G + 1)]).is_err());
    disk.put(objects[3].clone(), true).await.unwrap();
    assert!(!disk.is_whole(ids[0]));
    assert_eq!(disk.stats().used_bytes, 3 * cost);
    let killed = as_if_killed(dir.path());
    // A smaller budget at the next start is refused, because everything is pinned.
    let smaller = DiskTier::open(killed.path(), DiskOptions { budget: 2 * cost });
    let error = smaller.err().unwrap();
    assert!(
        matches!(error, StoreError::Budget { needed, available, .. }
        if needed == 3 * cost && available == 2 * cost),
        "{error}"
    );
    disk.remove(ids[1]).await.unwrap();
    assert!(!disk.is_whole(ids[1]) && disk.stats().used_bytes == 2 * cost);
}

#[tokio::test]
async fn the_order_of_use_survives_a_restart() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (0..6).map(|_| random(&mut rng, G)).collect();
    let disk = open(dir.path(), 6 * G);
    for bytes in &objects {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    assert!(read_all(&disk, &objects[0]).await.is_some());
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), 3 * G);
    assert_eq!(again.complete().len(), 3);
    assert!(again.is_whole(ShardId::of(&objects[0])), "used last");
    assert!(!again.is_whole(ShardId::of(&objects[1])), "the least recently used");
}

#[tokio::test]
async fn a_second_process_is_told_which_one_holds_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let error = DiskTier::open(dir.path(), DiskOptions { budget: ROOMY }).err().unwrap();
    assert!(matches!(error, StoreError::Locked { .. }));
    let text = error.to_string();
    assert!(text.contains(&dir.path().display().to_string()), "{text}");
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    drop(disk);
    open(dir.path(), ROOMY);
}

#[tokio::test]
async fn an_import_is_checked_linked_and_never_written_to() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let bytes = random(&mut rng, 6 * G + 1);
    let shard = ShardId::of(&bytes);
    let source = dir.path().join("shard_00000.bin");
    fs::write(&source, &bytes).unwrap();
    let data = dir.path().join("data");
    let disk = open(&data, ROOMY);
    let foreign = ShardId::of(b"something else");
    let error = disk.import(source.clone(), foreign, true).await.unwrap_err();
    assert!(matches!(&error, StoreError::Mismatch { actual, .. } if *actual == shard));
    assert!(error.to_string().contains("shard_00000.bin"), "{error}");
    let missing = disk.import(dir.path().join("missing.bin"), shard, true).await.unwrap_err();
    assert!(missing.to_string().contains("missing.bin"), "{missing}");
    let directory = disk.import(dir.path().to_owned(), shard, true).await;
    assert!(matches!(directory, Err(StoreError::Io { .. } | StoreError::Mismatch { .. })));
    assert_eq!(disk.stats().used_bytes, 0, "nothing half-imported");
    assert_eq!(fs::read_dir(data.join("tmp")).unwrap().count(), 0);

    let first = disk.import(source.clone(), shard, true).await.unwrap();
    assert_eq!(first.size, 6 * G + 1);
    let again = disk.import(source.clone(), shard, true).await.unwrap();
    assert_eq!(again, Imported { size: 6 * G + 1, how: None });
    assert!(disk.is_pinned(shard));
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let inode = |path| fs::metadata(path).unwrap().ino();
        let same = inode(source.clone()) == inode(object_file(&data, shard, ""));
        assert_eq!(same, first.how == Some(ImportMethod::Linked));
        assert_ne!(first.how, Some(ImportMethod::Copied), "on one file system nothing is copied");
        if first.how == Some(ImportMethod::Cloned) {
            println!("skipped: this file system clones, so there is no shared file to change");
            return;
        }
    }
    // Someone changes the source in place. The store detects it and repairs only its own copy.
    let mut changed = bytes.to_vec();
    changed[3 * G as usize] ^= 1;
    fs::write(&source, &changed).unwrap();
    let read = disk.read(shard, range(0, bytes.len() as u64)).await;
    assert!(matches!(read, Err(ReadError::Corrupt { .. })));
    disk.keep(proved(&bytes, range(3 * G, 4 * G))).await.unwrap();
    assert_eq!(read_all(&disk, &bytes).await.as_ref(), Some(&bytes));
    assert_eq!(fs::read(&source).unwrap(), changed, "the user's file is not touched");
}

#[tokio::test]
async fn a_proved_size_replaces_a_claimed_one() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let disk = open(dir.path(), ROOMY);
    let bytes = random(&mut rng, 20 * G + 5);
    let (shard, size) = (ShardId::of(&bytes), bytes.len() as u64);
    let liar = proved_as(&bytes, range(0, 2 * G), size + 3 * G);
    disk.keep(liar.clone()).await.unwrap();
    let honest = proved(&bytes, range(4 * G, 5 * G));
    assert_eq!(disk.keep(honest).await.unwrap(), Kept::SizeConflict);
    let last = proved(&bytes, range(19 * G, size));
    assert_eq!(disk.keep(last).await.unwrap(), Kept::Part);
    assert_eq!(disk.keep(liar).await.unwrap(), Kept::SizeConflict);
    assert_eq!(disk.keep(proved(&bytes, range(0, 19 * G))).await.unwrap(), Kept::Whole);
    assert_eq!(read_all(&disk, &bytes).await.as_ref(), Some(&bytes));
    assert_eq!(disk.complete(), [shard]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_writers_and_eviction_at_once_never_show_a_wrong_byte() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (0..12).map(|n| random(&mut rng, (4 + n) * G + n)).collect();
    let total: u64 = objects.iter().map(|bytes| bytes.len() as u64).sum();
    let disk = open(dir.path(), total / 2);
    let tasks: Vec<_> = (0..8_u64)
        .map(|_| {
            let (disk, objects, seed) = (disk.clone(), objects.clone(), rng.random::<u64>());
            tokio::spawn(async move {
                let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
                for _ in 0..40 {
                    let bytes = &objects[rng.random_range(0..objects.len())];
                    let (shard, size) = (ShardId::of(bytes), bytes.len() as u64);
                    let start = rng.random_range(0..size);
                    let want = range(start, rng.random_range(start + 1..=size));
                    match rng.random_range(0..5) {
                        0 => drop(disk.put(bytes.clone(), false).await),
                        1 => drop(disk.remove(shard).await),
                        2 => drop(disk.keep(proved(bytes, want)).await),
                        _ => {
                            if let Some(got) = disk.read(shard, want).await.unwrap() {
                                assert_eq!(got.slice(want).unwrap(), part(bytes, want));
                            }
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let stats = disk.stats();
    assert!(stats.used_bytes <= total / 2, "{stats:?}");
    assert_eq!(stats.quarantines, 0, "{stats:?}");
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let again = open(killed.path(), total / 2);
    assert_eq!(again.stats().used_bytes, stats.used_bytes);
    assert_eq!(again.complete(), disk.complete());
}

#[tokio::test]
async fn ten_thousand_objects_are_found_again_in_under_two_seconds() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), ROOMY));
    for n in 0..10_000_u32 {
        let bytes = n.to_le_bytes();
        fs::write(object_file(dir.path(), ShardId::of(&bytes), ""), bytes).unwrap();
    }
    for index in ["without", "with"] {
        let start = std::time::Instant::now();
        let disk = open(dir.path(), ROOMY);
        let took = start.elapsed();
        println!("opened {index} an index in {took:?}");
        assert_eq!(disk.complete().len(), 10_000);
        assert!(took.as_secs_f64() < 2.0, "{took:?}");
        disk.flush().await.unwrap();
    }
}
