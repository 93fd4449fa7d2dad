//! Calm swarms are run in batches: what cores are told of gossip within the time that the fastest packet takes,
//! they are told at once, on several threads (`crew`). What they say is done afterwards, in the order of time.
//!
//! Nothing that a node does reaches another within that time. Invariants: a core is told of nothing before
//! something that is earlier; no core is told ahead of time of what it may yet be spared; a batch does not depend
//! on the number of threads.

use std::rc::Rc;

use crate::crew::{Crew, Task, Way};
use crate::net::latency_min;
use crate::node::Replies;
use crate::options::Scenario;
use crate::queue::{Message, Next};
use crate::rng::Rng;
use crate::world::World;

/// The most tasks at a time.
const TASKS_MAX: usize = 1024;

/// Something that happens.
struct Item {
    at: u64,
    next: Next,
    /// A core was told of it ahead of time.
    is_told: bool,
}

/// What is kept from one batch to the next, for its room.
#[allow(clippy::vec_box)] // moved from thread to thread by pointer
struct Batch {
    items: Vec<Item>,
    /// Those that cores are told ahead of time, in the order of the items.
    tasks: Vec<Box<Task>>,
    spare: Vec<Box<Task>>,
    /// The number of this batch, and of the last in which each node was told something.
    number: u64,
    told: Vec<u64>,
}

impl Batch {
    fn new(nodes: usize) -> Self {
        Self {
            items: Vec::new(),
            tasks: Vec::new(),
            spare: Vec::new(),
            number: 0,
            told: vec![0; nodes],
        }
    }

    /// Notes that a node is told something in this batch. True if it was not before.
    fn tell(&mut self, node: usize) -> bool {
        std::mem::replace(&mut self.told[node], self.number) != self.number
    }
}

impl World {
    /// Whether nobody is banned or cut off: a node is changed by nothing but what it is told, what itself
    /// says, and what concerns all and is done by itself.
    pub(crate) fn is_calm(&self) -> bool {
        matches!(self.options.scenario, Scenario::Crowd | Scenario::Models | Scenario::Quiet)
    }

    /// [`World::run_until`] in batches.
    pub(crate) fn run_batches(&mut self, end: u64, crew: &Crew) {
        let mut batch = Batch::new(self.nodes.len());
        while self.violation.is_none() && self.queue.next_at().is_some_and(|at| at <= end) {
            self.collect(end, &mut batch);
            if batch.items.is_empty() {
                self.do_next();
                continue;
            }
            crew.work(&mut batch.tasks);
            self.do_all(&mut batch);
        }
        if self.violation.is_none() {
            self.now = end;
        }
    }

    /// Takes what is next, up to something that may concern all nodes.
    fn collect(&mut self, end: u64, batch: &mut Batch) {
        let Some(first) = self.queue.next_at() else { return };
        let before = (first + latency_min(self.nodes.len())).min(end.saturating_add(1));
        batch.number += 1;
        while batch.tasks.len() < TASKS_MAX {
            let Some((at, next)) = self.queue.peek().filter(|(at, _)| *at < before) else { break };
            let is_told = match next {
                Next::Gossip { to, message, is_replay: false, .. } => {
                    let to = *to;
                    self.may_tell(to, message) && batch.tell(to)
                }
                Next::Wake { node }
                | Next::Boot { node }
                | Next::Bootstrap { node, .. }
                | Next::Work { node, .. }
                | Next::Look { node, .. }
                | Next::Heal { node, .. } => {
                    batch.tell(*node);
                    false
                }
                Next::Dialled { node, to, .. } => {
                    batch.tell(*node);
                    batch.tell(*to);
                    false
                }
                _ => break,
            };
            let Some((_, next)) = self.queue.pop() else { break };
            if let (true, Next::Gossip { to, from, message, .. }) = (is_told, &next) {
                self.prepare(at, (*to, *from), message, batch);
            }
            batch.items.push(Item { at, next, is_told });
        }
    }

    /// Whether a message will be news for a node.
    fn may_tell(&self, to: usize, message: &Message) -> bool {
        let node = &self.nodes[to];
        node.is_up() && !message.is_heard(to, node.boot) && self.gossip.has(message.topic, to)
    }

    /// A node is to be told of a message.
    fn prepare(
        &mut self,
        at: u64,
        (node, from): (usize, usize),
        message: &Message,
        batch: &mut Batch,
    ) {
        let (time, event) = (self.instant(at), Some(self.gossip_event(message)));
        let (seed, nodes) = (self.options.seed, self.nodes.len());
        let way = Way { from, author: message.from, bytes: message.len(), at, seed, nodes };
        let mut task = batch.spare.pop().unwrap_or_else(|| {
            Box::new(Task {
                node,
                at: time,
                core: None,
                replies: Replies::default(),
                relay: Box::default(),
                topic: None,
                rng: Rng::default(),
                event: None,
                way,
                actions: Vec::new(),
                passed: None,
            })
        });
        (task.node, task.at, task.event, task.way) = (node, time, event, way);
        task.topic = message.topic;
        self.exchange(&mut task);
        batch.tasks.push(task);
    }

    /// Gives a task what it needs of its node, or takes it back.
    fn exchange(&mut self, task: &mut Task) {
        let node = &mut self.nodes[task.node];
        std::mem::swap(&mut node.core, &mut task.core);
        std::mem::swap(&mut node.replies, &mut task.replies);
        std::mem::swap(&mut node.rng, &mut task.rng);
        self.gossip.swap(task.topic, task.node, &mut task.relay);
    }

    fn do_all(&mut self, batch: &mut Batch) {
        for task in &mut batch.tasks {
            self.exchange(task);
        }
        let Batch { items, tasks, spare, .. } = batch;
        let mut tasks = tasks.drain(..);
        for Item { at, next, is_told } in items.drain(..) {
            let task = if is_told { tasks.next() } else { None };
            // What has just come up: a core wants to be woken.
            while self.violation.is_none() && self.queue.next_at().is_some_and(|next| next < at) {
                self.do_next();
            }
            if self.violation.is_some() {
                return;
            }
            self.now = at;
            self.stats.events += 1;
            match (task, next) {
                (Some(mut task), Next::Gossip { to, from, message, .. }) => {
                    self.schedule.fold(self.now);
                    self.has_heard((to, from), message, &mut task);
                    spare.push(task);
                }
                (_, next) => self.step(next),
            }
        }
    }

    /// A node's core was told of a message.
    fn has_heard(&mut self, (to, from): (usize, usize), message: Rc<Message>, task: &mut Task) {
        let boot = self.nodes[to].boot;
        message.hear(to, boot, self.now);
        self.stats.messages += 1;
        self.hearing = Some((message, from));
        self.passed = task.passed.take();
        self.told(to, &mut task.actions);
        (self.hearing, self.passed) = (None, None);
    }

    fn do_next(&mut self) {
        if let Some((at, next)) = self.queue.pop() {
            self.now = at;
            self.stats.events += 1;
            self.step(next);
        }
    }
}
