//! Large swarms on several threads: what cores are told of gossip within the time that the fastest packet
//! takes, they are told at once (`crew`). What they say is done afterwards, in the order of time.
//!
//! Nothing that a core says reaches another within that time, so the schedule is that of one thread.
//! Invariants: a core is told of nothing before something that is earlier; no core is told ahead of time of
//! what it may yet be spared.

use std::collections::BTreeSet;
use std::rc::Rc;

use doppler_mesh::core::Action;

use crate::crew::{Crew, TASKS_MAX, Task};
use crate::net::LATENCY_MIN;
use crate::options::Scenario;
use crate::queue::{Message, Next};
use crate::world::World;

/// Something that happens, and what the core said that was told of it ahead of time.
struct Item {
    at: u64,
    next: Next,
    said: Option<Vec<Action>>,
}

/// What is kept from one batch to the next, for its room.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    tasks: Vec<Task>,
    /// The items of the tasks, in their order.
    places: Vec<usize>,
    /// Nodes whose cores are told something.
    told: BTreeSet<usize>,
    /// Emptied.
    spare: Vec<Vec<Action>>,
}

impl World {
    /// Whether a node is changed by nothing but what it is told, and what itself says: nobody is banned,
    /// killed or cut off.
    pub(crate) fn is_calm(&self) -> bool {
        matches!(self.options.scenario, Scenario::Crowd | Scenario::Quiet)
    }

    /// [`World::run_until`] in batches.
    pub(crate) fn run_batches(&mut self, end: u64, crew: &Crew) {
        let mut batch = Batch::default();
        while self.violation.is_none() && self.queue.next_at().is_some_and(|at| at <= end) {
            self.collect(end, &mut batch);
            if batch.items.is_empty() {
                self.do_next();
                continue;
            }
            self.tell_all(crew, &mut batch);
            self.do_all(&mut batch);
        }
        if self.violation.is_none() {
            self.now = end;
        }
    }

    /// Takes what is next, up to something that may change more than one node.
    fn collect(&mut self, end: u64, batch: &mut Batch) {
        let Some(first) = self.queue.next_at() else { return };
        let before = (first + LATENCY_MIN).min(end.saturating_add(1));
        batch.told.clear();
        while batch.tasks.len() < TASKS_MAX {
            let Some((at, next)) = self.queue.peek().filter(|(at, _)| *at < before) else { break };
            let task = match next {
                Next::Gossip { to, message, is_replay: false, .. } => {
                    let (to, message) = (*to, Rc::clone(message));
                    self.may_tell(to, &message) && batch.told.insert(to)
                }
                Next::Wake { node } => {
                    batch.told.insert(*node);
                    false
                }
                Next::Bootstrap { .. } => false,
                _ => break,
            };
            let Some((_, next)) = self.queue.pop() else { break };
            if let (true, Next::Gossip { to, message, .. }) = (task, &next) {
                batch.places.push(batch.items.len());
                let actions = batch.spare.pop().unwrap_or_default();
                batch.tasks.extend(self.task(*to, at, message, actions));
            }
            batch.items.push(Item { at, next, said: None });
        }
    }

    /// Whether a message will be news for a node.
    fn may_tell(&self, to: usize, message: &Message) -> bool {
        let node = &self.nodes[to];
        node.is_up() && !message.is_heard(to, node.boot)
    }

    fn task(
        &mut self,
        node: usize,
        at: u64,
        message: &Message,
        actions: Vec<Action>,
    ) -> Option<Task> {
        let (at, event) = (self.instant(at), Some(self.gossip_event(message)));
        let this = &mut self.nodes[node];
        let core = this.core.take()?;
        let replies = std::mem::take(&mut this.replies);
        Some(Task { node, at, core, replies, event, actions })
    }

    fn tell_all(&mut self, crew: &Crew, batch: &mut Batch) {
        crew.work(&mut batch.tasks);
        for (place, task) in batch.places.drain(..).zip(batch.tasks.drain(..)) {
            let node = &mut self.nodes[task.node];
            (node.core, node.replies) = (Some(task.core), task.replies);
            batch.items[place].said = Some(task.actions);
        }
    }

    fn do_all(&mut self, batch: &mut Batch) {
        for Item { at, next, said } in batch.items.drain(..) {
            // What has just come up: a core wants to be woken.
            while self.violation.is_none() && self.queue.next_at().is_some_and(|next| next < at) {
                self.do_next();
            }
            if self.violation.is_some() {
                return;
            }
            self.now = at;
            self.stats.events += 1;
            match (said, next) {
                (Some(mut actions), Next::Gossip { to, from, message, .. }) => {
                    self.schedule.fold(self.now);
                    self.has_heard(to, from, message, &mut actions);
                    batch.spare.push(actions);
                }
                (_, next) => self.step(next),
            }
        }
    }

    /// A node's core was told of a message, and said this.
    fn has_heard(
        &mut self,
        to: usize,
        from: usize,
        message: Rc<Message>,
        actions: &mut Vec<Action>,
    ) {
        let boot = self.nodes[to].boot;
        message.hear(to, boot, self.now);
        self.stats.messages += 1;
        self.hearing = Some((message, from));
        self.told(to, actions);
        self.hearing = None;
    }

    fn do_next(&mut self) {
        if let Some((at, next)) = self.queue.pop() {
            self.now = at;
            self.stats.events += 1;
            self.step(next);
        }
    }
}
