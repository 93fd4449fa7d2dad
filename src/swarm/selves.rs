//! Tells this node's own connections to itself from those of another node of the same identity.
//! Pure: the time is an argument.
//!
//! A connection to oneself (by a name, a proxy, a router that sends packets back) ends here twice:
//! where it was dialled and where it came in. One that ends here once has its other end in another
//! process that holds the same key.
//!
//! Invariant: nothing is reported before its other end had [`OTHER_END`] to show up.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::Address;

/// How far apart the two ends of one connection may notice that it is one: a few round trips.
const OTHER_END: Duration = Duration::from_secs(3);
/// Ends that are waited for; of more than that nothing is learned.
const ENDS_MAX: usize = 16;

/// Which end of a connection this node was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Dialled,
    Accepted,
}

/// Connections whose other end showed this node's own identity.
#[derive(Default)]
pub(crate) struct Selves {
    waiting: VecDeque<(Instant, End, Address)>,
}

impl Selves {
    /// One end of such a connection. Returns the dialled address if the other end was here, too:
    /// it leads to this node itself.
    pub(crate) fn note(&mut self, now: Instant, end: End, address: Address) -> Option<Address> {
        if let Some(at) = self.waiting.iter().position(|(_, other, _)| *other != end) {
            let (.., other) = self.waiting.remove(at)?;
            return Some(if end == End::Dialled { address } else { other });
        }
        if self.waiting.len() < ENDS_MAX {
            self.waiting.push_back((now, end, address));
        }
        None
    }

    /// Ends whose other end is not here: another node of this identity was there.
    pub(crate) fn twins(&mut self, now: Instant) -> Vec<(End, Address)> {
        let mut twins = Vec::new();
        while self.waiting.front().is_some_and(|(at, ..)| *at + OTHER_END <= now) {
            twins.extend(self.waiting.pop_front().map(|(_, end, address)| (end, address)));
        }
        twins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_without_its_other_end_is_a_twin() {
        let start = Instant::now();
        let address = |port: u8| format!("/ip4/10.0.0.1/tcp/{port}").parse::<Address>().unwrap();
        let mut selves = Selves::default();
        for ends in [[End::Dialled, End::Accepted], [End::Accepted, End::Dialled]] {
            let place = |end| address(if end == End::Dialled { 1 } else { 2 });
            assert_eq!(selves.note(start, ends[0], place(ends[0])), None);
            assert_eq!(selves.note(start, ends[1], place(ends[1])), Some(address(1)));
            assert_eq!(selves.twins(start + OTHER_END * 9), []);
        }
        assert_eq!(selves.note(start, End::Accepted, address(3)), None);
        assert_eq!(selves.twins(start + OTHER_END / 2), []);
        assert_eq!(selves.twins(start + OTHER_END), [(End::Accepted, address(3))]);
        for port in 0..99 {
            selves.note(start, End::Dialled, address(port));
        }
        assert_eq!(selves.twins(start + OTHER_END).len(), ENDS_MAX);
    }
}
