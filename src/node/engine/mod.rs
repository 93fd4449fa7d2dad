//! The engine of a node: requests are checked against their model, wait in a bounded queue, and run
//! one after another on a thread that owns the device.
//!
//! `models` keeps graphs and tokenizers, `asked` checks requests, `queue` holds waiting requests,
//! `worker` is the thread. An impossible request is refused before anything is touched. Only a lost
//! device unloads a model.

mod asked;
mod error;
mod models;
mod queue;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

pub use asked::{Asked, check_request};
pub use error::EngineError;
pub use models::{Job, Opened};

use super::api::{GenerateEvent, Traffic};
use super::args::BackendChoice;
use super::generation;
use models::Models;
use queue::Queue;
use worker::Worker;

/// What an engine may use.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    pub backend: BackendChoice,
    /// Bytes of the device's memory.
    pub vram_budget: u64,
    /// Bytes of main memory for experts that lost their slots on a GPU.
    pub host_budget: u64,
}

/// A handle on the engine's thread.
pub struct Engine {
    models: Models,
    queue: Queue,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
    shown: Arc<Mutex<Shown>>,
}

/// What `status` shows of the engine.
#[derive(Debug, Clone, Default)]
struct Shown {
    backend: String,
    loaded: Option<String>,
    loads: u64,
}

impl Engine {
    /// `traffic` reads the mesh's counters.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        options: EngineOptions,
        traffic: impl Fn() -> Traffic + Send + 'static,
    ) -> Result<Self, EngineError> {
        let (queue, jobs) = Queue::new();
        let (end, ended) = oneshot::channel();
        let shown = Arc::new(Mutex::new(Shown {
            backend: generation::describe_choice(options.backend).to_owned(),
            ..Shown::default()
        }));
        let worker = Worker::new(options, traffic, shown.clone());
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                worker.work(jobs);
                let _ = end.send(());
            })
            .map_err(EngineError::Thread)?;
        Ok(Self { models: Models::default(), queue, ended: Mutex::new(Some(ended)), shown })
    }

    /// The models it knows.
    pub const fn models(&self) -> &Models {
        &self.models
    }

    /// Queues a checked request. Its events arrive on the returned channel.
    ///
    /// # Errors
    /// If too many requests are waiting, or the node is stopping.
    pub fn submit(&self, job: Job) -> Result<mpsc::Receiver<GenerateEvent>, EngineError> {
        self.queue.submit(job)
    }

    pub fn describe(&self) -> String {
        self.shown().backend
    }

    /// The loaded model's name.
    pub fn loaded(&self) -> Option<String> {
        self.shown().loaded
    }

    /// How often a model was loaded.
    pub fn loads(&self) -> u64 {
        self.shown().loads
    }

    fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Accepts no more requests, and waits for the current token of the running one.
    pub async fn stop(&self) {
        self.queue.close();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended {
            let _ = ended.await;
        }
    }
}
