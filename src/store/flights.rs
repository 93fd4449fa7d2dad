//! Single flight: readers of one range share one fetch.
//!
//! A flight is a shared future that its waiters poll. Dropping one waiter does
//! not affect the others; dropping the last one cancels the fetch. A reader
//! joins a flight only if that flight is at least as urgent and its deadline is
//! no later than the reader's. Otherwise the reader starts a flight of its own,
//! which later readers join.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};

use super::{ByteRange, Found, ReadError, ReadRequest, ShardId};

type Key = (ShardId, ByteRange);
type Outcome = Result<Found, Arc<ReadError>>;

/// A read that may have other waiters.
pub(super) type Flight = Shared<BoxFuture<'static, Outcome>>;

/// The reads in flight.
#[derive(Default)]
pub(super) struct Flights {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    in_flight: HashMap<Key, Entry>,
    started: u64,
}

struct Entry {
    number: u64,
    request: ReadRequest,
    flight: WeakShared<BoxFuture<'static, Outcome>>,
}

impl Flights {
    /// The flight to wait for, and whether another reader started it.
    pub fn join_or_start(
        self: &Arc<Self>,
        request: ReadRequest,
        start: impl FnOnce() -> BoxFuture<'static, Result<Found, ReadError>>,
    ) -> (Flight, bool) {
        let key = (request.shard, request.range);
        let mut table = self.table();
        let running = table.in_flight.get(&key).and_then(|entry| {
            let flight = entry.flight.upgrade()?;
            Some((flight, serves(&entry.request, &request)))
        });
        // Dropping the last handle of a flight takes the table's lock. So a flight
        // that is not joined is kept until the lock is released.
        let _not_joined = match running {
            Some((flight, true)) => return (flight, true),
            other => other,
        };
        table.started += 1;
        let removal = Removal { flights: Arc::clone(self), key, number: table.started };
        let work = start();
        let flight = async move {
            let outcome = work.await.map_err(Arc::new);
            drop(removal);
            outcome
        }
        .boxed()
        .shared();
        if let Some(weak) = flight.downgrade() {
            let entry = Entry { number: table.started, request, flight: weak };
            table.in_flight.insert(key, entry);
        }
        drop(table);
        (flight, false)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.table().in_flight.len()
    }
}

/// Whether waiting for `running` is as good as starting `wanted`.
fn serves(running: &ReadRequest, wanted: &ReadRequest) -> bool {
    let gives_up_in_time = match (running.deadline, wanted.deadline) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(running), Some(wanted)) => running <= wanted,
    };
    running.priority <= wanted.priority && gives_up_in_time
}

/// Removes a flight from the table when it is finished or cancelled.
struct Removal {
    flights: Arc<Flights>,
    key: Key,
    number: u64,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut table = self.flights.table();
        if table.in_flight.get(&self.key).is_some_and(|entry| entry.number == self.number) {
            table.in_flight.remove(&self.key);
        }
    }
}

/// A waiter's own copy of a shared error.
pub(super) fn copy_error(error: &ReadError) -> ReadError {
    match error {
        ReadError::NotFound { shard, waited } => {
            ReadError::NotFound { shard: *shard, waited: *waited }
        }
        ReadError::Corrupt { shard, detail } => {
            ReadError::Corrupt { shard: *shard, detail: detail.clone() }
        }
        ReadError::Deadline { shard, waited, detail } => {
            ReadError::Deadline { shard: *shard, waited: *waited, detail: detail.clone() }
        }
        ReadError::Overloaded(what) => ReadError::Overloaded(what.clone()),
        ReadError::Refused(what) => ReadError::Refused(what.clone()),
        ReadError::OutOfRange { shard, range, size } => {
            ReadError::OutOfRange { shard: *shard, range: *range, size: *size }
        }
        ReadError::Io { what, source } => ReadError::Io {
            what: what.clone(),
            source: std::io::Error::new(source.kind(), source.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytes::Bytes;

    use super::super::{Priority, Tier};
    use super::*;

    fn request(priority: Priority, deadline: Option<Instant>) -> ReadRequest {
        let range = ByteRange::new(0, 1).unwrap();
        ReadRequest { shard: ShardId::of(b"x"), range, priority, deadline }
    }

    fn found() -> Result<Found, ReadError> {
        Ok(Found { bytes: Bytes::from_static(b"x"), tier: Tier::Peer })
    }

    #[test]
    fn a_flight_is_joined_only_if_it_is_as_urgent_and_ends_in_time() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        use Priority::{Bulk, Prefetch, Token};
        for (running, wanted, joined) in [
            (request(Token, None), request(Token, None), true),
            (request(Token, None), request(Bulk, None), true),
            (request(Prefetch, None), request(Token, None), false),
            (request(Token, None), request(Token, Some(now)), false),
            (request(Token, Some(now)), request(Token, Some(later)), true),
            (request(Token, Some(later)), request(Token, Some(now)), false),
            (request(Token, Some(now)), request(Token, None), true),
        ] {
            let flights = Arc::new(Flights::default());
            let (first, _) = flights.join_or_start(running, || async { found() }.boxed());
            let (_second, was_joined) = flights.join_or_start(wanted, || async { found() }.boxed());
            assert_eq!(was_joined, joined, "{running:?} then {wanted:?}");
            drop(first);
        }
    }

    #[tokio::test]
    async fn finished_and_cancelled_flights_leave_the_table() {
        let flights = Arc::new(Flights::default());
        let token = request(Priority::Token, None);
        let (flight, _) = flights.join_or_start(token, || async { found() }.boxed());
        assert_eq!(flights.len(), 1);
        assert_eq!(flight.await.unwrap().bytes, "x");
        assert_eq!(flights.len(), 0);
        // The first is never polled and is superseded by a more urgent one; then both are dropped.
        let bulk = request(Priority::Bulk, None);
        let (slow, _) = flights.join_or_start(bulk, || std::future::pending().boxed());
        let (fast, joined) = flights.join_or_start(token, || std::future::pending().boxed());
        assert!(!joined);
        drop(slow);
        assert_eq!(flights.len(), 1, "the newer flight stays");
        drop(fast);
        assert_eq!(flights.len(), 0);
    }
}
