//! Where a device keeps a sequence's recurrent states, and after how many tokens they are known.
//!
//! A layer with a recurrence (a short convolution, a delta net) passes a state of fixed size from
//! token to token instead of keeping keys and values. A place holds the states of all such layers of
//! one sequence, after each of its last steps: the state after `n` tokens is in entry `n % RING`. So
//! a token that runs twice, or that was queued ahead and is dropped, destroys nothing that is still
//! needed, and going back a few tokens costs nothing. A state that is not known is computed again
//! from the tokens, from their longest beginning whose state is known.
//!
//! Places are counted as blocks are (`kv`): forks and snapshots share one until one of them steps.

use super::kv::{Block, BlockCopy, Pool};

/// Entries of a place: one for each token that may be in flight, and one before them.
pub const RING: usize = 5;

/// A sequence's place, and what it holds. A clone shares the place.
#[derive(Debug, Clone, Default)]
pub struct State {
    place: Option<Block>,
    /// Numbers of tokens after which the state is in the place. Those beyond the sequence's end are
    /// of tokens that were queued ahead.
    known: Vec<usize>,
}

impl State {
    /// The number of the place; 0 without one.
    pub fn index(&self) -> u32 {
        self.place.as_ref().map_or(0, Block::index)
    }

    /// The longest beginning of at most `len` tokens whose state is known. Before the first token it
    /// always is.
    pub fn known(&self, len: usize) -> usize {
        self.known.iter().copied().filter(|known| *known <= len).max().unwrap_or(0)
    }

    /// Whether the next step needs another place.
    pub fn wants(&self) -> bool {
        self.place.as_ref().is_none_or(Block::is_shared)
    }

    /// Takes a place for a sequence that has none. False if none is free.
    pub fn claim(&mut self, pool: &Pool) -> bool {
        if self.place.is_none() {
            self.known.clear();
            self.place = pool.take();
        }
        self.place.is_some()
    }

    /// Makes room to write the state after `end` tokens, computed from the one after `start`, which
    /// is known. Returns the copy to make on the device first, if any. `None`, with nothing changed,
    /// if no place is free.
    pub fn prepare(&mut self, pool: &Pool, start: usize, end: usize) -> Option<Option<BlockCopy>> {
        let mut copy = None;
        if self.wants() {
            let place = pool.take()?;
            match self.place.take().filter(|_| start > 0) {
                Some(old) => copy = Some(BlockCopy { from: old.index(), to: place.index() }),
                None => self.known.clear(),
            }
            self.place = Some(place);
        }
        self.known.retain(|known| *known <= start && known % RING != end % RING);
        self.known.push(end);
        Some(copy)
    }

    /// Forgets what lies beyond `len` tokens. Gives the place back if it holds nothing then.
    pub fn truncate(&mut self, len: usize) {
        self.known.retain(|known| *known <= len);
        if self.known.is_empty() {
            self.place = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(count: usize) -> Pool {
        let mut pool = Pool::default();
        pool.grow(count);
        pool
    }

    #[test]
    fn the_last_entries_are_known_and_a_step_overwrites_the_oldest() {
        let pool = pool(1);
        let mut state = State::default();
        assert_eq!(state.known(9), 0);
        state.prepare(&pool, 0, 20).unwrap();
        (20..24).for_each(|at| assert_eq!(state.prepare(&pool, at, at + 1), Some(None)));
        assert_eq!([19, 20, 23, 99].map(|len| state.known(len)), [0, 20, 23, 24]);
        // 25 is in the entry of 20.
        state.prepare(&pool, 24, 25).unwrap();
        assert_eq!([20, 21].map(|len| state.known(len)), [0, 21]);
        // Going back and on: what was after it is no longer what these tokens lead to.
        state.truncate(22);
        state.prepare(&pool, 22, 23).unwrap();
        assert_eq!([22, 23, 25].map(|len| state.known(len)), [22, 23, 23]);
    }

    #[test]
    fn a_batch_that_ends_in_its_own_beginnings_entry_overwrites_it() {
        let pool = pool(1);
        let mut state = State::default();
        state.prepare(&pool, 0, 7).unwrap();
        state.prepare(&pool, 7, 7 + 2 * RING).unwrap();
        assert_eq!([7, 17].map(|len| state.known(len)), [0, 17]);
    }

    #[test]
    fn a_fork_shares_until_one_steps_and_a_place_is_free_again_once_nobody_holds_it() {
        let pool = pool(2);
        let mut a = State::default();
        a.prepare(&pool, 0, 3).unwrap();
        let mut b = a.clone();
        assert!(a.wants() && b.wants() && pool.free() == 1);
        assert_eq!(b.prepare(&pool, 3, 4), Some(Some(BlockCopy { from: 0, to: 1 })));
        assert_eq!((a.index(), b.index(), a.wants(), b.known(3)), (0, 1, false, 3));
        let mut c = a.clone();
        assert_eq!(c.prepare(&pool, 3, 4), None, "no place is free");
        assert_eq!((c.index(), c.known(9)), (0, 3), "nothing changed");
        drop(b);
        // From the beginning, nothing needs to be copied.
        assert_eq!(c.prepare(&pool, 0, 2), Some(None));
        assert_eq!((c.index(), c.known(9)), (1, 2));
        c.truncate(1);
        assert_eq!(pool.free(), 1);
    }
}
