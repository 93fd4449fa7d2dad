//! What is to happen, in the order of time; what is due at the same time happens in the order in
//! which it was put there.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;

use doppler_ids::PeerId;
use doppler_mesh::core::{FailureKind, ReadId, RequestId, Word};

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
    pub fn new(id: u64, (author, from): (PeerId, usize), word: Word, nodes: usize) -> Self {
        let heard = RefCell::new(vec![Heard { boot: 0, due: u64::MAX, at: u64::MAX }; nodes]);
        Self { id, author, from, word, heard }
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
        upload: Upload,
    },
    /// The disk has read what an upload needs.
    Ready {
        node: usize,
        boot: u32,
        upload: Upload,
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
    /// A flooder says its piece.
    Flood {
        node: usize,
        boot: u32,
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

/// When something is to happen, and where it is kept meanwhile. Small, because a heap moves its
/// entries.
#[derive(PartialEq, Eq)]
struct Entry {
    at: u64,
    sequence: u64,
    place: usize,
}

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

/// The queue.
#[derive(Default)]
pub struct Queue {
    heap: BinaryHeap<Entry>,
    kept: Vec<Option<Next>>,
    free: Vec<usize>,
    sequence: u64,
}

impl Queue {
    pub fn push(&mut self, at: u64, next: Next) {
        self.sequence += 1;
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.kept.push(None);
                self.kept.len() - 1
            }
        };
        self.kept[place] = Some(next);
        self.heap.push(Entry { at, sequence: self.sequence, place });
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at)
    }

    /// What happens next, and when.
    pub fn peek(&self) -> Option<(u64, &Next)> {
        let Entry { at, place, .. } = self.heap.peek()?;
        self.kept[*place].as_ref().map(|next| (*at, next))
    }

    pub fn pop(&mut self) -> Option<(u64, Next)> {
        let Entry { at, place, .. } = self.heap.pop()?;
        self.free.push(place);
        self.kept[place].take().map(|next| (at, next))
    }
}
