//! `pull hf:...` and `run hf:...`, from a server that speaks the Hub's API: killed and resumed, run again
//! without the network, into a running node.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use doppler_testing::hub::{Behaviour, Hub};
use doppler_testing::shared;
use serde_json::Value;

use crate::common::{Node, PATIENCE, Said, command, root};

/// The command, with this Hub and nothing of the user's own.
fn with(endpoint: &str, data: &Path, args: &[&str]) -> Command {
    let mut command = command();
    command.args(args).arg("--data").arg(data).env("HF_ENDPOINT", endpoint);
    command.env("HF_HOME", data.join("no-cache"));
    for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SSL_CERT_FILE"] {
        command.env_remove(name);
    }
    command
}

fn said(endpoint: &str, data: &Path, args: &[&str]) -> Said {
    Said::of(with(endpoint, data, args).output().unwrap())
}

fn gguf_hub() -> Hub {
    let hub = Hub::start();
    let file = root().join("tests/data/gguf/qwen3/model.gguf");
    hub.add("lab/small", &[("small-Q8_0.gguf", file.as_path())], 1024);
    hub
}

#[test]
fn a_model_of_the_hub_runs_and_runs_again_without_the_network() {
    let hub = gguf_hub();
    let data = tempfile::tempdir().unwrap();
    let run = ["run", "hf:lab/small:Q8_0", "-p", "a", "-n", "3", "--json", "--backend", "cpu"];
    let first = said(&hub.endpoint, data.path(), &run).ok().json();
    assert_eq!(first["tokens"].as_array().unwrap().len(), 3);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nobody = format!("http://{nobody}");
    let again = said(&nobody, data.path(), &run).ok().json();
    assert_eq!((&again["text"], &again["tokens"]), (&first["text"], &first["tokens"]));
    let pulled = said(&hub.endpoint, data.path(), &["pull", "hf:lab/small:Q8_0"]).ok();
    assert!(pulled.out.contains("is here already"), "{}", pulled.out);
    let words = ["hf:", "ORG/MODEL"];
    said(&nobody, data.path(), &["pull", "lab/small"]).fails(&words);
    let none = said(&hub.endpoint, data.path(), &["run", "hf:lab/none", "-p", "a"]);
    assert_eq!(none.code, Some(3));
    none.fails(&["lab/none", "no such model"]);
}

#[test]
fn a_model_of_the_hub_is_served() {
    let hub = gguf_hub();
    let data = tempfile::tempdir().unwrap();
    let serve = ["serve", "hf:lab/small", "--http", "127.0.0.1:0", "--backend", "cpu", "--json"];
    let mut child =
        with(&hub.endpoint, data.path(), &serve).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let said: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"));
    assert_eq!((&said["event"], &said["model"]), (&"serving".into(), &"small-Q8_0".into()));
}

#[test]
fn a_pull_into_a_running_node_is_announced_and_one_without_is_by_the_next() {
    let hub = gguf_hub();
    let data = tempfile::tempdir().unwrap();
    let pull = ["pull", "hf:lab/small", "--json"];
    let node = Node::start(data.path(), "hub", &[], &[]);
    let pulled = said(&hub.endpoint, data.path(), &pull).ok().json();
    let shows = |data: &Path| {
        let models = said(&hub.endpoint, data, &["ls", "--json"]).ok().json();
        let model = &models[0];
        assert_eq!((&model["id"], &model["trust"]), (&pulled["model"], &"own".into()));
        assert_eq!(model["shards_here"], model["shards"]);
    };
    shows(data.path());
    drop(node);
    let other = tempfile::tempdir().unwrap();
    assert_eq!(said(&hub.endpoint, other.path(), &pull).ok().json()["model"], pulled["model"]);
    let _node = Node::start(other.path(), "hub", &[], &[]);
    shows(other.path());
}

#[test]
fn a_killed_pull_fetches_nothing_twice_but_the_open_pieces() {
    const MIB: u64 = 1 << 20;
    const CONNECTIONS: u64 = 8;
    let Some(model) = shared("models/tiny-mixtral") else { return };
    let hub = Hub::start();
    let paths: Vec<_> =
        std::fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path()).collect();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let names: Vec<String> = paths.iter().map(|path| name(path)).collect();
    let files: Vec<(&str, &Path)> =
        names.iter().zip(&paths).map(|(name, path)| (name.as_str(), path.as_path())).collect();
    hub.add("lab/tiny-mixtral", &files, 8 << 20);
    let weights = paths.iter().filter(|path| std::fs::metadata(path).unwrap().len() > 8 << 20);
    let size: u64 = weights.map(|path| std::fs::metadata(path).unwrap().len()).sum();
    hub.behave(Behaviour { silent_after: Some(size / 2), ..Behaviour::default() });
    let data = tempfile::tempdir().unwrap();
    let pull = ["pull", "hf:lab/tiny-mixtral", "--json"];
    let mut child = with(&hub.endpoint, data.path(), &pull).spawn().unwrap();
    hub.wait_for(size / 2);
    // Everything but the open pieces has been written down.
    let (started, least) = (Instant::now(), (size / 2 / MIB).saturating_sub(CONNECTIONS));
    let pulls = data.path().join("pulls");
    loop {
        let work = std::fs::read_dir(&pulls).unwrap().next().unwrap().unwrap().path();
        let journal = std::fs::read_to_string(work.join("journal")).unwrap_or_default();
        if journal.lines().filter(|line| line.starts_with("{\"piece\"")).count() as u64 >= least {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{journal}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    hub.behave(Behaviour::default());
    let pulled = said(&hub.endpoint, data.path(), &pull).ok().json();
    let most = size + CONNECTIONS * MIB;
    assert!(hub.sent() <= most, "{} of {size} bytes were sent", hub.sent());
    assert!(!pulls.exists());
    // The same bytes as `convert` of the same directory.
    let out = tempfile::tempdir().unwrap();
    let mut convert = command();
    convert.arg("convert").arg(shared("models/tiny-mixtral").unwrap()).arg("--json");
    convert.arg("--out").arg(out.path().join("model"));
    let converted = Said::of(convert.output().unwrap()).ok().json();
    assert_eq!(pulled["model"], converted["model"]);
}
