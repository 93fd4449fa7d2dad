//! Cores that are told of gossip at about the same time are told at once, on more than one thread.
//!
//! A core answers an event from what itself knows, so who tells it does not matter. Everything else, and all
//! that cores say, is done in the order of time by one thread (`world`). Invariants: a task is done once; when
//! [`Crew::work`] returns, all of them are done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use doppler_mesh::core::{Action, Core, Event};

use crate::node::Replies;

/// The most tasks at a time.
pub const TASKS_MAX: usize = 64;
/// Fewer tasks than this are done where they are.
const SHARED_MIN: usize = 3;
/// How often a thread without a task looks for one before it lets others run.
const SPINS: u32 = 200;

/// A core that is to be told of an event, and afterwards what it said.
pub struct Task {
    pub node: usize,
    pub at: Instant,
    pub core: Box<Core>,
    pub replies: Replies,
    pub event: Option<Event>,
    pub actions: Vec<Action>,
}

impl Task {
    fn perform(&mut self) {
        if let Some(event) = self.event.take() {
            self.core.on_into(self.at, event, &self.replies, &mut self.actions);
        }
    }
}

/// What the threads share.
pub struct Crew {
    slots: Vec<Mutex<Option<Task>>>,
    /// How many of the slots are filled, and which is taken next. A thread that is late may take a number of
    /// the round before: each task is done by whoever comes first.
    filled: AtomicUsize,
    next: AtomicUsize,
    is_over: AtomicBool,
}

fn lock<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits a little; the longer, the more it leaves to others.
fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins < SPINS {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

impl Crew {
    pub fn new() -> Self {
        Self {
            slots: (0..TASKS_MAX).map(|_| Mutex::new(None)).collect(),
            filled: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
        }
    }

    /// Does what a helper does until [`Self::end`].
    pub fn help(&self) {
        let mut spins = 0;
        while !self.is_over.load(Ordering::Acquire) {
            if self.take_one() {
                spins = 0;
            } else {
                pause(&mut spins);
            }
        }
    }

    pub fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Does one of the tasks that are left. False if there is none.
    fn take_one(&self) -> bool {
        if self.next.load(Ordering::Acquire) >= self.filled.load(Ordering::Acquire) {
            return false;
        }
        let place = self.next.fetch_add(1, Ordering::AcqRel);
        let Some(slot) = self.slots.get(place) else { return false };
        if let Some(task) = lock(slot).as_mut() {
            task.perform();
        }
        true
    }

    /// Has all of these done, at most [`TASKS_MAX`].
    pub fn work(&self, tasks: &mut Vec<Task>) {
        if tasks.len() < SHARED_MIN {
            tasks.iter_mut().for_each(Task::perform);
            return;
        }
        let count = tasks.len().min(TASKS_MAX);
        for (slot, task) in self.slots.iter().zip(tasks.drain(..count)) {
            *lock(slot) = Some(task);
        }
        self.next.store(0, Ordering::Release);
        self.filled.store(count, Ordering::Release);
        while self.take_one() {}
        self.filled.store(0, Ordering::Release);
        // Waits for the one that a helper is about to do; does the one that a helper has only numbered.
        let done = self.slots[..count].iter().filter_map(|slot| {
            let mut task = lock(slot).take()?;
            task.perform();
            Some(task)
        });
        tasks.extend(done);
    }
}
