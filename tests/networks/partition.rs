//! Ten nodes in two namespaces, five in each; the link between them is cut with nftables for a minute.
//! Each side heals what it has, and afterwards the swarm is one again, with no shard lost and copies
//! dropped that are too many. Needs root, iproute2 and nftables.

use std::time::{Duration, Instant};

use crate::common::netns::Namespace;
use crate::common::{Node, model};
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";
const SIDES: [&str; 2] = ["10.213.86.1", "10.213.86.2"];
const NODES: usize = 10;
const SHARDS: usize = 11;
/// How long the link stays cut, at least.
const CUT_FOR: Duration = Duration::from_secs(60);
/// Each step takes far less.
const STEP_MAX: Duration = Duration::from_secs(150);

struct Sides {
    namespaces: [Namespace; 2],
    nodes: Vec<Node>,
}

impl Sides {
    fn ask(&self, node: usize, args: &[&str]) -> Option<Value> {
        let mut command = self.namespaces[node % 2].command();
        let output = command.args(args).arg("--data").arg(&self.nodes[node].data).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(told.lines().last().unwrap_or_default()).ok()
    }

    /// The number of copies of each shard, as a node counts them.
    fn copies(&self, node: usize) -> Vec<u64> {
        let Some(seen) = self.ask(node, &["ls", NAME, "--json"]) else { return Vec::new() };
        let objects = seen["objects"].as_array().unwrap().iter();
        let shards = objects.filter(|object| object["what"].as_str().unwrap().starts_with("shard"));
        shards.map(|shard| shard["copies"].as_u64().unwrap()).collect()
    }

    /// A figure of healing, summed over all nodes.
    fn sum(&self, figure: &str) -> u64 {
        let of = |node| self.ask(node, &["status", "--json"])?["healing"][figure].as_u64();
        (0..NODES).filter_map(of).sum()
    }

    /// Waits until every node counts the copies of every shard as `holds` says.
    fn wait(&self, what: &str, holds: impl Fn(u64) -> bool) {
        let began = Instant::now();
        loop {
            let all: Vec<Vec<u64>> = (0..NODES).map(|node| self.copies(node)).collect();
            if all.iter().all(|seen| seen.len() == SHARDS && seen.iter().all(|n| holds(*n))) {
                eprintln!("{what}: after {:.1} s", began.elapsed().as_secs_f64());
                return;
            }
            assert!(began.elapsed() < STEP_MAX, "{what}: {all:?}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

#[test]
#[ignore = "takes four minutes"]
fn a_swarm_cut_in_two_for_a_minute_loses_no_shard() {
    let (Some(left), Some(right)) = (Namespace::create("part-a"), Namespace::create("part-b"))
    else {
        return;
    };
    left.ip(&format!("link add between type veth peer name between netns {}", right.name()));
    let namespaces = [left, right];
    for (side, address) in namespaces.iter().zip(SIDES) {
        side.ip(&format!("addr add {address}/24 dev between"));
        side.ip("link set between up");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut sides = Sides { namespaces, nodes: Vec::new() };
    for number in 0..NODES {
        let mut extra = vec!["--no-mdns".to_owned(), "--no-upnp".to_owned()];
        for node in &sides.nodes {
            extra.extend(["--bootstrap".to_owned(), node.address.clone()]);
        }
        let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
        let data = dir.path().join(number.to_string());
        let node = sides.namespaces[number % 2].join(&data, SIDES[number % 2], &extra);
        sides.nodes.push(node);
        // Each shard is on four nodes, two on each side.
        let holds = |shard: &usize| (number + NODES - shard % NODES) % NODES < 4;
        let shards: Vec<String> = (0..SHARDS).filter(holds).map(|s| s.to_string()).collect();
        let (path, shards) = (model(), shards.join(","));
        let args = ["publish", path.to_str().unwrap(), "--shards", &shards, "--json"];
        sides.ask(number, &[&args[..], &["--replicas", "4:5"]].concat()).expect("published");
    }
    sides.wait("four copies of each", |copies| copies == 4);

    let cut = "table inet cut {
        chain in { type filter hook input priority filter; iifname between drop; }
        chain out { type filter hook output priority filter; oifname between drop; }
    }";
    if !sides.namespaces[0].nft(cut) {
        return;
    }
    let began = Instant::now();
    // Those across the link no longer count, so each side makes two of each shard.
    while sides.sum("copied") < 4 * SHARDS as u64 {
        assert!(began.elapsed() < STEP_MAX, "{} copies were made", sides.sum("copied"));
        std::thread::sleep(Duration::from_millis(500));
    }
    sides.wait("each side has four copies of its own", |copies| copies == 4);
    eprintln!("healed {:.1} s after the cut", began.elapsed().as_secs_f64());
    let made = sides.sum("copied");
    std::thread::sleep(CUT_FOR.saturating_sub(began.elapsed()));

    assert!(sides.namespaces[0].nft("delete table inet cut"));
    sides.wait("they have met again", |copies| copies > 5);
    let met = Instant::now();
    // Replicas go a minute later, pinned copies stay.
    while sides.sum("dropped") == 0 {
        assert!(met.elapsed() < STEP_MAX, "no copy was dropped");
        std::thread::sleep(Duration::from_millis(500));
    }
    sides.wait("enough are left", |copies| copies >= 4);
    assert_eq!(sides.sum("copied"), made, "nothing was copied again");
}
