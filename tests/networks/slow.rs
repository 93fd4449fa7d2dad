//! Several nodes fetch from one behind a line of 64 KiB a second: all of them are late, none fails.
//! Needs root, iproute2 and its `tc`.

use std::process::{Child, Stdio};
use std::time::Instant;

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

/// Three runs at once. `shape` makes the line slow, `extra` is for the node that holds the model.
fn three_runs(purpose: &str, shape: bool, extra: &[&str]) {
    let name = |side: &str| format!("{purpose}-{side}");
    let (Some(left), Some(right)) = (Namespace::create(&name("a")), Namespace::create(&name("b")))
    else {
        return;
    };
    left.ip(&format!("link add lan type veth peer name lan netns {}", right.name()));
    left.ip(&format!("addr add {HOLDER}/24 dev lan"));
    right.ip(&format!("addr add {READERS}/24 dev lan"));
    left.ip("link set lan up");
    right.ip("link set lan up");
    if shape {
        let line = "qdisc add dev lan root tbf rate 512kbit burst 16kb limit 128kb";
        if !left.program("tc").args(line.split(' ')).status().is_ok_and(|status| status.success()) {
            eprintln!("skipped: tc does not shape here");
            return;
        }
    }
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
    three_runs("line", true, &[]);
}

#[test]
#[ignore = "takes six minutes"]
fn three_runs_from_a_node_that_limits_its_uploads_all_end() {
    three_runs("upload", false, &["--upload-limit", "64KiB/s"]);
}
