//! `logs`: of a running node, after a kill, and over a restart.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use serde_json::Value;

use crate::common::{Node, PATIENCE, command, run};

/// Waits until the node's log says this.
fn until_logged(node: &Node, word: &str) -> Vec<Value> {
    let began = Instant::now();
    loop {
        let said = node.ask(&["logs", "--json"]);
        let lines: Vec<Value> =
            said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let says = |line: &Value| line["message"].as_str().unwrap().contains(word);
        if lines.iter().any(says) {
            return lines;
        }
        assert!(began.elapsed() < PATIENCE, "{word:?} is not in {lines:?}; {}", said.err);
    }
}

#[test]
fn a_nodes_log_is_read_while_it_runs_after_a_kill_and_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let at = data.to_str().unwrap();
    run(["logs", "--data", at]).fails(&["there is no log", at, "join"]);

    let mut node = Node::start(&data, "logged", &[], &[]);
    let lines = until_logged(&node, "joined swarm \"logged\"");
    assert_eq!(lines[0]["message"], "the node starts");
    assert_eq!(lines[0]["fields"]["pid"], node.pid());
    assert!(lines.iter().all(|line| line["time"].as_str().unwrap().ends_with('Z')), "{lines:?}");
    let shown = node.ask(&["logs"]).ok().out;
    assert!(
        shown.contains(" INFO doppler_node: joined swarm") && shown.contains(&node.peer_id),
        "{shown}"
    );
    assert!(shown.contains("the node starts version="), "{shown}");
    assert_eq!(node.ask(&["logs", "-n", "1"]).ok().out.lines().count(), 1);
    assert_eq!(node.ask(&["logs", "--level", "error"]).ok().out, "");
    // Another process that cannot have the data directory writes nothing there.
    run(["join", "--swarm", "x", "--no-mdns", "--data", at]).fails(&["in use"]);

    let mut following = command();
    following.args(["logs", "--follow", "--data", at]).stdout(Stdio::piped());
    let mut following = following.spawn().unwrap();
    let mut followed = BufReader::new(following.stdout.take().unwrap()).lines();

    node.signal("KILL");
    node.wait();
    let after = node.ask(&["logs"]).ok().out;
    assert!(after.starts_with(&shown), "nobody runs, and nothing is lost: {after}");

    let mut again = Node::start(&data, "logged", &[], &[]);
    again.signal("TERM");
    assert_eq!(again.wait(), Some(0));
    let last = again.ask(&["logs", "-n", "1"]).ok().out;
    assert!(last.contains("stopped"), "{last}");
    // Whoever follows sees both runs, to the end of the later one.
    let lines = followed.by_ref().map(Result::unwrap);
    let seen: Vec<String> = lines.take_while(|line| !line.contains("stopped")).collect();
    following.kill().unwrap();
    following.wait().unwrap();
    let count = |word: &str| seen.iter().filter(|line| line.contains(word)).count();
    assert_eq!((count("the node starts"), count("joined swarm")), (2, 2), "{seen:?}");
}
