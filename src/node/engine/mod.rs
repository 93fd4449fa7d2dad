//! The engine of a node: requests are checked against their model, wait in a bounded and fair queue,
//! and run side by side on a thread that owns the device.
//!
//! `models` keeps graphs and tokenizers, `asked` checks requests, `queue` holds waiting requests,
//! `worker` is the thread, `running` one generation on it, `schedule` says whose turn it is, `shelf`
//! holds models that are loaded and wait. Prompts go on from `kept` sequences and from `prefixes` on
//! disk. An impossible request is refused before anything is touched. Only a lost device unloads a
//! model that is in use.

mod asked;
mod embedding;
mod error;
#[cfg(test)]
mod form_tests;
mod kept;
#[cfg(test)]
mod many_tests;
mod models;
#[cfg(test)]
mod prefix_tests;
mod prefixes;
mod queue;
mod running;
mod schedule;
#[cfg(test)]
mod several_tests;
mod shelf;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

pub use asked::{Asked, check_request};
pub use embedding::prepare;
pub use error::EngineError;
pub use models::{Job, Opened};

use super::api::{GenerateEvent, Hits, Traffic};
use super::args::BackendChoice;
use super::generation;
use doppler_store::ModelId;
use models::Models;
pub use prefixes::Prefixes;
use queue::Queue;
pub use queue::{Lane, QUEUE_MAX};
pub use schedule::RUNNING_MAX;
use worker::{Work, Worker};

/// What an engine may use.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    pub backend: BackendChoice,
    /// Bytes of the device's memory.
    pub vram_budget: u64,
    /// Bytes of main memory for experts that lost their slots on a GPU.
    pub host_budget: u64,
    /// How long a model stays loaded after its last request. `None`: as long as the node runs.
    pub keep_alive: Option<Duration>,
}

/// A handle on the engine's thread.
pub struct Engine {
    models: Models,
    queue: Queue<Work>,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
    shown: Arc<Mutex<Shown>>,
}

/// What `status`, `ps` and the metrics show of the engine.
#[derive(Debug, Clone, Default)]
pub struct Shown {
    pub backend: String,
    /// The loaded models; the one that answers, or did last, is the first.
    pub loaded: Vec<LoadedModel>,
    pub loads: u64,
    /// Generations that run now.
    pub running: usize,
    /// Whether a request was taken from the queue and waits until those that run make room.
    pub held: bool,
    /// Keys and values on disk.
    pub prefixes: prefixes::Held,
    /// Since the node started.
    pub counts: Counts,
}

/// A loaded model.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    pub id: ModelId,
    pub name: String,
    /// The device, for people.
    pub backend: String,
    /// Bytes of the device that it holds.
    pub bytes: u64,
    /// When its last request ended; `None` while any runs.
    pub idle_since: Option<Instant>,
}

/// Requests and tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Generations that ended, and those among them that failed or that nobody listened to.
    pub ended: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub prompt_tokens: u64,
    /// Those of them whose keys and values were there already.
    pub reused_tokens: u64,
    pub generated_tokens: u64,
    pub hits: Hits,
}

impl Engine {
    /// `traffic` reads the mesh's counters. Prompts go on from `prefixes` of earlier runs.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        options: EngineOptions,
        prefixes: Option<Prefixes>,
        traffic: impl Fn() -> Traffic + Send + 'static,
    ) -> Result<Self, EngineError> {
        let queue = Queue::new();
        let (end, ended) = oneshot::channel();
        let shown = Arc::new(Mutex::new(Shown {
            backend: generation::describe_choice(options.backend).to_owned(),
            ..Shown::default()
        }));
        let worker = Worker::new(options, prefixes, traffic, shown.clone(), queue.clone());
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                worker.work();
                let _ = end.send(());
            })
            .map_err(EngineError::Thread)?;
        Ok(Self { models: Models::default(), queue, ended: Mutex::new(Some(ended)), shown })
    }

    /// The models it knows.
    pub const fn models(&self) -> &Models {
        &self.models
    }

    /// Queues a checked request's jobs, one for each choice, in its lane. Their events arrive on the
    /// returned channels.
    ///
    /// # Errors
    /// If too many requests are waiting, or the node is stopping.
    pub fn submit(
        &self,
        lane: Lane,
        jobs: Vec<Job>,
    ) -> Result<Vec<mpsc::Receiver<GenerateEvent>>, EngineError> {
        self.queue.submit(lane, jobs.into_iter().map(Work::Text).collect())
    }

    /// Requests that wait for their turn.
    pub fn waiting(&self) -> usize {
        self.queue.len() + usize::from(self.shown().held)
    }

    pub fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Accepts no more requests, and waits for the current step of those that run.
    pub async fn stop(&self) {
        self.queue.close();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended {
            let _ = ended.await;
        }
    }
}
