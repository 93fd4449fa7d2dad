//! The engine's queue: jobs wait here while another one runs.
//!
//! Bounded: a full queue refuses at once. It is closed when the node stops. Jobs that wait then
//! only run up to their next token, because their listeners are going, too.

use std::sync::{Mutex, PoisonError};

use tokio::sync::mpsc;

use super::error::EngineError;
use super::models::Job;
use crate::api::GenerateEvent;

/// The most waiting requests.
pub const QUEUE_MAX: usize = 8;
/// How many events a slow listener may lag behind before the engine waits for it.
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

    /// Queues a job. Its events arrive on the returned channel.
    ///
    /// # Errors
    /// If the queue is full or closed.
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

    /// Accepts no more jobs.
    pub fn close(&self) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
