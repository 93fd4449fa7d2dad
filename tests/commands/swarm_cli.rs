//! Nodes as a user runs them: separate processes that find each other, share a
//! model, answer commands, lack shards, run out of disk, and stop cleanly.

use crate::common;
use crate::common::{Node, model, run};
use serde_json::Value;

fn publish(node: &Node, shards: &str) -> Value {
    let model = model();
    node.ask(&["publish", model.to_str().unwrap(), "--shards", shards, "--json"]).ok().json()
}

#[test]
fn a_model_published_on_two_nodes_runs_on_a_third() {
    let dir = tempfile::tempdir().unwrap();
    let first = Node::start(&dir.path().join("a"), "pair", &[], &[]);
    let second = Node::start(&dir.path().join("b"), "pair", &[&first.address], &[]);
    let id = publish(&first, "0-5")["model"].as_str().unwrap().to_owned();
    publish(&second, "5-10");

    let mut third = Node::start(&dir.path().join("c"), "pair", &[&second.address], &[]);
    let learned = third.event("model");
    assert_eq!(learned["id"], id.as_str());
    assert_eq!(learned["name"], "tiny-mixtral-q4_k_m");

    let args = ["run", "tiny-mixtral-q4_k_m", "-p", "Call me", "-n", "12", "--json"];
    let through_the_node = third.ask(&args).ok().json();
    let model = model();
    let local = ["run", model.to_str().unwrap(), "-p", "Call me", "-n", "12", "--json"];
    let local = run(local.into_iter().chain(["--backend", "cpu"])).ok().json();
    assert_eq!(through_the_node["tokens"], local["tokens"]);
    assert_eq!(through_the_node["text"], local["text"]);
    assert!(through_the_node["traffic"]["verified_bytes"].as_u64().unwrap() > 1_000_000);

    // A node for one run; the model is given by the start of its id.
    let own = dir.path().join("d");
    let args = ["run", &id[..12], "-p", "Call me", "-n", "12", "--json", "--swarm", "pair"];
    let more = ["--bootstrap", &first.address, "--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns"];
    let more = more.into_iter().chain(["--backend", "cpu", "--data", own.to_str().unwrap()]);
    assert_eq!(run(args.into_iter().chain(more)).ok().json()["tokens"], local["tokens"]);

    let models = third.ask(&["ls", "--json"]).ok().json();
    assert_eq!(models[0]["id"], id.as_str());
    assert_eq!(models[0]["shards"], 11);
    assert_eq!(models[0]["shards_reachable"], 11);
    let listed = third.ask(&["ls"]).ok().out;
    let publisher = models[0]["publishers"][0].clone();
    let publishers = [&first, &second].map(|node| {
        let status = node.ask(&["status", "--json"]).ok().json();
        status["publisher"].as_str().unwrap().to_owned()
    });
    // Both signed it; whose model was used first is trusted, and comes first.
    assert!(publishers.iter().any(|one| publisher == one.as_str()), "{publisher}");
    assert_eq!(models[0]["signers"][0]["trust"], "trusted");
    assert_eq!(models[0]["signers"][1]["trust"], "stranger");
    for part in ["tiny-mixtral-q4_k_m", publisher.as_str().unwrap()] {
        assert!(listed.contains(part), "{part}: {listed}");
    }

    let peers = third.ask(&["peers", "--json"]).ok().json();
    let received = |peer: &Node| {
        let row = peers.as_array().unwrap().iter().find(|row| row["id"] == peer.peer_id.as_str());
        row.map_or(0, |row| row["bytes_in"].as_u64().unwrap())
    };
    assert!(received(&first) > 0 && received(&second) > 0, "{peers}");
    assert!(third.ask(&["peers"]).ok().out.contains(&first.peer_id));

    let status = third.ask(&["status", "--json"]).ok().json();
    assert_eq!(status["swarm"], "pair");
    assert_eq!(status["loaded"], serde_json::json!(["tiny-mixtral-q4_k_m"]));
    let page = status["page"].as_str().unwrap();
    assert!(page.starts_with("http://127.0.0.1:"), "{page}");
    let told = third.ask(&["status"]).ok().out;
    for part in [&third.peer_id, page, status["publisher"].as_str().unwrap()] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn swarms_of_other_names_and_other_tokens_learn_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Node::start(&dir.path().join("a"), "ours", &[], &[]);
    publish(&ours, "0");
    let theirs =
        Node::start(&dir.path().join("b"), "theirs", &[&ours.address], &["--find-timeout", "1"]);
    theirs
        .ask(&["run", "tiny-mixtral-q4_k_m", "-p", "x"])
        .fails(&["no model \"tiny-mixtral-q4_k_m\" is known", "peer"]);
    // The control API refuses clients that cannot read control.json.
    let control = theirs.data.join("control.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&control).unwrap()).unwrap();
    file["token"] = "guess".into();
    std::fs::write(&control, file.to_string()).unwrap();
    theirs.ask(&["status"]).fails(&["token"]);
}

#[test]
fn a_wrong_name_is_answered_at_once_with_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "names", &[], &[]);
    let id = publish(&node, "0-10")["model"].as_str().unwrap().to_owned();
    let asked = std::time::Instant::now();
    let wrong = ["tiny-mixtral-q4_k_n", "tiny-mixtra1"];
    for name in wrong {
        let near = "did you mean tiny-mixtral-q4_k_m?";
        node.ask(&["run", name, "-p", "x"]).fails(&[name, near, "0 connected peers"]);
        node.ask(&["pin", name]).fails(&[name, near]);
        node.ask(&["rm", name]).fails(&[name, near]);
    }
    assert!(asked.elapsed().as_secs() < 15, "six questions, and none waited 20 s");
    for right in [&id[..], &id[..8], "Tiny-Mixtral-Q4_K_M", "tiny-mix"] {
        let said = node.ask(&["run", right, "-p", "Call me", "-n", "1", "--json"]).ok().json();
        assert_eq!(said["tokens"].as_array().unwrap().len(), 1, "{right}");
        assert!(node.ask(&["pin", right]).ok().out.contains(&id), "{right}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn directories_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let odd = |name: &[u8]| dir.path().join(std::ffi::OsStr::from_bytes(name));
    let (data, copy) = (odd(b"data\xff"), odd(b"model\xfe"));
    common::copy_dir(&model(), &copy);
    let node = Node::start(&data, "odd", &[], &[]);
    let ask = |args: &[&std::ffi::OsStr]| {
        run(args.iter().copied().chain(["--data".as_ref(), data.as_os_str()]))
    };
    let told = ask(&["status".as_ref()]).ok().out;
    assert!(told.contains("data\u{fffd}"), "{told}");
    ask(&["status".as_ref(), "--json".as_ref()]).ok();
    ask(&["publish".as_ref(), copy.as_os_str()]).ok();
    let words = ["-p", "Once", "-n", "1", "--backend", "cpu"].map(std::ffi::OsStr::new);
    ask(&[&["run".as_ref(), copy.as_os_str()], &words[..]].concat()).ok();
    ask(&[&["run".as_ref(), "tiny-mixtral-q4_k_m".as_ref()], &words[..]].concat()).ok();
    drop(node);
}

#[test]
fn a_node_that_hangs_up_stops_as_told_unless_it_must_not_hear() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    if !common::ignores_hangup() {
        let mut node = Node::start(&data, "hup", &[], &[]);
        node.signal("HUP");
        node.event("stopped");
        assert_eq!(node.wait(), Some(0));
        assert!(!data.join("control.json").exists());
    }

    // Started as by `nohup`.
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_doppler-node")]);
    shell.args(["join", "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    shell.args(["--swarm", "hup", "--data"]).arg(&data);
    let mut node = Node::spawn(shell, &data);
    node.signal("HUP");
    node.ask(&["status"]).ok();
    node.signal("TERM");
    node.event("stopped");
    assert_eq!(node.wait(), Some(0));
}

#[test]
fn a_shard_that_nobody_holds_times_out_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let holder = Node::start(&dir.path().join("a"), "gap", &[], &[]);
    publish(&holder, "0-9");
    let mut other =
        Node::start(&dir.path().join("b"), "gap", &[&holder.address], &["--find-timeout", "2"]);
    other.event("model");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(model().join("manifest.json")).unwrap()).unwrap();
    let missing = manifest["shards"][10]["hash"].as_str().unwrap();
    let refusal = other
        .ask(&["run", "tiny-mixtral-q4_k_m", "-p", "It was a dark", "-n", "64"])
        .fails(&[missing, "nobody has it"]);
    assert!(refusal.contains("looked for 2."), "{refusal}");

    // The node survives: once a peer holds the shard, the same request works.
    publish(&holder, "10");
    other.ask(&["run", "tiny-mixtral-q4_k_m", "-p", "It was a dark", "-n", "64"]).ok();
}

#[test]
fn a_disk_budget_too_small_refuses_the_model_whole() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "small", &[], &["--disk-budget", "2MiB"]);
    let model = model();
    node.ask(&["publish", model.to_str().unwrap()]).fails(&["budget"]);
    assert_eq!(node.ask(&["ls", "--json"]).ok().json(), serde_json::json!([]));
    let status = node.ask(&["status", "--json"]).ok().json();
    assert_eq!(status["disk"]["used"], 0, "nothing half-stored");
}

#[test]
fn a_damaged_or_absent_model_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(&dir.path().join("a"), "bad", &[], &[]);
    node.ask(&["publish", "/no/such/model"]).fails(&["/no/such/model/manifest.json"]);
    let copy = dir.path().join("copy");
    common::copy_dir(&model(), &copy);
    let path = copy.join("shard_00003.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[99] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    node.ask(&["publish", copy.to_str().unwrap()]).fails(&["shard_00003.bin"]);
    node.ask(&["publish", copy.to_str().unwrap(), "--shards", "44"]).fails(&["no shard 44"]);
    assert_eq!(node.ask(&["ls", "--json"]).ok().json(), serde_json::json!([]));
}

#[test]
fn a_node_stops_cleanly_and_comes_back_as_itself() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut node = Node::start(&data, "again", &[], &[]);
    let (peer_id, id) = (node.peer_id.clone(), publish(&node, "0-2")["model"].clone());

    let second = common::command()
        .args(["join", "--swarm", "again", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"])
        .arg("--data")
        .arg(&data)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(6), "{said}");
    assert!(said.contains(data.to_str().unwrap()), "{said}");

    node.signal("INT");
    node.event("stopped");
    assert_eq!(node.wait(), Some(0));
    assert!(!data.join("control.json").exists());

    let node = Node::start(&data, "again", &[], &[]);
    assert_eq!(node.peer_id, peer_id);
    let models = node.ask(&["ls", "--json"]).ok().json();
    assert_eq!(models[0]["id"], id);
    assert_eq!(models[0]["shards_here"], 3);
}

#[test]
fn a_node_finds_its_peers_again_without_being_told() {
    let dir = tempfile::tempdir().unwrap();
    let first = Node::start(&dir.path().join("a"), "again", &[], &[]);
    let id = publish(&first, "0")["model"].as_str().unwrap().to_owned();
    let data = dir.path().join("b");
    let mut second = Node::start(&data, "again", &[&first.address], &[]);
    second.event("model");
    second.signal("TERM");
    assert_eq!(second.wait(), Some(0));
    let book = data.join("peers.json");
    let kept = std::fs::read_to_string(&book).unwrap();
    assert!(kept.contains(&first.peer_id), "{kept}");

    let mut second = Node::start(&data, "again", &[], &[]);
    assert_eq!(second.event("model")["id"], id.as_str());
    second.signal("TERM");
    assert_eq!(second.wait(), Some(0));

    // A damaged address book loses its addresses but does not prevent the start.
    std::fs::write(&book, &kept[..kept.len() / 2]).unwrap();
    let mut second = Node::start(&data, "again", &[&first.address], &[]);
    assert_eq!(second.event("model")["id"], id.as_str());
}

#[test]
fn a_private_swarm_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let (key, other) = (dir.path().join("lab.key"), dir.path().join("other.key"));
    for key in [&key, &other] {
        run(["swarm-key".as_ref(), key.as_os_str()]).ok();
    }
    assert!(run(["swarm-key".as_ref(), key.as_os_str()]).err.contains("exists"));
    let with = |key: &std::path::Path| ["--swarm-key".to_owned(), key.display().to_string()];
    let start = |name: &str, bootstrap: &[&str], key: Option<&std::path::Path>| {
        let extra = key.map(with);
        let extra: Vec<&str> = extra.iter().flatten().map(String::as_str).collect();
        Node::start(&dir.path().join(name), "private", bootstrap, &extra)
    };
    let first = start("a", &[], Some(&key));
    let id = publish(&first, "0")["model"].as_str().unwrap().to_owned();
    let mut member = start("b", &[&first.address], Some(&key));
    assert_eq!(member.event("model")["id"], id.as_str());
    for (name, key) in [("c", None), ("d", Some(other.as_path()))] {
        let stranger = start(name, &[&first.address], key);
        let refused = || {
            let status = stranger.ask(&["status", "--json"]).ok().json();
            status["refused_peers"].as_u64().unwrap() > 0
        };
        let deadline = std::time::Instant::now() + common::PATIENCE;
        while !refused() {
            assert!(std::time::Instant::now() < deadline, "{name} was never refused");
        }
        assert_eq!(stranger.ask(&["ls", "--json"]).ok().json(), serde_json::json!([]));
    }
    let status = first.ask(&["status", "--json"]).ok().json();
    assert_eq!((&status["private"], &status["peers"]), (&true.into(), &1.into()));
    assert!(status["refused_peers"].as_u64().unwrap() >= 2, "{status}");

    let bad = run(["join", "--swarm", "x", "--swarm-key", "/nowhere/key", "--data"]
        .map(std::ffi::OsStr::new)
        .into_iter()
        .chain([dir.path().join("e").as_os_str()]));
    assert!(bad.err.contains("--swarm-key") && bad.err.contains("/nowhere/key"), "{}", bad.err);
}

#[test]
fn a_bootstrap_address_that_leads_nowhere_is_told_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = Node::start(&dir.path().join("a"), "theirs", &[], &[]);
    let gone = Node::start(&dir.path().join("b"), "ours", &[], &[]).address.clone();
    // Nobody listens there any more.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let bare = format!("/ip4/127.0.0.1/tcp/{}", closed.port());
    let bootstrap = [bare.as_str(), gone.as_str(), theirs.address.as_str()];
    let node = Node::start(&dir.path().join("c"), "ours", &bootstrap, &[]);
    let expected = ["failed", "failed", "other_swarm"];
    let deadline = std::time::Instant::now() + common::PATIENCE;
    let status = loop {
        let status = node.ask(&["status", "--json"]).ok().json();
        let states = status["bootstrap"].as_array().unwrap().iter();
        if states.map(|one| one["state"].as_str().unwrap()).eq(expected) {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "{status}");
    };
    for (index, reason) in ["refused", "refused", "not in a swarm of this name"].iter().enumerate()
    {
        let one = &status["bootstrap"][index];
        assert_eq!(one["address"], bootstrap[index]);
        assert!(one["reason"].as_str().unwrap().contains(reason), "{one}");
    }
    let status = node.ask(&["status"]).ok().out;
    let peers = node.ask(&["peers"]).ok();
    for address in bootstrap {
        assert!(status.contains(address) && peers.err.contains(address), "{status}{}", peers.err);
    }
    assert!(peers.out.contains("other swarm"), "{}", peers.out);

    // One that does lead into the swarm is no problem, with an id or without.
    let bare = node.address.split("/p2p/").next().unwrap().to_owned();
    let third = Node::start(&dir.path().join("d"), "ours", &[&bare], &[]);
    loop {
        let status = third.ask(&["status", "--json"]).ok().json();
        if status["bootstrap"][0]["state"] == "connected" && status["peers"] == 1 {
            break;
        }
        assert!(std::time::Instant::now() < deadline + common::PATIENCE, "{status}");
    }
}

#[test]
fn a_node_listens_where_it_did_last_unless_somebody_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let start = || Node::start(&data, "again", &[], &[]);
    let stop = |mut node: Node| {
        node.signal("INT");
        assert_eq!(node.wait(), Some(0));
    };
    let first = start();
    let address = first.address.clone();
    stop(first);
    let second = start();
    assert_eq!(second.address, address, "what others wrote down still leads there");
    stop(second);

    let port = address.split('/').nth(4).unwrap();
    let taken = std::net::TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
    let third = start();
    let other = third.address.clone();
    assert_ne!(other, address);
    stop(third);
    drop(taken);
    let fourth = start();
    assert_eq!(fourth.address, other, "the last one counts");
    stop(fourth);
    std::fs::write(data.join("listen.json"), "damaged").unwrap();
    stop(start());
}
