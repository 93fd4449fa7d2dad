//! What must hold, looked at all the time, and a run's schedule as one number.

use crate::options::SECOND;
use crate::rng::mix;

/// A rule was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Virtual nanoseconds.
    pub at: u64,
    /// The rule, a word or two: shrinking keeps to it.
    pub rule: &'static str,
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.at as f64 / SECOND as f64;
        write!(f, "{}: {} (at {seconds:.3} s)", self.rule, self.what)
    }
}

/// Everything that happens, folded into 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule(u64);

impl Default for Schedule {
    fn default() -> Self {
        Self(mix(0))
    }
}

impl Schedule {
    pub fn fold(&mut self, number: u64) {
        self.0 = mix(self.0.rotate_left(5) ^ number);
    }

    pub fn fold_bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
        self.fold(bytes.len() as u64);
    }

    pub const fn value(self) -> u64 {
        self.0
    }
}

/// What a run counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    pub events: u64,
    /// Gossip messages heard for the first time, summed over the nodes.
    pub messages: u64,
    pub reads: u64,
    pub failed_reads: u64,
    pub bytes: u64,
    pub bans: u64,
    pub probes: u64,
    pub faults: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.messages += other.messages;
        self.reads += other.reads;
        self.failed_reads += other.failed_reads;
        self.bytes += other.bytes;
        self.bans += other.bans;
        self.probes += other.probes;
        self.faults += other.faults;
    }
}
