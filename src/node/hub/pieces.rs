//! Which pieces of the weight files are here, which one comes next, and which may go. Pure.
//!
//! A piece is fetched ahead of its use only within a bound; one that the conversion waits for always
//! comes next. It may go once its file's hash has covered it and everything that was made of it is
//! durable. Invariant: only pieces that went are ever fetched twice, and only if they are read again.

use std::collections::VecDeque;

/// A file's number and a piece's number in it.
pub type At = (usize, usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Missing,
    /// Being fetched.
    Claimed,
    Here,
    /// It was here, and its bytes are gone.
    Gone,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    state: State,
    /// Stretches that are still needed and have some of it.
    wanted: u32,
    /// It was read before the plan was known, so it is read again at the next start.
    kept: bool,
}

/// Pieces of one file, one after another, to be fetched by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub file: usize,
    pub first: usize,
    pub count: usize,
}

/// Bounds.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of a piece.
    pub piece: u64,
    /// Pieces of a run.
    pub run: usize,
    /// Bytes fetched ahead of their use.
    pub ahead: u64,
}

struct File {
    /// Bytes.
    size: u64,
    pieces: Vec<Piece>,
    /// Pieces that its hash has covered, from the first on.
    hashed: usize,
}

/// See the module.
pub struct Pieces {
    bounds: Bounds,
    files: Vec<File>,
    urgent: VecDeque<At>,
    is_planned: bool,
    /// In the order of their use, once that is known.
    order: Vec<At>,
    /// How many of `order` need not be looked at again.
    passed: usize,
    /// Bytes that are here or coming, and still wanted.
    ahead: u64,
}

impl Pieces {
    /// Files by their sizes in bytes.
    pub fn new(bounds: Bounds, sizes: &[u64]) -> Self {
        let piece = Piece { state: State::Missing, wanted: 0, kept: false };
        let file = |&size: &u64| {
            let count = usize::try_from(size.div_ceil(bounds.piece)).unwrap_or(usize::MAX);
            File { size, pieces: vec![piece; count], hashed: 0 }
        };
        let files = sizes.iter().map(file).collect();
        Self {
            bounds,
            files,
            urgent: VecDeque::new(),
            is_planned: false,
            order: Vec::new(),
            passed: 0,
            ahead: 0,
        }
    }

    /// The bytes of a piece: the first one, and the one behind the last.
    pub fn range(&self, (file, piece): At) -> (u64, u64) {
        let start = piece as u64 * self.bounds.piece;
        (start, (start + self.bounds.piece).min(self.files[file].size))
    }

    fn len(&self, at: At) -> u64 {
        let (start, end) = self.range(at);
        end - start
    }

    fn covering(&self, file: usize, start: u64, bytes: u64) -> std::ops::Range<usize> {
        if bytes == 0 {
            return 0..0;
        }
        let piece = self.bounds.piece;
        let count = self.files[file].pieces.len();
        let end = ((start + bytes).div_ceil(piece) as usize).min(count);
        ((start / piece) as usize).min(end)..end
    }

    pub fn state(&self, (file, piece): At) -> State {
        self.files[file].pieces[piece].state
    }

    /// Takes over what an earlier run left.
    pub fn restore(&mut self, (file, piece): At, state: State) {
        self.files[file].pieces[piece].state = state;
    }

    pub fn restore_hashed(&mut self, file: usize, pieces: usize) {
        let file = &mut self.files[file];
        file.hashed = pieces.min(file.pieces.len());
    }

    /// Whether these bytes are here. If not, they come next.
    pub fn need(&mut self, file: usize, start: u64, bytes: u64) -> bool {
        let mut all = true;
        for number in self.covering(file, start, bytes) {
            let is_early = !self.is_planned;
            let piece = &mut self.files[file].pieces[number];
            piece.kept |= is_early;
            match piece.state {
                State::Here => continue,
                State::Claimed => {}
                State::Missing | State::Gone => {
                    piece.state = State::Missing;
                    if !self.urgent.contains(&(file, number)) {
                        self.urgent.push_back((file, number));
                    }
                }
            }
            all = false;
        }
        all
    }

    /// What will be used, in this order: files, first bytes and numbers of bytes. Everything else
    /// follows, for the hashes.
    pub fn plan(&mut self, order: &[(usize, u64, u64)]) {
        let mut planned = Vec::new();
        for &(file, start, bytes) in order {
            for piece in self.covering(file, start, bytes) {
                let entry = &mut self.files[file].pieces[piece];
                if entry.wanted == 0 {
                    planned.push((file, piece));
                }
                entry.wanted += 1;
            }
        }
        for (number, file) in self.files.iter().enumerate() {
            let unused = file.pieces.iter().enumerate().filter(|(_, piece)| piece.wanted == 0);
            planned.extend(unused.map(|(piece, _)| (number, piece)));
        }
        let counts =
            |piece: &Piece| piece.wanted > 0 && matches!(piece.state, State::Here | State::Claimed);
        let mut ahead = 0;
        for (number, file) in self.files.iter().enumerate() {
            for (piece, _) in file.pieces.iter().enumerate().filter(|(_, piece)| counts(piece)) {
                ahead += self.len((number, piece));
            }
        }
        (self.order, self.passed, self.ahead) = (planned, 0, ahead);
        self.is_planned = true;
    }

    pub const fn is_planned(&self) -> bool {
        self.is_planned
    }

    /// The next pieces to fetch, which count as claimed from here on.
    pub fn next_run(&mut self) -> Option<Run> {
        while let Some(at) = self.urgent.pop_front() {
            if self.state(at) == State::Missing {
                return Some(self.claim(at, |_, _| true));
            }
        }
        let order = std::mem::take(&mut self.order);
        while order.get(self.passed).is_some_and(|at| self.state(*at) != State::Missing) {
            self.passed += 1;
        }
        let run = match order.get(self.passed) {
            Some(&at) if self.ahead < self.bounds.ahead => {
                let passed = self.passed;
                let follows = |at: At, count: usize| order.get(passed + count) == Some(&at);
                Some(self.claim(at, follows))
            }
            _ => None,
        };
        self.order = order;
        run
    }

    /// Claims a piece, and those behind it that are missing and may come with it.
    fn claim(&mut self, first: At, may: impl Fn(At, usize) -> bool) -> Run {
        let (file, start) = first;
        let most = if self.is_planned { self.bounds.run } else { 1 };
        let mut count = 0;
        while count < most && start + count < self.files[file].pieces.len() {
            let at = (file, start + count);
            if self.state(at) != State::Missing || count > 0 && !may(at, count) {
                break;
            }
            self.set(at, State::Claimed);
            count += 1;
        }
        Run { file, first: start, count }
    }

    fn set(&mut self, at: At, state: State) {
        let counts = |state| matches!(state, State::Here | State::Claimed);
        let bytes = self.len(at);
        let piece = &mut self.files[at.0].pieces[at.1];
        if piece.wanted > 0 {
            match (counts(piece.state), counts(state)) {
                (false, true) => self.ahead += bytes,
                (true, false) => self.ahead = self.ahead.saturating_sub(bytes),
                _ => {}
            }
        }
        piece.state = state;
    }

    pub fn arrived(&mut self, at: At) {
        self.set(at, State::Here);
    }

    /// What was made of these bytes is durable. Returns the pieces that may go.
    pub fn release(&mut self, file: usize, start: u64, bytes: u64) -> Vec<At> {
        let mut free = Vec::new();
        for number in self.covering(file, start, bytes) {
            let length = self.len((file, number));
            let piece = &mut self.files[file].pieces[number];
            if piece.wanted == 1 && matches!(piece.state, State::Here | State::Claimed) {
                self.ahead = self.ahead.saturating_sub(length);
            }
            piece.wanted = piece.wanted.saturating_sub(1);
            free.extend(self.free((file, number)));
        }
        free
    }

    /// The next piece for a file's hash, if it is here.
    pub fn to_hash(&self, file: usize) -> Option<At> {
        let of = &self.files[file];
        let next = of.pieces.get(of.hashed)?;
        (next.state == State::Here).then_some((file, of.hashed))
    }

    /// A file's hash has covered one more piece. Returns it if it may go.
    pub fn hashed(&mut self, file: usize) -> Option<At> {
        let at = (file, self.files[file].hashed);
        self.files[file].hashed += 1;
        self.free(at)
    }

    /// Pieces that a file's hash has covered.
    pub fn count_hashed(&self, file: usize) -> usize {
        self.files[file].hashed
    }

    pub fn is_hashed(&self, file: usize) -> bool {
        self.files[file].hashed == self.files[file].pieces.len()
    }

    fn free(&self, at: At) -> Option<At> {
        let file = &self.files[at.0];
        let piece = file.pieces[at.1];
        let is_free = self.is_planned
            && piece.state == State::Here
            && piece.wanted == 0
            && !piece.kept
            && at.1 < file.hashed;
        is_free.then_some(at)
    }

    pub fn gone(&mut self, at: At) {
        self.set(at, State::Gone);
    }

    /// Bytes that have arrived, and all bytes.
    pub fn counts(&self) -> (u64, u64) {
        let mut done = 0;
        for (number, file) in self.files.iter().enumerate() {
            for (piece, entry) in file.pieces.iter().enumerate() {
                if matches!(entry.state, State::Here | State::Gone) {
                    done += self.len((number, piece));
                }
            }
        }
        (done, self.files.iter().map(|file| file.size).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces() -> Pieces {
        Pieces::new(Bounds { piece: 10, run: 3, ahead: 40 }, &[95, 25])
    }

    fn fetch(pieces: &mut Pieces) -> Option<(usize, usize, usize)> {
        let Run { file, first, count } = pieces.next_run()?;
        (first..first + count).for_each(|piece| pieces.arrived((file, piece)));
        Some((file, first, count))
    }

    #[test]
    fn nothing_is_fetched_unasked_before_the_plan_and_then_in_its_order_within_bounds() {
        let mut pieces = pieces();
        assert_eq!(pieces.range((0, 9)), (90, 95));
        assert_eq!(pieces.next_run(), None);
        assert!(!pieces.need(0, 0, 4));
        assert_eq!(fetch(&mut pieces), Some((0, 0, 1)), "a header's piece alone");
        assert!(pieces.need(0, 0, 4) && pieces.next_run().is_none());
        pieces.plan(&[(1, 5, 10), (0, 12, 40), (0, 30, 5)]);
        assert_eq!(fetch(&mut pieces), Some((1, 0, 2)));
        assert_eq!(fetch(&mut pieces), Some((0, 1, 3)));
        assert_eq!(fetch(&mut pieces), None, "as much as may lie ahead");
        assert!(!pieces.need(0, 80, 15), "what is waited for comes in any case");
        assert_eq!(fetch(&mut pieces), Some((0, 8, 2)));
        assert_eq!(pieces.release(1, 5, 10), [], "no hash has covered it");
        assert_eq!(fetch(&mut pieces), Some((0, 4, 2)), "the last planned one, and what follows");
        while fetch(&mut pieces).is_some() {}
        pieces.release(0, 12, 40);
        while fetch(&mut pieces).is_some() {}
        assert_eq!(pieces.counts(), (120, 120), "the rest comes for the hashes");
    }

    #[test]
    fn a_piece_goes_once_it_is_hashed_and_nothing_needs_it() {
        let mut pieces = pieces();
        pieces.need(0, 0, 4);
        fetch(&mut pieces);
        pieces.plan(&[(0, 12, 20), (0, 15, 2), (0, 40, 10)]);
        while fetch(&mut pieces).is_some() {}
        assert_eq!(pieces.to_hash(0), Some((0, 0)));
        assert_eq!(pieces.hashed(0), None, "the header is read at each start");
        assert_eq!(pieces.hashed(0), None);
        assert_eq!(pieces.release(0, 12, 20), [], "another stretch needs its first piece");
        assert_eq!(pieces.release(0, 15, 2), [(0, 1)]);
        pieces.gone((0, 1));
        assert_eq!(pieces.hashed(0), Some((0, 2)));
        assert_eq!(pieces.hashed(0), Some((0, 3)));
        assert!(!pieces.need(0, 12, 1), "what went is fetched again if it is read again");
        assert_eq!(fetch(&mut pieces), Some((0, 1, 1)));
    }
}
