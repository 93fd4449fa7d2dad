//! Which of the port's connections may be served, and which one gives way to a newcomer. Pure.
//!
//! A connection is silent until a request's headers have arrived, and again once the request is
//! answered. Guests' requests and the owner's have a number of seats each; together they are fewer
//! than the connections. So there is always a silent connection that can give way.
//!
//! Invariant: a newcomer always gets in, and never at the expense of a connection that is being
//! served.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use crate::pace::Pace;

/// Connections at once, of all kinds.
pub const CONNECTIONS_MAX: usize = 256;
/// Requests in service: those without the control API's token, and those of the node's owner.
pub const GUESTS_MAX: usize = 176;
pub const OWNERS_MAX: usize = 64;
const _: () = assert!(GUESTS_MAX + OWNERS_MAX < CONNECTIONS_MAX);

/// Who sends a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    /// Has the control API's token.
    Owner,
    Guest,
}

/// A connection's number, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

/// The connections of one port. `H` is the handle by which a connection is told to close.
pub struct Seats<H> {
    last: u64,
    /// Silent connections by the turn in which they became silent.
    silent: BTreeMap<u64, Id>,
    connections: HashMap<Id, Connection<H>>,
    guests: usize,
    owners: usize,
    /// Requests that wait for a seat: guests' and owners'.
    lines: [Line; 2],
}

/// Requests that wait for a seat of one kind.
#[derive(Default)]
struct Line {
    waiting: usize,
    /// How fast seats become free while they wait.
    pace: Pace,
}

struct Connection<H> {
    close: H,
    /// The turn since which it has been silent; `None` while it is served.
    silent: Option<u64>,
}

impl<H> Seats<H> {
    pub fn new() -> Self {
        let (silent, connections) = (BTreeMap::new(), HashMap::new());
        let lines = Default::default();
        Self { last: 0, silent, connections, guests: 0, owners: 0, lines }
    }

    /// Adds a newcomer. Returns the connection that gives way to it, if any.
    pub fn enter(&mut self, close: H) -> (Id, Option<H>) {
        let gone = (self.connections.len() >= CONNECTIONS_MAX).then(|| self.evict()).flatten();
        self.last += 1;
        let (turn, id) = (self.last, Id(self.last));
        self.silent.insert(turn, id);
        self.connections.insert(id, Connection { close, silent: Some(turn) });
        (id, gone)
    }

    /// Removes the connection that has been silent the longest.
    pub fn evict(&mut self) -> Option<H> {
        let (_, id) = self.silent.pop_first()?;
        self.connections.remove(&id).map(|connection| connection.close)
    }

    /// Call when a request has arrived. False if all seats of its kind are taken.
    pub fn begin(&mut self, id: Id, asker: Asker) -> bool {
        let (taken, max) = self.taken(asker);
        if *taken >= max {
            return false;
        }
        *taken += 1;
        let turn = self.connections.get_mut(&id).and_then(|connection| connection.silent.take());
        if let Some(turn) = turn {
            self.silent.remove(&turn);
        }
        true
    }

    /// Call when a request that had [begun](Self::begin) is answered or its connection is gone.
    pub fn end(&mut self, id: Id, asker: Asker) {
        *self.taken(asker).0 -= 1;
        if let Some(connection) = self.connections.get_mut(&id) {
            self.last += 1;
            connection.silent = Some(self.last);
            self.silent.insert(self.last, id);
        }
    }

    /// A request begins to wait for a seat. Call [`gives_up`](Self::gives_up) when it does not any more.
    pub fn waits(&mut self, asker: Asker, now: Instant) {
        let line = self.line(asker);
        line.waiting += 1;
        line.pace.waits(now);
    }

    /// A request waits no longer: it has a seat, or has gone.
    pub const fn gives_up(&mut self, asker: Asker) {
        let line = self.line(asker);
        line.waiting -= 1;
        if line.waiting == 0 {
            line.pace.nobody_waits();
        }
    }

    /// Call when a seat has become free.
    pub fn freed(&mut self, asker: Asker, now: Instant) {
        let line = self.line(asker);
        line.pace.freed(now, line.waiting > 0);
    }

    /// In how many seconds all who wait now will probably have had a seat.
    pub fn retry_s(&mut self, asker: Asker, now: Instant) -> u64 {
        let line = self.line(asker);
        line.pace.retry_s(now, line.waiting)
    }

    const fn line(&mut self, asker: Asker) -> &mut Line {
        &mut self.lines[asker as usize]
    }

    /// Call when a connection is closed.
    pub fn leave(&mut self, id: Id) {
        if let Some(Connection { silent: Some(turn), .. }) = self.connections.remove(&id) {
            self.silent.remove(&turn);
        }
    }

    /// Whether so many guests are served that the slow ones delay others.
    pub const fn is_crowded(&self) -> bool {
        self.guests > GUESTS_MAX / 4 * 3
    }

    /// Whether any request is in service.
    #[cfg(test)]
    pub const fn is_serving(&self) -> bool {
        self.guests + self.owners > 0
    }

    const fn taken(&mut self, asker: Asker) -> (&mut usize, usize) {
        match asker {
            Asker::Guest => (&mut self.guests, GUESTS_MAX),
            Asker::Owner => (&mut self.owners, OWNERS_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(seats: &mut Seats<usize>, name: usize) -> Id {
        let (id, gone) = seats.enter(name);
        assert_eq!(gone, None);
        id
    }

    #[test]
    fn the_longest_silent_one_gives_way_and_nobody_who_is_served() {
        let mut seats = Seats::new();
        let ids: Vec<Id> = (0..CONNECTIONS_MAX).map(|name| enter(&mut seats, name)).collect();
        // The first is being served, the second was served and has been silent for less long.
        assert!(seats.begin(ids[0], Asker::Guest));
        assert!(seats.begin(ids[1], Asker::Owner));
        seats.end(ids[1], Asker::Owner);
        // The fourth has left by itself.
        seats.leave(ids[3]);
        enter(&mut seats, 1000);
        let others = (4..CONNECTIONS_MAX).chain([1, 1000]);
        for gone in [2].into_iter().chain(others) {
            assert_eq!(seats.enter(2000).1, Some(gone));
        }
        assert_eq!(seats.connections.len(), CONNECTIONS_MAX);
        assert!(seats.connections.contains_key(&ids[0]));
    }

    #[test]
    fn guests_leave_room_for_the_owner_and_for_newcomers() {
        let mut seats = Seats::new();
        let mut serve = |asker| {
            let (id, _) = seats.enter(0);
            let served = seats.begin(id, asker);
            if !served {
                seats.leave(id);
            }
            (id, served, seats.is_crowded())
        };
        let guests: Vec<_> = (0..GUESTS_MAX).map(|_| serve(Asker::Guest)).collect();
        assert!(guests.iter().all(|(_, served, _)| *served));
        assert!(!guests[GUESTS_MAX / 2].2 && guests[GUESTS_MAX - 1].2);
        assert!(!serve(Asker::Guest).1, "no seat is left for guests");
        assert!((0..OWNERS_MAX).all(|_| serve(Asker::Owner).1));
        assert!(!serve(Asker::Owner).1);
        // Newcomers get in all the same, for each other's silence.
        for _ in 0..CONNECTIONS_MAX {
            seats.enter(7);
        }
        assert_eq!(seats.connections.len(), CONNECTIONS_MAX);
        // A request that ends after its connection makes room, too.
        seats.leave(guests[0].0);
        seats.end(guests[0].0, Asker::Guest);
        let (id, gone) = seats.enter(8);
        assert_eq!(gone, None);
        assert!(seats.begin(id, Asker::Guest));
    }

    #[test]
    fn whoever_finds_no_seat_is_told_when_the_line_will_be_over() {
        let (mut seats, mut now) = (Seats::<()>::new(), Instant::now());
        assert_eq!(seats.retry_s(Asker::Guest, now), 1);
        for _ in 0..4 {
            seats.waits(Asker::Guest, now);
        }
        for _ in 0..20 {
            now += std::time::Duration::from_secs(3);
            seats.freed(Asker::Guest, now);
        }
        assert_eq!(seats.retry_s(Asker::Guest, now), 12);
        assert_eq!(seats.retry_s(Asker::Owner, now), 1, "a line of their own");
        for _ in 0..3 {
            seats.gives_up(Asker::Guest);
        }
        assert_eq!(seats.retry_s(Asker::Guest, now), 3);
        seats.gives_up(Asker::Guest);
        seats.waits(Asker::Guest, now + std::time::Duration::from_secs(1000));
        assert_eq!(seats.retry_s(Asker::Guest, now + std::time::Duration::from_secs(1000)), 3);
    }

    #[test]
    fn what_gave_way_may_still_end_what_it_began() {
        let mut seats = Seats::new();
        let id = enter(&mut seats, 1);
        assert_eq!(seats.evict(), Some(1));
        assert_eq!(seats.evict(), None);
        // Its request had just arrived.
        assert!(seats.begin(id, Asker::Guest));
        seats.end(id, Asker::Guest);
        seats.leave(id);
        assert_eq!((seats.guests, seats.silent.len(), seats.connections.len()), (0, 0, 0));
    }
}
