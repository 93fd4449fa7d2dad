//! The way of a translated request to the engine, and of its events back.
//!
//! Dropping what is returned here cancels the request: queued choices are never run, a running one
//! ends at its next token.

use std::pin::Pin;

use axum::response::Response;
use futures::stream::{self, SelectAll, Stream, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;

use super::answer::{Finish, Reading, Teller, Told, Usage, Whole};
use super::failed::Failed;
use super::sse;
use crate::api::{GenerateEvent, GenerateRequest};
use crate::engine::Lane;
use crate::generating::Ready;
use crate::service::Service;

/// A translated request: one generation for each choice.
pub struct Asking {
    pub requests: Vec<GenerateRequest>,
    pub reading: Reading,
    pub lane: Lane,
}

type Events = Pin<Box<dyn Stream<Item = (usize, GenerateEvent)> + Send>>;

/// The answers to a request as they come.
pub struct Answers {
    first: Option<(usize, GenerateEvent)>,
    rest: SelectAll<Events>,
    tellers: Vec<Teller>,
    /// Choices whose last event has come.
    ended: usize,
}

/// Queues a request, and waits until its first choice begins: what fails before has a status.
pub async fn ask(service: &Service, ready: &Ready, asking: Asking) -> Result<Answers, Failed> {
    let Asking { requests, reading, lane } = asking;
    let channels = service.submit(ready, lane, requests).await;
    let channels = channels.map_err(|error| Failed::of(&error))?;
    let tellers = channels.iter().map(|_| Teller::new(reading.clone())).collect();
    let mut rest: SelectAll<Events> =
        stream::select_all(channels.into_iter().enumerate().map(|(choice, events)| {
            let events = stream::unfold(events, |mut events: mpsc::Receiver<_>| async move {
                let event = events.recv().await?;
                Some((event, events))
            });
            Box::pin(events.map(move |event| (choice, event))) as Events
        }));
    match rest.next().await {
        Some((_, GenerateEvent::Error { label, message })) => Err(Failed::told(label, message)),
        first => Ok(Answers { first, rest, tellers, ended: 0 }),
    }
}

impl Answers {
    /// The next thing that is told, and of which choice. `None` once all have ended.
    pub async fn next(&mut self) -> Option<(usize, Told)> {
        if self.ended == self.tellers.len() {
            return None;
        }
        let event = match self.first.take() {
            Some(event) => Some(event),
            None => self.rest.next().await,
        };
        let Some((choice, event)) = event else {
            let message = "the engine stopped before the answer was complete";
            self.ended = self.tellers.len();
            return Some((0, Told::Failed(Failed::new("stopping", message))));
        };
        let told = self.tellers[choice].hear(event);
        match &told {
            Told::End { .. } => self.ended += 1,
            // One answer for all choices: it is over.
            Told::Failed(_) => self.ended = self.tellers.len(),
            Told::Start(_) | Told::Parts(_) => {}
        }
        Some((choice, told))
    }

    /// Waits for all of it: each choice with its end.
    ///
    /// # Errors
    /// If one of them fails.
    pub async fn whole(mut self) -> Result<Vec<(Whole, Finish, Usage)>, Failed> {
        let mut parts: Vec<Whole> = self.tellers.iter().map(|_| Whole::default()).collect();
        let mut ends: Vec<Option<(Finish, Usage)>> = self.tellers.iter().map(|_| None).collect();
        while let Some((choice, told)) = self.next().await {
            match told {
                Told::Start(_) => {}
                Told::Parts(more) => parts[choice].add(more),
                Told::End { parts: more, finish, usage } => {
                    parts[choice].add(more);
                    ends[choice] = Some((finish, usage));
                }
                Told::Failed(failed) => return Err(failed),
            }
        }
        let ended = parts.into_iter().zip(ends);
        Ok(ended.filter_map(|(whole, end)| end.map(|(why, usage)| (whole, why, usage))).collect())
    }

    /// Streams it: `teller` writes what each thing that is told becomes.
    pub fn streamed(self, teller: impl Writer + Send + 'static) -> Response {
        let begin = Some((self, teller));
        sse::response(stream::unfold(begin, |state| async move {
            let (mut answers, mut teller) = state?;
            match answers.next().await {
                Some((choice, told)) => {
                    let text = teller.write(choice, told);
                    Some((text, Some((answers, teller))))
                }
                None => Some((teller.finish(), None)),
            }
        }))
    }
}

/// Writes a stream in an API's form.
pub trait Writer {
    /// The events, possibly none, that something becomes.
    fn write(&mut self, choice: usize, told: Told) -> String;

    /// The events at the end.
    fn finish(&mut self) -> String;
}

/// The sum of the choices' tokens. They share their prompt.
pub fn total(usages: impl IntoIterator<Item = Usage>) -> Usage {
    usages.into_iter().fold(Usage::default(), |sum, one| match sum.prompt {
        0 => one,
        _ => Usage { generated: sum.generated + one.generated, ..sum },
    })
}

/// A random name, `prefix` and 24 hexadecimal digits.
pub fn id(prefix: &str) -> String {
    format!("{prefix}{:024x}", rand::random::<u128>() >> 32)
}

/// The id of a call: nine letters and digits, which is what Mistral's templates demand.
pub fn call_id() -> String {
    const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut number: u64 = rand::random();
    let letters = (0..9).map(|_| {
        let letter = LETTERS[(number % 36) as usize];
        number /= 36;
        char::from(letter)
    });
    letters.collect()
}

/// Seconds since 1970.
pub fn now_s() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// A tool's arguments as a value; they are a JSON object.
pub fn arguments(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::Object(Default::default()))
}
