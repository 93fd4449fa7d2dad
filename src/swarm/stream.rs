//! A byte stream to a peer with tokio's traits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use crate::activity::Activity;

/// One multiplexed stream. Dropping it resets it. Closing it has no meaning:
/// protocols over it carry their own lengths.
pub struct Stream {
    inner: Compat<libp2p::Stream>,
    relayed: bool,
    activity: Arc<Activity>,
}

impl Stream {
    /// `activity` is its peer's.
    pub(crate) fn new(stream: libp2p::Stream, relayed: bool, activity: Arc<Activity>) -> Self {
        Self { inner: stream.compat(), relayed, activity }
    }

    /// Whether it goes through a relay, which limits its duration and bytes.
    pub const fn is_relayed(&self) -> bool {
        self.relayed
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let done = Pin::new(&mut self.inner).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.read();
        }
        done
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.inner).poll_write(cx, buf);
        if matches!(done, Poll::Ready(Ok(bytes)) if bytes > 0) {
            self.activity.wrote();
        }
        done
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
