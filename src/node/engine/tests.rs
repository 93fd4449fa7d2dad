//! A bad request costs nothing: the next good one is answered without loading again.

use std::sync::Arc;

use doppler_infer::backend::BackendError;
use doppler_infer::error::SessionError;
use doppler_infer::reader::WeightReader;
use doppler_store::dir::{DirReader, DirShard};
use doppler_store::{Manifest, ModelId};
use tempfile::TempDir;

use super::*;
use crate::api::GenerateRequest;
use crate::embedded;

/// An engine on the CPU, and the embedded model in a directory.
struct Bench {
    dir: TempDir,
    engine: Engine,
    opened: Arc<Opened>,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    embedded::extract(dir.path()).unwrap();
    let backend = BackendChoice::Cpu;
    let options = EngineOptions { backend, vram_budget: 1 << 30, host_budget: 0 };
    let engine = Engine::start(options, Traffic::default).unwrap();
    let manifest = Manifest::parse(embedded::manifest()).unwrap();
    let shards = manifest.shards.iter().map(|shard| DirShard {
        shard: shard.id().unwrap(),
        path: dir.path().join(&shard.filename),
        size: shard.size,
    });
    let reader = Arc::new(DirReader::new(shards));
    let reader = WeightReader::new(reader, tokio::runtime::Handle::current());
    let tokenizer = std::fs::read(dir.path().join("tokenizer.json")).unwrap();
    let id = ModelId::of(embedded::manifest());
    let opened = engine.models().open(id, manifest, &tokenizer, reader).unwrap();
    Bench { dir, engine, opened }
}

fn request(prompt: &str) -> GenerateRequest {
    let text = serde_json::json!({ "model": "embedded", "prompt": prompt, "tokens": 3 });
    serde_json::from_value(text).unwrap()
}

impl Bench {
    /// The answer's text, or the label of its failure.
    async fn ask(&self, request: &GenerateRequest) -> Result<String, &'static str> {
        let job = Job::check(self.opened.clone(), request).map_err(|error| error.label())?;
        let mut events = self.engine.submit(job).map_err(|error| error.label())?;
        while let Some(event) = events.recv().await {
            match event {
                GenerateEvent::End { text, .. } => return Ok(text),
                GenerateEvent::Error { label, .. } => {
                    return Err(crate::failures::of_label(&label).label);
                }
                _ => {}
            }
        }
        panic!("no end")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_each_kind_of_bad_request_the_next_good_one_answers_without_loading() {
    let bench = bench();
    let good = request("Once upon a time");
    let context_max = bench.opened.model.graph.context_max;
    let text = bench.ask(&good).await.unwrap();
    assert_eq!(bench.engine.loads(), 1);
    let bad = [
        ("no_tokens", GenerateRequest { tokens: 0, ..good.clone() }),
        ("empty_prompt", request("")),
        ("sampling", GenerateRequest { top_p: 0.0, ..good.clone() }),
        ("sampling", GenerateRequest { top_p: f32::NAN, ..good.clone() }),
        ("sampling", GenerateRequest { temperature: -1.0, ..good.clone() }),
        ("sampling", GenerateRequest { repetition_penalty: 0.0, ..good.clone() }),
        ("context", GenerateRequest { context: Some(0), ..good.clone() }),
        ("context", GenerateRequest { context: Some(context_max + 1), ..good.clone() }),
        ("prompt_too_long", GenerateRequest { context: Some(2), ..good.clone() }),
        ("prompt_too_long", request(&"many words ".repeat(context_max))),
    ];
    for (label, request) in bad {
        assert_eq!(bench.ask(&request).await, Err(label), "{request:?}");
        assert_eq!(bench.ask(&good).await.as_ref(), Ok(&text), "after {label}");
    }
    assert_eq!(bench.engine.loads(), 1);
    bench.engine.stop().await;
    assert_eq!(bench.ask(&good).await, Err("stopping"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_tokens_as_can_be_asked_for_end_with_the_context() {
    let bench = bench();
    let all = GenerateRequest { tokens: usize::MAX, context: Some(12), ..request("Once upon") };
    let job = Job::check(bench.opened.clone(), &all).unwrap();
    assert_eq!(job.request.context, 12);
    assert!(bench.ask(&all).await.is_ok());
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_longer_context_than_the_first_requests_needs_no_reload() {
    let bench = bench();
    let short = GenerateRequest { tokens: 2, ..request("Once") };
    let long = GenerateRequest { tokens: 150, ..request("Once upon a time there was") };
    let first = bench.ask(&short).await.unwrap();
    let text = bench.ask(&long).await.unwrap();
    assert_eq!(bench.ask(&short).await, Ok(first));
    assert_eq!(bench.engine.loads(), 1);
    bench.engine.stop().await;
    // The text is the same as on an engine that had the room from the start.
    let bench = self::bench();
    assert_eq!(bench.ask(&long).await, Ok(text));
    bench.engine.stop().await;
}

/// Weights that cannot be read fail the request. The next one reads them again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_fails_says_why_and_can_be_tried_again() {
    let bench = bench();
    let good = request("Once upon a time");
    let shard = bench.dir.path().join("shard_00003.bin");
    let aside = bench.dir.path().join("aside");
    std::fs::rename(&shard, &aside).unwrap();
    assert!(bench.ask(&good).await.is_err());
    std::fs::rename(&aside, &shard).unwrap();
    assert!(bench.ask(&good).await.is_ok());
    bench.engine.stop().await;
}

#[test]
fn only_a_lost_device_unloads_a_model() {
    let session = |error| EngineError::Session(SessionError::Backend(error));
    assert!(session(BackendError::Lost(String::new())).is_lost());
    assert!(EngineError::Device(BackendError::Lost(String::new())).is_lost());
    let what = String::new();
    assert!(!session(BackendError::OutOfMemory { what: what.clone(), bytes: 1 }).is_lost());
    assert!(!session(BackendError::Unsupported(what)).is_lost());
    assert!(!EngineError::Session(SessionError::EmptyPrompt).is_lost());
    assert!(!EngineError::Busy.is_lost());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_opened_once() {
    let bench = bench();
    let again = bench.engine.models().get(bench.opened.id).unwrap();
    assert!(Arc::ptr_eq(&again, &bench.opened));
    assert!(bench.engine.models().get(ModelId::of(b"another")).is_none());
    bench.engine.stop().await;
}
