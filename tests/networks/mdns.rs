//! Nodes of one local network find each other without an address, over IPv4 or IPv6, and again after
//! the network between them was gone. Needs multicast, so it runs in network namespaces of its own
//! (root and iproute2).

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::netns::Namespace;
use crate::common::{Node, PATIENCE, model};

const ADDRESS: &str = "10.213.77.1";

#[test]
fn nodes_of_one_network_need_no_address() {
    let Some(namespace) = Namespace::create("mdns") else { return };
    for line in [
        "link add near type veth peer name far",
        "link set near up",
        "link set far up",
        &format!("addr add {ADDRESS}/24 dev near"),
        "route add 224.0.0.0/4 dev near",
    ] {
        namespace.ip(line);
    }
    let dir = tempfile::tempdir().unwrap();
    let first = namespace.join(&dir.path().join("a"), ADDRESS, &[]);
    let mut second = namespace.join(&dir.path().join("b"), ADDRESS, &[]);
    let published = namespace
        .command()
        .arg("publish")
        .arg(model())
        .args(["--shards", "0"])
        .arg("--data")
        .arg(&first.data)
        .output()
        .unwrap();
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    assert_eq!(second.event("model")["name"], "tiny-mixtral-q4_k_m");
}

/// Two machines and the link between them.
struct Pair {
    near: Namespace,
    far: Namespace,
}

impl Pair {
    /// `addresses` of each machine, with prefix lengths.
    fn create(purpose: &str, addresses: [&[&str]; 2]) -> Option<Self> {
        let near = Namespace::create(&format!("{purpose}-a"))?;
        let far = Namespace::create(&format!("{purpose}-b"))?;
        near.ip(&format!("link add lan type veth peer name lan netns {}", far.name()));
        for (namespace, addresses) in [&near, &far].into_iter().zip(addresses) {
            for address in addresses {
                // An address whose uniqueness is still being checked cannot be listened at.
                let nodad = if address.contains(':') { " nodad" } else { "" };
                namespace.ip(&format!("addr add {address} dev lan{nodad}"));
            }
            namespace.ip("link set lan up");
            if addresses.iter().any(|address| !address.contains(':')) {
                namespace.ip("route add 224.0.0.0/4 dev lan");
            }
        }
        Some(Self { near, far })
    }

    /// A node with the default listen addresses.
    fn join(namespace: &Namespace, data: &Path, extra: &[&str]) -> Node {
        namespace.join_at(data, &[], &[&["--no-upnp"][..], extra].concat())
    }
}

fn peers(namespace: &Namespace, node: &Node) -> Value {
    let output = namespace.command().args(["peers", "--json", "--data"]).arg(&node.data).output();
    serde_json::from_slice(&output.unwrap().stdout).unwrap()
}

fn sees(namespace: &Namespace, node: &Node, peer: &Node) -> bool {
    let peers = peers(namespace, node);
    peers.as_array().unwrap().iter().any(|row| row["id"] == peer.peer_id.as_str())
}

/// Waits until it is so, at most `limit`; how long that took.
fn until(what: &str, limit: Duration, is_so: impl Fn() -> bool) -> Duration {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < limit, "waited in vain: {what}");
        // Each question starts a process.
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("{what}: after {:.1} s", started.elapsed().as_secs_f64());
    started.elapsed()
}

#[test]
fn a_network_of_ipv6_alone_needs_no_flags() {
    let Some(pair) = Pair::create("six", [&["fd77::1/64"], &["fd77::2/64"]]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = Pair::join(&pair.near, &dir.path().join("a"), &[]);
    let second = Pair::join(&pair.far, &dir.path().join("b"), &[]);
    until("they meet", PATIENCE, || sees(&pair.near, &first, &second));
    until("both know", PATIENCE, || sees(&pair.far, &second, &first));
    let row = peers(&pair.near, &first);
    assert!(row.to_string().contains("/ip6/fd77::2/"), "{row}");
}

#[test]
fn an_ipv4_network_still_needs_no_flags() {
    let lan: [&[&str]; 2] = [&["10.213.79.1/24"], &["10.213.79.2/24"]];
    let Some(pair) = Pair::create("four", lan) else { return };
    let dir = tempfile::tempdir().unwrap();
    // A machine without IPv6: the default addresses are those that it has.
    let off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6";
    assert!(pair.near.program("sh").args(["-c", off]).status().unwrap().success());
    let first = Pair::join(&pair.near, &dir.path().join("a"), &[]);
    let second = Pair::join(&pair.far, &dir.path().join("b"), &[]);
    until("they meet", PATIENCE, || sees(&pair.near, &first, &second));
}

/// What is promised once the way is open again, and what a loaded test machine adds.
const MET_WITHIN: Duration = Duration::from_secs(20 + 10);

/// They meet by mDNS; the link is cut for so long; they meet again.
fn cut(purpose: &str, time: Duration) {
    let lan: [&[&str]; 2] = [&["10.213.80.1/24"], &["10.213.80.2/24"]];
    let Some(pair) = Pair::create(purpose, lan) else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = Pair::join(&pair.near, &dir.path().join("a"), &[]);
    let second = Pair::join(&pair.far, &dir.path().join("b"), &[]);
    until("they meet", PATIENCE, || {
        sees(&pair.near, &first, &second) && sees(&pair.far, &second, &first)
    });
    pair.far.ip("link set lan down");
    let started = Instant::now();
    until("the cut is noticed", PATIENCE, || !sees(&pair.near, &first, &second));
    let looks = pair.near.command().args(["peers", "--data"]).arg(&first.data).output().unwrap();
    let said = String::from_utf8_lossy(&looks.stderr).into_owned();
    assert!(said.contains("looking for") && said.contains(&second.peer_id), "{said}");
    std::thread::sleep(time.saturating_sub(started.elapsed()));
    pair.far.ip("link set lan up");
    pair.far.ip("route add 224.0.0.0/4 dev lan");
    until("they meet again", MET_WITHIN, || sees(&pair.near, &first, &second));
}

#[test]
fn after_a_cut_they_meet_again() {
    cut("cut", Duration::from_secs(25));
}

#[test]
#[ignore = "takes two minutes"]
fn after_a_cut_of_ninety_seconds_they_meet_again() {
    cut("cut90", Duration::from_secs(90));
}

/// A peer goes for so long and comes back under the same name; only one of the two looks.
fn absence(purpose: &str, time: Duration, extra: impl Fn(&Node) -> Vec<String>) {
    let lan: [&[&str]; 2] = [&["10.213.81.1/24"], &["10.213.81.2/24"]];
    let Some(pair) = Pair::create(purpose, lan) else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = Pair::join(&pair.near, &dir.path().join("a"), &["--no-mdns"]);
    let data = dir.path().join("b");
    let address = |node: &Node| {
        let mut ask = pair.near.command();
        let output = ask.args(["status", "--json", "--data"]).arg(&node.data).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap();
        let all = status["addresses"].as_array().unwrap().iter();
        let here = all.filter_map(Value::as_str).find(|text| text.starts_with("/ip4/10."));
        here.map(str::to_owned)
    };
    until("it listens on its network", PATIENCE, || address(&first).is_some());
    let address = address(&first).unwrap();
    let bootstrap = ["--no-mdns", "--bootstrap", &address];
    let mut second = Pair::join(&pair.far, &data, &bootstrap);
    until("they meet", PATIENCE, || sees(&pair.near, &first, &second));
    // Where the second one was reached is written down, too.
    until("it is remembered", PATIENCE, || {
        let book = std::fs::read_to_string(first.data.join("peers.json")).unwrap_or_default();
        book.contains(&second.peer_id)
    });
    second.signal("TERM");
    second.wait();
    std::thread::sleep(time);
    let extra = extra(&first);
    let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
    let second = Pair::join(&pair.far, &data, &extra);
    until("they meet again", MET_WITHIN, || sees(&pair.near, &first, &second));
}

#[test]
#[ignore = "takes eleven minutes"]
fn after_ten_minutes_a_peer_that_knows_nobody_is_found_by_the_one_that_met_it() {
    absence("back", Duration::from_secs(600), |first| {
        let book = first.data.parent().unwrap().join("b/peers.json");
        std::fs::remove_file(book).unwrap();
        vec!["--no-mdns".to_owned()]
    });
}

#[test]
fn a_peer_that_comes_back_and_knows_nobody_is_found_by_the_one_that_met_it() {
    absence("return", Duration::ZERO, |first| {
        let book = first.data.parent().unwrap().join("b/peers.json");
        std::fs::remove_file(book).unwrap();
        vec!["--no-mdns".to_owned()]
    });
}
