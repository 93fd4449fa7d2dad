//! `bench`, `trace` and `synth` as commands: their JSON is complete, their counters add
//! up, and bad input is refused in one line. Speeds are not asserted.

use std::fs;
use std::path::Path;

use crate::common::{golden, model, run};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn json(args: &[&str]) -> Value {
    run(args.iter().chain(&["--json"])).ok().json()
}

/// The backends to test: the GPU too if there is an adapter (lavapipe will do).
fn backends() -> Vec<&'static str> {
    let model = model();
    let args = ["run", text(&model), "-p", "x", "-n", "1", "--backend", "gpu", "--json"];
    let gpu = run(args).code == Some(0);
    let required = std::env::var("DOPPLER_REQUIRE_GPU").is_ok_and(|v| v == "1");
    assert!(gpu || !required, "DOPPLER_REQUIRE_GPU=1, but there is no adapter");
    if gpu { vec!["cpu", "gpu"] } else { vec!["cpu"] }
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).unwrap_or_else(|| panic!("no {path} in {value}"));
    found.as_f64().unwrap_or_else(|| panic!("{path} is {found}"))
}

/// Asserts that a summary agrees with its measurements.
fn summary(value: &Value, path: &str, runs: usize) {
    let all = value.pointer(&format!("{path}/all")).unwrap().as_array().unwrap();
    assert_eq!(all.len(), runs, "{path}");
    let (min, median) =
        (number(value, &format!("{path}/min")), number(value, &format!("{path}/median")));
    let max = number(value, &format!("{path}/max"));
    assert!(0.0 < min && min <= median && median <= max, "{path}: {value}");
    assert!(number(value, &format!("{path}/mad")) <= max - min);
}

/// Asserts that a record says where it ran and how it was called.
fn machine(value: &Value, backend: &str) {
    let field = |name: &str| value["machine"][name].as_str().unwrap_or_default().to_owned();
    assert!(!field("host").is_empty() && !field("version").is_empty());
    assert!(field("command").contains("bench"), "{value}");
    assert!((backend == "cpu") == field("device").starts_with("cpu"), "{value}");
    assert!(value["machine"]["commit"].is_string() || value["machine"]["commit"].is_null());
    assert!(number(value, "/bandwidth/copy_bytes_s") > 0.0);
    assert!(number(value, "/bandwidth/upload_bytes_s") > 0.0);
}

/// Asserts that the counters and the figures per token come from the same runs.
fn counters(value: &Value, per_token: &str, counters: &str, tokens: f64) {
    for name in ["dispatches", "submissions", "uploaded_bytes", "readbacks"] {
        let all = number(value, &format!("{counters}/{name}"));
        let each = number(value, &format!("{per_token}/{name}"));
        assert!((each * tokens - all).abs() < 1e-6 * all.max(1.0), "{name}: {each} of {all}");
    }
}

fn hits(pager: &Value) -> f64 {
    ["vram", "ram", "disk", "peer"].iter().map(|tier| number(pager, &format!("/hits/{tier}"))).sum()
}

#[test]
fn streams_are_timed_for_each_number_of_them() {
    let model = model();
    for backend in backends() {
        let common = ["--backend", backend, "--runs", "2", "--prompts", "2"];
        let streams = ["bench", "streams", text(&model), "--prompt-tokens", "5", "-n", "3"];
        let said = json(&[&streams[..], &["--streams", "1,3"], &common].concat());
        assert_eq!(number(&said, "/tokens"), 3.0);
        for (at, count) in [(0, 1.0), (1, 3.0)] {
            assert_eq!(number(&said, &format!("/streams/{at}/count")), count);
            summary(&said, &format!("/streams/{at}/tok_s"), 2);
            summary(&said, &format!("/streams/{at}/of_first"), 2);
        }
        assert_eq!(number(&said, "/streams/0/of_first/median"), 1.0);
    }
}

#[test]
fn decode_and_prefill_say_what_they_measured() {
    let model = model();
    for backend in backends() {
        let common = ["--backend", backend, "--runs", "3", "--prompts", "2"];
        let decode = ["bench", "decode", text(&model), "--prompt-tokens", "5", "-n", "7"];
        let decode = json(&[&decode[..], &common].concat());
        machine(&decode, backend);
        summary(&decode, "/tok_s", 3);
        assert_eq!(number(&decode, "/tokens"), 7.0);
        assert_eq!(number(&decode, "/experts"), 32.0);
        counters(&decode, "/per_token", "/counters", 21.0);
        // Two of eight experts in each of four layers for each token, all of them in slots.
        let pager = &decode["pager"];
        assert_eq!((number(pager, "/demands"), hits(pager)), (21.0 * 8.0, 21.0 * 8.0));
        assert_eq!(number(&decode, "/per_token/demands"), 8.0);
        assert!(
            number(&decode, "/counters/dispatches") >= number(&decode, "/counters/submissions")
        );
        assert!(number(&decode, "/counters/submissions") >= 21.0);
        assert!(number(&decode, "/per_token/device_seconds") > 0.0);
        let weights = number(&decode, "/weight_bytes_a_token");
        // The whole trunk except the embedding's other rows, and a quarter of the experts.
        assert!((1e6..9e6).contains(&weights), "{weights}");
        let share =
            weights * number(&decode, "/tok_s/median") / number(&decode, "/bandwidth/copy_bytes_s");
        assert!((share / number(&decode, "/bandwidth_share") - 1.0).abs() < 1e-6);
        assert!(number(&decode, "/peak_rss_bytes") > weights);
        assert!(number(&decode, "/session/slots") == 32.0);

        let prefill = ["bench", "prefill", text(&model), "--prompt-tokens", "9"];
        let prefill = json(&[&prefill[..], &common].concat());
        machine(&prefill, backend);
        summary(&prefill, "/tok_s", 3);
        counters(&prefill, "/per_token", "/counters", 27.0);
        assert_eq!(prefill["bandwidth_share"], Value::Null);
        assert_eq!(number(&prefill["pager"], "/demands"), hits(&prefill["pager"]));
    }
}

#[test]
fn paging_compares_policies_with_all_resident() {
    let model = model();
    let args = ["bench", "paging", text(&model), "--prompt-tokens", "6", "-n", "8"];
    for backend in backends() {
        let more = ["--backend", backend, "--runs", "2", "--policies", "lru,lfu", "--slots", "50%"];
        let paging = json(&[&args[..], &more].concat());
        machine(&paging, backend);
        assert_eq!((number(&paging, "/slots"), number(&paging, "/experts")), (16.0, 32.0));
        // A backend that reads ahead gets one more session per policy, which does not.
        let guesses: &[bool] = if backend == "cpu" { &[true, false] } else { &[false] };
        let policies = ["lru", "lfu"].into_iter();
        let sides: Vec<_> = policies.flat_map(|p| guesses.iter().map(move |g| (p, *g))).collect();
        // One run before the first session, and one after each session's two.
        summary(&paging, "/resident/tok_s", 1 + 2 * sides.len());
        assert_eq!(number(&paging, "/resident/hit_percent"), 100.0);
        assert_eq!(paging["paged"].as_array().unwrap().len(), sides.len());
        for (side, (policy, ahead)) in paging["paged"].as_array().unwrap().iter().zip(sides) {
            assert_eq!((&side["policy"], &side["read_ahead"]), (&policy.into(), &ahead.into()));
            for path in ["/tok_s", "/of_resident", "/bound_tok_s", "/of_bound"] {
                summary(side, path, 2);
            }
            let pager = &side["pager"];
            assert_eq!((number(pager, "/demands"), hits(pager)), (16.0 * 8.0, 16.0 * 8.0));
            let read_ahead = number(pager, "/read_ahead");
            assert!(
                number(pager, "/read_ahead_used") <= read_ahead && (ahead || read_ahead == 0.0)
            );
            let misses = hits(pager) - number(pager, "/hits/vram");
            assert!(
                misses > 0.0 && number(pager, "/hits/disk") + number(pager, "/hits/ram") == misses,
                "{side}"
            );
            let percent = number(pager, "/hits/vram") / number(pager, "/demands") * 100.0;
            assert!((number(side, "/hit_percent") - percent).abs() < 1e-9);
            let missed = number(side, "/per_token/missed_bytes") * 16.0;
            assert!((missed - number(pager, "/filled_bytes")).abs() < 1.0);
            assert!(number(side, "/per_token/uploaded_bytes") * 16.0 >= missed);
        }
    }
}

#[test]
fn kernels_are_timed_at_the_models_shapes() {
    let model = model();
    for backend in backends() {
        let args = ["bench", "kernels", text(&model), "--backend", backend, "--runs", "2"];
        let kernels = json(&args);
        machine(&kernels, backend);
        let list = kernels["kernels"].as_array().unwrap();
        assert!(list.len() > 3, "{kernels}");
        let mut seconds = 0.0;
        for kernel in list {
            summary(kernel, "/seconds", 2);
            assert!(number(kernel, "/bytes") > 0.0 && number(kernel, "/bandwidth_share") > 0.0);
            seconds += number(kernel, "/count") * number(kernel, "/seconds/median");
        }
        assert!((number(&kernels, "/token_seconds") / seconds - 1.0).abs() < 1e-9);
        let experts: Vec<_> = list
            .iter()
            .filter(|kernel| kernel["kernel"].as_str().unwrap().starts_with("experts_"))
            .collect();
        let layers: f64 = experts.iter().map(|kernel| number(kernel, "/count")).sum();
        assert_eq!(layers, 4.0, "each layer's experts once a token");

        let some = json(&[&args[..], &["--kernel", "experts"]].concat());
        assert_eq!(some["kernels"].as_array().unwrap().len(), experts.len());
    }
}

#[test]
fn records_are_written_once_and_for_people() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record.md");
    let model = model();
    let args = ["bench", "decode", text(&model), "-n", "2", "--runs", "1", "--backend", "cpu"];
    let args = [&args[..], &["--record", text(&path)]].concat();
    let shown = run(&args).ok().out;
    assert!(shown.contains("tok/s") && shown.contains("commit"), "{shown}");
    let record = fs::read_to_string(&path).unwrap();
    for part in ["# decode", "host: ", "device: cpu", "commit ", "command: ", "tok/s"] {
        assert!(record.contains(part), "{part:?} is not in {record}");
    }
    run(&args).fails(&["record.md"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), record);
}

#[test]
fn a_recorded_run_replays_to_the_engines_own_counters() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["mixtral", "qwen3-moe"] {
        let source = golden(name);
        for policy in ["lru", "lfu", "slru"] {
            let file = dir.path().join(format!("{name}-{policy}.trace"));
            let args = ["trace", "record", text(&source), "--backend", "cpu", "-n", "20"];
            let more = ["--slots", "60%", "--policy", policy, "--out", text(&file)];
            let recorded = json(&[&args[..], &more].concat());
            let slots = number(&recorded, "/session/slots");
            let demands = number(&recorded, "/session/pager/demands");
            let percent = number(&recorded, "/session/pager/hits/vram") / demands * 100.0;
            let at = slots.to_string();
            let args = ["trace", "replay", text(&file), "--slots", &at, "--policy", policy];
            let replayed = json(&args);
            let replay = &replayed["replays"][0];
            assert_eq!(replay["policy"], policy);
            assert_eq!(
                (number(replay, "/slots"), number(replay, "/all/demands")),
                (slots, demands)
            );
            assert!((number(replay, "/hit_percent") - percent).abs() < 0.1, "{replay}");
            assert!(percent > 0.0 && percent < 100.0, "{recorded}");
        }
    }
}

#[test]
fn prompts_are_recorded_and_all_policies_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file) = (model(), dir.path().join("a.trace"));
    let args = ["trace", "record", text(&model), "--backend", "cpu", "-n", "12"];
    let prompts = ["-p", "Once upon a time", "-p", "ROMEO:\n", "--out", text(&file)];
    let shown = run(args.iter().chain(&prompts)).ok().out;
    // Each prompt is one step, and the last token is not fed back in.
    assert!(shown.contains("24 steps"), "{shown}");
    let shown = run(["trace", "replay", text(&file)]).ok().out;
    for word in ["lru", "lfu", "slru", "optimal", "50.0%"] {
        assert!(shown.contains(word), "{shown}");
    }
    let all = json(&["trace", "replay", text(&file), "--slots", "9,100%"]);
    let rates: Vec<f64> = all["replays"]
        .as_array()
        .unwrap()
        .iter()
        .map(|replay| number(replay, "/all/hits"))
        .collect();
    assert_eq!(rates.len(), 8);
    assert!(rates[..4].iter().all(|hits| *hits <= rates[3]), "{rates:?}");
    assert!(rates[4..].iter().all(|hits| *hits == rates[4]), "all resident: {rates:?}");

    fs::write(&file, "nothing of the kind\n").unwrap();
    run(["trace", "replay", text(&file)]).fails(&["a.trace", "not a routing trace"]);
}

#[test]
fn a_policy_changes_no_token() {
    let model = model();
    let with = |policy: &str| {
        let args = ["run", text(&model), "-p", "Call me", "-n", "16", "--backend", "cpu"];
        json(&[&args[..], &["--vram-budget", "5MiB", "--policy", policy]].concat())
    };
    let (lru, lfu) = (with("lru"), with("lfu"));
    assert_eq!(lru["tokens"], lfu["tokens"]);
    assert!(number(&lru, "/hits/disk") > 32.0, "nothing was paged: {lru}");
}

#[test]
fn a_skewed_model_is_written_and_measured() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("skewed");
    let args = ["synth", "--arch", "qwen3-30b-a3b", "--layers", "1", "--out", text(&out)];
    run(args.iter().chain(&["--routing", "zipf"])).fails(&["zipf:S"]);
    assert!(!out.exists());
    let dense = ["synth", "--arch", "llama-3.2-1b", "--out", text(&out), "--routing", "zipf:1"];
    run(dense).fails(&["no experts"]);
    assert!(!out.exists());
}

#[test]
fn the_mesh_is_measured_against_raw_streams() {
    let args = ["bench", "mesh", "--size", "5MiB", "--rounds", "2", "--connects", "3"];
    let record = json(&args);
    assert_eq!((number(&record, "/bytes"), number(&record, "/rounds")), (f64::from(5 << 20), 2.0));
    for name in ["raw_mb_s", "raw_4_streams_mb_s", "verified_mb_s"] {
        let all = record[name]["all"].as_array().unwrap();
        assert!(all.len() == 2 && all.iter().all(|speed| speed.as_f64().unwrap() > 0.0), "{name}");
    }
    assert!(number(&record, "/verified_to_raw") > 0.0 && number(&record, "/throttled_mb_s") > 0.0);
    if cfg!(target_os = "linux") {
        assert!(number(&record, "/rss_before") > 0.0 && number(&record, "/rss_after") > 0.0);
    }
    let said = run(args.iter().chain(&["--connects=0"])).code;
    assert_eq!(said, Some(2), "given twice");
    run(["bench", "mesh", "--size", "9B"]).fails(&["--size", "1 MiB"]);
    run(["bench", "mesh", "--rounds", "0"]).fails(&["--rounds"]);
    run(["bench", "mesh", "--listen", "nowhere"]).fails(&["--listen", "nowhere"]);
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let model = model();
    let model = text(&model);
    let dense = golden("qwen3");
    let dense = text(&dense);
    let cpu = ["--backend", "cpu"];
    let refused = |args: &[&str], words: &[&str]| {
        run(args.iter().chain(&cpu)).fails(words);
    };
    refused(&["bench", "decode", "/no/such/model"], &["/no/such/model"]);
    refused(&["bench", "decode", model, "--runs", "0"], &["--runs"]);
    refused(&["bench", "decode", model, "-n", "0"], &["--tokens"]);
    refused(&["bench", "decode", model, "--prompt-tokens", "0"], &["--prompt-tokens"]);
    refused(&["bench", "prefill", model, "--prompts", "0"], &["--prompts"]);
    refused(&["bench", "decode", model, "--text", "/no/such/text"], &["/no/such/text"]);
    refused(&["bench", "decode", model, "--record", "/no/such/dir/x.md"], &["/no/such/dir/x.md"]);
    refused(&["bench", "paging", dense], &["no experts"]);
    refused(&["bench", "paging", model, "--slots", "3"], &["8 slots"]);
    refused(&["bench", "kernels", model, "--runs", "0"], &["--runs"]);
    refused(&["bench", "kernels", model, "--kernel", "fft"], &["fft", "linear_"]);
    refused(&["bench", "kernels", "--arch", "gpt-9"], &["gpt-9", "mixtral-8x7b"]);
    refused(&["trace", "record", dense, "--out", "/no/such/dir/x"], &["no experts"]);
    refused(&["trace", "record", model, "--out", "/no/such/dir/x", "-n", "1"], &["/no/such/dir/x"]);
    run(["trace", "replay", "/no/such/file"]).fails(&["/no/such/file"]);
    let named = ["run", "no-such-name", "--swarm", "lab", "-p", "x", "--policy", "lru"];
    run(named).fails(&["--policy"]);
    for wrong in [
        &["bench", "kernels"][..],
        &["bench", "decode", model, "--policy", "fifo"],
        &["bench", "paging", model, "--slots", "150%"],
        &["trace", "replay", "x", "--policy", "fifo"],
        &["bench", "fly", model],
    ] {
        assert_eq!(run(wrong).code, Some(2), "{wrong:?}");
    }
}
