//! `chat`, `run --chat` and how `run` chooses and ends: on a model in a directory, and on one of a
//! running node.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use crate::common::{Node, Said, command, copy_dir, model, run};
use doppler_store::chat::ChatTemplates;
use doppler_store::manifest::{Manifest, ManifestBody};

const TEMPLATE: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

/// The embedded model with a chat template, and its manifest.
fn with_template(dir: &Path) -> Manifest {
    copy_dir(&model(), dir);
    let manifest = Manifest::read_dir(dir).unwrap();
    let chat = Some(ChatTemplates::one(TEMPLATE));
    let model_id = "chatty".to_owned();
    let body = ManifestBody { chat, model_id, ..ManifestBody::clone(&manifest) };
    let manifest = Manifest::new(body).unwrap();
    std::fs::write(dir.join("manifest.json"), manifest.to_json_bytes()).unwrap();
    manifest
}

/// Runs a command with this standard input.
fn fed(args: &[&str], input: &str) -> Said {
    let mut child = command()
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Said::of(child.wait_with_output().unwrap())
}

#[test]
fn a_scripts_lines_are_turns_and_a_message_is_one() {
    let dir = tempfile::tempdir().unwrap();
    with_template(dir.path());
    let path = dir.path().to_str().unwrap();
    let cpu = ["--backend", "cpu", "-n", "6"];
    let told = |prompt: &str| {
        let args = ["run", path, "-p", prompt, "--json"];
        run(args.into_iter().chain(cpu)).ok().json()["text"].as_str().unwrap().to_owned()
    };
    let first = told("system: Be brief.\nuser: Hello\nassistant:");
    let second = format!("user: Hello\nassistant: {first}\nuser: And\nmore?\nassistant:");
    let second = told(&format!("system: Be brief.\n{second}"));
    let chat = [&["chat", path, "--system", "Be brief."], &cpu[..]].concat();
    let said = fed(&chat, "Hello\n\nAnd\\\nmore?\n").ok();
    assert_eq!(said.out, format!("{first}\n{second}\n"));
    assert_eq!(said.err.matches("stopped after 6 tokens").count(), 2, "{}", said.err);
    let said = fed(&chat, "Hello\n/clear\nHello\n/bye\nnever").ok();
    assert_eq!(said.out, format!("{first}\n{first}\n"));

    let message = ["run", path, "--chat", "--system", "Be brief.", "--prompt-file", "-"];
    let said = fed(&[&message, &cpu[..]].concat(), "Hello").ok();
    assert_eq!(said.out, format!("{first}\n"), "the answer alone");
    assert!(said.err.contains("as many tokens as -n allows"), "{}", said.err);
    let raw = fed(&[&["run", path, "--prompt-file", "-"], &cpu[..]].concat(), "Once\n").ok();
    assert!(raw.out.starts_with("Once\n"), "{}", raw.out);
}

#[test]
fn a_model_without_a_template_says_what_to_do() {
    let model = model();
    let path = model.to_str().unwrap();
    for args in [&["chat", path][..], &["run", path, "--chat", "-p", "Hello"]] {
        let said = run(args.iter().copied().chain(["--backend", "cpu"]));
        assert_eq!(said.code, Some(7));
        said.fails(&["no chat template", "--chat", "chat_template.jinja"]);
    }
}

#[test]
fn a_running_node_answers_turn_by_turn_and_tells_why_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let (chatty, data) = (dir.path().join("chatty"), dir.path().join("data"));
    with_template(&chatty);
    let node = Node::start(&data, "chat", &[], &[]);
    let at = ["--data", data.to_str().unwrap()];
    run(["publish", chatty.to_str().unwrap()].into_iter().chain(at)).ok();
    let chat = |name: &str, more: &[&str], input: &str| {
        fed(&[&["chat", name, "-n", "6"], more, &at[..]].concat(), input)
    };
    let here = ["--backend", "cpu"];
    let local =
        fed(&[&["chat", chatty.to_str().unwrap(), "-n", "6"], &here[..]].concat(), "Hi\nOn\n");
    let far = chat("chatty", &[], "Hi\nOn\n").ok();
    assert_eq!(far.out, local.ok().out);
    let args = ["run", "chatty", "-p", "Once upon a time", "-n", "12", "--json"];
    let whole = run(args.into_iter().chain(at)).ok().json();
    assert_eq!(whole["stop"], "max_tokens");
    let text = whole["text"].as_str().unwrap();
    let stop = &text[6..12];
    let more = ["--stop", stop, "--logprobs", "1"];
    let ended = run(args.into_iter().chain(more).chain(at)).ok().json();
    assert_eq!((&ended["stop"], &ended["stop_text"]), (&"stop_string".into(), &stop.into()));
    assert_eq!(ended["text"].as_str(), text.get(..text.find(stop).unwrap()));
    let odds = ended["logprobs"].as_array().unwrap();
    assert_eq!(odds.len(), ended["tokens"].as_array().unwrap().len());
    assert_eq!(odds[0]["top"][0]["id"], odds[0]["id"]);
    chat("chatty", &["--temp", "-1"], "Hi\n").fails(&["temperature"]);
    drop(node);
}
