//! A stream whose reader must keep up.
//!
//! Invariant: while bytes wait for a reader, it takes [`RATE_MIN`] over every [`STALL_MAX`], or the
//! write fails, and the connection with it. While requests wait for places that readers hold
//! ([`Pressure`]), it must take [`PRESSED_BYTES_MIN`] in [`STALL_PRESSED_MAX`].

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// How long a reader may be slower than [`RATE_MIN`]. A busy browser catches up within seconds.
pub const STALL_MAX: Duration = Duration::from_secs(20);
/// Bytes per second that a reader must take.
pub const RATE_MIN: u64 = 32 * 1024;
/// The same while others wait, and the bytes that a reader must take in that time.
pub const STALL_PRESSED_MAX: Duration = Duration::from_secs(2);
pub const PRESSED_BYTES_MIN: u64 = 512 * 1024;
/// How often a waiting write checks whether others wait.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The number of requests that wait for places that readers hold.
#[derive(Clone, Default)]
pub struct Pressure(Arc<AtomicUsize>);

impl Pressure {
    /// Counts one more request until the returned value is dropped.
    pub fn wait(&self) -> Waiting {
        self.0.fetch_add(1, Ordering::Relaxed);
        Waiting(self.clone())
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// One waiting request.
pub struct Waiting(Pressure);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a reader must take: a number of bytes in a time.
#[derive(Debug, Clone, Copy)]
struct Pace {
    within: Duration,
    bytes: u64,
}

/// How long a write may wait: without pressure, and with it.
#[derive(Debug, Clone, Copy)]
struct Patience {
    usual: Pace,
    pressed: Pace,
    look: Duration,
}

const PATIENCE: Patience = Patience {
    usual: Pace { within: STALL_MAX, bytes: RATE_MIN * STALL_MAX.as_secs() },
    pressed: Pace { within: STALL_PRESSED_MAX, bytes: PRESSED_BYTES_MIN },
    look: LOOK_EVERY,
};

/// The period over which a reader is measured.
struct Stretch {
    since: Instant,
    taken: u64,
}

impl Stretch {
    /// Whether the reader is too slow. After a period in which it kept up, a new one begins.
    fn is_too_slow(&mut self, now: Instant, pace: Pace) -> bool {
        if now - self.since < pace.within {
            return false;
        }
        let too_slow = self.taken < pace.bytes;
        *self = Self { since: now, taken: 0 };
        too_slow
    }
}

/// A stream whose writes must make progress.
pub struct Impatient<S> {
    stream: S,
    patience: Patience,
    pressure: Pressure,
    /// From the first write that waits until everything is written.
    stretch: Option<(Stretch, Pin<Box<Sleep>>)>,
}

impl<S> Impatient<S> {
    pub fn new(stream: S, pressure: Pressure) -> Self {
        Self::with(stream, PATIENCE, pressure)
    }

    const fn with(stream: S, patience: Patience, pressure: Pressure) -> Self {
        Self { stream, patience, pressure, stretch: None }
    }

    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        done: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match (&done, &mut self.stretch) {
            (Poll::Ready(Ok(bytes)), Some((stretch, _))) => stretch.taken += *bytes as u64,
            (Poll::Pending, _) => return self.wait(cx).map(Err),
            _ => {}
        }
        done
    }

    /// Call when a write waits. Ready if it has waited for too long.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Patience { usual, pressed, look } = self.patience;
        let (stretch, timer) = self.stretch.get_or_insert_with(|| {
            let stretch = Stretch { since: Instant::now(), taken: 0 };
            (stretch, Box::pin(tokio::time::sleep(look)))
        });
        while timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let pace = if self.pressure.is_on() { pressed } else { usual };
            if stretch.is_too_slow(now, pace) {
                return Poll::Ready(io::ErrorKind::TimedOut.into());
            }
            timer.as_mut().reset(now + look);
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(cx, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(cx, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Called once everything before it is written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(cx);
        match done {
            Poll::Pending => self.wait(cx).map(Err),
            Poll::Ready(_) => {
                self.stretch = None;
                done
            }
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const fn millis(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    const fn patience(usual: u64, pressed: u64) -> Patience {
        Patience {
            usual: Pace { within: millis(usual), bytes: 1 },
            pressed: Pace { within: millis(pressed), bytes: 1 },
            look: millis(5),
        }
    }

    /// After how many seconds, within two minutes, a reader with this many bytes per second is too
    /// slow.
    fn too_slow_after(rate: u64, pace: Pace) -> Option<u64> {
        let began = Instant::now();
        let mut stretch = Stretch { since: began, taken: 0 };
        (1..=120).find(|second| {
            stretch.taken += rate;
            stretch.is_too_slow(began + Duration::from_secs(*second), pace)
        })
    }

    #[test]
    fn a_reader_takes_so_much_in_every_stretch() {
        let Patience { usual, pressed, .. } = PATIENCE;
        for (rate, pace, after) in [
            (0, usual, Some(20)),
            (1, usual, Some(20)),
            (RATE_MIN - 1, usual, Some(20)),
            (RATE_MIN, usual, None),
            (0, pressed, Some(2)),
            (RATE_MIN, pressed, Some(2)),
            (PRESSED_BYTES_MIN / 2, pressed, None),
        ] {
            assert_eq!(too_slow_after(rate, pace), after, "{rate} {pace:?}");
        }
        // Bytes taken earlier do not excuse taking none now.
        let began = Instant::now();
        let mut stretch = Stretch { since: began, taken: 1 << 30 };
        assert!(!stretch.is_too_slow(began + usual.within, usual));
        assert!(!stretch.is_too_slow(began + usual.within + pressed.within / 2, pressed));
        assert!(stretch.is_too_slow(began + usual.within + pressed.within, pressed));
    }

    #[tokio::test]
    async fn a_reader_that_holds_what_others_wait_for_is_cut_off_sooner() {
        let (near, _far) = tokio::io::duplex(1000);
        let pressure = Pressure::default();
        let mut near = Impatient::with(near, patience(60_000, 20), pressure.clone());
        let write = near.write_all(&[7; 5000]);
        tokio::pin!(write);
        // While nobody waits, or no longer waits, it may take its time.
        drop(pressure.wait());
        assert!(tokio::time::timeout(millis(100), &mut write).await.is_err());
        let _waiting = pressure.wait();
        let soon = tokio::time::timeout(Duration::from_secs(30), &mut write).await;
        assert_eq!(soon.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_is_cut_off() {
        let (near, mut far) = tokio::io::duplex(1000);
        let mut near = Impatient::with(near, patience(20, 20), Pressure::default());
        let error = near.write_all(&[7; 5000]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // The bytes that the pipe took before are there, and writes continue once there is room.
        far.read_exact(&mut [0; 1000]).await.unwrap();
        near.write_all(&[8; 1000]).await.unwrap();
        near.flush().await.unwrap();
        assert!(near.stretch.is_none(), "it is measured anew");
    }
}
