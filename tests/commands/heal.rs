//! A swarm that heals itself, through the binary: nodes as processes, killed with SIGKILL, restarted
//! with their data, and asked to leave.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::{self, Node, PATIENCE, model, run};
use crate::trust_cli::gateway;
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";
const NODES: usize = 10;
/// How soon a dead node is no longer counted on, and everything has its copies again.
const DETECTED_MAX: f64 = 10.0;
const HEALED_MAX: f64 = 45.0;

/// The objects of the model as a node counts them.
fn objects(node: &Node) -> Vec<Value> {
    let seen = node.ask(&["ls", NAME, "--json"]);
    if seen.code != Some(0) {
        return Vec::new();
    }
    seen.json()["objects"].as_array().unwrap().clone()
}

fn fewest(node: &Node) -> u64 {
    objects(node).iter().map(|object| object["copies"].as_u64().unwrap()).min().unwrap_or(0)
}

fn status(node: &Node) -> Value {
    node.ask(&["status", "--json"]).ok().json()
}

/// Waits until something holds. Panics with `what` if it does not within `limit`.
fn wait(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    began.elapsed()
}

fn publish(node: &Node, shards: &str, replicas: &str) -> Value {
    let model = model();
    let args = ["publish", model.to_str().unwrap(), "--shards", shards, "--replicas", replicas];
    node.ask(&[&args[..], &["--json"]].concat()).ok().json()
}

fn join(dir: &Path, name: &str, bootstrap: &[&str], extra: &[&str]) -> Node {
    Node::start(&dir.join(name), "heal", bootstrap, extra)
}

#[test]
fn three_of_ten_nodes_killed_in_mid_generation_lose_nothing() {
    let outcome = common::run(["demo", "--heal", "--json"]).ok().json();
    println!("{outcome}");
    assert_eq!(outcome["identical"], true);
    assert_eq!(
        (&outcome["nodes"], &outcome["killed"], &outcome["shards"], &outcome["lost"]),
        (&10.into(), &3.into(), &11.into(), &0.into())
    );
    assert_eq!(outcome["tokens"], 96);
    let (detect, heal) =
        (outcome["detect_s"].as_f64().unwrap(), outcome["heal_s"].as_f64().unwrap());
    assert!(detect > 0.0 && detect <= DETECTED_MAX, "noticed after {detect} s");
    assert!(heal >= detect && heal <= HEALED_MAX, "healed after {heal} s");
    let bytes = |name: &str| outcome[name].as_u64().unwrap();
    let (copied, least) = (bytes("copied_bytes"), bytes("least_bytes"));
    // Each of them held four or five shards of a mebibyte. The asker's cache may spare a copy, and may take one.
    let enough = least * 3 / 4;
    assert!(least >= 4 << 20 && copied >= enough, "{copied} bytes copied, {least} were missing");
}

#[test]
fn ten_nodes_lose_no_shard_to_kills_and_restarts_and_copy_nothing_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes: Vec<Node> = Vec::new();
    for number in 0..NODES {
        let known: Vec<String> = nodes.iter().map(|node| node.address.clone()).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let node = join(dir.path(), &number.to_string(), &known, &[]);
        // Each shard is on four of the ten.
        let holds = |shard: &usize| (number + NODES - shard % NODES) % NODES < 4;
        let shards: Vec<String> = (0..11).filter(holds).map(|shard| shard.to_string()).collect();
        publish(&node, &shards.join(","), "4:5");
        nodes.push(node);
    }
    wait(PATIENCE, "four copies of each", || nodes.iter().all(|node| fewest(node) >= 4));
    assert_eq!(status(&nodes[0])["healing"]["copied"], 0);

    let dead: BTreeSet<String> = nodes[..3].iter().map(|node| node.peer_id.clone()).collect();
    nodes[..3].iter().for_each(|node| node.signal("KILL"));
    let counted_on = |node: &Node| {
        let holders = |object: &Value| object["holders"].as_array().unwrap().clone();
        let all: Vec<Value> = objects(node).iter().flat_map(holders).collect();
        all.iter().any(|id| dead.contains(id.as_str().unwrap()))
    };
    let alive = &nodes[3..];
    let noticed = wait(PATIENCE, "nobody counts on the dead", || !alive.iter().any(counted_on));
    wait(PATIENCE, "four copies of each again", || alive.iter().all(|node| fewest(node) >= 4));
    assert!(noticed.as_secs_f64() <= DETECTED_MAX, "noticed after {noticed:?}");
    let copied = |node: &Node| status(node)["healing"]["copied"].as_u64().unwrap();
    let copies: u64 = alive.iter().map(copied).sum();
    // Of the shards on the three nodes, those on one lack one copy, on two two, on all three three.
    assert!((15..=16).contains(&copies), "{copies} copies");

    // All ten, one after another, with their data; those that were killed first.
    let places: Vec<std::path::PathBuf> = nodes.iter().map(|node| node.data.clone()).collect();
    for (number, data) in places.iter().enumerate() {
        if number >= 3 {
            nodes[number].signal("TERM");
        }
        nodes[number].wait();
        let known: Vec<String> = nodes
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != number && (*other >= 3 || *other < number))
            .map(|(_, node)| node.address.clone())
            .collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        nodes[number] = Node::start(data, "heal", &known, &[]);
    }
    wait(PATIENCE, "everything is there", || nodes.iter().all(|node| fewest(node) >= 4));
    wait(PATIENCE, "all nodes know it", || {
        nodes.iter().all(|node| status(node)["healing"]["lacking"] == 0)
    });
    for node in &nodes {
        let healing = &status(node)["healing"];
        assert_eq!(healing["copied"], 0, "copied again: {healing}");
    }
    let kept: u64 =
        nodes.iter().map(|node| status(node)["healing"]["replica_bytes"].as_u64().unwrap()).sum();
    assert!(kept >= 4 << 20, "the copies outlive a restart: {kept} bytes");
}

#[test]
fn a_target_is_signed_shown_and_remembered_and_a_bad_one_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = join(dir.path(), "a", &[], &["--replica-budget", "off"]);
    for bad in ["0:4", "5:4", "2:65", "2", "two:four"] {
        let model = model();
        let said = node.ask(&["publish", model.to_str().unwrap(), "--replicas", bad]);
        assert_eq!(said.code, Some(2), "{}", said.err);
        assert!(said.err.contains("MIN is at least 1") && said.err.contains("at most 64"));
    }
    publish(&node, "0-10", "3:7");
    let replicas = |node: &Node| node.ask(&["ls", "--json"]).ok().json()[0]["replicas"].clone();
    let wanted = |min: u64, max: u64| serde_json::json!({ "min": min, "max": max });
    assert_eq!(replicas(&node), wanted(3, 7));
    // Another node hears of it, and of the next one, which counts whatever the clocks say.
    let other = join(dir.path(), "b", &[&node.address], &[]);
    wait(PATIENCE, "it is heard of", || {
        let models = other.ask(&["ls", "--json"]).ok().json();
        models[0]["replicas"] == wanted(3, 7)
    });
    publish(&node, "0-10", "1:2");
    wait(PATIENCE, "the new target is heard of", || replicas(&other) == wanted(1, 2));
    drop(other);
    node.signal("TERM");
    node.wait();
    let node = join(dir.path(), "a", &[], &["--replica-budget", "off"]);
    assert_eq!(replicas(&node), wanted(1, 2));
    let status = status(&node);
    assert_eq!((&status["healing"]["budget"], &status["healing"]["room"]), (&0.into(), &0.into()));
    let one = run(["join", "--swarm", "x", "--disk-budget", "1GiB", "--replica-budget", "2GiB"]);
    one.fails(&["--replica-budget 2.00 GiB", "--disk-budget"]);
}

#[test]
fn a_node_leaves_once_others_hold_what_it_holds_and_says_so_if_nobody_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut holder = join(dir.path(), "a", &[], &[]);
    publish(&holder, "0-10", "1:2");
    let publisher = status(&holder)["publisher"].as_str().unwrap().to_owned();

    let refused = holder.ask(&["leave", "--drain"]);
    refused.fails(&["13 objects", "held by no other node", "offers to copy", "without --drain"]);
    assert_eq!(status(&holder)["healing"]["is_leaving"], false, "it stays");
    holder.ask(&["rm", NAME, "--force"]).fails(&["13 of 13 objects", "--last-copy"]);

    // One that trusts the publisher takes everything; a stranger to it takes nothing unasked.
    let stranger = join(dir.path(), "s", &[&holder.address], &["--trust-policy", "listed"]);
    let other = join(dir.path(), "b", &[&holder.address], &["--trust", &publisher]);
    wait(PATIENCE, "they hear of it", || [&other, &stranger].iter().all(|node| fewest(node) >= 1));
    let left = holder.ask(&["leave", "--drain", "--json"]).ok();
    assert_eq!(holder.wait(), Some(0));
    let end = left.json();
    assert_eq!((end["event"].as_str(), &end["last_copies"]), (Some("leaving"), &0.into()), "{end}");
    assert!(left.out.contains(r#""event":"draining""#), "{}", left.out);
    let here = |node: &Node| node.ask(&["ls", "--json"]).ok().json()[0]["shards_here"].clone();
    assert_eq!((here(&other), here(&stranger)), (11.into(), 0.into()));
    let text = other.ask(&["ls", NAME]).ok().out;
    assert!(text.contains("1:2 copies") && text.contains("replica"), "{text}");

    // A replica that is the last copy goes neither by gc nor by rm, and by `leave` only if told.
    other.ask(&["gc", "--disk-budget", "0"]).fails(&["no other peer", "--last-copy"]);
    other.ask(&["rm", NAME]).fails(&["no other peer", "--last-copy"]);
    assert_eq!(here(&other), 11);
    let mut other = other;
    let said = other.ask(&["leave"]).ok().out;
    assert!(said.contains("left") && said.contains("held by no other peer: 12 objects"), "{said}");
    assert_eq!(other.wait(), Some(0));
    run(["leave", "--data", other.data.to_str().unwrap()]).fails(&["no node is running"]);
}

#[test]
fn the_cache_of_a_small_disk_beside_one_publisher_keeps_changing() {
    let dir = tempfile::tempdir().unwrap();
    let holder = join(dir.path(), "a", &[], &[]);
    publish(&holder, "0-10", "2:4");
    let publisher = status(&holder)["publisher"].as_str().unwrap().to_owned();
    // Room for three shards of eleven, and no copies for others.
    let small = ["--disk-budget", "4MiB", "--replica-budget", "off", "--trust", &publisher];
    let node = join(dir.path(), "b", &[&holder.address], &small);
    wait(PATIENCE, "it knows the model", || fewest(&node) >= 1);
    let shards: Vec<Value> = objects(&node).into_iter().skip(1).collect();
    let bring = |shard: &Value| {
        let path = format!("/shards/{}/bring", shard["id"].as_str().unwrap());
        let (status, body) = gateway(&node, "POST", &path);
        assert_eq!(status, 200, "{body}");
    };
    shards[..2].iter().for_each(bring);
    let lacking = |node: &Node| status(node)["healing"]["lacking"].as_u64().unwrap();
    // Everything but the two and the manifest: the node has looked since they came.
    wait(PATIENCE, "it counts the copies", || lacking(&node) == 10);
    let here = |node: &Node| {
        let here = objects(node).into_iter().filter(|object| object["here"] == "cached");
        here.map(|object| object["id"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    // Fewer nodes than should hold them, but the publisher has pinned them: what was read first goes
    // as soon as that is known here.
    let first = shards[0]["id"].as_str().unwrap();
    wait(PATIENCE, "what was read first has gone", || {
        shards[2..].iter().for_each(bring);
        !here(&node).contains(first)
    });
    let last = shards.last().unwrap()["id"].as_str().unwrap();
    assert!(here(&node).contains(last), "what was read last is here: {:?}", here(&node));
    // The publisher evicts nothing, and its copies are the last ones of most.
    let kept = holder.ask(&["gc", "--disk-budget", "0", "--json"]).ok().json();
    assert_eq!(kept["evicted"], serde_json::json!([]));
    assert_eq!(objects(&holder).iter().filter(|object| object["here"] == "pinned").count(), 13);
}
