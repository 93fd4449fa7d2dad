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
    strict.ask(&run_it).fails(&["not trusted"]);
    strict.ask(&["run", &name, "-p", "Call me", "-n", "2", "--trust", &publisher]).ok();
    strict.ask(&run_it).ok();

    // The default policy, where nobody can be asked.
    let mut open = Node::start(&dir.path().join("c"), "trust", &[&holder.address], &[]);
    open.event("model");
    open.ask(&run_it).ok();
    let kept = open.ask(&["trust", "list", "--json"]).ok().json();
    assert_eq!((&kept[0]["publisher"], &kept[0]["how"]), (&json!(publisher), &json!("first_use")));
}
