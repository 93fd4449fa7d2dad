//! A multiplexer over a socket whose incoming bytes are signs of life.
//!
//! A stream that its reader gave up leaves bytes behind: what the sender had passed to its system
//! before it heard of that. On a slow line they arrive for half a minute, nothing else gets through
//! meanwhile, and no stream counts them. So they are counted below the multiplexer.
//!
//! Invariant: only bytes that passed authentication count, so nobody else can feign the peer's life.

use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade};
use libp2p::yamux;

use crate::activity::Activity;
use crate::options::CONNECTION_STREAMS_MAX;

/// The multiplexer's upgrade for a connection to the peer of this activity.
#[derive(Clone)]
pub(crate) struct Counted {
    multiplexing: yamux::Config,
    activity: Arc<Activity>,
}

impl Counted {
    pub(crate) fn new(activity: Arc<Activity>) -> Self {
        let mut multiplexing = yamux::Config::default();
        multiplexing.set_max_num_streams(CONNECTION_STREAMS_MAX);
        Self { multiplexing, activity }
    }
}

impl UpgradeInfo for Counted {
    type Info = <yamux::Config as UpgradeInfo>::Info;
    type InfoIter = <yamux::Config as UpgradeInfo>::InfoIter;

    fn protocol_info(&self) -> Self::InfoIter {
        self.multiplexing.protocol_info()
    }
}

impl<C> InboundConnectionUpgrade<C> for Counted
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = yamux::Muxer<CountedSocket<C>>;
    type Error = io::Error;
    type Future = <yamux::Config as InboundConnectionUpgrade<CountedSocket<C>>>::Future;

    fn upgrade_inbound(self, socket: C, info: Self::Info) -> Self::Future {
        let socket = CountedSocket { inner: socket, activity: self.activity };
        self.multiplexing.upgrade_inbound(socket, info)
    }
}

impl<C> OutboundConnectionUpgrade<C> for Counted
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Output = yamux::Muxer<CountedSocket<C>>;
    type Error = io::Error;
    type Future = <yamux::Config as OutboundConnectionUpgrade<CountedSocket<C>>>::Future;

    fn upgrade_outbound(self, socket: C, info: Self::Info) -> Self::Future {
        let socket = CountedSocket { inner: socket, activity: self.activity };
        self.multiplexing.upgrade_outbound(socket, info)
    }
}

/// An encrypted socket.
pub(crate) struct CountedSocket<C> {
    inner: C,
    activity: Arc<Activity>,
}

impl<C> CountedSocket<C> {
    fn count(&self, done: &Poll<io::Result<usize>>) {
        if matches!(done, Poll::Ready(Ok(bytes)) if *bytes > 0) {
            self.activity.came();
        }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for CountedSocket<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.count(&done);
        done
    }

    fn poll_read_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.inner).poll_read_vectored(cx, bufs);
        self.count(&done);
        done
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for CountedSocket<C> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use futures::{AsyncReadExt, FutureExt};

    use super::*;
    use crate::PeerId;
    use crate::activity::Activities;

    #[test]
    fn bytes_count_and_an_end_does_not() {
        let all = Activities::default();
        let peer = PeerId::from_seed([1; 32]);
        for (sent, alive) in [(&b"a"[..], true), (b"", false)] {
            let mut socket = CountedSocket { inner: Cursor::new(sent), activity: all.of(peer) };
            let mut got = Vec::new();
            socket.read_to_end(&mut got).now_or_never().unwrap().unwrap();
            assert_eq!((&got[..], all.of(peer).is_alive(1000)), (sent, alive));
            all.forget(peer);
        }
    }
}
