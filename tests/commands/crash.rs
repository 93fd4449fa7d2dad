//! A process that imports, downloads and collects is killed at 200 random moments.
//! Whenever the store is opened again, everything that was reported stored is there
//! and valid, and there is no damage.
//!
//! Each kill comes after a random number of output lines and a short random delay.
//! The directory is reused, so each run starts from what the last kill left.
use crate::common;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use doppler_store::verified::SERVE_BYTES_MAX;
use doppler_store::{ByteRange, DiskOptions, DiskTier, ShardId};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;

/// Total kills, over two directories that are used concurrently.
const KILLS: usize = 200;
const LANES: usize = 2;

const ROOMY: DiskOptions = DiskOptions { budget: 1 << 30 };

/// What the killed processes reported stored and did not remove again.
#[derive(Default)]
struct Promises {
    whole: BTreeSet<ShardId>,
    held: BTreeMap<ShardId, Vec<ByteRange>>,
}

impl Promises {
    /// Records one line and returns its kind.
    fn hear(&mut self, line: &str) -> String {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
        let kind = event["event"].as_str().unwrap().to_owned();
        let shard = || event["shard"].as_str().unwrap().parse::<ShardId>().unwrap();
        match kind.as_str() {
            "stored" => drop(self.whole.insert(shard())),
            "held" => {
                let range = serde_json::from_value(event["range"].clone()).unwrap();
                self.held.entry(shard()).or_default().push(range);
            }
            "dropping" => {
                self.whole.remove(&shard());
                self.held.remove(&shard());
            }
            other => assert_eq!(other, "open"),
        }
        kind
    }
}

/// What happened in one lane.
#[derive(Default)]
struct Seen {
    lines: BTreeMap<String, usize>,
    /// Kills that came before the store was open again.
    while_opening: usize,
    checked: usize,
}

/// A directory in memory if possible. A kill loses nothing that was written, synced
/// or not, so a disk would only be slower.
fn data_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn lane(seed: u64) -> Seen {
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = data_dir();
    let mut promises = Promises::default();
    let mut seen = Seen::default();
    for _ in 0..KILLS / LANES {
        run_and_kill(&mut rng, dir.path(), &mut promises, &mut seen);
        check(dir.path(), &promises, &mut seen);
    }
    seen
}

fn run_and_kill(rng: &mut StdRng, data: &Path, promises: &mut Promises, seen: &mut Seen) {
    let mut child = common::command()
        .args(["store-exercise", "--seed", &rng.random::<u64>().to_string(), "--data"])
        .arg(data)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    let mut opened = false;
    let mut hear = |line: &mut String, promises: &mut Promises| {
        // An incomplete line does not count.
        if line.ends_with('\n') {
            let kind = promises.hear(line);
            opened |= kind == "open";
            *seen.lines.entry(kind).or_default() += 1;
        }
        line.clear();
    };
    for _ in 0..rng.random_range(0..16) {
        if out.read_line(&mut line).unwrap() == 0 {
            break;
        }
        hear(&mut line, promises);
    }
    // The kill comes at a random moment of whatever the process is doing.
    std::thread::sleep(Duration::from_micros(rng.random_range(0..6_000)));
    let _ = child.kill();
    while out.read_line(&mut line).unwrap() > 0 {
        hear(&mut line, promises);
    }
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.signal(), Some(9), "it ended by itself: {said}");
    assert!(!said.contains("panicked"), "{said}");
    seen.while_opening += usize::from(!opened);
}

/// Opens the store as the next node would, and checks everything in it.
fn check(data: &Path, promises: &Promises, seen: &mut Seen) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let disk = DiskTier::open(data, ROOMY).unwrap();
        assert_eq!(disk.damage_at_open(), []);
        for shard in &promises.whole {
            assert!(disk.is_whole(*shard), "{shard} was said to be stored");
            assert!(disk.is_pinned(*shard), "{shard} was said to be pinned");
        }
        for (shard, ranges) in &promises.held {
            let groups = disk.groups(*shard).await.unwrap_or_else(|| panic!("{shard} is gone"));
            assert!(ranges.iter().all(|range| groups.holds(*range)), "{shard}: a range is gone");
        }
        for object in disk.list().await.unwrap() {
            let groups = disk.groups(object.shard).await.unwrap();
            let Some(whole) = ByteRange::new(0, object.size) else { continue };
            let mut bytes = Vec::new();
            for (range, held) in groups.runs(whole, SERVE_BYTES_MAX) {
                if held {
                    let read = disk.read(object.shard, range).await.unwrap().unwrap();
                    bytes.extend_from_slice(read.bytes());
                }
            }
            if object.whole {
                assert_eq!(ShardId::of(&bytes), object.shard);
            }
            seen.checked += 1;
        }
        assert_eq!(disk.stats().quarantines, 0);
    });
}

#[test]
fn two_hundred_kills_lose_nothing_that_was_stored() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let lanes: Vec<_> =
        (0..LANES as u64).map(|n| std::thread::spawn(move || lane(seed.wrapping_add(n)))).collect();
    for lane in lanes {
        let seen = lane.join().unwrap();
        println!(
            "{:?}; {} killed while opening; {} objects checked",
            seen.lines, seen.while_opening, seen.checked
        );
        for kind in ["open", "stored", "held", "dropping"] {
            assert!(seen.lines.contains_key(kind), "no kill came near {kind:?}: {:?}", seen.lines);
        }
        assert!(seen.checked > KILLS);
    }
}

#[test]
fn ten_thousand_objects_after_a_kill_are_there_in_two_seconds() {
    let dir = data_dir();
    let mut promises = Promises::default();
    run_and_kill(&mut StdRng::seed_from_u64(7), dir.path(), &mut promises, &mut Seen::default());
    // Files as the store writes them, but without syncing: whole, pinned and partial objects.
    let file = |shard: ShardId, suffix: &str| {
        let name = format!("{shard}{suffix}");
        dir.path().join("objects").join(&name[..2]).join(name)
    };
    for n in 0..10_000_u32 {
        let bytes = n.to_le_bytes();
        let shard = ShardId::of(&bytes);
        std::fs::write(file(shard, ""), bytes).unwrap();
        if n % 3 == 0 {
            std::fs::write(file(shard, ".pin"), b"").unwrap();
        }
    }
    for index in ["without", "with"] {
        let started = Instant::now();
        let disk = DiskTier::open(dir.path(), ROOMY).unwrap();
        let took = started.elapsed();
        println!("opened 10,000 objects {index} them in the index in {took:?}");
        assert!(disk.complete().len() >= 10_000);
        assert!(took < Duration::from_secs(2), "{took:?}");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(disk.flush()).unwrap();
    }
    for shard in &promises.whole {
        assert!(DiskTier::open(dir.path(), ROOMY).unwrap().is_whole(*shard));
    }
}
