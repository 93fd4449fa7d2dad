//! Several models loaded at once: each is loaded once while the budget has room, and answers as it
//! does alone. Where there is no room, the one not used for longest goes.

use std::time::Duration;

use doppler_store::ModelId;

use super::tests::{Bench, OPTIONS, bench_with, open, request};
use super::*;
use crate::api::GenerateRequest;

/// An engine whose device has so many bytes, and models with the same weights.
fn bench(vram_budget: u64, keep_alive: Option<Duration>) -> (Bench, [Arc<Opened>; 3]) {
    let bench = bench_with(None, EngineOptions { vram_budget, keep_alive, ..OPTIONS });
    let opened =
        [1, 2, 3].map(|id| open(&bench.engine, bench.dir.path(), ModelId::of(&[id]), None));
    (bench, opened)
}

/// The models that are loaded, the one that answered last first.
fn loaded(bench: &Bench) -> Vec<ModelId> {
    bench.engine.shown().loaded.iter().map(|model| model.id).collect()
}

/// What an engine of one loaded model holds.
async fn bytes_of_one() -> u64 {
    let (bench, [first, ..]) = bench(1 << 30, None);
    bench.end_of(&first, &request("Once upon a time")).await.unwrap();
    bench.engine.stop().await;
    bench.engine.shown().loaded[0].bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_that_fit_beside_each_other_are_loaded_once_and_answer_as_alone() {
    let (bench, models) = bench(1 << 30, None);
    let begin = GenerateRequest { tokens: 9, resume: true, ..request("Once upon a time") };
    let alone = bench.end_of(&bench.opened, &begin).await.unwrap().text;
    for round in 0..3 {
        for model in &models {
            let end = bench.end_of(model, &begin).await.unwrap();
            assert_eq!(end.text, alone);
            // What was kept of its earlier answers is there, too.
            assert_eq!(end.reused > 0, round > 0, "round {round}");
        }
    }
    bench.engine.stop().await;
    let shown = bench.engine.shown();
    assert_eq!(shown.loads, 4);
    let [a, b, c] = models.map(|model| model.id);
    assert_eq!(loaded(&bench), [c, b, a, bench.opened.id]);
    assert!(shown.loaded.iter().all(|model| model.bytes > 0 && model.idle_since.is_some()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_budget_has_room_for_two_the_third_takes_the_place_of_the_oldest() {
    let one = bytes_of_one().await;
    let (bench, [a, b, c]) = bench(2 * one + one / 2, None);
    let ask = request("Once upon a time");
    let mut loads = Vec::new();
    for model in [&a, &b, &a, &c, &a, &b] {
        bench.end_of(model, &ask).await.unwrap();
        loads.push(bench.engine.shown().loads);
    }
    assert_eq!(loads, [1, 2, 2, 3, 3, 4]);
    bench.engine.stop().await;
    assert_eq!(loaded(&bench), [b.id, a.id], "c was used before a");
    let held: u64 = bench.engine.shown().loaded.iter().map(|model| model.bytes).sum();
    assert!(held <= 2 * one + one / 2, "{held}");
}

/// Two short answers fit beside each other. Then one model's caches need more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_only_waits_gives_its_room_to_longer_caches() {
    let one = bytes_of_one().await;
    let (bench, [a, b, _]) = bench(2 * one + one / 8, None);
    let ask = request("Once upon a time");
    bench.end_of(&b, &ask).await.unwrap();
    bench.end_of(&a, &ask).await.unwrap();
    assert_eq!(bench.engine.shown().loads, 2);
    let context = a.model.graph.context_max;
    let ids = (0..context as u32 - 8).map(|at| 1 + at * 7 % 4000).collect();
    let long = GenerateRequest { prompt_ids: ids, ..request("") };
    bench.end_of(&a, &long).await.unwrap();
    bench.engine.stop().await;
    assert_eq!((loaded(&bench), bench.engine.shown().loads), (vec![a.id], 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_nobody_asks_for_is_unloaded_while_another_stays() {
    let keep = Duration::from_millis(400);
    let (bench, [a, b, _]) = bench(1 << 30, Some(keep));
    let ask = request("Once upon a time");
    bench.end_of(&a, &ask).await.unwrap();
    let forgotten = async {
        // Requests for one model keep only that one.
        while bench.engine.shown().loads < 2 || loaded(&bench).contains(&a.id) {
            bench.end_of(&b, &ask).await.unwrap();
        }
        assert_eq!(loaded(&bench), [b.id]);
        while !bench.engine.shown().loaded.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(100), forgotten).await.expect("it stays for ever");
    bench.engine.stop().await;
    assert_eq!(bench.engine.shown().loads, 2);
}
