//! Maintaining a store from the command line: pins, removal, collection and checks,
//! for a running node and for a directory that no node has open; damage under a
//! running node.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{Node, model, run};
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";
/// The model's shards, its tokenizer and its manifest.
const OBJECTS: u64 = 13;

fn publish(node: &Node, shards: &str) -> Value {
    let model = model();
    node.ask(&["publish", model.to_str().unwrap(), "--shards", shards, "--json"]).ok().json()
}

fn manifest() -> Value {
    serde_json::from_slice(&fs::read(model().join("manifest.json")).unwrap()).unwrap()
}

fn shard(index: usize) -> String {
    manifest()["shards"][index]["hash"].as_str().unwrap().to_owned()
}

fn stored(data: &Path, shard: &str) -> PathBuf {
    data.join("objects").join(&shard[..2]).join(shard)
}

fn source(index: usize) -> Vec<u8> {
    fs::read(model().join(format!("shard_{index:05}.bin"))).unwrap()
}

/// Flips one bit of a stored object, as a failing disk would. Copies the file first,
/// because an import may share its blocks with the repository's file.
fn flip(data: &Path, shard: &str, at: usize) {
    let path = stored(data, shard);
    let mut bytes = fs::read(&path).unwrap();
    let at = at % bytes.len();
    bytes[at] ^= 1 << (at % 8);
    let own = data.join("flipped");
    fs::write(&own, bytes).unwrap();
    fs::rename(own, path).unwrap();
}

fn used(node: &Node) -> u64 {
    node.ask(&["status", "--json"]).ok().json()["disk"]["used"].as_u64().unwrap()
}

fn local_text() -> Value {
    let model = model();
    let args = ["run", model.to_str().unwrap(), "-p", "Call me", "-n", "12", "--json"];
    run(args.into_iter().chain(["--backend", "cpu"])).ok().json()
}

#[test]
fn a_running_node_pins_evicts_and_removes_as_told() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "care", &[], &[]);
    let published = publish(&node, "0-10");
    let id = published["model"].as_str().unwrap();
    let all = used(&node);

    let kept = node.ask(&["gc", "--disk-budget", "0", "--json"]).ok().json();
    assert_eq!(kept["evicted"], serde_json::json!([]), "what is published is pinned");
    assert_eq!(kept["used_bytes"], all);
    node.ask(&["rm", NAME]).fails(&[id, "13 of 13", "pinned", "--force"]);
    node.ask(&["pin", "nothing-of-the-kind"]).fails(&["nothing-of-the-kind", "neither"]);
    node.ask(&["rm", "zz"]).fails(&["zz"]);

    let unpinned = node.ask(&["unpin", NAME, "--json"]).ok().json();
    assert_eq!(unpinned["objects"], OBJECTS);
    let again = node.ask(&["unpin", &id[..10], "--json"]).ok().json();
    assert_eq!(again["objects"], 0);
    let third = shard(3);
    let pinned = node.ask(&["pin", &third[..16], "--json"]).ok().json();
    assert_eq!((pinned["objects"].as_u64(), pinned["missing"].as_u64()), (Some(1), Some(0)));

    let dry = node.ask(&["gc", "--disk-budget", "3MiB", "--dry-run", "--json"]).ok().json();
    let last = ["no other peer", "--last-copy"];
    node.ask(&["gc", "--disk-budget", "3MiB"]).fails(&last);
    assert_eq!(used(&node), all, "only said");
    let collect = |budget| ["gc", "--disk-budget", budget, "--last-copy", "--json"];
    let done = node.ask(&collect("3MiB")).ok().json();
    assert_eq!(done["evicted"], dry["evicted"]);
    assert!(used(&node) <= 3 << 20 && done["evicted"].as_array().unwrap().len() > 5);
    assert!(node.ask(&["gc"]).ok().out.contains("evicted 0 objects"));
    let done = node.ask(&collect("0")).ok().json();
    assert_eq!(done["used_bytes"], done["pinned_bytes"]);
    assert!(stored(&node.data, &third).exists());

    node.ask(&["rm", &third]).fails(&["pinned"]);
    node.ask(&["rm", &third, "--force"]).fails(&last);
    assert!(stored(&node.data, &third).exists());
    let removed = node.ask(&["rm", &third, "--force", "--last-copy"]).ok().out;
    assert!(removed.contains("removed") && removed.contains("no other peer"), "{removed}");
    assert_eq!(used(&node), 0);
    assert!(!stored(&node.data, &third).exists());
    // Its manifest is gone, so only what gossip said of the model is left.
    let rest = node.ask(&["rm", id, "--json"]).ok().json();
    assert_eq!(rest["objects"], 0);
    assert_eq!(fs::read_dir(node.data.join("published")).unwrap().count(), 0, "withdrawn");
}

#[test]
fn a_stopped_nodes_store_is_looked_after_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut node = Node::start(&data, "still", &[], &[]);
    publish(&node, "0-10");
    node.ask(&["fsck", "--json"]).ok();
    node.signal("INT");
    assert_eq!(node.wait(), Some(0));

    let ask = |args: &[&str]| run(args.iter().copied().chain(["--data", data.to_str().unwrap()]));
    let checked = ask(&["fsck", "--json"]).ok();
    let end = checked.json();
    assert_eq!((end["event"].as_str(), end["objects"].as_u64()), (Some("end"), Some(OBJECTS)));
    let steps = checked.out.lines().filter(|line| line.contains("\"checked\"")).count();
    assert_eq!(steps as u64, OBJECTS, "progress by object");

    ask(&["gc"]).fails(&["--disk-budget"]);
    ask(&["fsck", "--repair"]).fails(&["--repair", "start a node"]);
    ask(&["pin", NAME, "--fetch"]).fails(&["start a node"]);
    ask(&["rm", NAME]).fails(&["pinned"]);
    assert_eq!(ask(&["unpin", NAME, "--json"]).ok().json()["objects"], OBJECTS);
    assert_eq!(ask(&["pin", NAME, "--json"]).ok().json()["objects"], OBJECTS);
    assert_eq!(ask(&["unpin", &shard(5), "--json"]).ok().json()["objects"], 1);
    ask(&["rm", &shard(5)]).fails(&["no node runs here", "1 stored object", "--last-copy"]);
    ask(&["gc", "--disk-budget", "1MiB"]).fails(&["no node runs here", "1 object", "--last-copy"]);
    assert!(stored(&data, &shard(5)).exists());
    let gc = ["gc", "--disk-budget", "1MiB", "--json"];
    let planned = ask(&[&gc[..], &["--dry-run"]].concat()).ok().json();
    let gone = ask(&[&gc[..], &["--last-copy"]].concat()).ok().json();
    assert_eq!(gone["evicted"], planned["evicted"]);
    assert_eq!(gone["evicted"][0][0], shard(5).as_str(), "the only unpinned one: {gone}");

    // Damage is reported by range, gives exit code 1, and is quarantined.
    flip(&data, &shard(2), 40_000);
    flip(&data, &shard(7), 0);
    let damaged = ask(&["fsck"]);
    assert_eq!(damaged.code, Some(1), "{}", damaged.out);
    assert!(damaged.out.contains(&shard(2)) && damaged.out.contains("32768..49152"));
    assert!(damaged.out.contains(&shard(7)) && damaged.err.contains("--repair"));
    let second = ask(&["fsck", "--json"]);
    assert_eq!(second.code, Some(1), "pinned and not whole is still an error");
    assert_eq!(second.json()["incomplete_pinned"], 2);

    // With a node that has the rest, the store is repaired.
    let other = Node::start(&dir.path().join("b"), "still", &[], &[]);
    publish(&other, "0-10");
    let mut node = Node::start(&data, "still", &[&other.address], &[]);
    let repaired = node.ask(&["fsck", "--repair", "--json"]).ok().json();
    assert_eq!(repaired["repaired_objects"], 2);
    assert_eq!(repaired["incomplete_pinned"], 0);
    for index in [2, 7] {
        assert_eq!(fs::read(stored(&data, &shard(index))).unwrap(), source(index));
    }
    node.ask(&["fsck"]).ok();
    node.signal("INT");
    node.wait();
    // Its address is remembered, and it would announce the model again.
    drop(other);

    ask(&["rm", NAME, "--force"]).fails(&["no node runs here", "--last-copy"]);
    let removed = ask(&["rm", NAME, "--force", "--last-copy", "--json"]).ok().json();
    assert_eq!(removed["missing"], 1);
    let node = Node::start(&data, "still", &[], &[]);
    assert_eq!(node.ask(&["ls", "--json"]).ok().json(), serde_json::json!([]), "withdrawn");
    assert_eq!(used(&node), 0);
}

#[test]
fn directories_without_a_store_or_in_use_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = dir.path().join("typo");
    for command in [vec!["fsck"], vec!["gc"], vec!["pin", "x"], vec!["rm", "x"]] {
        let args = command.into_iter().chain(["--data", nothing.to_str().unwrap()]);
        run(args).fails(&["holds no store", nothing.to_str().unwrap()]);
    }
    assert!(!nothing.exists(), "nothing is made by asking");
    // Locked by a process that takes no commands: this one.
    let options = doppler_store::DiskOptions { budget: 1 << 30 };
    let _held = doppler_store::DiskTier::open(dir.path(), options).unwrap();
    let pid = std::process::id().to_string();
    run(["fsck", "--data", dir.path().to_str().unwrap()]).fails(&["in use", &pid]);
    let join = ["join", "--swarm", "x", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
    run(join.into_iter().chain(["--data", dir.path().to_str().unwrap()])).fails(&["in use", &pid]);
}

#[test]
fn bits_flipped_under_a_running_node_never_reach_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let other = Node::start(&dir.path().join("b"), "flips", &[], &[]);
    publish(&other, "0-10");
    let node = Node::start(&dir.path().join("a"), "flips", &[&other.address], &[]);
    publish(&node, "0-10");
    let seed: u64 = rand::random();
    println!("seed {seed}");
    for index in 0..11 {
        // In several groups of each shard, including the first.
        for place in 0..6 {
            let at = (seed as usize).wrapping_mul(place).wrapping_add(place * 150_001);
            flip(&node.data, &shard(index), at);
        }
    }
    let through = node.ask(&["run", NAME, "-p", "Call me", "-n", "12", "--json"]).ok().json();
    let local = local_text();
    assert_eq!((&through["tokens"], &through["text"]), (&local["tokens"], &local["text"]));
    let status = node.ask(&["status", "--json"]).ok().json();
    let count = |key: &str| status["store"][key].as_u64().unwrap();
    assert!(count("quarantines") > 0 && count("damaged_bytes") > 0, "{status}");
    assert!(count("repaired_reads") > 0, "{status}");
    assert!(node.ask(&["status"]).ok().out.contains("damage"));
    // A check finds the damage that nobody has read, and repairs everything.
    node.ask(&["fsck", "--repair"]).ok();
    for index in 0..11 {
        assert_eq!(fs::read(stored(&node.data, &shard(index))).unwrap(), source(index));
    }
    let end = node.ask(&["fsck", "--json"]).ok().json();
    assert_eq!((&end["damaged_objects"], &end["incomplete_pinned"]), (&0.into(), &0.into()));
}

#[test]
fn a_model_that_is_fetched_and_pinned_outlives_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = Node::start(&dir.path().join("a"), "fetch", &[], &[]);
    publish(&holder, "0-10");
    let mut node =
        Node::start(&dir.path().join("b"), "fetch", &[&holder.address], &["--find-timeout", "3"]);
    node.event("model");
    let some = node.ask(&["pin", NAME, "--json"]).ok().json();
    assert!(some["missing"].as_u64().unwrap() >= 11, "{some}");
    let all = node.ask(&["pin", NAME, "--fetch", "--json"]).ok().json();
    assert_eq!((all["objects"].as_u64(), all["missing"].as_u64()), (Some(OBJECTS), Some(0)));
    // Two hold it: one of them may let go of it without a word.
    let third = shard(3);
    let deadline = std::time::Instant::now() + crate::common::PATIENCE;
    while holder.ask(&["rm", &third, "--force"]).code != Some(0) {
        assert!(std::time::Instant::now() < deadline, "the holder never heard of a second copy");
    }
    holder.signal("KILL");
    holder.wait();
    node.ask(&["gc", "--disk-budget", "0"]).ok();
    let text = node.ask(&["run", NAME, "-p", "Call me", "-n", "12", "--json"]).ok().json();
    assert_eq!(text["tokens"], local_text()["tokens"]);
    // No peer is left to repair from; the check says so for each object.
    flip(&node.data, &shard(1), 5);
    let left = node.ask(&["fsck", "--repair"]);
    assert_eq!(left.code, Some(1));
    assert!(left.out.contains(&shard(1)) && left.out.contains("not repaired"), "{}", left.out);
}

/// Also what only memory has left, after disk has evicted it.
#[test]
fn a_removed_model_is_gone_from_memory_too() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "gone", &[], &[]);
    publish(&node, "0-10");
    let ram = || node.ask(&["status", "--json"]).ok().json()["ram"]["used"].as_u64().unwrap();
    node.ask(&["run", NAME, "-p", "Call me", "-n", "3"]).ok();
    assert!(ram() > 1 << 20);
    node.ask(&["unpin", NAME]).ok();
    node.ask(&["gc", "--disk-budget", "0", "--last-copy"]).ok();
    assert_eq!(used(&node), 0);
    assert!(ram() > 1 << 20, "a tier of its own");
    node.ask(&["rm", NAME]).ok();
    assert_eq!(ram(), 0);
}

/// Posts to a node's control API; the lines of the answer.
fn post(node: &Node, path: &str, body: &Value) -> Vec<Value> {
    use std::io::{Read, Write};
    let control = fs::read(node.data.join("control.json")).unwrap();
    let control: Value = serde_json::from_slice(&control).unwrap();
    let (address, token) =
        (control["address"].as_str().unwrap(), control["token"].as_str().unwrap());
    let body = body.to_string();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(crate::common::PATIENCE)).unwrap();
    // HTTP/1.0: the answer ends with the connection, in one piece.
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{answer}");
    body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn long_work_says_how_far_it_has_come_and_a_pipe_hears_only_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "far", &[], &[]);
    let request = serde_json::json!({ "dir": model(), "shards": null, "progress": true });
    let told = post(&holder, "/control/v1/publish", &request);
    let (end, progress) = told.split_last().unwrap();
    assert_eq!(
        (end["event"].as_str(), end["reply"]["shards_stored"].as_u64()),
        (Some("done"), Some(11))
    );
    assert_eq!(progress.len(), 12, "one for each file");
    let last = progress.last().unwrap();
    assert_eq!(last["done"], last["total"]);

    // Slow enough that there is something to tell.
    let slow = ["--download-limit", "4MB/s"];
    let mut node = Node::start(&dir.path().join("b"), "far", &[&holder.address], &slow);
    node.event("model");
    let request = serde_json::json!({ "target": NAME, "fetch": true, "progress": true });
    let told = post(&node, "/control/v1/store/pin", &request);
    let (end, progress) = told.split_last().unwrap();
    assert_eq!((end["event"].as_str(), end["reply"]["missing"].as_u64()), (Some("done"), Some(0)));
    let done: Vec<u64> = progress.iter().map(|one| one["done"].as_u64().unwrap()).collect();
    let total = progress[0]["total"].as_u64().unwrap();
    assert!(done.is_sorted() && done.last() == Some(&total), "{done:?} of {total}");
    assert!(done.iter().any(|bytes| *bytes > 0 && *bytes < total), "{done:?}");
    let rates = progress.iter().filter_map(|one| one["rate"].as_f64());
    assert!(
        rates.clone().any(|rate| rate > 0.5e6 && rate < 8e6),
        "{:?}",
        rates.collect::<Vec<_>>()
    );

    let mut third = Node::start(&dir.path().join("c"), "far", &[&holder.address], &[]);
    third.event("model");
    let said = third.ask(&["pin", NAME, "--fetch"]).ok();
    assert!(said.out.starts_with("pinned ") && said.err.is_empty(), "{}{}", said.out, said.err);
    let absent = serde_json::json!({ "target": "no-such-model", "fetch": true, "progress": true });
    let told = post(&third, "/control/v1/store/pin", &absent);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["event"], "failed");
    assert!(told[0]["error"].as_str().unwrap().contains("no-such-model"), "{}", told[0]);

    // A model that is not here says how much of it has come before its first token.
    let data = dir.path().join("d");
    let slow = ["--download-limit", "1MB/s"];
    let mut fourth = Node::start(&data, "far", &[&holder.address], &slow);
    fourth.event("model");
    let request = serde_json::json!({
        "model": NAME, "prompt": "Call me", "tokens": 2, "progress": true
    });
    let told = post(&fourth, "/control/v1/generate", &request);
    let kinds: Vec<&str> = told.iter().map(|one| one["event"].as_str().unwrap()).collect();
    let starts = kinds.iter().position(|kind| *kind == "start").unwrap();
    assert!(starts > 1 && kinds[..starts].iter().all(|kind| *kind == "loading"), "{kinds:?}");
    assert_eq!(kinds.last(), Some(&"end"));
    let before = &told[starts - 1];
    assert!(before["done"].as_u64().unwrap() > 0 && before["total"].as_u64() > Some(100_000));
}
