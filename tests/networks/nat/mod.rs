//! Nodes behind NATs: which ones can be dialled, which ones need a relay, and what a relay
//! carries. Runs on a small internet of network namespaces (root, iproute2 and nftables).

mod gateway;

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use crate::common::netns::{House, Namespace, Street};
use crate::common::{Node, PATIENCE, model};
use serde_json::Value;

const ASK_AGAIN: Duration = Duration::from_millis(100);
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

/// Asks repeatedly until it is so, with pauses, because each attempt starts a process.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < 2 * PATIENCE, "waited in vain: {what}");
        std::thread::sleep(ASK_AGAIN);
    }
    eprintln!("{what}: after {:.1} s", started.elapsed().as_secs_f64());
}

/// A node that listens like a user's node, but without WebSocket and WebRTC.
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

    /// Waits until every node knows whether it is public.
    fn settle(&self) {
        let relay_id = self.relay.peer_id.as_str();
        until("the machine on the street is public and offers a relay", || {
            let reach = status(&self.outside, &self.relay)["reach"].clone();
            reach["state"] == "public" && reach["offers_relay"] == true
        });
        let houses = [(&self.first, &self.holder), (&self.second, &self.reader)];
        for (house, node) in houses {
            until("a node in a house has a reservation at the relay", || {
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
    // The router's address. It forwards nothing, so only a punched hole leads through it.
    let hole = format!("/ip4/{}/", town.first.street);
    until("a hole is punched", || {
        let peers = told(&town.second.inside, &town.reader, &["peers", "--json"]);
        let to = |row: &&Value| row["id"] == town.holder.peer_id.as_str();
        let row = peers.as_array().unwrap().iter().find(to).cloned().unwrap_or_default();
        row["via"]["way"] == "direct"
            && row["addresses"][0].as_str().is_some_and(|remote| remote.starts_with(&hole))
    });
    // The hole will be gone at the next start, so the address through the relay is saved.
    until("the circuit is written down", || {
        let book = std::fs::read_to_string(town.reader.data.join("peers.json"));
        let book: Value = serde_json::from_str(&book.unwrap_or_default()).unwrap_or_default();
        let entries = book["peers"].as_array().cloned().unwrap_or_default();
        let kept = entries.iter().find(|entry| entry["id"] == town.holder.peer_id.as_str());
        kept.is_some_and(|entry| entry["addresses"].to_string().contains("/p2p-circuit"))
    });
    assert_eq!(town.reader.event("model")["name"], NAME);
    let fetched = town.fetch();
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    let models = told(&town.second.inside, &town.reader, &["ls", "--json"]);
    assert_eq!(models[0]["shards"], models[0]["shards_here"], "{models}");
}

#[test]
fn without_a_hole_a_model_is_known_and_no_shard_is_requested() {
    let Some(mut town) = Town::create("wall", &[]) else { return };
    // Nothing passes between the houses, but everything passes to the relay.
    for (house, other) in [(&town.first, &town.second), (&town.second, &town.first)] {
        let rule = format!("insert rule ip home through ip daddr {} drop", other.street);
        assert!(house.router.nft(&rule));
    }
    town.settle();
    town.publish();
    let reader = |args: &[&str]| ask(&town.second.inside, &town.reader, args);
    until("a circuit to the holder", || {
        way(&town.second.inside, &town.reader, &town.holder).as_deref() == Some("relay")
    });
    let shown = String::from_utf8(reader(&["peers"]).stdout).unwrap();
    assert!(shown.contains(" relay ") && shown.contains(&town.holder.peer_id), "{shown}");
    let shown = String::from_utf8(reader(&["status"]).stdout).unwrap();
    assert!(shown.contains(&format!("through relay {}", town.relay.peer_id)), "{shown}");

    assert_eq!(town.reader.event("model")["name"], NAME);
    let fetched = town.fetch();
    let error = String::from_utf8_lossy(&fetched.stderr).into_owned();
    assert!(!fetched.status.success(), "there is no way for them");
    assert!(error.contains("through a relay, which carries no shards"), "{error}");
    // The manifest came, from the first peer that had it, and nothing else.
    let manifest = std::fs::metadata(model().join("manifest.json")).unwrap().len();
    let status = |house: &House, node| status(&house.inside, node);
    let received = &status(&town.second, &town.reader)["traffic"]["verified_bytes"];
    assert_eq!(received.as_u64(), Some(manifest));
    let sent = status(&town.first, &town.holder)["uploaded_bytes"].as_u64().unwrap();
    assert!(sent < 3 * manifest, "{sent} bytes went to two peers");
    let way = way(&town.second.inside, &town.reader, &town.holder);
    assert_ne!(way.as_deref(), Some("direct"));
}

#[test]
fn a_router_that_maps_ports_makes_a_node_public_while_it_runs() {
    let Some(street) = Street::create("upnp") else { return };
    let (Some(house), Some((outside, address)), Some((third, third_address))) =
        (street.house(1), street.machine(10), street.machine(11))
    else {
        return;
    };
    let mut gateway = gateway::Gateway::start(&house);
    let dir = tempfile::tempdir().unwrap();
    let peer = join(&outside, &dir.path().join("peer"), &address, &[]);
    let listen = ["udp/0/quic-v1", "tcp/0"].map(|rest| format!("/ip4/{}/{rest}", house.address));
    let listen = listen.each_ref().map(String::as_str);
    let extra = ["--no-mdns", "--bootstrap", &peer.address];
    let mut node = house.inside.join_at(&dir.path().join("node"), &listen, &extra);
    let added = [gateway.says("add"), gateway.says("add")];
    for (protocol, added) in ["TCP", "UDP"].into_iter().zip({
        let mut added = added.clone();
        added.sort();
        added
    }) {
        // The same port outside as inside, for an hour.
        let [its, port, inside, to, lease] = added.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{added}")
        };
        assert_eq!((its, inside, lease), (protocol, house.address.as_str(), "3600"));
        assert_eq!(port, to);
    }
    until("the node is public, by its router", || {
        status(&house.inside, &node)["reach"]["state"] == "mapped"
    });
    let told = status(&house.inside, &node);
    let mapped = told["reach"]["mapped"].as_array().unwrap();
    assert_eq!(mapped.len(), 2, "{told}");
    let quic = mapped.iter().map(|text| text.as_str().unwrap()).find(|text| text.contains("quic"));
    let quic = format!("{}/p2p/{}", quic.unwrap(), node.peer_id);
    assert!(quic.starts_with(&format!("/ip4/{}/udp/", house.street)), "{quic}");
    assert!(told["addresses"].as_array().unwrap().contains(&Value::from(quic.as_str())), "{told}");

    // A node that knows neither reaches it there.
    let visitor = join(&third, &dir.path().join("third"), &third_address, &["--bootstrap", &quic]);
    until("a visitor dials the router's address", || {
        way(&third, &visitor, &node).as_deref() == Some("direct")
    });
    node.signal("INT");
    node.event("stopped");
    assert_eq!(node.wait(), Some(0));
    let mut gone = [gateway.says("delete"), gateway.says("delete")];
    gone.sort();
    assert!(gone[0].starts_with("TCP ") && gone[1].starts_with("UDP "), "{gone:?}");
}
