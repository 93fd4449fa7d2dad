//! The connections of the HTTP port: a bounded number, none held for ever by a reader that
//! does not read.
//!
//! Invariant: a write that moves no byte for `STALL_MAX` fails, and with it the connection; for
//! `STALL_PRESSED_MAX` while others wait for a reply's place ([`Pressure`]).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// Connections at once; further ones wait in the system's queue.
const CONNECTIONS_MAX: usize = 256;
/// How long a reader may take nothing. A browser that is busy catches up within seconds.
const STALL_MAX: Duration = Duration::from_secs(20);
/// The same while others wait for what this reader holds.
pub const STALL_PRESSED_MAX: Duration = Duration::from_secs(2);
/// A write that waits looks this often whether others wait.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How many requests wait for a place that readers hold.
#[derive(Clone, Default)]
pub struct Pressure(Arc<AtomicUsize>);

impl Pressure {
    /// Counts one more until what is returned is dropped.
    pub fn wait(&self) -> Waiting {
        self.0.fetch_add(1, Ordering::Relaxed);
        Waiting(self.clone())
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

/// One request that waits.
pub struct Waiting(Pressure);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a write may wait: without pressure, and with it.
#[derive(Debug, Clone, Copy)]
struct Patience {
    stall: Duration,
    pressed: Duration,
    look: Duration,
}

const PATIENCE: Patience =
    Patience { stall: STALL_MAX, pressed: STALL_PRESSED_MAX, look: LOOK_EVERY };

/// Accepts up to `CONNECTIONS_MAX` connections.
pub struct Connections {
    listener: TcpListener,
    room: Arc<Semaphore>,
    pressure: Pressure,
}

impl Connections {
    pub fn new(listener: TcpListener, pressure: Pressure) -> Self {
        Self { listener, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)), pressure }
    }
}

impl Listener for Connections {
    type Io = Impatient<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.room).acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Impatient::new(stream, PATIENCE, self.pressure.clone(), permit), address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A stream whose writes must move.
pub struct Impatient<S> {
    stream: S,
    patience: Patience,
    pressure: Pressure,
    /// Since when a write waits, and when to look next.
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl<S> Impatient<S> {
    fn new(
        stream: S,
        patience: Patience,
        pressure: Pressure,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self { stream, patience, pressure, waiting: None, _permit: permit }
    }

    fn moved<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.waiting = None;
            return done;
        }
        let Patience { stall, pressed, look } = self.patience;
        let (since, timer) = self
            .waiting
            .get_or_insert_with(|| (Instant::now(), Box::pin(tokio::time::sleep(look))));
        while timer.as_mut().poll(cx).is_ready() {
            let limit = if self.pressure.is_on() { pressed } else { stall };
            if since.elapsed() >= limit {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            timer.as_mut().reset(Instant::now() + look);
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
        self.moved(cx, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.moved(cx, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(cx);
        self.moved(cx, done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn patience(stall: u64, pressed: u64) -> Patience {
        let [stall, pressed, look] = [stall, pressed, 5].map(Duration::from_millis);
        Patience { stall, pressed, look }
    }

    #[tokio::test]
    async fn a_reader_that_holds_what_others_wait_for_is_cut_off_sooner() {
        let (near, _far) = tokio::io::duplex(1000);
        let pressure = Pressure::default();
        let mut near = Impatient::new(near, patience(60_000, 20), pressure.clone(), None);
        let write = near.write_all(&[7; 5000]);
        tokio::pin!(write);
        // Nobody waits, or no longer: it may take its time.
        drop(pressure.wait());
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut write).await.is_err());
        let _waiting = pressure.wait();
        let soon = tokio::time::timeout(Duration::from_secs(30), &mut write).await;
        assert_eq!(soon.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_is_cut_off() {
        let (near, mut far) = tokio::io::duplex(1000);
        let mut near = Impatient::new(near, patience(20, 20), Pressure::default(), None);
        let error = near.write_all(&[7; 5000]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // What the pipe took before is there, and once there is room writes go on.
        far.read_exact(&mut [0; 1000]).await.unwrap();
        near.write_all(&[8; 1000]).await.unwrap();
    }
}
