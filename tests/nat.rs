//! Nodes behind NATs: who can be reached, who needs a relay, and what comes over one. On a
//! small internet of network namespaces: root, iproute2 and nftables.

mod common;

use std::path::Path;
use std::process::Output;
use std::time::Instant;

use common::netns::{House, Namespace, Street};
use common::{Node, PATIENCE, model};
use serde_json::Value;

const NAME: &str = "tiny-mixtral-q4_k_m";

fn ask(namespace: &Namespace, node: &Node, args: &[&str]) -> Output {
    namespace.command().args(args).arg("--data").arg(&node.data).output().unwrap()
}

fn told(namespace: &Namespace, node: &Node, args: &[&str]) -> Value {
    let output = ask(namespace, node, args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn status(namespace: &Namespace, node: &Node) -> Value {
    told(namespace, node, &["status", "--json"])
}

/// How `node` is connected to `peer`: "direct", "relay", or nothing.
fn way(namespace: &Namespace, node: &Node, peer: &Node) -> Option<String> {
    let peers = told(namespace, node, &["peers", "--json"]);
    let row = peers.as_array()?.iter().find(|row| row["id"] == peer.peer_id.as_str())?.clone();
    Some(row["via"]["way"].as_str()?.to_owned())
}

/// Asks until it is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < 2 * PATIENCE, "waited in vain: {what}");
    }
    eprintln!("{what}: after {:.1} s", started.elapsed().as_secs_f64());
}

/// A node that listens like a user's, but for WebSocket and WebRTC.
fn join(namespace: &Namespace, data: &Path, address: &str, extra: &[&str]) -> Node {
    let listen = ["udp/0/quic-v1", "tcp/0"].map(|rest| format!("/ip4/{address}/{rest}"));
    let listen = listen.each_ref().map(String::as_str);
    let extra = [&["--no-mdns", "--no-upnp", "--find-timeout", "3"][..], extra].concat();
    namespace.join_at(data, &listen, &extra)
}

/// Two houses and a machine on the street.
struct Town {
    _street: Street,
    first: House,
    second: House,
    outside: Namespace,
    relay: Node,
    holder: Node,
    reader: Node,
    _dir: tempfile::TempDir,
}

impl Town {
    fn create(purpose: &str, extra: &[&str]) -> Option<Self> {
        let street = Street::create(purpose)?;
        let (first, second) = (street.house(1)?, street.house(2)?);
        let (outside, address) = street.machine(10)?;
        let dir = tempfile::tempdir().unwrap();
        let relay = join(&outside, &dir.path().join("relay"), &address, extra);
        let extra = [extra, &["--bootstrap", &relay.address]].concat();
        let holder = join(&first.inside, &dir.path().join("holder"), &first.address, &extra);
        let reader = join(&second.inside, &dir.path().join("reader"), &second.address, &extra);
        Some(Self { _street: street, first, second, outside, relay, holder, reader, _dir: dir })
    }

    /// Waits until everybody knows what they are.
    fn settle(&self) {
        let relay_id = self.relay.peer_id.as_str();
        until("the machine on the street is public and offers a relay", || {
            let reach = status(&self.outside, &self.relay)["reach"].clone();
            reach["state"] == "public" && reach["offers_relay"] == true
        });
        let houses = [(&self.first, &self.holder), (&self.second, &self.reader)];
        for (house, node) in houses {
            until("a node in a house has a place at the relay", || {
                let reach = status(&house.inside, node)["reach"].clone();
                assert_ne!(reach["state"], "public", "{reach}");
                reach["state"] == "private" && reach["relays"][0] == relay_id
            });
            let status = status(&house.inside, node);
            let circuit = format!("/p2p/{relay_id}/p2p-circuit/p2p/{}", node.peer_id);
            let announced = status["addresses"].as_array().unwrap();
            assert!(announced.iter().any(|a| a.as_str().unwrap().ends_with(&circuit)), "{status}");
        }
    }

    fn publish(&self) {
        let model = model();
        let said = ask(&self.first.inside, &self.holder, &["publish", model.to_str().unwrap()]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    }

    fn fetch(&self) -> Output {
        ask(&self.second.inside, &self.reader, &["pin", NAME, "--fetch"])
    }
}

#[test]
fn two_houses_meet_through_a_relay_and_then_directly() {
    let Some(mut town) = Town::create("punch", &[]) else { return };
    town.settle();
    town.publish();
    until("a hole is punched", || {
        way(&town.second.inside, &town.reader, &town.holder).as_deref() == Some("direct")
    });
    assert_eq!(town.reader.event("model")["name"], NAME);
    let fetched = town.fetch();
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    let models = told(&town.second.inside, &town.reader, &["ls", "--json"]);
    assert_eq!(models[0]["shards"], models[0]["shards_here"], "{models}");
}
