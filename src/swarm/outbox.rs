//! Publications without subscribers, kept until there is one.
//!
//! Invariant: never more than `capacity` entries; the oldest is dropped.

use std::collections::VecDeque;

/// A bounded queue of (topic, data) to retry.
pub(crate) struct Outbox {
    entries: VecDeque<(String, Vec<u8>)>,
    capacity: usize,
}

impl Outbox {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { entries: VecDeque::new(), capacity }
    }

    /// Keeps an entry; true if an older one was dropped for it.
    pub(crate) fn push(&mut self, topic: String, data: Vec<u8>) -> bool {
        let full = self.entries.len() >= self.capacity;
        if full {
            self.entries.pop_front();
        }
        self.entries.push_back((topic, data));
        full
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Retries every entry, oldest first; drops those for which `publish` returns true.
    pub(crate) fn retry(&mut self, mut publish: impl FnMut(&str, &[u8]) -> bool) {
        self.entries.retain(|(topic, data)| !publish(topic, data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_dropped_and_retries_keep_what_failed() {
        let mut outbox = Outbox::new(2);
        assert!(!outbox.push("t".into(), vec![1]));
        assert!(!outbox.push("t".into(), vec![2]));
        assert!(outbox.push("t".into(), vec![3]));
        let mut seen = Vec::new();
        outbox.retry(|_, data| {
            seen.push(data[0]);
            data[0] == 2
        });
        assert_eq!(seen, [2, 3]);
        outbox.retry(|_, data| data[0] == 3);
        assert!(outbox.is_empty());
    }
}
