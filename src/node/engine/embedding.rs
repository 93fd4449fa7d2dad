//! Embeddings on the engine's thread: jobs that are checked as requests for text are, and wait in
//! the same queue.

use std::sync::Arc;

use doppler_infer::adapter::Attached;
use doppler_infer::embedding::{self, Asked, Embedded, Prepared};
use tokio::sync::{mpsc, oneshot};

use super::Engine;
use super::error::EngineError;
use super::models::Opened;
use super::queue::Lane;
use super::worker::{Work, Worker};
use crate::api::{GenerateEvent, Traffic};

/// Texts to embed, with which nothing is wrong.
pub struct EmbedJob {
    pub(super) opened: Arc<Opened>,
    pub(super) adapters: Vec<Attached>,
    pub(super) prepared: Prepared,
    pub(super) reply: oneshot::Sender<Result<Vec<Embedded>, EngineError>>,
}

/// An answer that is waited for. Dropping it cancels what has not begun.
pub struct Embedding {
    events: mpsc::Receiver<GenerateEvent>,
    answer: oneshot::Receiver<Result<Vec<Embedded>, EngineError>>,
}

/// Makes tokens of texts; reads no weights.
///
/// # Errors
/// If the model does not embed, or a text is wrong.
pub fn prepare(
    opened: &Opened,
    texts: &[String],
    prompt_name: Option<&str>,
) -> Result<Prepared, EngineError> {
    let asked = Asked { texts, prompt_name };
    Ok(embedding::prepare(&opened.model, &opened.tokenizer, &asked)?)
}

impl Engine {
    /// Queues texts.
    ///
    /// # Errors
    /// If too many requests are waiting, or the node is stopping.
    pub fn embed(
        &self,
        lane: Lane,
        opened: Arc<Opened>,
        adapters: Vec<Attached>,
        prepared: Prepared,
    ) -> Result<Embedding, EngineError> {
        let (reply, answer) = oneshot::channel();
        let job = Work::Vectors(EmbedJob { opened, adapters, prepared, reply });
        let mut listeners = self.queue.submit(lane, vec![job])?;
        let events = listeners.pop().ok_or(EngineError::Stopping)?;
        Ok(Embedding { events, answer })
    }
}

impl Embedding {
    /// # Errors
    /// If the device fails, or the node is stopping.
    pub async fn wait(self) -> Result<Vec<Embedded>, EngineError> {
        let Self { events, answer } = self;
        let answer = answer.await;
        // Held until here, because the queue forgets jobs to which nobody listens.
        drop(events);
        answer.unwrap_or(Err(EngineError::Stopping))
    }
}

impl<T: Fn() -> Traffic> Worker<T> {
    pub(super) fn embed(&mut self, job: &EmbedJob) -> Result<Vec<Embedded>, EngineError> {
        let (model, longest) = (&job.opened.model, job.prepared.longest());
        self.switch(job.opened.id);
        if !self.embeds(longest) {
            let options = embedding::load_options(model, longest);
            self.load(&job.opened, options, Some(longest))?;
        }
        let engine = self.answers().ok_or(EngineError::Stopping)?;
        engine.adapt(&job.adapters)?;
        Ok(embedding::run(engine, model, &job.prepared)?)
    }
}
