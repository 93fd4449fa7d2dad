//! Cores that are told of gossip at about the same time are told at once, on more than one thread, and what
//! each passes on is worked out beside it.
//!
//! A core answers an event from what itself knows, and to whom a node passes a message on depends on that node
//! alone, so who works it out does not matter. Everything else, and all that cores say, is done in the order of
//! time by one thread (`world`). Invariants: a task is done once; when [`Crew::work`] returns, all are done.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use doppler_mesh::core::{Action, Core, Event};

use crate::gossip::{Relay, is_large};
use crate::net::{jitter, latency};
use crate::node::Replies;
use crate::rng::Rng;
use crate::topics::Topic;

/// Fewer tasks than this are done where they are.
const SHARED_MIN: usize = 8;
/// How often a thread without a task looks for one before it lets others run.
const SPINS: u32 = 5000;

/// How a message came to a node.
#[derive(Debug, Clone, Copy, Default)]
pub struct Way {
    pub from: usize,
    pub author: usize,
    /// Bytes of data.
    pub bytes: usize,
    /// Virtual nanoseconds.
    pub at: u64,
    /// The run's seed and number of nodes, which say how long packets take.
    pub seed: u64,
    pub nodes: usize,
}

/// What a node passes on.
#[derive(Debug, Default)]
pub struct Passed {
    /// To whom, and how long that takes.
    pub copies: Vec<(usize, u64)>,
    /// To whom it offers the message, and when.
    pub offers: Vec<(usize, u64)>,
}

/// A core that is to be told of a message, and afterwards what it said and what its node passes on.
pub struct Task {
    pub node: usize,
    pub at: Instant,
    pub core: Option<Box<Core>>,
    pub replies: Replies,
    pub relay: Box<Relay>,
    pub topic: Topic,
    pub rng: Rng,
    pub event: Option<Event>,
    pub way: Way,
    pub actions: Vec<Action>,
    /// If it passes the message on, and that concerns nobody else.
    pub passed: Option<Passed>,
}

impl Task {
    fn perform(&mut self) {
        let (Some(event), Some(core)) = (self.event.take(), &mut self.core) else { return };
        core.on_into(self.at, event, &self.replies, &mut self.actions);
        let is_sound = |action: &Action| matches!(action, Action::Judge { is_sound: true, .. });
        let Way { from, author, bytes, at, seed, nodes } = self.way;
        let is_passed = self.actions.iter().any(is_sound) && !is_large(bytes);
        if !is_passed || !self.relay.keep_up_alone(at) {
            return;
        }
        let others = self.relay.forward(at, (from, Some(author)), bytes, |_| false);
        let rng = &mut self.rng;
        let copies = others.into_iter().map(|to| {
            let base = latency(seed, nodes, self.node, to);
            (to, base + jitter(base, rng))
        });
        let copies = copies.collect();
        self.passed = Some(Passed { copies, offers: self.relay.offered() });
    }
}

/// What one helper is given to do.
#[allow(clippy::vec_box)] // moved from thread to thread by pointer
#[derive(Default)]
struct Desk {
    tasks: Mutex<Vec<Box<Task>>>,
    /// Odd while there is something to do.
    turn: AtomicU64,
}

/// What the threads share.
pub struct Crew {
    desks: Vec<Desk>,
    is_over: AtomicBool,
    /// A helper has panicked.
    is_broken: AtomicBool,
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `is_due`; the longer, the more it leaves to others.
fn wait(is_due: impl Fn() -> bool) {
    let mut spins = 0;
    while !is_due() {
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

/// Says that a desk is done, and whether that is because of a panic.
struct Done<'a>(&'a Crew, &'a Desk);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.is_broken.store(true, Ordering::Release);
        }
        self.1.turn.fetch_add(1, Ordering::AcqRel);
    }
}

impl Crew {
    pub fn new(helpers: usize) -> Self {
        let desks = (0..helpers).map(|_| Desk::default()).collect();
        Self { desks, is_over: AtomicBool::new(false), is_broken: AtomicBool::new(false) }
    }

    /// Does what one helper does until [`Self::end`].
    pub fn help(&self, helper: usize) {
        let desk = &self.desks[helper];
        let is_given = || desk.turn.load(Ordering::Acquire) % 2 == 1;
        loop {
            wait(|| is_given() || self.is_over.load(Ordering::Acquire));
            if !is_given() {
                return;
            }
            let _done = Done(self, desk);
            lock(&desk.tasks).iter_mut().for_each(|task| task.perform());
        }
    }

    pub fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Has all of these done.
    #[allow(clippy::vec_box)] // moved from thread to thread by pointer
    pub fn work(&self, tasks: &mut Vec<Box<Task>>) {
        if tasks.len() < SHARED_MIN || self.desks.is_empty() {
            tasks.iter_mut().for_each(|task| task.perform());
            return;
        }
        let share = tasks.len() / (self.desks.len() + 1);
        for desk in self.desks.iter().rev() {
            lock(&desk.tasks).extend(tasks.drain(tasks.len() - share..));
            desk.turn.fetch_add(1, Ordering::AcqRel);
        }
        tasks.iter_mut().for_each(|task| task.perform());
        for desk in &self.desks {
            wait(|| desk.turn.load(Ordering::Acquire) % 2 == 0);
            assert!(!self.is_broken.load(Ordering::Acquire), "a helper panicked");
            tasks.append(&mut lock(&desk.tasks));
        }
    }
}
