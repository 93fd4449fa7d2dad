//! Which models nodes know, over restarts and withdrawals.

use std::sync::Arc;
use std::time::Instant;

use crate::common::{Node, PATIENCE, model, run};
use doppler_mesh::{Mesh, MeshOptions};
use doppler_store::ModelId;
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::signature::SignedModel;
use serde_json::{Value, json};

fn stop(mut node: Node) {
    node.signal("TERM");
    assert_eq!(node.wait(), Some(0));
}

#[test]
fn what_is_pinned_is_known_and_told_on_though_its_publisher_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "kept", &[], &[]);
    let published = holder.ask(&["publish", model().to_str().unwrap(), "--json"]).ok().json();
    let (id, name) = (published["model"].as_str().unwrap(), published["name"].as_str().unwrap());
    let publisher = published["publisher"].as_str().unwrap();
    let data = dir.path().join("b");
    let mut node = Node::start(&data, "kept", &[&holder.address], &[]);
    node.event("model");
    node.ask(&["pin", name, "--fetch"]).ok();
    stop(holder);
    stop(node);
    // Where no node runs, its signer is known, too.
    let words = ["-p", "Call me", "-n", "2", "--backend", "cpu", "--data", data.to_str().unwrap()];
    run(["run", &name[..6]].iter().chain(&words)).ok();

    let node = Node::start(&data, "kept", &[], &[]);
    let models = node.ask(&["ls", "--json"]).ok().json();
    assert_eq!((&models[0]["id"], &models[0]["name"]), (&json!(id), &json!(name)));
    assert_eq!(models[0]["signers"][0]["publisher"], publisher);
    assert_eq!((&models[0]["shards_here"], &models[0]["trust"]), (&json!(11), &json!("trusted")));
    node.ask(&["pin", name]).ok();
    node.ask(&["run", name, "-p", "Call me", "-n", "2"]).ok();

    // Somebody who never met the publisher learns it from here.
    let mut third = Node::start(&dir.path().join("c"), "kept", &[&node.address], &[]);
    let learned = third.event("model");
    assert_eq!((&learned["id"], &learned["publisher"]), (&json!(id), &json!(publisher)));
    third.ask(&["run", name, "-p", "Call me", "-n", "2"]).ok();

    // What was removed is not known again, here or after a restart.
    node.ask(&["rm", name, "--force", "--last-copy"]).ok();
    stop(third);
    stop(node);
    let node = Node::start(&data, "kept", &[], &[]);
    assert_eq!(node.ask(&["ls", "--json"]).ok().json(), json!([]));
    assert!(std::fs::read_dir(data.join("kept")).unwrap().next().is_none());
}

#[test]
fn a_model_that_was_withdrawn_is_not_listed_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "gone", &[], &[]);
    let published = node.ask(&["publish", model().to_str().unwrap(), "--json"]).ok().json();
    let name = published["name"].as_str().unwrap();
    assert_eq!(node.ask(&["ls", "--json"]).ok().json()[0]["name"], name);
    node.ask(&["rm", name, "--force", "--last-copy"]).ok();
    assert_eq!(node.ask(&["ls", "--json"]).ok().json(), json!([]));
    assert_eq!(node.ask(&["status", "--json"]).ok().json()["models"], 0);
    node.ask(&["publish", model().to_str().unwrap()]).ok();
    assert_eq!(node.ask(&["ls", "--json"]).ok().json()[0]["shards_here"], 11);
}

/// Asks until the list of models satisfies `done`.
fn listed(node: &Node, what: &str, done: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let models = node.ask(&["ls", "--json"]).ok().json();
        let models = models.as_array().unwrap();
        if done(models) {
            return models.clone();
        }
        assert!(Instant::now() < deadline, "{what}: there are {}", models.len());
    }
}

#[test]
fn a_strangers_names_sizes_and_junk_hide_no_honest_model() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(&dir.path().join("a"), "junk", &[], &[]);
    let manifest = std::fs::read(model().join("manifest.json")).unwrap();
    let honest = ModelId::of(&manifest);
    let (id, name) = (honest.to_string(), "tiny-mixtral-q4_k_m");
    // A stranger signs the honest bytes first, under another name and with a wrong size; junk under the
    // honest name and under the start of its id; and much more junk.
    let seed = [7; 32];
    let sign = |model, name: &str, size| SignedModel::sign(&seed, model, name, size).unwrap();
    let junk = |index: u32| ModelId::of(&index.to_le_bytes());
    let mut said = vec![
        sign(honest, "another-name", 5),
        sign(junk(0), name, 9),
        sign(junk(1), &id[..12], 9),
        sign(junk(2), "huge", 30 << 20),
    ];
    said.extend((3..150).map(|index| sign(junk(index), &format!("junk-{index}"), 900)));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let stranger = runtime.block_on(async {
        let mut options = MeshOptions::new("junk", seed);
        options.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
        options.bootstrap = vec![node.address.parse().unwrap()];
        options.mdns = false;
        let nothing = Ladder::new(LadderOptions { ram_budget: 1 << 20 }, None, None, Vec::new());
        let stranger = Mesh::start(options, Arc::new(nothing)).await.unwrap();
        for signed in &said {
            stranger.publish(signed.clone()).unwrap();
        }
        stranger
    });
    listed(&node, "the stranger's models", |models| models.len() == said.len());

    let holder = Node::start(&dir.path().join("b"), "junk", &[&node.address], &[]);
    let published = holder.ask(&["publish", model().to_str().unwrap(), "--json"]).ok().json();
    let publisher = published["publisher"].as_str().unwrap();
    assert_eq!(published["name"], name);
    assert_eq!(node.event("model")["id"], id.as_str(), "whatever its first signer says");
    let signers = |models: &[Value]| {
        let found = models.iter().find(|model| model["id"] == id.as_str())?;
        Some(found["signers"].as_array()?.len())
    };
    listed(&node, "both signers", |models| signers(models) == Some(2));

    let words = ["-p", "Call me", "-n", "1", "--trust", publisher];
    let run = |text: &str| node.ask(&[&["run", text][..], &words[..4]].concat());
    // Neither stranger is preferred; the message says who they are.
    let told = run(name).fails(&["more than one", &id, publisher]);
    assert!(told.contains(&said[1].publisher.to_string()), "{told}");
    run(&id[..12]).fails(&["more than one", publisher]);
    // Its id, and every name of it, find it.
    node.ask(&[&["run", id.as_str()][..], &words[..]].concat()).ok();
    run("another-name").ok();
    // Now that its publisher is trusted, nobody else can take its name.
    run(name).ok();
    run(&id[..12]).ok();
    let names = node.ask(&["ls"]).ok().out;
    assert!(names.contains(name) && names.contains("another-name"), "{names}");
    runtime.block_on(stranger.shutdown());
}
