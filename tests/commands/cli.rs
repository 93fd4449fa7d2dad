//! Commands on files: what they do, and how they refuse bad input: one line, a
//! failing exit code, and nothing half-written.

use crate::common;
use std::fs;
use std::path::Path;

use crate::common::{copy_dir, golden, model, run};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The names in a directory, including hidden files.
fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Converts a damaged copy of a checkpoint and asserts that nothing is left behind.
fn refuses(damage: impl FnOnce(&Path), words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    copy_dir(&golden("mixtral"), &source);
    damage(&source);
    run(["convert", text(&source), "--out", text(&dir.path().join("out"))]).fails(words);
    assert_eq!(entries(dir.path()), ["source"]);
    run(["run", text(&source), "-p", "x", "--backend", "cpu"]).fails(words);
}

#[test]
fn a_missing_or_truncated_checkpoint_is_refused() {
    refuses(|dir| fs::remove_file(dir.join("model.safetensors")).unwrap(), &["safetensors"]);
    refuses(
        |dir| {
            let file = fs::File::options().write(true).open(dir.join("model.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
        },
        &["model.safetensors"],
    );
    refuses(
        |dir| fs::write(dir.join("model.safetensors"), b"short").unwrap(),
        &["model.safetensors"],
    );
    refuses(|dir| fs::write(dir.join("config.json"), b"{").unwrap(), &["config.json"]);
}

#[test]
fn an_unknown_architecture_is_refused_by_name() {
    refuses(
        |dir| {
            let path = dir.join("config.json");
            let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config["architectures"] = json!(["MambaForCausalLM"]);
            fs::write(path, config.to_string()).unwrap();
        },
        &["MambaForCausalLM", "MixtralForCausalLM"],
    );
}

#[test]
fn old_and_new_rope_configs_convert_to_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old");
    copy_dir(&golden("llama3"), &old);
    let mut config: Value =
        serde_json::from_slice(&fs::read(old.join("config.json")).unwrap()).unwrap();
    let mut rope = config["rope_parameters"].take();
    config["rope_theta"] = rope["rope_theta"].take();
    config.as_object_mut().unwrap().remove("rope_parameters");
    rope.as_object_mut().unwrap().remove("rope_theta");
    config["rope_scaling"] = rope;
    fs::write(old.join("config.json"), config.to_string()).unwrap();
    run([
        "check",
        text(&old),
        "--expected",
        text(&old.join("expected.safetensors")),
        "--backend",
        "cpu",
    ])
    .ok();
}

#[test]
fn a_converted_model_is_inspected_and_run_and_an_existing_one_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("made/by/convert");
    let source = golden("qwen3-moe");
    let args = ["convert", text(&source), "--out", text(&out), "--quantize", "q8_0"];
    let converted = run(args.into_iter().chain(["--json"])).ok().json();
    let summary = run(["inspect", text(&out), "--json"]).ok().json();
    assert_eq!(summary["id"], converted["model"]);
    assert_eq!(summary["experts"]["count"], 32);
    let shown = run(["inspect", text(&out.join("manifest.json"))]).ok().out;
    assert!(shown.contains("router") && shown.contains("Q8_0"), "{shown}");
    run(args).fails(&["made/by/convert"]);
}

#[test]
fn real_manifests_are_inspected() {
    for (name, experts) in [
        ("diffusiongemma-26b-a4b-it-q4k-ehf16-af16", true),
        ("gemma-3-270m-it-q4k-ehf16-af32", false),
        ("qwen-3-5-0-8b-q4k-ehaf16", false),
    ] {
        let path = common::root().join(format!("tests/data/rdrr/{name}.manifest.json"));
        let shown = run(["inspect", text(&path)]).ok().out;
        assert!(shown.contains(name) && shown.contains("embedding"), "{shown}");
        assert_eq!(shown.lines().any(|line| line.starts_with("experts")), experts);
    }
}

/// Damages the embedded model's manifest and asserts that every reader refuses it.
fn manifest_refused(damage: impl FnOnce(&mut Value), words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&model(), dir.path());
    let path = dir.path().join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    damage(&mut manifest);
    fs::write(&path, manifest.to_string()).unwrap();
    run(["inspect", text(dir.path())]).fails(words);
    run(["run", text(dir.path()), "-p", "x", "--backend", "cpu"]).fails(words);
}

#[test]
fn a_manifest_with_overlapping_or_out_of_range_tensors_is_refused() {
    const TENSOR: &str = "model.layers.0.self_attn.q_proj.weight";
    let offset = |manifest: &mut Value, offset: u64| {
        let tensor = &mut manifest["tensors"][TENSOR];
        assert!(tensor["offset"].is_u64(), "{tensor}");
        tensor["offset"] = json!(offset);
    };
    manifest_refused(|manifest| offset(manifest, 0), &[TENSOR, "overlap"]);
    manifest_refused(|manifest| offset(manifest, 60_000_000), &[TENSOR, "shard 0"]);
    manifest_refused(|manifest| manifest["tensors"][TENSOR]["shape"] = json!([1, 1]), &[TENSOR]);
    manifest_refused(
        |manifest| manifest["shards"][0]["filename"] = json!("../outside.bin"),
        &["../outside.bin"],
    );
}

#[test]
fn a_shard_that_does_not_match_its_hash_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&model(), dir.path());
    let path = dir.path().join("shard_00002.bin");
    let mut bytes = fs::read(&path).unwrap();
    bytes[4321] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let run_it = || run(["run", text(dir.path()), "-p", "Once", "--backend", "cpu"]);
    run_it().fails(&["shard_00002.bin", "hash"]);
    fs::remove_file(&path).unwrap();
    run_it().fails(&["shard_00002.bin"]);
}

#[test]
fn a_tokenizer_that_is_not_the_manifests_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&model(), dir.path());
    let path = dir.path().join("tokenizer.json");
    let mut json = fs::read_to_string(&path).unwrap();
    let run_it = || run(["run", text(dir.path()), "-p", "Once", "-n", "1", "--backend", "cpu"]);
    run_it().ok();
    // Still a valid tokenizer of the same length: two letters of a token are swapped.
    let at = json.find("\"the\"").unwrap();
    json.replace_range(at..at + 5, "\"teh\"");
    fs::write(&path, &json).unwrap();
    run_it().fails(&["tokenizer.json", "hash"]);
    json.push('\n');
    fs::write(&path, &json).unwrap();
    run_it().fails(&["tokenizer.json"]);
}

#[test]
fn perplexity_needs_something_to_predict() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    let model = model();
    let measure = |contents: &str| {
        fs::write(&file, contents).unwrap();
        run(["perplexity", text(&model), "--text", text(&file), "--backend", "cpu", "--json"])
    };
    for too_short in ["", "a"] {
        measure(too_short).fails(&[text(&file), "longer text"]);
    }
    let two = measure("Once upon a time there was").ok().json();
    assert!(two["perplexity"].as_f64().unwrap() > 1.0, "{two}");
}

#[test]
fn a_prompt_may_begin_with_a_hyphen() {
    let model = model();
    let args = ["run", text(&model), "-p", "- milk\n- ", "-n", "1", "--backend", "cpu"];
    assert!(run(args).ok().out.starts_with("- milk\n- "));
}

#[test]
fn a_full_context_is_reported_as_the_reason_for_stopping() {
    let model = model();
    let args = ["run", text(&model), "-p", "Once", "-n", "200", "--context", "16"];
    let said = run(args.into_iter().chain(["--backend", "cpu"])).ok();
    assert!(said.err.contains("the context of 16 tokens is full"), "{}", said.err);
    let said = run(args[..6].iter().copied().chain(["--backend", "cpu"])).ok();
    assert!(!said.err.contains("is full"), "{}", said.err);
}

/// A directory and a running node's model have the same name.
#[test]
fn a_name_that_is_a_directory_and_another_model_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let node = super::common::Node::start(&dir.path().join("a"), "both", &[], &[]);
    node.ask(&["publish", text(&model())]).ok();
    let name = "tiny-mixtral-q4_k_m";
    let here = dir.path().join(name);
    copy_dir(&model(), &here);
    let ask = |model: &str| {
        let mut command = super::common::command();
        command.args(["run", model, "-p", "Call me", "-n", "2", "--backend", "cpu", "--json"]);
        let output =
            command.arg("--data").arg(&node.data).current_dir(dir.path()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    // Both are the same model, so the choice does not matter.
    assert_eq!(ask(name).0, Some(0));
    let path = here.join("manifest.json");
    let manifest = fs::read_to_string(&path).unwrap();
    fs::write(&path, manifest + "\n").unwrap();
    let (code, _, said) = ask(name);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("a directory here and another model"), "{said}");
    assert!(said.contains("./tiny-mixtral"), "{said}");
    let (code, out, _) = ask("./tiny-mixtral-q4_k_m");
    assert_eq!(code, Some(0));
    assert!(!out.contains("verified_bytes"), "run in this process: {out}");
    // A directory that is not a model does not hide the node's model.
    fs::remove_file(&path).unwrap();
    let (code, out, said) = ask(name);
    assert_eq!(code, Some(0), "{said}");
    assert!(out.contains("verified_bytes"), "run by the node: {out}");
}

/// `check`, `perplexity` and `bench` find a store's models like `run`, with or without a running node.
#[test]
fn a_stored_model_is_measured_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("a");
    let mut node = super::common::Node::start(&data, "held", &[], &[]);
    let name = "tiny-mixtral-q4_k_m";
    node.ask(&["publish", text(&model()), "--shards", "0-9"]).ok();
    let file = dir.path().join("text");
    fs::write(&file, "Once upon a time there was a king who had three sons.").unwrap();
    let measured = |model: &str| {
        let args = ["perplexity", model, "--text", text(&file), "--backend", "cpu", "--json"];
        run(args.into_iter().chain(["--data", text(&data)]))
    };
    measured(name).fails(&["1 of 12 objects", "pin", "--fetch"]);
    measured("tiny-mixtral-q4_k_x").fails(&["did you mean tiny-mixtral-q4_k_m?"]);
    node.ask(&["publish", text(&model())]).ok();
    let local = measured(text(&model())).ok().json();
    assert_eq!(measured(name).ok().json(), local);
    assert_eq!(measured("TINY-mixtral-q4_k_m").ok().json(), local);
    node.signal("TERM");
    assert_eq!(node.wait(), Some(0));
    assert_eq!(measured(name).ok().json(), local);
    measured("tiny-mixtral-q4_k_x").fails(&["did you mean tiny-mixtral-q4_k_m?"]);
    // And so does `run`.
    let args = ["run", name, "-p", "Call me", "-n", "2", "--backend", "cpu", "--json"];
    let said = run(args.into_iter().chain(["--data", text(&data)])).ok().json();
    assert_eq!(said["tokens"].as_array().unwrap().len(), 2);
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let signals = [("INT", 130), ("TERM", 143), ("HUP", 129)];
    let heard = if super::common::ignores_hangup() { 2 } else { 3 };
    for (signal, code) in signals.into_iter().take(heard) {
        let mut synth = super::common::command();
        synth.args(["synth", "--arch", "llama-3.2-1b", "--out"]).arg(&out);
        let mut child = synth.spawn().unwrap();
        // Its first shard shows that it is working.
        let at_work = || {
            entries(dir.path()).iter().any(|name| {
                !entries(&dir.path().join(name)).join(" ").replace(".lock", "").is_empty()
            })
        };
        while !at_work() {
            assert!(child.try_wait().unwrap().is_none(), "it ended too soon");
            std::thread::yield_now();
        }
        let pid = child.id().to_string();
        assert!(
            std::process::Command::new("kill")
                .args([&format!("-{signal}"), &pid])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
        assert_eq!(entries(dir.path()), [] as [&str; 0], "{signal}");
    }
}

#[test]
fn a_budget_below_one_tokens_demand_names_the_smallest_that_works() {
    let with_budget = |bytes: &str| {
        let model = model();
        let args = ["run", text(&model), "-p", "Call me", "-n", "24", "--json"];
        run(args.into_iter().chain(["--backend", "cpu", "--vram-budget", bytes]))
    };
    let refusal = with_budget("1MiB").fails(&["smallest budget that works is"]);
    let smallest: u64 = refusal
        .split("smallest budget that works is ")
        .nth(1)
        .and_then(|rest| rest.split('B').next())
        .unwrap()
        .parse()
        .unwrap();
    with_budget(&format!("{}B", smallest - 1)).fails(&["smallest budget that works is"]);

    // Paged within the smallest budget or all resident: the same tokens, and every demand is counted.
    let paged = with_budget(&format!("{smallest}B")).ok().json();
    let resident = with_budget("1GiB").ok().json();
    assert_eq!(paged["tokens"], resident["tokens"]);
    assert_eq!(paged["tokens"].as_array().unwrap().len(), 24);
    let demands = |answer: &Value| -> u64 {
        answer["hits"].as_object().unwrap().values().map(|hits| hits.as_u64().unwrap()).sum()
    };
    assert_eq!(demands(&paged), demands(&resident));
    assert!(paged["hits"]["disk"].as_u64().unwrap() > resident["hits"]["disk"].as_u64().unwrap());
}

#[test]
fn sampling_follows_its_seed() {
    let sample = |seed: &str| {
        let model = model();
        let args = ["run", text(&model), "-p", "Once upon a time", "-n", "16", "--json"];
        let more = ["--backend", "cpu", "--temperature", "1.0", "--top-k", "50", "--seed", seed];
        run(args.into_iter().chain(more)).ok().json()["tokens"].clone()
    };
    assert_eq!(sample("7"), sample("7"));
    assert_ne!(sample("7"), sample("8"));
}

/// What can be known beforehand is said before anything is loaded, and not behind the prompt's echo.
#[test]
fn a_request_that_cannot_be_done_is_refused_before_it_is_echoed() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&model(), dir.path());
    // Nothing can be loaded any more.
    for name in entries(dir.path()).iter().filter(|name| name.starts_with("shard")) {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let refused = |more: &[&str], word: &str| {
        let args = ["run", text(dir.path()), "-p", "Once upon a time", "--backend", "cpu"];
        let said = run(args.iter().chain(more));
        assert_eq!((said.code, said.out.as_str()), (Some(2), ""), "{more:?}: {}", said.err);
        said.fails(&[word]);
    };
    refused(&["--top-p", "0"], "top-p");
    refused(&["--temperature=-1"], "temperature");
    refused(&["--repetition-penalty", "0"], "repetition penalty");
    refused(&["--context", "2"], "2 positions");
    refused(&["--context", "1000000"], "1000000");
    refused(&["-n", "0"], "tokens");
    let long = "many words ".repeat(2000);
    let said = run(["run", text(dir.path()), "-p", &long, "--backend", "cpu"]);
    assert_eq!((said.code, said.out.as_str()), (Some(2), ""));
    said.fails(&["shorten it"]);
    // As many tokens as a number can say wrap nothing: the load is what fails.
    let all = u64::MAX.to_string();
    let said = run(["run", text(dir.path()), "-p", "Once", "-n", &all, "--backend", "cpu"]);
    said.fails(&["shard_0"]);
}

#[test]
fn wrong_arguments_are_told_in_one_line() {
    let model = model();
    let model = text(&model);
    run(["run", "/no/such/model", "-p", "x", "--data", "/no/such/data"]).fails(&["/no/such/model"]);
    run(["run", model, "-p", ""]).fails(&["prompt"]);
    run(["run", model, "-p", "Once upon a time", "--context", "1"]).fails(&["context"]);
    run(["run", model, "-p", "x", "--temperature=-1"]).fails(&["temperature"]);
    run(["inspect", "/no/such/dir"]).fails(&["/no/such/dir"]);
    run(["ls", "--data", "/no/such/data"]).fails(&["no node is running", "join"]);
    run(["check", model, "--expected", "/no/such/file"]).fails(&["/no/such/file"]);
    run(["perplexity", model, "--text", "/no/such/file"]).fails(&["/no/such/file"]);
    assert_eq!(run(["dance"]).code, Some(2));
    let said = run(["run", model, "-p", "x", "--vram-budget", "4"]);
    assert_eq!(said.code, Some(2));
    assert!(said.err.contains("no unit") && said.err.contains("4GiB"), "{}", said.err);
}
