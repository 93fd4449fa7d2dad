//! The engine's queue: jobs wait here while as many as can run.
//!
//! Bounded: a full queue refuses at once, and says when there will probably be room (`pace`). A job whose
//! listener has gone no longer takes a place.
//! Fair: the jobs of one lane (the choices of one request, or the requests of one user) take turns
//! with those of other lanes, so a lane that asks for much delays others by one job at a time.
//! Closed when the node stops: running jobs then end at their next tokens, and those that wait are
//! refused.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::error::EngineError;
use crate::api::GenerateEvent;
use crate::pace::Pace;

/// The most waiting requests.
pub const QUEUE_MAX: usize = 64;
/// How many events a slow listener may lag behind before its generation pauses.
const EVENTS_MAX: usize = 4096;

/// A job and where its events go.
pub type Queued<J> = (J, mpsc::Sender<GenerateEvent>);

/// Whose turn a job uses up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lane(pub u64);

impl Lane {
    /// A lane that no other request has.
    pub fn own() -> Self {
        Self(rand::random())
    }

    /// The lane of a user.
    pub fn of(user: &str) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(user.as_bytes()).as_bytes();
        Self(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// What the engine's thread takes from the queue.
pub enum Taken<J> {
    Job(Box<Queued<J>>),
    /// Nothing came in time.
    Nothing,
    /// The queue is closed.
    Closed,
}

/// Both ends of the queue.
pub struct Queue<J> {
    shared: Arc<Shared<J>>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    changed: Condvar,
}

struct State<J> {
    waiting: VecDeque<Waiting<J>>,
    /// The turn of the job that was taken last.
    turn: u64,
    /// How fast jobs are taken while others wait.
    pace: Pace,
    closed: bool,
}

struct Waiting<J> {
    lane: Lane,
    /// Jobs are taken in the order of their turns.
    turn: u64,
    queued: Queued<J>,
}

impl<J> State<J> {
    /// A job's turn comes after those of its lane that wait, and after the present one.
    fn turn_of(&self, lane: Lane) -> u64 {
        let own = self.waiting.iter().filter(|one| one.lane == lane).map(|one| one.turn);
        own.max().unwrap_or(self.turn).max(self.turn) + 1
    }

    fn forget_gone(&mut self) {
        self.waiting.retain(|one| !one.queued.1.is_closed());
        if self.waiting.is_empty() {
            self.pace.nobody_waits();
        }
    }

    /// The job whose turn it is; of equals the one that came first.
    fn take(&mut self) -> Option<Queued<J>> {
        self.forget_gone();
        let first = self.waiting.iter().enumerate().min_by_key(|(at, one)| (one.turn, *at));
        let at = first?.0;
        let taken = self.waiting.remove(at)?;
        self.turn = taken.turn;
        self.pace.freed(Instant::now(), !self.waiting.is_empty());
        Some(taken.queued)
    }
}

impl<J> Clone for Queue<J> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<J> Queue<J> {
    pub fn new() -> Self {
        let state =
            State { waiting: VecDeque::new(), turn: 0, pace: Pace::default(), closed: false };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() }) }
    }

    fn state(&self) -> MutexGuard<'_, State<J>> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a request's jobs, all of them or none. Their events arrive on the returned channels.
    ///
    /// # Errors
    /// If the queue has no room for all of them, or is closed.
    pub fn submit(
        &self,
        lane: Lane,
        jobs: Vec<J>,
    ) -> Result<Vec<mpsc::Receiver<GenerateEvent>>, EngineError> {
        self.submit_to(lane, jobs, EVENTS_MAX)
    }

    /// The same, to listeners who may lag behind by so many events.
    pub(super) fn submit_to(
        &self,
        lane: Lane,
        jobs: Vec<J>,
        events_max: usize,
    ) -> Result<Vec<mpsc::Receiver<GenerateEvent>>, EngineError> {
        let mut state = self.state();
        if state.closed {
            return Err(EngineError::Stopping);
        }
        state.forget_gone();
        let places = (state.waiting.len() + jobs.len()).saturating_sub(QUEUE_MAX);
        if places > 0 {
            return Err(EngineError::Busy { retry_s: state.pace.retry_s(Instant::now(), places) });
        }
        state.pace.waits(Instant::now());
        let listeners = jobs.into_iter().map(|job| {
            let (sender, events) = mpsc::channel(events_max);
            let turn = state.turn_of(lane);
            state.waiting.push_back(Waiting { lane, turn, queued: (job, sender) });
            events
        });
        let listeners = listeners.collect();
        drop(state);
        self.shared.changed.notify_all();
        Ok(listeners)
    }

    /// The job whose turn it is, if any waits.
    pub fn next(&self) -> Option<Queued<J>> {
        self.state().take()
    }

    /// Waits until something is queued or the queue is closed, or for so long.
    pub fn doze(&self, time: Duration) {
        let state = self.state();
        if !state.closed {
            let changed = self.shared.changed.wait_timeout(state, time);
            drop(changed.unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Waits for a job, until `deadline` if there is one.
    pub fn take(&self, deadline: Option<Instant>) -> Taken<J> {
        let mut state = self.state();
        loop {
            if state.closed {
                for Waiting { queued: (_, events), .. } in state.waiting.drain(..) {
                    // A listener that has gone needs no answer, and a new channel has room.
                    let _ = events.try_send(GenerateEvent::of_error(&EngineError::Stopping));
                }
                return Taken::Closed;
            }
            if let Some(queued) = state.take() {
                return Taken::Job(Box::new(queued));
            }
            let changed = &self.shared.changed;
            state = match deadline {
                None => changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return Taken::Nothing;
                    }
                    changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Jobs that wait for their turn.
    pub fn len(&self) -> usize {
        let mut state = self.state();
        state.forget_gone();
        state.waiting.len()
    }

    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Accepts no more jobs.
    pub fn close(&self) {
        self.state().closed = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(queue: &Queue<u32>) -> Option<u32> {
        match queue.take(Some(Instant::now())) {
            Taken::Job(queued) => Some(queued.0),
            Taken::Nothing | Taken::Closed => None,
        }
    }

    #[test]
    fn lanes_take_turns_and_within_one_the_first_comes_first() {
        let queue = Queue::new();
        let mut listeners = queue.submit(Lane(1), vec![10, 11, 12]).unwrap();
        assert_eq!(taken(&queue), Some(10));
        listeners.extend(queue.submit(Lane(2), vec![20, 21]).unwrap());
        listeners.extend(queue.submit(Lane(3), vec![30]).unwrap());
        let order: Vec<_> = std::iter::from_fn(|| taken(&queue)).collect();
        assert_eq!(order, [11, 20, 30, 12, 21]);
        listeners.extend(queue.submit(Lane(1), vec![13]).unwrap());
        assert_eq!(taken(&queue), Some(13), "an idle lane owes nothing");
    }

    #[test]
    fn a_full_queue_refuses_a_whole_request_and_listeners_that_go_make_room() {
        let queue = Queue::new();
        let mut listeners = queue.submit(Lane(1), (0..QUEUE_MAX as u32 - 1).collect()).unwrap();
        assert!(matches!(
            queue.submit(Lane(2), vec![70, 71]),
            Err(EngineError::Busy { retry_s: 1 })
        ));
        assert_eq!(queue.len(), QUEUE_MAX - 1, "none of a request that is refused");
        listeners.drain(..5);
        assert_eq!(queue.len(), QUEUE_MAX - 6);
        let others = queue.submit(Lane(2), vec![70, 71]).unwrap();
        assert_eq!([taken(&queue), taken(&queue)], [Some(70), Some(71)], "they waited less");
        assert_eq!(taken(&queue), Some(5), "jobs without a listener are not run");
        drop(others);
        drop(listeners);
        assert_eq!(taken(&queue), None);
    }

    #[test]
    fn whoever_waits_when_the_queue_is_closed_is_told() {
        let queue = Queue::new();
        let mut listeners = queue.submit(Lane(1), vec![1]).unwrap();
        queue.close();
        assert!(matches!(queue.submit(Lane(1), vec![2]), Err(EngineError::Stopping)));
        assert!(matches!(queue.take(None), Taken::Closed));
        let told = listeners[0].try_recv().unwrap();
        assert!(matches!(told, GenerateEvent::Error { label, .. } if label == "stopping"));
    }

    #[test]
    fn users_are_told_apart() {
        assert_eq!(Lane::of("a"), Lane::of("a"));
        assert_ne!(Lane::of("a"), Lane::of("b"));
        assert_ne!(Lane::own(), Lane::own());
    }
}
