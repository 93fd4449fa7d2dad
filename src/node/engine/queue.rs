//! The engine's queue: jobs wait here for the one that runs.
//!
//! Bounded: a full queue refuses at once. Closed when the node stops; what waits then is still run
//! up to its next token, since its listeners are going too.

use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;

use super::error::EngineError;
use super::models::Job;
use crate::api::GenerateEvent;

/// Requests waiting for the one running.
pub const QUEUE_MAX: usize = 8;
/// Events a slow listener may lag behind before the engine waits for it.
const EVENTS_MAX: usize = 256;

/// A job and where its events go.
pub type Queued = (Job, mpsc::Sender<GenerateEvent>);

/// The sending end.
pub struct Queue {
    jobs: Mutex<Option<mpsc::Sender<Queued>>>,
}

impl Queue {
    /// The queue, and the end that the engine's thread takes from.
    pub fn new() -> (Self, mpsc::Receiver<Queued>) {
        let (jobs, waiting) = mpsc::channel(QUEUE_MAX);
        (Self { jobs: Mutex::new(Some(jobs)) }, waiting)
    }

    /// Queues a job; its events come on the returned channel.
    ///
    /// # Errors
    /// The queue is full, or closed.
    pub fn submit(&self, job: Job) -> Result<mpsc::Receiver<GenerateEvent>, EngineError> {
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.as_ref().ok_or(EngineError::Stopping)?;
        jobs.try_send((job, sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::Stopping,
        })?;
        Ok(events)
    }

    /// Takes no more jobs.
    pub fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
