//! Which publishers' models may be used, as the user decides: by list, on first use, or not at all.

use crate::common::{Node, model, run};
use serde_json::json;

const KEY: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c";

#[test]
fn publishers_are_added_listed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let trust = |args: &[&str]| {
        run(["trust"].iter().chain(args).chain(&["--data", dir.path().to_str().unwrap()]))
    };
    assert!(trust(&["list"]).ok().out.contains("nobody is trusted"));
    assert_eq!(trust(&["list", "--json"]).ok().json(), json!([]));
    assert!(trust(&["add", KEY, "--note", "the lab"]).ok().out.contains("trusted"));
    assert_eq!(trust(&["add", KEY, "--json"]).ok().json()["result"], "trusted already");
    let listed = trust(&["list", "--json"]).ok().json();
    assert_eq!(listed, json!([{ "publisher": KEY, "how": "added", "note": "the lab" }]));
    assert!(trust(&["list"]).ok().out.contains("the lab"));
    assert_eq!(trust(&["add", "abc"]).code, Some(2), "wrong usage");
    assert!(trust(&["remove", KEY]).ok().out.contains("removed"));
    assert!(trust(&["remove", KEY]).ok().out.contains("was not trusted"));

    // A damaged file is reported, not treated as empty; a node refuses to start on it.
    std::fs::write(dir.path().join("trusted.json"), b"{").unwrap();
    trust(&["list"]).fails(&["trusted.json is damaged", "delete it"]);
    trust(&["add", KEY]).fails(&["trusted.json is damaged"]);
    let data = dir.path().to_str().unwrap();
    let join = ["join", "--swarm", "s", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"];
    run(join.iter().chain(&["--data", data])).fails(&["trusted.json is damaged"]);
}

#[test]
fn a_strangers_model_is_refused_or_trusted_on_first_use() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "trust", &[], &[]);
    let published = holder.ask(&["publish", model().to_str().unwrap(), "--json"]).ok().json();
    let name = published["name"].as_str().unwrap().to_owned();
    let run_it = ["run", &name, "-p", "Call me", "-n", "2"];
    // A node's own publications need no approval.
    holder.ask(&run_it).ok();
    assert_eq!(holder.ask(&["trust", "list", "--json"]).ok().json(), json!([]));

    let listed = ["--trust-policy", "listed"];
    let mut strict = Node::start(&dir.path().join("b"), "trust", &[&holder.address], &listed);
    let publisher = strict.event("model")["publisher"].as_str().unwrap().to_owned();
    let what_to_do = format!("trust add {publisher}");
    strict.ask(&run_it).fails(&[&name, &publisher, "not trusted", &what_to_do]);
    strict.ask(&["pin", &name, "--fetch"]).fails(&[&what_to_do]);
    assert_eq!(strict.ask(&["trust", "list", "--json"]).ok().json(), json!([]));
    // The running node notices additions and removals.
    strict.ask(&["trust", "add", &publisher]).ok();
    strict.ask(&run_it).ok();
    strict.ask(&["trust", "remove", &publisher]).ok();
    strict.ask(&run_it).fails(&["was removed", &what_to_do]);
    strict.ask(&["run", &name, "-p", "Call me", "-n", "2", "--trust", &publisher]).ok();
    strict.ask(&run_it).ok();

    // The default policy, where nobody can be asked.
    let mut open = Node::start(&dir.path().join("c"), "trust", &[&holder.address], &[]);
    open.event("model");
    open.ask(&run_it).ok();
    let kept = open.ask(&["trust", "list", "--json"]).ok().json();
    assert_eq!((&kept[0]["publisher"], &kept[0]["how"]), (&json!(publisher), &json!("first_use")));
    // Once removed, it stays refused, though nobody can be asked; also for a run without the node.
    open.ask(&["pin", &name, "--fetch"]).ok();
    open.ask(&["trust", "remove", &publisher]).ok();
    open.ask(&run_it).fails(&[&name, "was removed", &what_to_do]);
    open.ask(&["pin", &name, "--fetch"]).fails(&["was removed"]);
    assert_eq!(open.ask(&["trust", "list", "--json"]).ok().json(), json!([]));
    assert!(open.ask(&["trust", "list"]).ok().out.contains("refused"));
    assert_eq!(open.ask(&["ls", "--json"]).ok().json()[0]["trust"], "refused");
    open.signal("TERM");
    assert_eq!(open.wait(), Some(0));
    open.ask(&run_it).fails(&["was removed"]);
    open.ask(&["trust", "add", &publisher]).ok();
    open.ask(&run_it).ok();
}

/// Asks a node's gateway for something, without a token; the status and the body.
pub fn gateway(node: &Node, method: &str, path: &str) -> (u16, String) {
    use std::io::{Read, Write};
    let status = node.ask(&["status", "--json"]).ok().json();
    let address = status["page"].as_str().unwrap().strip_prefix("http://").unwrap().to_owned();
    let mut stream = std::net::TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(crate::common::PATIENCE)).unwrap();
    // HTTP/1.0: the answer ends with the connection.
    let head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[test]
fn nobody_is_trusted_because_a_page_asked() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "page", &[], &[]);
    holder.ask(&["publish", model().to_str().unwrap()]).ok();
    // The default policy: a run from a script would trust the publisher.
    let mut node = Node::start(&dir.path().join("b"), "page", &[&holder.address], &[]);
    let event = node.event("model");
    let (id, publisher) = (event["id"].as_str().unwrap(), event["publisher"].as_str().unwrap());
    let manifest = std::fs::read(model().join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let shard = manifest["shards"][3]["hash"].as_str().unwrap();
    let bring = format!("/shards/{shard}/bring");
    let nobody = || assert_eq!(node.ask(&["trust", "list", "--json"]).ok().json(), json!([]));
    let (status, body) = gateway(&node, "POST", &bring);
    assert!(status == 403 && body.contains("untrusted") && body.contains(publisher), "{body}");
    nobody();
    // The model's program needs no trust for the embedded model alone.
    let other = format!("/models/{id}/program");
    let embedded = gateway(&node, "GET", "/models/embedded").1;
    if !embedded.contains(id) {
        assert_eq!(gateway(&node, "GET", &other).0, 403);
        nobody();
    }
    node.ask(&["trust", "add", publisher]).ok();
    let (status, body) = gateway(&node, "POST", &bring);
    assert_eq!(status, 200, "{body}");
}
