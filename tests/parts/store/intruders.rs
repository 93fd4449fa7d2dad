//! Things that are no files, in the places of files. Each costs the object whose name it has,
//! never the start of a node, and nothing waits at a FIFO.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use bytes::Bytes;
use doppler_store::{
    DiskTier, Ladder, LadderOptions, ModelId, RangeReader, ReadRequest, ShardId, Tier,
};

use super::support::*;

const ROOMY: u64 = 1 << 30;
/// Far longer than opening a store takes.
const PATIENCE: Duration = Duration::from_secs(60);

const KINDS: [&str; 6] =
    ["directory", "FIFO", "socket", "device", "dangling link", "link to a FIFO"];

/// Puts something that is no file where a file may be.
fn intrude(at: &Path, kind: &str) {
    let _ = fs::remove_file(at);
    let run = |command: &str, args: &[&str]| {
        let ran = Command::new(command).arg(at).args(args).status().unwrap();
        assert!(ran.success(), "{command} {}", at.display());
    };
    match kind {
        "directory" => {
            fs::create_dir(at).unwrap();
            fs::write(at.join("somebody's"), "file").unwrap();
        }
        "FIFO" => run("mkfifo", &[]),
        "socket" => drop(UnixListener::bind(at).unwrap()),
        // Only root can make a device; a link to one is opened in the same way.
        "device" => symlink("/dev/zero", at).unwrap(),
        "dangling link" => symlink("nowhere", at).unwrap(),
        _ => {
            let fifo = at.with_extension("fifo");
            if !fifo.exists() {
                intrude(&fifo, "FIFO");
            }
            symlink(&fifo, at).unwrap();
        }
    }
}

/// Opens a store, in time.
fn opened(dir: &Path) -> DiskTier {
    let (sender, receiver) = channel();
    let dir = dir.to_owned();
    std::thread::spawn(move || drop(sender.send(open(&dir, ROOMY))));
    receiver.recv_timeout(PATIENCE).expect("opening the store hangs or fails")
}

async fn in_time<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("it hangs")
}

#[tokio::test]
async fn an_intruder_costs_its_object_only_at_a_start() {
    let mut rng = fresh_rng();
    for kind in KINDS {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let objects: Vec<_> = (0..6).map(|n| random(&mut rng, (3 + n) * G)).collect();
        let shards: Vec<_> = objects.iter().map(|bytes| ShardId::of(bytes)).collect();
        let disk = open(dir.path(), ROOMY);
        for bytes in &objects {
            disk.put(bytes.clone(), false).await.unwrap();
        }
        let sizes: Vec<_> =
            shards.iter().zip(&objects).map(|(s, b)| (*s, b.len() as u64)).collect();
        disk.pin_model(ModelId::of(b"m"), "m".to_owned(), sizes).await.unwrap();
        drop(disk);
        let file = |n: usize, suffix| object_file(dir.path(), shards[n], suffix);
        // In the place of the object; of its outboard; beside it, where it is in part.
        intrude(&file(0, ""), kind);
        intrude(&file(1, ".obao"), kind);
        for suffix in [".part", ".have", ".pin"] {
            intrude(&file(2, suffix), kind);
        }
        fs::remove_file(file(3, "")).unwrap();
        intrude(&file(3, ".part"), kind);
        fs::write(file(3, ".have"), b"").unwrap();
        let disk = opened(dir.path());
        for n in [2, 4, 5] {
            let all = range(0, objects[n].len() as u64);
            let read = in_time(disk.read(shards[n], all)).await.unwrap();
            assert_eq!(read.unwrap().bytes(), &objects[n], "{kind}: object {n}");
        }
        for object in disk.list().await.unwrap() {
            assert!(object.pinned, "{kind}");
            assert_eq!(
                object.whole,
                ![0, 3].contains(&shards.iter().position(|s| *s == object.shard).unwrap()),
                "{kind}"
            );
        }
        // All of it is fetched again, and the next start finds nothing unusual.
        let source = Arc::new(Source::new(objects.iter().cloned()));
        let ladder = Ladder::new(
            LadderOptions { ram_budget: 0 },
            Some(Arc::new(disk.clone())),
            Some(source),
            vec![],
        );
        for shard in &shards {
            in_time(ladder.repair(*shard)).await.unwrap();
        }
        assert_eq!(disk.complete().len(), 6, "{kind}");
        drop((ladder, disk));
        assert_eq!(opened(dir.path()).complete().len(), 6, "{kind}");
        if kind == "directory" {
            let aside = dir.path().join("set-aside").join(shards[0].to_string());
            assert_eq!(fs::read(aside.join("somebody's")).unwrap(), b"file", "nothing is lost");
        }
        for n in 0..4 {
            let outside = file(n, "").with_file_name("nowhere");
            assert!(!outside.exists(), "{kind}: no link was written through");
        }
    }
}

#[tokio::test]
async fn an_intruder_beside_the_objects_does_not_keep_the_store_from_opening() {
    let mut rng = fresh_rng();
    let bytes = random(&mut rng, 5 * G);
    let shard = ShardId::of(&bytes);
    let model = ModelId::of(b"m");
    let other = if shard.to_string().starts_with("00") { "objects/01" } else { "objects/00" };
    for kind in KINDS {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let disk = open(dir.path(), ROOMY);
        disk.put(bytes.clone(), true).await.unwrap();
        let sizes = vec![(shard, 5 * G)];
        disk.pin_model(model, "m".to_owned(), sizes).await.unwrap();
        disk.flush().await.unwrap();
        drop(disk);
        fs::remove_dir(dir.path().join(other)).unwrap();
        let record = format!("pins/{model}");
        for name in [other, "tmp/0", "reserve", "index/conf", &record] {
            intrude(&dir.path().join(name), kind);
        }
        let disk = opened(dir.path());
        let read = in_time(disk.read(shard, range(0, 5 * G))).await.unwrap().unwrap();
        assert_eq!(read.bytes(), &bytes, "{kind}");
        assert!(disk.is_pinned(shard), "{kind}: by itself, whatever became of the model's record");
        disk.put(random(&mut rng, G), false).await.unwrap();
        in_time(disk.flush()).await.unwrap();
    }
}

#[tokio::test]
async fn an_intruder_under_the_open_store_costs_its_object_only() {
    let mut rng = fresh_rng();
    for kind in KINDS {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let disk = open(dir.path(), ROOMY);
        let objects: Vec<Bytes> = (0..3).map(|n| random(&mut rng, (3 + n) * G)).collect();
        for (n, bytes) in objects.iter().enumerate() {
            disk.put(bytes.clone(), n == 0).await.unwrap();
        }
        let source = Arc::new(Source::new(objects.iter().cloned()));
        let ladder = Ladder::new(
            LadderOptions { ram_budget: 0 },
            Some(Arc::new(disk.clone())),
            Some(source),
            vec![],
        );
        for bytes in &objects[..2] {
            intrude(&object_file(dir.path(), ShardId::of(bytes), ""), kind);
        }
        // One is met by a check, the other by a reader.
        in_time(disk.check(ShardId::of(&objects[0]))).await.unwrap();
        for bytes in &objects {
            let request = ReadRequest::token(ShardId::of(bytes), range(0, bytes.len() as u64));
            assert_eq!(in_time(ladder.read(request)).await.unwrap().bytes, bytes, "{kind}");
            in_time(ladder.flush()).await.unwrap();
        }
        in_time(ladder.repair(ShardId::of(&objects[0]))).await.unwrap();
        assert_eq!(disk.complete().len(), 3, "{kind}");
        for bytes in &objects {
            let request = ReadRequest::token(ShardId::of(bytes), range(0, bytes.len() as u64));
            assert_eq!(in_time(ladder.read(request)).await.unwrap().tier, Tier::Disk, "{kind}");
        }
    }
}
