//! `invite` and `join INVITE`, config.toml, completions and manual pages, as a user sees them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::{Node, Said, command, model, run};

/// `join INVITE` on loopback.
fn join(invite: &str, data: &Path) -> Command {
    let mut join = command();
    join.args(["join", invite, "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
    join.args(["--backend", "cpu", "--data"]).arg(data);
    join
}

#[test]
fn an_invitation_brings_another_node_into_a_private_swarm() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let key = at("lab.key");
    run(["swarm-key".as_ref(), key.as_os_str()]).ok();
    let first = Node::start(&at("a"), "lab", &[], &["--swarm-key", key.to_str().unwrap()]);
    let published = first.ask(&["publish", model().to_str().unwrap(), "--json"]).ok().json();

    let said = first.ask(&["invite"]).ok();
    let invite = said.out.trim_end().to_owned();
    assert!(said.err.contains("the swarm's key"), "it is a secret: {}", said.err);
    assert!(!invite.contains(char::is_whitespace) && invite.len() < 1000, "{invite}");
    assert_eq!(first.ask(&["invite", "--json"]).ok().json()["invite"], invite.as_str());

    // Nothing but the invitation: neither a name, nor an address, nor a key.
    let mut second = Node::spawn(join(&invite, &at("b")), &at("b"));
    assert_eq!(second.event("model")["id"], published["model"]);
    let status = second.ask(&["status", "--json"]).ok().json();
    assert_eq!((&status["swarm"], &status["private"]), (&json!("lab"), &json!(true)));
    second.signal("TERM");
    assert_eq!(second.wait(), Some(0));

    // A secret stands better on standard input than among the arguments.
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, format!("{invite}\n").as_bytes()).unwrap();
    drop(writer);
    let mut from_input = join("-", &at("b"));
    from_input.stdin(reader);
    let mut again = Node::spawn(from_input, &at("b"));
    assert_eq!(again.event("model")["id"], published["model"]);

    // Half of it is none, and another swarm's key is not overwritten. Neither error shows the secret.
    let fails = |mut join: Command, words: &[&str]| {
        let said = Said::of(join.stdout(Stdio::piped()).output().unwrap()).fails(words);
        assert!(!said.contains(&invite[8..40]), "{said}");
    };
    fails(join(&invite[..invite.len() / 2], &at("c")), &["no invitation"]);
    fs::create_dir(at("d")).unwrap();
    run(["swarm-key".as_ref(), at("d").join("swarm.key").as_os_str()]).ok();
    fails(join(&invite, &at("d")), &["swarm.key", "another swarm"]);
}

#[test]
fn options_come_from_the_file_the_environment_and_the_words_and_config_says_which() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let path = file.to_str().unwrap();
    let text = "ram-budget = '1GiB'\n[join]\nswarm = 'from-file'\nno-mdns = true\n\
                listen = ['/ip4/127.0.0.1/tcp/0']\nbackend = 'cpu'\nvram-budget = '3GiB'\n";
    fs::write(&file, text).unwrap();
    let with = |args: &[&str]| {
        let mut command = command();
        command
            .env("DOPPLER_CONFIG", &file)
            .env("DOPPLER_DATA", dir.path().join("data"))
            .args(args);
        command
    };
    let said = Said::of(with(&["config", "join", "--json"]).output().unwrap()).ok().json();
    let row = |name: &str| {
        let row = said.as_array().unwrap().iter().find(|row| row["option"] == name).unwrap();
        (row["value"].clone(), row["from"].as_str().unwrap().to_owned())
    };
    assert_eq!(row("swarm"), (json!("from-file"), path.to_owned()));
    assert_eq!(row("ram-budget"), (json!("1GiB"), path.to_owned()));
    assert_eq!(row("disk-budget"), (json!("50GiB"), "default".to_owned()));
    assert_eq!(row("data").1, "DOPPLER_DATA");
    assert_eq!(row("swarm-key"), (Value::Null, String::new()));
    let shown = Said::of(with(&["config"]).output().unwrap()).ok().out;
    let line = shown.lines().find(|line| line.starts_with("--swarm ")).unwrap();
    assert!(line.contains("from-file") && line.ends_with(path), "{line}");

    // What holds does: the word wins over the environment, and that over the file.
    let word = dir.path().join("word");
    let args = ["join", "--json", "--vram-budget", "5GiB", "--data", word.to_str().unwrap()];
    let node = Node::spawn(with(&args), &word);
    let status = node.ask(&["status", "--json"]).ok().json();
    assert_eq!(status["swarm"], "from-file");
    assert_eq!(status["vram_budget"], 5_u64 << 30);
    assert_eq!(status["ram"]["budget"], 1_u64 << 30);
    assert_eq!(status["data"], word.to_str().unwrap());

    for (text, words) in [
        ("[join]\nswrm = 'x'\n", &["config.toml", "join has no option --swrm"][..]),
        ("[join]\nram-budget = 'much'\n", &["ram-budget"]),
        ("[join\n", &["config.toml"]),
    ] {
        fs::write(&file, text).unwrap();
        let said = Said::of(with(&["join", "--swarm", "x"]).output().unwrap());
        assert_eq!(said.code, Some(2), "{}", said.err);
        assert!(words.iter().all(|word| said.err.contains(word)), "{}", said.err);
        assert!(said.err.contains(path), "{}", said.err);
    }
    fs::remove_file(&file).unwrap();
    let said = Said::of(with(&["status"]).output().unwrap());
    assert!(
        said.err.contains("DOPPLER_CONFIG"),
        "a file that is named must be there: {}",
        said.err
    );
}

#[test]
fn shells_and_manuals_know_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let help = run(["--help"]).ok().out;
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let named = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let commands: Vec<&str> = named.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 25 && commands.contains(&"logs"), "{commands:?}");

    for shell in ["bash", "zsh", "fish"] {
        let script = run(["completions", shell]).ok().out;
        for word in commands.iter().chain(&["--ram-budget", "--follow"]) {
            assert!(script.contains(word.trim_start_matches('-')), "{word} is not in {shell}'s");
        }
        let file = dir.path().join(shell);
        fs::write(&file, script).unwrap();
        // A shell that is here can read it.
        if let Ok(output) = Command::new(shell).arg("-n").arg(&file).output() {
            let said = Said::of(output);
            assert!(said.code == Some(0) && said.err.is_empty(), "{shell}: {}", said.err);
        }
    }
    let said = run(["completions", "csh"]);
    assert!(said.code == Some(2) && said.err.contains("csh"), "{}", said.err);

    let pages = dir.path().join("man1");
    run(["man".as_ref(), pages.as_os_str()]).fails(&["man1", "not a directory"]);
    fs::create_dir(&pages).unwrap();
    run(["man".as_ref(), pages.as_os_str()]).ok();
    for command in commands.iter().filter(|command| **command != "help") {
        let page = pages.join(format!("doppler-node-{command}.1"));
        let text = fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        assert!(text.contains(".TH") && text.contains(".SH SYNOPSIS"), "{}", page.display());
    }
    assert!(pages.join("doppler-node.1").is_file());
}
