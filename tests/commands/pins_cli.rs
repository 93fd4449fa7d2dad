//! What keeps shards here: pins of models that share them, publications that fail or are
//! interrupted, files that are lost or replaced while the node is stopped, a full disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{self, Node, copy_dir, model, run};
use rand::RngExt;
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";
const TWIN: &str = "tiny-twin";
/// The model's shards, its tokenizer and its manifest.
const OBJECTS: u64 = 13;

/// A model of the same shards under another name.
fn twin(dir: &Path) -> PathBuf {
    let twin = dir.join("twin");
    copy_dir(&model(), &twin);
    let manifest = fs::read_to_string(twin.join("manifest.json")).unwrap();
    fs::write(twin.join("manifest.json"), manifest.replacen(NAME, TWIN, 1)).unwrap();
    twin
}

fn publish(node: &Node, dir: &Path) -> Value {
    node.ask(&["publish", dir.to_str().unwrap(), "--json"]).ok().json()
}

fn shard(index: usize) -> String {
    let manifest = fs::read(model().join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    manifest["shards"][index]["hash"].as_str().unwrap().to_owned()
}

fn stored(data: &Path, shard: &str) -> PathBuf {
    data.join("objects").join(&shard[..2]).join(shard)
}

fn source(index: usize) -> Vec<u8> {
    fs::read(model().join(format!("shard_{index:05}.bin"))).unwrap()
}

fn used(node: &Node) -> u64 {
    node.ask(&["status", "--json"]).ok().json()["disk"]["used"].as_u64().unwrap()
}

fn pinned(node: &Node) -> u64 {
    node.ask(&["status", "--json"]).ok().json()["store"]["pinned_bytes"].as_u64().unwrap()
}

/// Waits until a node knows the model.
fn knows(node: &Node) {
    let deadline = std::time::Instant::now() + common::PATIENCE;
    while !node.ask(&["ls", "--json"]).ok().out.contains(NAME) {
        assert!(std::time::Instant::now() < deadline, "it never heard of the model");
    }
}

/// Lets go of everything that is not pinned.
fn collect(node: &Node) -> Value {
    node.ask(&["gc", "--disk-budget", "0", "--last-copy", "--json"]).ok().json()
}

#[test]
fn a_pinned_model_keeps_what_it_shares_with_one_that_is_unpinned_or_removed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut node = Node::start(&data, "twins", &[], &[]);
    publish(&node, &model());
    publish(&node, &twin(dir.path()));
    let unpinned = node.ask(&["unpin", NAME, "--json"]).ok().json();
    assert_eq!(unpinned["objects"], OBJECTS);
    assert_eq!(unpinned["shared"], OBJECTS - 1, "all but the manifest");
    let gone = collect(&node);
    assert_eq!(gone["evicted"].as_array().unwrap().len(), 1, "{gone}");
    let whole = |node: &Node| {
        let models = node.ask(&["ls", "--json"]).ok().json();
        let models = models.as_array().unwrap();
        let twin = models.iter().find(|model| model["name"] == TWIN).unwrap();
        (twin["shards_here"].as_u64(), twin["shards"].as_u64())
    };
    assert_eq!(whole(&node), (Some(11), Some(11)));
    let run = ["run", TWIN, "-p", "Call me", "-n", "2", "--json"];
    node.ask(&run).ok();
    // So after a restart, and offline.
    node.signal("INT");
    assert_eq!(node.wait(), Some(0));
    let ask =
        |args: &[&str]| common::run(args.iter().copied().chain(["--data", data.to_str().unwrap()]));
    ask(&["fsck"]).ok();
    let gone = ask(&["gc", "--disk-budget", "0", "--json"]).ok().json();
    assert_eq!(gone["evicted"], serde_json::json!([]));
    let node = Node::start(&data, "twins", &[], &[]);
    assert_eq!(whole(&node), (Some(11), Some(11)));

    // The other way round, by removal.
    publish(&node, &model());
    node.ask(&["rm", NAME]).fails(&["1 of 1 stored object", "pinned"]);
    let removed = node.ask(&["rm", NAME, "--force", "--last-copy", "--json"]).ok().json();
    assert_eq!((&removed["objects"], &removed["shared"]), (&1.into(), &(OBJECTS - 1).into()));
    assert_eq!(collect(&node)["evicted"], serde_json::json!([]));
    assert_eq!(whole(&node), (Some(11), Some(11)));
    assert_eq!(node.ask(&["unpin", TWIN, "--json"]).ok().json()["shared"], 0);
    assert_eq!(collect(&node)["used_bytes"], 0);
}

#[test]
fn a_publication_that_fails_or_is_interrupted_leaves_nothing_that_cannot_be_freed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut node = Node::start(&data, "half", &[], &[]);
    let damaged = dir.path().join("damaged");
    copy_dir(&model(), &damaged);
    let file = damaged.join("shard_00007.bin");
    let mut bytes = fs::read(&file).unwrap();
    bytes[77] ^= 1;
    fs::write(&file, bytes).unwrap();
    node.ask(&["publish", damaged.to_str().unwrap()]).fails(&["shard_00007.bin", "BLAKE3"]);
    assert_eq!(pinned(&node), 0);
    assert_eq!(collect(&node)["used_bytes"], 0);

    let mut rng = rand::rng();
    let mut ends = Vec::new();
    for _ in 0..4 {
        let model = model();
        let mut publishing = common::command()
            .args(["publish", model.to_str().unwrap(), "--data", data.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The kill comes at a random moment of the publication, or just before or after it.
        std::thread::sleep(Duration::from_micros(rng.random_range(0..150_000)));
        node.signal("KILL");
        node.wait();
        publishing.wait().unwrap();
        node = Node::start(&data, "half", &[], &[]);
        let left = pinned(&node);
        ends.push(left);
        if left > 0 {
            assert_eq!(node.ask(&["unpin", NAME, "--json"]).ok().json()["objects"], OBJECTS);
        }
        assert_eq!(pinned(&node), 0);
        assert_eq!(collect(&node)["used_bytes"], 0);
    }
    println!("pinned after each kill: {ends:?}");
    publish(&node, &model());
    assert!(pinned(&node) > 0);
}

#[test]
fn what_was_collected_removed_or_lost_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "again", &[], &[]);
    publish(&holder, &model());
    let data = dir.path().join("b");
    let mut node = Node::start(&data, "again", &[&holder.address], &[]);
    knows(&node);
    let fetch = |node: &Node, what: &str| -> (u64, u64) {
        let reply = node.ask(&["pin", what, "--fetch", "--json"]).ok().json();
        (reply["objects"].as_u64().unwrap(), reply["missing"].as_u64().unwrap())
    };
    // Without a restart: its manifest is gone from here with the rest.
    fetch(&node, NAME);
    node.ask(&["unpin", NAME]).ok();
    assert_eq!(collect(&node)["used_bytes"], 0);
    assert_eq!(fetch(&node, NAME), (OBJECTS, 0));
    node.ask(&["rm", NAME, "--force", "--last-copy"]).ok();
    assert_eq!(used(&node), 0);
    assert_eq!(fetch(&node, NAME), (OBJECTS, 0));
    let third = shard(3);
    node.ask(&["rm", &third, "--force", "--last-copy"]).ok();
    assert!(!stored(&data, &third).exists());
    assert_eq!(fetch(&node, &third[..20]), (1, 0));
    node.ask(&["fsck"]).ok();

    // Files that are deleted or replaced while the node is stopped: each is named, none is
    // forgotten, and the node starts and ends as ever.
    node.signal("INT");
    assert_eq!(node.wait(), Some(0));
    for index in [2, 3, 5, 6] {
        fs::remove_file(stored(&data, &shard(index))).unwrap();
    }
    fs::create_dir(stored(&data, &shard(5))).unwrap();
    let fifo = Command::new("mkfifo").arg(stored(&data, &shard(6))).status().unwrap();
    assert!(fifo.success());
    let stopped = run(["fsck", "--data", data.to_str().unwrap()]);
    assert_eq!(stopped.code, Some(1), "{}{}", stopped.out, stopped.err);
    let mut node = Node::start(&data, "again", &[&holder.address], &[]);
    let running = node.ask(&["fsck"]);
    assert_eq!(running.code, Some(1), "{}{}", running.out, running.err);
    for said in [stopped, running] {
        for index in [2, 3, 5, 6] {
            let line = said.out.lines().find(|line| line.contains(&shard(index))).unwrap();
            let size = format!("{} bytes is missing", source(index).len());
            assert!(line.contains(&size), "{line}");
        }
        assert!(said.err.contains("--repair"), "{}", said.err);
    }
    assert_eq!(pinned(&node), used(&node));
    let end = node.ask(&["fsck", "--repair", "--json"]).ok().json();
    assert_eq!((&end["repaired_objects"], &end["incomplete_pinned"]), (&4.into(), &0.into()));
    for index in [2, 3, 5, 6] {
        assert_eq!(fs::read(stored(&data, &shard(index))).unwrap(), source(index));
    }
    assert_eq!(collect(&node)["evicted"], serde_json::json!([]), "pinned as before");
    node.ask(&["fsck"]).ok();
    node.signal("TERM");
    assert_eq!(node.wait(), Some(0));
}

#[test]
fn a_model_that_nobody_announces_any_more_can_be_named_by_its_pin() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = Node::start(&dir.path().join("a"), "alone", &[], &[]);
    publish(&holder, &model());
    let data = dir.path().join("b");
    let mut node = Node::start(&data, "alone", &[&holder.address], &[]);
    knows(&node);
    node.ask(&["pin", NAME, "--fetch"]).ok();
    holder.signal("KILL");
    holder.wait();
    node.signal("INT");
    assert_eq!(node.wait(), Some(0));
    // Its manifest is lost, too: only the pin knows its name.
    let manifest = fs::read_dir(data.join("pins")).unwrap().flatten();
    let mut ids = manifest.map(|entry| entry.file_name().into_string().unwrap());
    let id = ids.find(|name| name.len() == 64).unwrap();
    fs::remove_file(stored(&data, &id)).unwrap();
    let node = Node::start(&data, "alone", &[], &[]);
    let all = pinned(&node);
    assert!(all > 9_000_000, "{all}");
    assert_eq!(node.ask(&["unpin", NAME, "--json"]).ok().json()["objects"], OBJECTS);
    assert_eq!(collect(&node)["used_bytes"], 0);
    node.ask(&["fsck"]).ok();
}

#[cfg(target_os = "linux")]
#[test]
fn a_fetch_onto_a_full_disk_says_so_and_how_much_is_missing() {
    use crate::small::Small;
    let Some(small) = Small::mount_with(32 << 20, "nr_inodes=1500") else { return };
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "full", &[], &[]);
    publish(&holder, &model());
    let node = Node::start(&small.at.join("b"), "full", &[&holder.address], &[]);
    knows(&node);
    let fetch = ["pin", NAME, "--fetch"];
    let refused = |words: &[&str]| {
        let said = node.ask(&fetch);
        assert_eq!(said.code, Some(5), "{}{}", said.out, said.err);
        said.fails(words)
    };
    // No room for all of it: nothing is fetched, and what is missing is said in bytes.
    small.fill(3 << 20);
    let line = refused(&["the disk is full", "bytes are missing", "available"]);
    let number = |before: &str| -> u64 {
        let words: Vec<&str> = line.split(before).next().unwrap().split(['(', ' ']).collect();
        words.iter().rev().find_map(|word| word.parse().ok()).unwrap()
    };
    let missing = number(" bytes are missing");
    assert!((5_000_000..8_000_000).contains(&missing), "{missing}: {line}");
    assert!(used(&node) < 1 << 20, "nothing was fetched");
    fs::remove_file(small.at.join("ballast")).unwrap();
    // No file can be made, though there are bytes.
    let spent = small.spend_inodes();
    refused(&["the disk is full", "missing objects were fetched", "number of files"]);
    spent.iter().for_each(|file| fs::remove_file(file).unwrap());
    let reply = node.ask(&[&fetch[..], &["--json"]].concat()).ok().json();
    assert_eq!((&reply["objects"], &reply["missing"]), (&OBJECTS.into(), &0.into()));
}
