//! What is to happen, in the order of time; what is due at the same time happens in the order in
//! which it was put there.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;

use doppler_ids::PeerId;
use doppler_mesh::core::{FailureKind, ReadId, RequestId, Word};

use crate::topics::Topic;
use crate::transfer::Upload;

/// Names a request of one node.
pub type Key = (ReadId, RequestId);

/// A gossip message on its way, and who has it.
#[derive(Debug)]
pub struct Message {
    pub id: u64,
    pub author: PeerId,
    /// The author's number.
    pub from: usize,
    pub word: Word,
    pub topic: Topic,
    /// By node.
    pub heard: RefCell<Vec<Heard>>,
}

/// What has become of a message at one node.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    /// The life in which the node heard it; 0 if it did not.
    pub boot: u32,
    /// When the first of its copies on their way arrives, and when it heard one.
    pub due: u64,
    pub at: u64,
}

impl Message {
    pub fn new(
        id: u64,
        (author, from): (PeerId, usize),
        (topic, word): (Topic, Word),
        nodes: usize,
    ) -> Self {
        let heard = RefCell::new(vec![Heard { boot: 0, due: u64::MAX, at: u64::MAX }; nodes]);
        Self { id, author, from, word, topic, heard }
    }

    /// The bytes of what it says.
    pub fn len(&self) -> usize {
        self.word.bytes().len()
    }

    /// Whether a node heard it in this life of its.
    pub fn is_heard(&self, node: usize, boot: u32) -> bool {
        self.heard.borrow().get(node).is_some_and(|heard| heard.boot == boot)
    }

    /// A node hears it. True if it had not before in this life.
    pub fn hear(&self, node: usize, boot: u32, now: u64) -> bool {
        let mut heard = self.heard.borrow_mut();
        let Some(heard) = heard.get_mut(node).filter(|heard| heard.boot != boot) else {
            return false;
        };
        heard.boot = boot;
        heard.at = heard.at.min(now);
        true
    }

    /// When a node first heard it.
    pub fn heard_at(&self, node: usize) -> Option<u64> {
        self.heard.borrow().get(node).map(|heard| heard.at).filter(|at| *at < u64::MAX)
    }

    /// Whether a copy that arrives at a node then is worth sending: whoever has it, or gets it
    /// before, does not take it.
    pub fn is_wanted(&self, node: usize, boot: u32, at: u64) -> bool {
        let mut heard = self.heard.borrow_mut();
        let Some(heard) = heard.get_mut(node) else { return false };
        if heard.boot == boot || heard.due <= at {
            return false;
        }
        heard.due = at;
        true
    }
}

/// What is to happen. `boot` is the life of the node that it belongs to: what a killed node was
/// about to do does not happen.
#[derive(Debug)]
pub enum Next {
    /// The core of a node asked to be woken.
    Wake {
        node: usize,
    },
    /// A node starts.
    Boot {
        node: usize,
    },
    FaultBegins {
        fault: usize,
    },
    FaultEnds {
        fault: usize,
    },
    /// A node sees whether it is connected to one of the nodes that it was given.
    Bootstrap {
        node: usize,
        boot: u32,
        to: usize,
        wait: u64,
    },
    /// A dial has come through, or not.
    Dialled {
        node: usize,
        boot: u32,
        to: usize,
    },
    /// A connection is looked at after its peer may have gone.
    Notice {
        one: usize,
        other: usize,
        link: u64,
    },
    /// A relayed connection becomes a direct one.
    Upgrade {
        one: usize,
        other: usize,
        link: u64,
    },
    /// A node hangs up.
    HangUp {
        node: usize,
        other: usize,
    },
    /// A replay comes after the receiver's duplicate cache has forgotten the message.
    Gossip {
        to: usize,
        from: usize,
        message: Rc<Message>,
        is_replay: bool,
    },
    /// A request reaches the peer that it was sent to.
    Request {
        to: usize,
        upload: Box<Upload>,
    },
    /// The disk has read what an upload needs.
    Ready {
        node: usize,
        boot: u32,
        upload: Box<Upload>,
    },
    /// The uplink is free again.
    Pump {
        node: usize,
        boot: u32,
    },
    /// Bytes of an answer arrive.
    Chunk {
        node: usize,
        boot: u32,
        key: Key,
        end: u64,
        is_wrong: bool,
    },
    /// A request ends: `None` if all of it has come.
    Answer {
        node: usize,
        boot: u32,
        key: Key,
        kind: Option<FailureKind>,
    },
    /// A request is looked at for silence.
    Idle {
        node: usize,
        boot: u32,
        key: Key,
    },
    /// An object is durable.
    Stored {
        node: usize,
        boot: u32,
        job: u64,
    },
    /// A node begins what it does of its own accord.
    Work {
        node: usize,
        boot: u32,
    },
    /// A node looks at what it lacks: manifests, a pull.
    Look {
        node: usize,
        boot: u32,
    },
    /// A copy has ended: a node looks for the next.
    Heal {
        node: usize,
        boot: u32,
    },
    /// A flooder says its piece.
    Flood {
        node: usize,
        boot: u32,
    },
    /// A node joins or leaves a model's topic.
    Topic {
        node: usize,
        boot: u32,
        model: usize,
        joins: bool,
    },
    /// A node publishes a model that nobody knows.
    News {
        node: usize,
        number: u64,
    },
    /// The liveness reads begin.
    Probe,
    /// Everything is looked at.
    Check,
}

/// Something, when it is to happen, and how many were put there before it.
#[derive(Debug)]
struct Entry {
    at: u64,
    sequence: u64,
    next: Next,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

/// The time that a slot stands for, a millisecond or so, and how many slots there are.
const SLOT: u64 = 1 << 20;
const SLOTS: u64 = 1 << 10;

/// The queue. What comes within the next second lies in a slot for its millisecond, in no order; only a
/// slot that has come is put in order. So an entry costs as much among a hundred thousand as among a few.
///
/// Invariant: whatever is in `soon` comes before what is in the slots, and that before what is in `far`.
pub struct Queue {
    soon: BinaryHeap<Entry>,
    slots: Vec<Vec<Entry>>,
    far: BinaryHeap<Entry>,
    /// The first slot that has not come, counted from time 0; and how many entries the slots have.
    first: u64,
    slotted: usize,
    sequence: u64,
}

impl Default for Queue {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| Vec::new()).collect();
        let (soon, far) = (BinaryHeap::new(), BinaryHeap::new());
        Self { soon, slots, far, first: 0, slotted: 0, sequence: 0 }
    }
}

impl Queue {
    pub fn push(&mut self, at: u64, next: Next) {
        self.sequence += 1;
        let entry = Entry { at, sequence: self.sequence, next };
        self.place(entry);
        self.refill();
    }

    fn place(&mut self, entry: Entry) {
        let slot = entry.at / SLOT;
        if slot < self.first {
            self.soon.push(entry);
        } else if slot < self.first + SLOTS {
            self.slots[(slot % SLOTS) as usize].push(entry);
            self.slotted += 1;
        } else {
            self.far.push(entry);
        }
    }

    /// Takes the next slot that has anything, once all before it has been taken.
    fn refill(&mut self) {
        while self.soon.is_empty() {
            if self.slotted == 0 {
                let Some(far) = self.far.peek() else { return };
                self.first = self.first.max(far.at / SLOT);
            }
            while self.far.peek().is_some_and(|far| far.at / SLOT < self.first + SLOTS) {
                let Some(entry) = self.far.pop() else { break };
                self.slots[(entry.at / SLOT % SLOTS) as usize].push(entry);
                self.slotted += 1;
            }
            let slot = &mut self.slots[(self.first % SLOTS) as usize];
            self.slotted -= slot.len();
            self.soon.extend(slot.drain(..));
            self.first += 1;
        }
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.soon.peek().map(|entry| entry.at)
    }

    /// What happens next, and when.
    pub fn peek(&self) -> Option<(u64, &Next)> {
        self.soon.peek().map(|entry| (entry.at, &entry.next))
    }

    pub fn pop(&mut self) -> Option<(u64, Next)> {
        let Entry { at, next, .. } = self.soon.pop()?;
        self.refill();
        Some((at, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::SECOND;
    use crate::rng::Rng;

    #[test]
    fn what_is_due_first_comes_first_and_of_what_is_due_at_once_what_was_put_first() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (mut queue, mut known) = (Queue::default(), std::collections::BTreeMap::new());
            let (mut now, mut number) = (0, 0);
            for _ in 0..400 {
                if rng.percent(55) {
                    let wait =
                        [0, SLOT / 3, SECOND / 2, 5 * SECOND, 3000 * SECOND][rng.below(5) as usize];
                    let at = now + rng.below(wait + 1);
                    queue.push(at, Next::Wake { node: number });
                    known.insert((at, number), ());
                    number += 1;
                } else {
                    assert_eq!(queue.next_at(), known.first_key_value().map(|((at, _), ())| *at));
                    let Some((at, Next::Wake { node })) = queue.pop() else {
                        assert!(known.is_empty());
                        continue;
                    };
                    assert_eq!(known.pop_first(), Some(((at, node), ())));
                    now = at;
                }
            }
        }
    }
}
