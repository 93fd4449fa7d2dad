//! One direction of a connection: bytes that are on their way, and when they arrive.
//!
//! Invariants: bytes arrive in order; at most [`WINDOW`] of them are on their way. While the
//! direction is cut, nothing arrives, and both ends believe that the other is merely slow.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use bytes::{Buf, Bytes};
use futures::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use super::network::Network;

/// Bytes on their way: more than any line here holds.
const WINDOW: usize = 1024 * 1024;
/// Bytes that one write takes.
const PIECE: usize = 64 * 1024;

pub(super) struct Pipe {
    network: Arc<Network>,
    pub(super) from: usize,
    pub(super) to: usize,
    flow: Mutex<Flow>,
}

struct Flow {
    pieces: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    /// When the last piece arrives.
    last: Instant,
    /// When the writer's farewell arrives.
    ends: Option<Instant>,
    has_reader: bool,
    is_broken: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Changes a flow and wakes whoever that concerns. They are woken once the lock is released: waking a task
/// of a runtime that has ended drops the task, and with it perhaps an end of this very pipe.
fn change<T>(mut flow: MutexGuard<'_, Flow>, change: impl FnOnce(&mut Flow) -> T) -> T {
    let result = change(&mut flow);
    let wakers = [flow.reader.take(), flow.writer.take()];
    drop(flow);
    wakers.into_iter().flatten().for_each(Waker::wake);
    result
}

impl Pipe {
    pub(super) fn new(network: Arc<Network>, from: usize, to: usize) -> Arc<Self> {
        let flow = Flow {
            pieces: VecDeque::new(),
            bytes: 0,
            last: Instant::now(),
            ends: None,
            has_reader: true,
            is_broken: false,
            reader: None,
            writer: None,
        };
        Arc::new(Self { network, from, to, flow: Mutex::new(flow) })
    }

    fn lock(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_cut(&self) -> bool {
        self.network.is_cut(self.from, self.to)
    }

    /// Both ends look again.
    pub(super) fn wake(&self) {
        change(self.lock(), |_| {});
    }

    /// What is on its way is lost, and both ends are told.
    pub(super) fn break_off(&self) {
        change(self.lock(), |flow| {
            flow.is_broken = true;
            flow.pieces.clear();
        });
    }

    /// Flips a bit of what arrives last. False if nothing is on its way.
    pub(super) fn flip(&self) -> bool {
        let mut flow = self.lock();
        let Some((_, piece)) = flow.pieces.back_mut() else { return false };
        let mut bytes = piece.to_vec();
        if let Some(last) = bytes.last_mut() {
            *last ^= 1;
        }
        *piece = bytes.into();
        true
    }

    fn write(&self, cx: &Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let former = self.lock().writer.replace(cx.waker().clone());
        drop(former);
        // After the waker is in place, so that the end of a cut in between is not missed.
        let is_cut = self.is_cut();
        let mut flow = self.lock();
        if flow.is_broken {
            return Poll::Ready(Err(ErrorKind::ConnectionReset.into()));
        }
        if flow.ends.is_some() || !flow.has_reader && !is_cut {
            return Poll::Ready(Err(ErrorKind::BrokenPipe.into()));
        }
        let len = bytes.len().min(PIECE).min(WINDOW - flow.bytes.min(WINDOW));
        if len == 0 {
            return if bytes.is_empty() { Poll::Ready(Ok(0)) } else { Poll::Pending };
        }
        let at = self.network.arrival(self.from, self.to, len).max(flow.last);
        flow.last = at;
        flow.bytes += len;
        flow.pieces.push_back((at, Bytes::copy_from_slice(&bytes[..len])));
        let reader = flow.reader.take();
        drop(flow);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(Ok(len))
    }

    fn close(&self) {
        change(self.lock(), |flow| {
            if flow.ends.is_none() {
                let at = self.network.arrival(self.from, self.to, 0).max(flow.last);
                flow.ends = Some(at);
            }
        });
    }

    /// When there is something to read, or the end; at once if it has broken.
    fn next(&self, cx: &Context<'_>) -> Poll<Instant> {
        let former = self.lock().reader.replace(cx.waker().clone());
        drop(former);
        let is_cut = self.is_cut();
        let flow = self.lock();
        if flow.is_broken {
            return Poll::Ready(Instant::now());
        }
        match flow.pieces.front().map(|(at, _)| *at).or(flow.ends) {
            Some(at) if !is_cut => Poll::Ready(at),
            _ => Poll::Pending,
        }
    }

    /// Takes what has arrived; 0 at the end.
    fn take(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut flow = self.lock();
        if flow.is_broken {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let Some((_, piece)) = flow.pieces.front_mut() else { return Ok(0) };
        let len = piece.len().min(buffer.len());
        piece.copy_to_slice(&mut buffer[..len]);
        if piece.is_empty() {
            flow.pieces.pop_front();
        }
        flow.bytes -= len;
        let writer = flow.writer.take();
        drop(flow);
        if let Some(writer) = writer {
            writer.wake();
        }
        self.network.received(self.to, len);
        Ok(len)
    }
}

/// One end of a connection.
pub(super) struct End {
    input: Arc<Pipe>,
    output: Arc<Pipe>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl End {
    pub(super) const fn new(input: Arc<Pipe>, output: Arc<Pipe>) -> Self {
        Self { input, output, wait: None }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.output.close();
        change(self.input.lock(), |flow| flow.has_reader = false);
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let at = ready!(self.input.next(cx));
            if at <= Instant::now() {
                self.wait = None;
                return Poll::Ready(self.input.take(buffer));
            }
            let wait =
                self.wait.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at.into())));
            if wait.deadline() != at.into() {
                wait.as_mut().reset(at.into());
            }
            ready!(wait.as_mut().poll(cx));
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.output.write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.output.close();
        Poll::Ready(Ok(()))
    }
}
