//! Prompts go on from what an earlier run of the node computed, and their answers are the same.

use std::fs;
use std::path::Path;

use doppler_infer::kv::BLOCK;
use doppler_store::ModelId;

use super::tests::{Bench, OPTIONS, bench_on, open, request};
use super::*;
use crate::api::GenerateRequest;

/// An engine that keeps prefixes in this directory.
fn bench(dir: &Path) -> Bench {
    bench_on(None, OPTIONS, Some(Prefixes::open(dir.to_owned(), 1 << 30).unwrap()))
}

/// A prompt of so many tokens, all of which begin alike.
fn prompt(tokens: usize, resume: bool) -> GenerateRequest {
    let prompt_ids = (0..tokens as u32).map(|at| 1 + (at * 7 + at / 60) % 4000).collect();
    GenerateRequest { prompt_ids, tokens: 9, resume, ..request("") }
}

/// Asks for an answer: its text, and how many tokens of the prompt were not computed.
async fn ask(bench: &Bench, request: &GenerateRequest) -> (String, usize) {
    let end = bench.end(request).await.unwrap();
    (end.text, end.reused)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_goes_on_from_an_earlier_run_and_says_what_it_would_have_said() {
    let dir = tempfile::tempdir().unwrap();
    let first = bench(dir.path());
    // One that others may not go on from leaves nothing.
    ask(&first, &prompt(5 * BLOCK, false)).await;
    let (_, reused) = ask(&first, &prompt(3 * BLOCK + 7, true)).await;
    assert_eq!(reused, 0);
    first.engine.stop().await;
    let again = bench(dir.path());
    let longer = prompt(4 * BLOCK + 20, true);
    let alone = ask(&again, &prompt(4 * BLOCK + 20, false)).await;
    assert_eq!(alone.1, 0, "it did not ask for it");
    let (text, reused) = ask(&again, &longer).await;
    assert_eq!((text, reused), (alone.0, 3 * BLOCK));
    let shown = again.engine.shown();
    assert_eq!(shown.loads, 1);
    // What it computed is there next time, too, all but what lies within a block.
    again.engine.stop().await;
    let third = bench(dir.path());
    assert_eq!(ask(&third, &longer).await.1, 4 * BLOCK);
    third.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_on_disk_and_another_model_change_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let ask_for = prompt(3 * BLOCK + 7, true);
    let first = bench(dir.path());
    let (text, _) = ask(&first, &ask_for).await;
    first.engine.stop().await;
    let second = bench(dir.path());
    let other = open(&second.engine, second.dir.path(), ModelId::of(b"another"), None);
    let end = second.end_of(&other, &ask_for).await.unwrap();
    assert_eq!((&end.text, end.reused), (&text, 0));
    drop(second.engine);
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let third = bench(dir.path());
    assert_eq!(ask(&third, &ask_for).await, (text, 0));
    third.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_unloaded_model_knew_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let prefixes = Prefixes::open(dir.path().to_owned(), 1 << 30).unwrap();
    // Room for one model.
    let budget = 12 << 20;
    let options = EngineOptions { vram_budget: budget, ..OPTIONS };
    let bench = bench_on(None, options, Some(prefixes));
    let other = open(&bench.engine, bench.dir.path(), ModelId::of(b"another"), None);
    let ask_for = prompt(3 * BLOCK + 7, true);
    let (text, _) = ask(&bench, &ask_for).await;
    bench.end_of(&other, &request("Once upon a time")).await.unwrap();
    assert_eq!(bench.engine.shown().loads, 2);
    while bench.engine.shown().prefixes.blocks < 3 {
        // It is being written.
        bench.end_of(&other, &request("Once upon a time")).await.unwrap();
    }
    let end = bench.end(&ask_for).await.unwrap();
    assert_eq!(bench.engine.shown().loads, 3);
    assert_eq!((end.text, end.reused), (text, 3 * BLOCK));
    bench.engine.stop().await;
}
