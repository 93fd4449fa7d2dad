//! Pulls from a server that speaks the Hub's API, and fails as it is told.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::pieces::Bounds;
use super::*;
use crate::failures;
use client::Patience;
use doppler_infer::load::{MemorySink, open};
use doppler_testing::hub::{Behaviour, COMMIT, Hub};
use doppler_testing::root;

const PIECE: u64 = 16 << 10;
const CONNECTIONS: usize = 4;
const SHARD: u64 = 64 << 10;
const REPO: &str = "lab/Tiny-Mixtral";

fn golden() -> PathBuf {
    root().join("tests/data/goldens/mixtral")
}

fn places(hub: &Hub, token: Option<&str>) -> Places {
    places_at(&hub.endpoint, token, None)
}

fn places_at(endpoint: &str, token: Option<&str>, cache: Option<PathBuf>) -> Places {
    let endpoint = Some(endpoint.to_owned());
    let token = token.map(str::to_owned);
    let mut client = Client::new(Settings { endpoint, token, authorities: None }).unwrap();
    client.patience = Patience { first: Duration::from_millis(1), tries: 4 };
    let bounds = Bounds { piece: PIECE, run: 1, ahead: 8 * PIECE };
    let options = Options { connections: CONNECTIONS, shard_bytes: SHARD, bounds };
    Places {
        client,
        cache: LocalCache::at(cache),
        options,
        report: None,
        stop: CancellationToken::new(),
    }
}

/// A Hub with one model of safetensors, one of GGUF files, and the bytes of the first one's weights.
fn hub() -> (Hub, u64) {
    let hub = Hub::start();
    let (config, weights) = (golden().join("config.json"), golden().join("model.safetensors"));
    let readme = golden().join("../README.md");
    let files = [
        ("config.json", config.as_path()),
        ("model.safetensors", weights.as_path()),
        ("README.md", readme.as_path()),
        ("a/b.txt", readme.as_path()),
    ];
    hub.add(REPO, &files, 16 << 10);
    let gguf = root().join("tests/data/gguf/mixtral/model.gguf");
    let other = root().join("tests/data/gguf/qwen3/model.gguf");
    hub.add("lab/gguf", &[("m-Q4_K_M.gguf", &gguf), ("m-Q8_0.gguf", &other)], 16 << 10);
    (hub, std::fs::metadata(weights).unwrap().len())
}

fn pull_with(data: &Path, text: &str, places: Places) -> anyhow::Result<Pulled> {
    let asked = Asked::parse(text).unwrap();
    let order = Order { asked: &asked, data, quantize: None, replicas: Replicas::DEFAULT };
    pull_from(&order, places)
}

/// The id of what `convert` makes of the same files.
fn converted(path: &Path) -> String {
    let checkpoint = open(path).unwrap();
    let quantization = match checkpoint.quantization() {
        Some(_) => Quantization::Keep,
        None => Quantization::Q4KM,
    };
    let mut sink = MemorySink::default();
    let manifest = convert(checkpoint.as_ref(), quantization, SHARD, &mut sink, &mut |_| ());
    manifest.unwrap().model_id_hash().to_string()
}

/// As `converted`, of the model of `REPO`.
fn expected() -> String {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("Tiny-Mixtral");
    std::fs::create_dir(&dir).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden().join(name), dir.join(name)).unwrap();
    }
    converted(&dir)
}

fn label(error: &anyhow::Error) -> &'static str {
    failures::of(error).label
}

#[test]
fn a_pulled_model_is_what_convert_makes_of_the_same_files_and_each_byte_comes_once() {
    let (hub, size) = hub();
    hub.behave(Behaviour { token: Some("hf_secret"), ..Behaviour::default() });
    let data = tempfile::tempdir().unwrap();
    let text = format!("hf:{REPO}");
    let pulled = pull_with(data.path(), &text, places(&hub, Some("hf_secret"))).unwrap();
    assert_eq!(pulled.model, expected());
    assert_eq!((pulled.name.as_str(), pulled.commit.as_str()), ("Tiny-Mixtral-q4_k_m", COMMIT));
    assert_eq!(hub.sent(), size);
    let log = hub.log();
    let weights: Vec<_> = log.iter().filter(|one| one.is_cdn).collect();
    assert!(weights.len() > 10 && weights.iter().all(|one| one.authorization.is_none()));
    let bearer = Some("Bearer hf_secret");
    assert!(log.iter().filter(|one| !one.is_cdn).all(|one| one.authorization.as_deref() == bearer));
    let redirected = log.iter().filter(|one| !one.is_cdn && one.path.ends_with(".safetensors"));
    assert!(redirected.count() <= CONNECTIONS + 1, "the place is remembered");
    assert!(!data.path().join("pulls").exists());
    let asked = Asked::parse(&text).unwrap();
    let order = |quantize| Order {
        asked: &asked,
        data: data.path(),
        quantize,
        replicas: Replicas::DEFAULT,
    };
    assert_eq!(order(None).remembered().unwrap().to_string(), pulled.model);
    assert_eq!(order(Some(Quantization::Bf16)).remembered(), None);
    let again = pull_with(data.path(), &text, places(&hub, Some("hf_secret"))).unwrap();
    assert!(again.present && again.model == pulled.model && hub.sent() == size);
}

#[test]
fn a_gguf_model_is_chosen_by_its_quantisation() {
    let (hub, _) = hub();
    let data = tempfile::tempdir().unwrap();
    let pulled = pull_with(data.path(), "hf:lab/gguf:q4_k_m@v1", places(&hub, None)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m-Q4_K_M.gguf");
    std::fs::copy(root().join("tests/data/gguf/mixtral/model.gguf"), &file).unwrap();
    assert_eq!(pulled.model, converted(&file));
    let error = pull_with(data.path(), "hf:lab/gguf", places(&hub, None)).unwrap_err();
    assert!(error.to_string().contains("m-Q8_0.gguf") && label(&error) == "hub_choice", "{error}");
}

#[test]
fn what_is_cut_off_goes_on_there_and_a_busy_server_is_waited_for() {
    let (hub, size) = hub();
    hub.behave(Behaviour { busy: 3, cut: 6, ..Behaviour::default() });
    let data = tempfile::tempdir().unwrap();
    let pulled = pull_with(data.path(), &format!("hf:{REPO}"), places(&hub, None)).unwrap();
    assert_eq!((pulled.model, hub.sent()), (expected(), size));
}

#[test]
fn a_pull_that_is_stopped_ends_and_the_next_one_goes_on_from_there() {
    let (hub, size) = hub();
    // Of each connection: all of it would take a quarter of a minute.
    hub.behave(Behaviour { rate: Some(size / 64), ..Behaviour::default() });
    let data = tempfile::tempdir().unwrap();
    let (text, places_of) = (format!("hf:{REPO}"), places(&hub, None));
    let stop = places_of.stop.clone();
    let stopped = std::thread::scope(|scope| {
        let pull = scope.spawn(|| pull_with(data.path(), &text, places_of));
        hub.wait_for(size / 8);
        stop.cancel();
        pull.join().unwrap()
    });
    assert_eq!(label(&stopped.unwrap_err()), "stopping");
    assert!(hub.sent() < size, "it was stopped before the end");
    hub.behave(Behaviour::default());
    assert_eq!(pull_with(data.path(), &text, places(&hub, None)).unwrap().model, expected());
    // Only pieces that were on their way come twice.
    let twice = hub.sent() - size;
    assert!(twice <= CONNECTIONS as u64 * PIECE, "{twice} of {size} bytes came twice");
    // One that is stopped before it begins asks for no weights.
    let (other, places_of) = (tempfile::tempdir().unwrap(), places(&hub, None));
    places_of.stop.cancel();
    let sent = hub.sent();
    assert_eq!(label(&pull_with(other.path(), &text, places_of).unwrap_err()), "stopping");
    assert_eq!(hub.sent(), sent);
}

#[test]
fn wrong_bytes_are_refused_by_their_file_and_fetched_anew() {
    let (hub, _) = hub();
    let text = format!("hf:{REPO}");
    for (file, algorithm) in [("model.safetensors", "SHA-256"), ("config.json", "Git SHA-1")] {
        let data = tempfile::tempdir().unwrap();
        hub.behave(Behaviour { wrong: Some(file), ..Behaviour::default() });
        let error = pull_with(data.path(), &text, places(&hub, None)).unwrap_err();
        let line = error.to_string();
        assert!(line.contains(file) && line.contains(algorithm), "{line}");
        assert_eq!(label(&error), "hub_mismatch");
        assert!(!crate::hub::keep::is_here(data.path(), expected().parse().unwrap()));
        hub.behave(Behaviour::default());
        assert_eq!(pull_with(data.path(), &text, places(&hub, None)).unwrap().model, expected());
    }
}

#[test]
fn refusals_say_what_to_do_and_never_the_token() {
    let (hub, _) = hub();
    let data = tempfile::tempdir().unwrap();
    let failed = |text: &str, token: Option<&str>| {
        let error = pull_with(data.path(), text, places(&hub, token)).unwrap_err();
        assert!(!format!("{error:#}").contains("hf_"), "{error:#}");
        (label(&error), error.to_string())
    };
    let has = |(label, line): (&str, String), want: &str, words: &[&str]| {
        assert_eq!(label, want, "{line}");
        assert!(
            words.iter().all(|word| line.contains(word)) && line.lines().count() == 1,
            "{line}"
        );
    };
    has(failed("hf:lab/none", None), "hub_missing", &["lab/none", "no such model", "search=none"]);
    let revision = failed(&format!("hf:{REPO}@v2"), None);
    has(revision, "hub_missing", &["no revision", "v2", "main, v1"]);
    has(failed(&format!("hf:{REPO}:Q4_0"), None), "hub_choice", &["Q4_0", "config.json"]);
    hub.behave(Behaviour { token: Some("hf_right"), ..Behaviour::default() });
    has(failed(&format!("hf:{REPO}"), None), "hub_access", &["gated", "HF_TOKEN", "no token"]);
    let wrong = failed(&format!("hf:{REPO}"), Some("hf_wrong"));
    has(wrong, "hub_access", &["gated", "accept", "does not give access"]);
    hub.behave(Behaviour { refuse: Some((401, "RepoNotFound")), ..Behaviour::default() });
    has(failed(&format!("hf:{REPO}"), None), "hub_access", &["private", "HF_TOKEN"]);
    hub.behave(Behaviour { refuse: Some((503, "")), ..Behaviour::default() });
    has(failed(&format!("hf:{REPO}"), None), "hub_answer", &["503"]);
    // Nobody listens there any more.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let places = places_at(&format!("http://{nobody}"), None, None);
    let error = pull_with(data.path(), &format!("hf:{REPO}"), places).unwrap_err();
    has((label(&error), error.to_string()), "hub_offline", &["cannot be reached", "same command"]);
}

#[test]
fn an_interrupted_pull_goes_on_where_it_was() {
    let (text, want) = (format!("hf:{REPO}"), expected());
    for part in 1..8 {
        let (hub, size) = hub();
        let data = tempfile::tempdir().unwrap();
        let broken_after = Some(size * part / 8);
        hub.behave(Behaviour { broken_after, ..Behaviour::default() });
        let error = pull_with(data.path(), &text, places(&hub, None)).unwrap_err();
        assert_eq!(label(&error), "hub_answer", "{error:#}");
        hub.behave(Behaviour::default());
        assert_eq!(pull_with(data.path(), &text, places(&hub, None)).unwrap().model, want);
        let most = size + CONNECTIONS as u64 * PIECE;
        assert!(hub.sent() <= most, "{} of {size} bytes were sent", hub.sent());
    }
}

/// The layout that huggingface_hub makes.
#[cfg(unix)]
#[test]
fn the_hubs_cache_on_this_disk_is_used_with_and_without_the_hub() {
    use std::os::unix::fs::symlink;
    let (hub, _) = hub();
    let cache = tempfile::tempdir().unwrap();
    let repo = cache.path().join("models--lab--Tiny-Mixtral");
    let snapshot = repo.join("snapshots").join(COMMIT);
    for dir in [&snapshot, &repo.join("refs"), &repo.join("blobs")] {
        std::fs::create_dir_all(dir).unwrap();
    }
    std::fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for name in ["config.json", "model.safetensors"] {
        let bytes = std::fs::read(golden().join(name)).unwrap();
        let kind = match name {
            "config.json" => Expected::GitBlob([0; 20]),
            _ => Expected::Sha256([0; 32]),
        };
        let blob = repo.join("blobs").join(hashes::of(&bytes, kind).to_string());
        std::fs::write(&blob, bytes).unwrap();
        symlink(&blob, snapshot.join(name)).unwrap();
    }
    let text = format!("hf:{REPO}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for endpoint in [hub.endpoint.clone(), format!("http://{nobody}")] {
        let data = tempfile::tempdir().unwrap();
        let places = places_at(&endpoint, None, Some(cache.path().to_owned()));
        let pulled = pull_with(data.path(), &text, places).unwrap();
        assert_eq!((pulled.model, hub.sent()), (expected(), 0));
        assert_eq!(pulled.cached_bytes, pulled.source_bytes);
    }
    // A cache that lies is found out.
    let weights = std::fs::canonicalize(snapshot.join("model.safetensors")).unwrap();
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let data = tempfile::tempdir().unwrap();
    let places = places_at(&hub.endpoint, None, Some(cache.path().to_owned()));
    let error = pull_with(data.path(), &text, places).unwrap_err();
    assert_eq!(label(&error), "hub_mismatch", "{error:#}");
}

#[test]
fn two_pulls_of_one_model_do_not_mix() {
    let (hub, size) = hub();
    hub.behave(Behaviour { silent_after: Some(size / 2), ..Behaviour::default() });
    let data = Arc::new(tempfile::tempdir().unwrap());
    let text = format!("hf:{REPO}");
    let (first, at) = (places(&hub, None), Arc::clone(&data));
    let asked = text.clone();
    let pulling = std::thread::spawn(move || pull_with(at.path(), &asked, first));
    hub.wait_for(size / 2);
    let error = pull_with(data.path(), &text, places(&hub, None)).unwrap_err().to_string();
    assert!(error.contains("another process"), "{error}");
    hub.behave(Behaviour::default());
    assert_eq!(pulling.join().unwrap().unwrap().model, expected());
}
