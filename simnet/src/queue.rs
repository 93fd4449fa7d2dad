//! What is to happen, in the order of time; what is due at the same time happens in the order in
//! which it was put there.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;

use doppler_ids::PeerId;
use doppler_mesh::core::{FailureKind, ReadId, RequestId};

use crate::transfer::Upload;

/// Names a request of one node.
pub type Key = (ReadId, RequestId);

/// A gossip message on its way.
#[derive(Debug)]
pub struct Message {
    pub id: u64,
    pub author: PeerId,
    pub data: Vec<u8>,
    /// When a node first heard it, if it is large.
    pub heard: RefCell<BTreeMap<usize, u64>>,
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
    /// The liveness reads begin.
    Probe,
    /// Everything is looked at.
    Check,
}

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

/// The queue.
#[derive(Default)]
pub struct Queue {
    heap: BinaryHeap<Entry>,
    sequence: u64,
}

impl Queue {
    pub fn push(&mut self, at: u64, next: Next) {
        self.sequence += 1;
        self.heap.push(Entry { at, sequence: self.sequence, next });
    }

    /// When the next thing happens.
    pub fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|entry| entry.at)
    }

    pub fn pop(&mut self) -> Option<(u64, Next)> {
        self.heap.pop().map(|entry| (entry.at, entry.next))
    }
}
