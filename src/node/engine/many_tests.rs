//! Generations side by side: each says what it says alone, and none can harm or delay the others.

use std::time::Duration;

use doppler_infer::generate::StopReason;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::mpsc::Receiver;

use super::schedule::RUNNING_MAX;
use super::tests::{Bench, OPTIONS, bench, request};
use super::*;
use crate::api::GenerateRequest;

/// Longer than anything here takes, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(100);

impl Bench {
    /// Queues a request.
    fn begin(&self, request: &GenerateRequest) -> Receiver<GenerateEvent> {
        let job = Job::check(self.opened.clone(), Vec::new(), request).unwrap();
        self.engine.submit(Lane::own(), vec![job]).unwrap().remove(0)
    }
}

/// The next event.
async fn next(events: &mut Receiver<GenerateEvent>) -> GenerateEvent {
    tokio::time::timeout(PATIENCE, events.recv()).await.expect("it hangs").expect("no end")
}

/// The text at the end, or the label of the failure.
async fn text(events: &mut Receiver<GenerateEvent>) -> Result<String, String> {
    loop {
        match next(events).await {
            GenerateEvent::End { text, .. } => return Ok(text),
            GenerateEvent::Error { label, .. } => return Err(label),
            _ => {}
        }
    }
}

/// A request of some kind. Its prompt is shorter than a chunk.
fn any(rng: &mut StdRng) -> GenerateRequest {
    let ids = (0..rng.random_range(1..40)).map(|_| rng.random_range(1..4096)).collect();
    GenerateRequest {
        prompt_ids: ids,
        tokens: rng.random_range(1..24),
        temperature: [0.0, 0.8][rng.random_range(0..2)],
        logprobs: [None, Some(2)][rng.random_range(0..2)],
        seed: rng.random(),
        ..request("")
    }
}

/// A request whose answer has exactly so many tokens.
fn endless(tokens: usize) -> GenerateRequest {
    GenerateRequest { tokens, logit_bias: vec![(0, -1000.0)], ..request("Once upon") }
}

fn long(tokens: usize) -> GenerateRequest {
    let prompt_ids = (0..tokens as u32).map(|at| 1 + at * 7 % 4000).collect();
    GenerateRequest { prompt_ids, tokens: 1, ..request("") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_say_what_each_says_alone() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let bench = bench();
    // More than may run at once.
    let requests: Vec<_> = (0..RUNNING_MAX + 8).map(|_| any(&mut rng)).collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(text(&mut bench.begin(request)).await.unwrap());
    }
    let mut listeners: Vec<_> = requests.iter().map(|request| bench.begin(request)).collect();
    // Some leave at once, some after a token, and a long prompt comes in between.
    drop(bench.begin(&requests[0]));
    let mut gone = bench.begin(&requests[1]);
    let mut last = bench.begin(&long(700));
    for (listener, alone) in listeners.iter_mut().zip(&alone) {
        assert_eq!(text(listener).await.as_ref(), Ok(alone));
    }
    next(&mut gone).await;
    drop(gone);
    text(&mut last).await.unwrap();
    bench.engine.stop().await;
    let shown = bench.engine.shown();
    assert_eq!((shown.loads, shown.running, shown.counts.failed), (1, 0, 0));
}

/// A worker without its thread, whose turns the test takes.
fn worker() -> (Worker<impl Fn() -> Traffic>, Queue<Work>, Arc<Mutex<Shown>>) {
    let (queue, shown) = (Queue::new(), Arc::new(Mutex::new(Shown::default())));
    (Worker::new(OPTIONS, None, Traffic::default, shown.clone(), queue.clone()), queue, shown)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_nobody_waits_for_any_more_is_not_finished() {
    let bench = bench();
    let job = Job::check(bench.opened.clone(), Vec::new(), &long(2000)).unwrap();
    let turns = move || {
        let (mut worker, queue, shown) = worker();
        let mut events = queue.submit(Lane::own(), vec![Work::Text(job)]).unwrap().remove(0);
        worker.admit();
        worker.turn();
        assert!(matches!(events.try_recv(), Ok(GenerateEvent::Start { .. })));
        assert!(events.try_recv().is_err(), "its prompt is longer than a chunk");
        drop(events);
        worker.turn();
        let shown = shown.lock().unwrap();
        assert_eq!((shown.running, shown.counts.ended, shown.counts.cancelled), (0, 1, 1));
        assert_eq!(shown.counts.generated_tokens, 0);
    };
    tokio::task::spawn_blocking(turns).await.unwrap();
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_come_while_anothers_prompt_runs() {
    let bench = bench();
    let job =
        |request: &GenerateRequest| Job::check(bench.opened.clone(), Vec::new(), request).unwrap();
    let (long, short) = (job(&long(1900)), job(&endless(3)));
    let turns = move || {
        let (mut worker, queue, _) = worker();
        let jobs = vec![Work::Text(long), Work::Text(short)];
        let mut events = queue.submit(Lane::own(), jobs).unwrap();
        worker.admit();
        // A chunk of the first, then the second's prompt, then its other tokens.
        (0..4).for_each(|_| worker.turn());
        let mut told =
            |at: usize| -> Vec<_> { std::iter::from_fn(|| events[at].try_recv().ok()).collect() };
        assert!(matches!(told(1)[..], [.., GenerateEvent::End { tokens: 3, .. }]));
        assert!(matches!(told(0)[..], [GenerateEvent::Start { .. }]));
        while told(0).is_empty() {
            worker.turn();
        }
    };
    tokio::task::spawn_blocking(turns).await.unwrap();
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_does_not_listen_stops_nobody_else() {
    let bench = bench();
    // As many as may run, but one: their channels are full before they end.
    let deaf: Vec<_> = (0..RUNNING_MAX - 1)
        .map(|_| {
            let request = endless(60);
            let job = Job::check(bench.opened.clone(), Vec::new(), &request).unwrap();
            bench.engine.queue.submit_to(Lane::own(), vec![Work::Text(job)], 8).unwrap().remove(0)
        })
        .collect();
    for _ in 0..3 {
        let mut listener = bench.begin(&endless(80));
        text(&mut listener).await.unwrap();
    }
    // They lost nothing, and go on when they are heard.
    for mut listener in deaf {
        let mut tokens = 0;
        loop {
            match next(&mut listener).await {
                GenerateEvent::Token { .. } => tokens += 1,
                GenerateEvent::End { tokens: all, .. } => break assert_eq!(all, tokens),
                _ => {}
            }
        }
        assert_eq!(tokens, 60);
    }
    bench.engine.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_runs_when_the_node_stops_is_told() {
    let bench = bench();
    let mut listeners: Vec<_> = (0..RUNNING_MAX + 3).map(|_| bench.begin(&endless(1500))).collect();
    next(&mut listeners[0]).await;
    bench.engine.stop().await;
    let mut told = [0, 0];
    for listener in &mut listeners {
        loop {
            match next(listener).await {
                GenerateEvent::End { stop: StopReason::Cancelled, .. } => break told[0] += 1,
                GenerateEvent::Error { label, .. } if label == "stopping" => break told[1] += 1,
                GenerateEvent::Start { .. } | GenerateEvent::Token { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(told.iter().sum::<usize>(), listeners.len());
    assert!(told[0] >= 1 && told[1] >= 3, "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_prompts_have_in_common_is_computed_once() {
    let bench = bench();
    let system: Vec<u32> = (0..300).map(|at| 1 + at * 7 % 4000).collect();
    let ask = |number: u32| {
        let prompt_ids = [&system[..], &[number + 1, number + 2]].concat();
        GenerateRequest { prompt: String::new(), prompt_ids, resume: true, ..endless(2) }
    };
    // One after another, and ten that come at the same time.
    for numbers in [10..13, 20..30] {
        let jobs: Vec<_> = numbers
            .clone()
            .map(|at| Job::check(bench.opened.clone(), Vec::new(), &ask(at)).unwrap())
            .collect();
        let listeners = if numbers.start == 10 {
            let one = |job| bench.engine.submit(Lane::own(), vec![job]).unwrap().remove(0);
            let mut listeners: Vec<_> = Vec::new();
            for job in jobs {
                let mut listener = one(job);
                listeners.push(end(&mut listener).await);
            }
            listeners
        } else {
            let mut listeners = Vec::new();
            for mut listener in bench.engine.submit(Lane::own(), jobs).unwrap() {
                listeners.push(end(&mut listener).await);
            }
            listeners
        };
        let reused: Vec<usize> = listeners.iter().map(|(_, reused)| *reused).collect();
        let known = if numbers.start == 10 { &reused[1..] } else { &reused[..] };
        assert!(known.iter().all(|reused| *reused >= system.len()), "{reused:?}");
    }
    bench.engine.stop().await;
    // Ten that come together to an engine that knows nothing.
    let bench = self::bench();
    let jobs = (30..40)
        .map(|at| Job::check(bench.opened.clone(), Vec::new(), &ask(at)).unwrap())
        .collect();
    let mut computed = 0;
    for mut listener in bench.engine.submit(Lane::own(), jobs).unwrap() {
        computed += 302 - end(&mut listener).await.1;
    }
    // Once, and what each has of its own; each may be behind by less than it pays to catch up.
    assert!(computed < 302 + 10 * (64 + 16), "{computed} tokens were computed");
    bench.engine.stop().await;
    let counts = bench.engine.shown().counts;
    assert_eq!(counts.prompt_tokens - counts.reused_tokens, computed as u64);
}

/// The answer's text, and how many of the prompt's tokens were known.
async fn end(events: &mut Receiver<GenerateEvent>) -> (String, usize) {
    loop {
        match next(events).await {
            GenerateEvent::End { text, reused, .. } => return (text, reused),
            GenerateEvent::Error { label, message } => panic!("{label}: {message}"),
            _ => {}
        }
    }
}
