//! Pins: of models that share objects, of objects by themselves, of an earlier version's store;
//! pins outlive the bytes that they pin.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use doppler_store::{DiskTier, Ladder, LadderOptions, Manifest, ModelId, ReadError, ShardId};

use super::support::*;

const ROOMY: u64 = 1 << 30;

fn model(name: &str) -> ModelId {
    ModelId::of(name.as_bytes())
}

async fn pin_as(disk: &DiskTier, name: &str, objects: &[&Bytes]) {
    let sizes = objects.iter().map(|bytes| (ShardId::of(bytes), bytes.len() as u64)).collect();
    let pinned = disk.pin_model(model(name), name.to_owned(), sizes).await.unwrap();
    assert_eq!(pinned.len(), objects.len());
}

/// What is left after everything that may go has gone, by the objects' places.
async fn left(disk: &DiskTier, objects: &[Bytes]) -> Vec<usize> {
    disk.collect(Some(0), false).await.unwrap();
    (0..objects.len()).filter(|n| disk.is_whole(ShardId::of(&objects[*n]))).collect()
}

#[tokio::test]
async fn an_object_stays_as_long_as_any_model_pins_it() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (1..7).map(|n| random(&mut rng, n * G + n)).collect();
    let disk = open(dir.path(), ROOMY);
    for bytes in &objects {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    let [a, b, c, d, e, _] = &objects[..] else { panic!() };
    pin_as(&disk, "one", &[a, b, c]).await;
    pin_as(&disk, "two", &[b, c, d]).await;
    disk.pin(ShardId::of(e)).await.unwrap();
    assert_eq!(left(&disk, &objects).await, [0, 1, 2, 3, 4]);
    // Unpinning a model that shares leaves what the other has; so does a kill at any time.
    let released = disk.unpin_model(model("one")).await.unwrap();
    assert_eq!(released.len(), 3);
    assert!(disk.unpin_model(model("one")).await.unwrap().is_empty(), "it pins nothing now");
    let killed = as_if_killed(dir.path());
    for disk in [&open(killed.path(), ROOMY), &disk] {
        assert_eq!(disk.pinned_by(ShardId::of(b)), [model("two")]);
        assert_eq!(left(disk, &objects).await, [1, 2, 3, 4]);
    }
    // Two ways of letting go of one object: it alone goes, and no record names it any more.
    disk.unpin(ShardId::of(b)).await.unwrap();
    assert_eq!(left(&disk, &objects).await, [2, 3, 4]);
    disk.remove(ShardId::of(d)).await.unwrap();
    let killed = as_if_killed(dir.path());
    for disk in [&open(killed.path(), ROOMY), &disk] {
        assert_eq!(disk.list().await.unwrap().len(), 2, "what was removed is not missed");
        let pins = disk.model_pins();
        assert_eq!(
            pins[&model("two")].objects.keys().copied().collect::<Vec<_>>(),
            [ShardId::of(c)]
        );
        assert_eq!(pins[&model("two")].name, "two");
    }
    // An object pinned by itself outlives its model's pin.
    disk.pin(ShardId::of(c)).await.unwrap();
    disk.unpin_model(model("two")).await.unwrap();
    assert_eq!(left(&disk, &objects).await, [2, 4]);
    disk.unpin(ShardId::of(c)).await.unwrap();
    disk.unpin(ShardId::of(e)).await.unwrap();
    let gone = disk.collect(Some(0), false).await.unwrap();
    assert_eq!((gone.used_bytes, gone.pinned_bytes), (0, 0));
}

#[tokio::test]
async fn what_is_held_back_is_not_evicted_until_it_is_let_go() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let objects: Vec<_> = (0..3).map(|_| random(&mut rng, 2 * G)).collect();
    let disk = open(dir.path(), ROOMY);
    let hold = disk.hold(objects[..2].iter().map(|bytes| ShardId::of(bytes)));
    for bytes in &objects {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    assert_eq!(left(&disk, &objects).await, [0, 1]);
    assert_eq!(disk.stats().pinned_bytes, 0, "nobody pins it");
    // Whoever held it back was killed: the next start knows nothing of it.
    let killed = as_if_killed(dir.path());
    assert_eq!(left(&open(killed.path(), ROOMY), &objects).await, [0usize; 0]);
    drop(hold);
    assert_eq!(left(&disk, &objects).await, [0usize; 0]);
}

fn ladder_on(disk: &DiskTier, source: &Arc<Source>) -> Ladder {
    let disk = Some(Arc::new(disk.clone()));
    let ladder = Ladder::new(LadderOptions { ram_budget: 0 }, disk, None, vec![]);
    ladder.set_peers(Arc::clone(source) as _);
    ladder
}

#[tokio::test]
async fn pinned_objects_whose_files_are_gone_are_missed_and_fetched_again() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    // Pinned by a model; by itself; by itself in an earlier version, that wrote no size; empty.
    let mut objects: Vec<_> = (0..3).map(|n| random(&mut rng, (4 + n) * G + 9)).collect();
    objects.push(Bytes::new());
    let loose = random(&mut rng, 3 * G);
    let disk = open(dir.path(), ROOMY);
    for bytes in objects.iter().chain([&loose]) {
        disk.put(bytes.clone(), false).await.unwrap();
    }
    pin_as(&disk, "m", &[&objects[0], &objects[3]]).await;
    for bytes in &objects[1..3] {
        disk.pin(ShardId::of(bytes)).await.unwrap();
    }
    disk.flush().await.unwrap();
    let killed = as_if_killed(dir.path());
    let file = |bytes: &Bytes, suffix| object_file(killed.path(), ShardId::of(bytes), suffix);
    for bytes in objects.iter().chain([&loose]) {
        fs::remove_file(file(bytes, "")).unwrap();
    }
    fs::write(file(&objects[2], ".pin"), b"").unwrap();
    fs::remove_dir_all(killed.path().join("index")).unwrap();
    for _ in 0..2 {
        let again = open(killed.path(), ROOMY);
        let list = again.list().await.unwrap();
        assert_eq!(list.len(), 4, "what nobody pins is not missed: {list:?}");
        for object in list {
            assert!(object.pinned && !object.whole && object.held == 0, "{object:?}");
            let bytes = objects.iter().find(|bytes| ShardId::of(bytes) == object.shard).unwrap();
            let known = if *bytes == objects[2] { 0 } else { bytes.len() as u64 };
            assert_eq!(object.size, known);
        }
        assert_eq!(again.stats().used_bytes, 0);
        let unknown = again.read(ShardId::of(&objects[2]), range(0, 1)).await.unwrap();
        assert!(unknown.is_none(), "a size that is not known is not 0");
    }
    let again = open(killed.path(), ROOMY);
    let source = Arc::new(Source::new(objects.iter().cloned()));
    let ladder = ladder_on(&again, &source);
    for bytes in &objects {
        assert_eq!(ladder.repair(ShardId::of(bytes)).await.unwrap(), bytes.len() as u64);
    }
    assert_eq!(left(&again, &objects).await, [0, 1, 2, 3], "pinned as before");
    for bytes in &objects {
        assert_eq!(fs::read(file(bytes, "")).unwrap(), **bytes);
    }
}

#[tokio::test]
async fn a_pin_outlives_a_file_that_is_deleted_under_the_open_store() {
    let mut rng = fresh_rng();
    let dir = tempfile::tempdir().unwrap();
    let (pinned, loose) = (random(&mut rng, 9 * G), random(&mut rng, 5 * G));
    let disk = open(dir.path(), ROOMY);
    for bytes in [&pinned, &loose] {
        disk.put(bytes.clone(), false).await.unwrap();
        fs::remove_file(object_file(dir.path(), ShardId::of(bytes), "")).unwrap();
    }
    pin_as(&disk, "m", &[&pinned]).await;
    assert!(disk.read(ShardId::of(&loose), range(0, G)).await.unwrap().is_none());
    let error = disk.read(ShardId::of(&pinned), range(0, G)).await.unwrap_err();
    assert!(matches!(&error, ReadError::Corrupt { detail, .. } if detail.contains("gone")));
    assert!(disk.is_pinned(ShardId::of(&pinned)) && disk.complete().is_empty());
    assert_eq!(disk.list().await.unwrap().len(), 1);
    assert_eq!(disk.stats().damaged_bytes, 9 * G);
    // Readers get a peer's bytes, and all of it is here again.
    let source = Arc::new(Source::new([pinned.clone()]));
    let ladder = ladder_on(&disk, &source);
    assert_eq!(ladder.repair(ShardId::of(&pinned)).await.unwrap(), 9 * G);
    assert_eq!(left(&disk, &[pinned]).await, [0]);
}

/// Two models of the embedded model's shards, as an earlier version left them: every object of
/// the first is pinned, of the second two shards and its manifest.
async fn earlier_version(dir: &Path) -> (DiskTier, [ModelId; 2], Vec<ShardId>) {
    let source = doppler_testing::root().join("models/tiny-mixtral-q4_k_m");
    let text = fs::read_to_string(source.join("manifest.json")).unwrap();
    let manifests = [text.clone(), text.replacen("tiny-mixtral", "tiny-twin", 1)];
    assert_ne!(manifests[0], manifests[1]);
    let disk = open(dir, ROOMY);
    let manifest = Manifest::parse(text.as_bytes()).unwrap();
    let mut shards = Vec::new();
    for shard in &manifest.shards {
        let id = shard.id().unwrap();
        disk.import(source.join(&shard.filename), id, true).await.unwrap();
        shards.push(id);
    }
    for text in &manifests {
        disk.put(Bytes::from(text.clone()), true).await.unwrap();
    }
    // Of no model: pinned by its id, or left by a publication that failed.
    disk.put(Bytes::from_static(b"{of no model}"), true).await.unwrap();
    for shard in shards.iter().copied().chain([ShardId::of(b"{of no model}")]) {
        fs::write(object_file(dir, shard, ".pin"), b"").unwrap();
    }
    drop(disk);
    fs::remove_dir_all(dir.join("pins")).unwrap();
    (open(dir, ROOMY), manifests.map(|text| ModelId::of(text.as_bytes())), shards)
}

#[tokio::test]
async fn pins_of_an_earlier_version_belong_to_its_models_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, [first, twin], shards) = earlier_version(dir.path()).await;
    let nobodys = ShardId::of(b"{of no model}");
    for disk in [disk, open(as_if_killed(dir.path()).path(), ROOMY)] {
        let pins = disk.model_pins();
        assert_eq!(pins.keys().copied().collect::<Vec<_>>().len(), 2);
        for model in [first, twin] {
            assert_eq!(pins[&model].objects.len(), shards.len() + 1, "shards and the manifest");
        }
        assert!(pins[&twin].name.contains("twin") && !pins[&first].name.contains("twin"));
        let gone = disk.collect(Some(0), false).await.unwrap();
        assert!(gone.evicted.is_empty(), "every pin is kept");
        assert_eq!(gone.pinned_alone, [(nobodys, b"{of no model}".len() as u64)]);
        disk.unpin_model(first).await.unwrap();
        let gone = disk.collect(Some(0), false).await.unwrap();
        assert_eq!(gone.evicted.len(), 1, "the manifest; the twin has the rest");
        disk.unpin_model(twin).await.unwrap();
        disk.unpin(nobodys).await.unwrap();
        assert_eq!(disk.collect(Some(0), false).await.unwrap().used_bytes, 0);
    }
}

#[tokio::test]
async fn a_damaged_record_is_mended_and_nothing_of_its_model_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, [first, twin], shards) = earlier_version(dir.path()).await;
    disk.unpin_model(twin).await.unwrap();
    drop(disk);
    let record = dir.path().join("pins").join(first.to_string());
    for damage in ["flipped", "emptied", "cut"] {
        let sound = fs::read(&record).unwrap();
        match damage {
            "flipped" => flip(&record, sound.len() / 2),
            "emptied" => fs::write(&record, b"").unwrap(),
            _ => fs::write(&record, &sound[..sound.len() / 3]).unwrap(),
        }
        let disk = open(dir.path(), ROOMY);
        assert!(shards.iter().all(|shard| disk.is_pinned(*shard)), "{damage}");
        assert!(disk.list().await.unwrap().iter().all(|object| object.whole), "{damage}");
        assert_eq!(fs::read(&record).unwrap(), sound, "{damage}");
    }
}
