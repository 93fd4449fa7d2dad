//! A stream that is written by a separate thread, so that a caller with a line for it never waits.
//! A stopped terminal, or a pipe that nobody reads, costs lines and nothing else.
//!
//! Owns the lines that are not written yet, `LINES_MAX` of them. Further lines are lost, and
//! counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Lines that wait, at most.
pub const LINES_MAX: usize = 1024;
/// How often a caller that waits for a full queue to empty checks it.
const LOOK_EVERY: Duration = Duration::from_millis(5);

enum Item {
    Line(Vec<u8>),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

pub struct Drain {
    queue: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

impl Drain {
    /// `write` gets each line, and how many were lost before it.
    pub fn new(name: &str, write: impl FnMut(&[u8], u64) + Send + 'static) -> Self {
        let (queue, items) = sync_channel(LINES_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let thread = std::thread::Builder::new().name(name.to_owned());
        // Without the thread, all lines are lost.
        let _ = thread.spawn(move || empty(&items, &counted, write));
        Self { queue, lost }
    }

    /// Takes a line, or loses it if the stream is too slow.
    pub fn offer(&self, line: Vec<u8>) {
        if self.queue.try_send(Item::Line(line)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything is written. False if that takes longer than `limit`.
    pub fn flush(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let (sender, done) = sync_channel(1);
        let mut flush = Item::Flush(sender);
        loop {
            match self.queue.try_send(flush) {
                Ok(()) => break,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) if Instant::now() < end => flush = back,
                Err(TrySendError::Full(_)) => return false,
            }
            std::thread::sleep(LOOK_EVERY);
        }
        done.recv_timeout(end.saturating_duration_since(Instant::now())).is_ok()
    }
}

fn empty(items: &Receiver<Item>, lost: &AtomicU64, mut write: impl FnMut(&[u8], u64)) {
    for item in items {
        match item {
            Item::Line(line) => write(&line, lost.swap(0, Ordering::Relaxed)),
            Item::Flush(done) => drop(done.send(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);
    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_stream_that_takes_nothing_costs_lines_only() {
        let (go, held) = channel::<()>();
        let (sender, written) = channel();
        let drain = Drain::new("held", move |line: &[u8], lost| {
            let _ = held.recv();
            let _ = sender.send((line.to_vec(), lost));
        });
        assert!(drain.flush(PATIENCE), "nothing waits");
        // One line is being written; the others wait or are lost.
        for number in 0..2 * LINES_MAX {
            drain.offer(number.to_string().into_bytes());
        }
        assert!(!drain.flush(SOON));
        drop(go);
        assert!(drain.flush(PATIENCE));
        drain.offer(b"last".to_vec());
        assert!(drain.flush(PATIENCE));
        let all: Vec<(Vec<u8>, u64)> = written.try_iter().collect();
        assert_eq!(all[1].0, b"1");
        let lost: u64 = all.iter().map(|(_, lost)| lost).sum();
        assert_eq!(all.len() as u64 + lost, 2 * LINES_MAX as u64 + 1);
        assert!(lost > 0 && all.last().unwrap().0 == b"last");
    }
}
