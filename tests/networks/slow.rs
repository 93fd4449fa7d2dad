//! Nodes fetch from one behind a slow line: they are late, none fails, and none loses the
//! connection. Needs root, iproute2 and its `tc`.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::common::netns::Namespace;
use crate::common::{Node, model};

const HOLDER: &str = "10.213.82.1";
const READERS: &str = "10.213.82.2";
const NAME: &str = "tiny-mixtral-q4_k_m";

fn run(namespace: &Namespace, node: &Node) -> Child {
    let mut run = namespace.command();
    run.args(["run", NAME, "-p", "Once upon a time", "-n", "4", "--data"]).arg(&node.data);
    run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A namespace for the holder, one for the readers, and the line between them, of so many bits a
/// second (as `tc` writes it) in the readers' direction. `None` if it cannot be made here.
fn two_ends(purpose: &str, rate: Option<&str>) -> Option<(Namespace, Namespace)> {
    let left = Namespace::create(&format!("{purpose}-a"))?;
    let right = Namespace::create(&format!("{purpose}-b"))?;
    left.ip(&format!("link add lan type veth peer name lan netns {}", right.name()));
    left.ip(&format!("addr add {HOLDER}/24 dev lan"));
    right.ip(&format!("addr add {READERS}/24 dev lan"));
    left.ip("link set lan up");
    right.ip("link set lan up");
    if let Some(rate) = rate {
        let line = format!("qdisc add dev lan root tbf rate {rate} burst 16kb limit 128kb");
        if !left.program("tc").args(line.split(' ')).status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: tc does not shape here");
            return None;
        }
    }
    Some((left, right))
}

/// Three runs at once. `rate` makes the line slow, `extra` is for the node that holds the model.
fn three_runs(purpose: &str, rate: Option<&str>, extra: &[&str]) {
    let Some((left, right)) = two_ends(purpose, rate) else { return };
    let dir = tempfile::tempdir().unwrap();
    let holder = left.join(&dir.path().join("holder"), HOLDER, &[&["--no-mdns"], extra].concat());
    let mut publish = left.command();
    publish.arg("publish").arg(model()).arg("--data").arg(&holder.data);
    assert!(publish.output().unwrap().status.success());
    let extra = ["--no-mdns", "--bootstrap", &holder.address];
    let mut readers: Vec<Node> = (0..3)
        .map(|number| right.join(&dir.path().join(number.to_string()), READERS, &extra))
        .collect();
    readers.iter_mut().for_each(|reader| assert_eq!(reader.event("model")["name"], NAME));
    let started = Instant::now();
    let runs: Vec<Child> = readers.iter().map(|reader| run(&right, reader)).collect();
    for run in runs {
        let output = run.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        eprintln!("after {:.0} s: {:?}", started.elapsed().as_secs_f64(), output.status);
        assert!(output.status.success(), "{error}");
    }
}

#[test]
#[ignore = "takes six minutes"]
fn three_runs_behind_a_slow_line_all_end() {
    three_runs("line", Some("512kbit"), &[]);
}

#[test]
#[ignore = "takes six minutes"]
fn three_runs_from_a_node_that_limits_its_uploads_all_end() {
    three_runs("upload", None, &["--upload-limit", "64KiB/s"]);
}

/// A holder's pings wait behind what it sends, and a reader of a long answer asks for nothing.
#[test]
#[ignore = "takes two minutes and a half"]
fn a_line_that_is_full_for_minutes_keeps_its_connection() {
    let Some((left, right)) = two_ends("full", Some("96kbit")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let holder = left.join(&dir.path().join("holder"), HOLDER, &["--no-mdns"]);
    let mut publish = left.command();
    publish.arg("publish").arg(model()).arg("--data").arg(&holder.data);
    assert!(publish.output().unwrap().status.success());
    let extra = ["--no-mdns", "--bootstrap", &holder.address];
    let mut reader = right.join(&dir.path().join("reader"), READERS, &extra);
    assert_eq!(reader.event("model")["name"], NAME);
    let pin = || {
        let mut pin = right.command();
        pin.args(["pin", NAME, "--fetch", "--data"]).arg(&reader.data);
        pin.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let (started, mut pinning) = (Instant::now(), pin());
    while started.elapsed() < Duration::from_secs(150) {
        let mut peers = left.command();
        let peers = peers.args(["peers", "--json", "--data"]).arg(&holder.data).output().unwrap();
        let peers = String::from_utf8_lossy(&peers.stdout).into_owned();
        let after = started.elapsed().as_secs_f64();
        assert!(peers.contains(&reader.peer_id), "lost after {after:.0} s: {peers}");
        // At so few bytes a second it may give up. The line is to stay full.
        if pinning.try_wait().unwrap().is_some() {
            pinning = pin();
        }
    }
    let _ = pinning.kill();
    pinning.wait().unwrap();
}
