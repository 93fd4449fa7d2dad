//! One browser's connection: streams over data channels, and how its end is detected.
//!
//! The parts of a library connection reference each other, so only closing frees them. Dropping a
//! connection, however far it got, therefore closes it. When the browser closes, the association
//! under the data channels ends, but the library reports that to nobody. So there is a channel
//! that exists on this side only and is always being read: its read ends with the association.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p_webrtc_utils::{DropListener, MAX_MSG_LEN, Stream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};
use webrtc::data::data_channel::{DataChannel, PollDataChannel};
use webrtc::data_channel::RTCDataChannel;
use webrtc::data_channel::data_channel_init::RTCDataChannelInit;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::peer_connection_state::RTCPeerConnectionState as State;

use super::clients::ClientSlot;
use super::flush::FlushedStream;
use crate::options::{WEBRTC_CLOSE_TIMEOUT, WEBRTC_OPENED_MAX};

/// The number of the channel that only this side has, above all numbers that browsers use.
const WATCH_CHANNEL: u16 = 65_534;

type Channel = Compat<PollDataChannel>;

/// A library connection that is closed when this is dropped. Its client slot is released after
/// that.
pub(crate) struct ClosedOnDrop {
    connection: Arc<RTCPeerConnection>,
    slot: Option<ClientSlot>,
}

impl ClosedOnDrop {
    pub(crate) fn new(connection: RTCPeerConnection, slot: ClientSlot) -> Self {
        Self { connection: Arc::new(connection), slot: Some(slot) }
    }
}

impl Drop for ClosedOnDrop {
    fn drop(&mut self) {
        // Without a runtime the process is about to end.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (connection, slot) = (self.connection.clone(), self.slot.take());
        runtime.spawn(async move {
            // Nobody is left to report an error to.
            let _ = timeout(WEBRTC_CLOSE_TIMEOUT, connection.close()).await;
            drop(slot);
        });
    }
}

/// Passes the channel to `take` once it is open. The connection must keep the channel alive.
fn once_open(
    channel: &Arc<RTCDataChannel>,
    take: impl FnOnce(Arc<DataChannel>) + Send + Sync + 'static,
) {
    let channel_of = Arc::downgrade(channel);
    channel.on_open(Box::new(move || {
        Box::pin(async move {
            let Some(channel) = channel_of.upgrade() else { return };
            match channel.detach().await {
                Ok(channel) => take(channel),
                Err(error) => tracing::debug!(%error, "a data channel"),
            }
        })
    }));
}

/// Opens a channel. The receiver fails if the connection closes first. A channel with a number is
/// not announced to the browser.
pub(crate) async fn open(
    connection: &RTCPeerConnection,
    number: Option<u16>,
) -> io::Result<oneshot::Receiver<Arc<DataChannel>>> {
    let options = RTCDataChannelInit { negotiated: number, ..RTCDataChannelInit::default() };
    let channel = connection.create_data_channel("", number.map(|_| options)).await;
    let channel = channel.map_err(io::Error::other)?;
    let (opened, is_open) = oneshot::channel();
    // If nobody waits any more, the connection has been closed.
    once_open(&channel, |channel| drop(opened.send(channel)));
    Ok(is_open)
}

pub(crate) fn stream(channel: Arc<DataChannel>) -> (Stream<Channel>, DropListener<Channel>) {
    let mut channel = PollDataChannel::new(channel);
    channel.set_read_buf_capacity(MAX_MSG_LEN);
    Stream::new(channel.compat())
}

pub(crate) struct Connection {
    incoming: mpsc::Receiver<Arc<DataChannel>>,
    opening: Option<BoxFuture<'static, io::Result<Arc<DataChannel>>>>,
    closing: Option<BoxFuture<'static, ()>>,
    /// Completes when the connection has ended.
    ended: BoxFuture<'static, ()>,
    /// Tell the browser about streams that were dropped.
    dropped: FuturesUnordered<DropListener<Channel>>,
    /// Woken when `dropped` gets a new entry.
    waiting: Option<Waker>,
    held: ClosedOnDrop,
}

impl Connection {
    /// Starts watching. Call this before the connection is established, so that no channel and no
    /// end is missed.
    pub(crate) async fn watch(held: ClosedOnDrop) -> io::Result<Self> {
        let (opened, incoming) = mpsc::channel(WEBRTC_OPENED_MAX);
        held.connection.on_data_channel(Box::new(move |channel| {
            let opened = opened.clone();
            once_open(&channel, move |channel| {
                // Too many are waiting: refuse this one.
                if let Err(refused) = opened.try_send(channel) {
                    tokio::spawn(async move { refused.into_inner().close().await });
                }
            });
            async {}.boxed()
        }));
        let (failed, has_failed) = oneshot::channel();
        let mut failed = Some(failed);
        held.connection.on_peer_connection_state_change(Box::new(move |state| {
            if matches!(state, State::Failed | State::Closed)
                && let Some(failed) = failed.take()
            {
                // If nobody listens, the end is already known.
                let _ = failed.send(());
            }
            async {}.boxed()
        }));
        let watched = open(&held.connection, Some(WATCH_CHANNEL)).await?;
        let association = async move {
            if let Ok(channel) = watched.await {
                // Nothing is ever sent on it, so any result means that the connection has ended.
                let _ = channel.read(&mut [0]).await;
            }
        };
        let ended = async move {
            tokio::select! {
                () = association => {}
                _ = has_failed => {}
            }
        };
        Ok(Self {
            incoming,
            opening: None,
            closing: None,
            ended: ended.boxed(),
            dropped: FuturesUnordered::new(),
            waiting: None,
            held,
        })
    }

    pub(crate) fn inner(&self) -> &Arc<RTCPeerConnection> {
        &self.held.connection
    }

    fn substream(&mut self, channel: Arc<DataChannel>) -> FlushedStream<Stream<Channel>> {
        let (stream, dropped) = stream(channel);
        self.dropped.push(dropped);
        if let Some(waiting) = self.waiting.take() {
            waiting.wake();
        }
        FlushedStream(stream)
    }
}

fn ended() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl StreamMuxer for Connection {
    type Substream = FlushedStream<Stream<Channel>>;
    type Error = io::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let channel = ready!(self.incoming.poll_recv(cx)).ok_or_else(ended)?;
        Poll::Ready(Ok(self.substream(channel)))
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let connection = self.inner().clone();
        let opening = self.opening.get_or_insert_with(|| {
            async move { open(&connection, None).await?.await.map_err(|_| ended()) }.boxed()
        });
        let channel = ready!(opening.poll_unpin(cx));
        self.opening = None;
        Poll::Ready(channel.map(|channel| self.substream(channel)))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let connection = self.inner().clone();
        let closing = self.closing.get_or_insert_with(|| {
            // An error means that a part was closed already.
            async move { drop(timeout(WEBRTC_CLOSE_TIMEOUT, connection.close()).await) }.boxed()
        });
        ready!(closing.poll_unpin(cx));
        self.closing = Some(std::future::ready(()).boxed());
        Poll::Ready(Ok(()))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        if self.ended.poll_unpin(cx).is_ready() {
            self.ended = std::future::ready(()).boxed();
            return Poll::Ready(Err(ended()));
        }
        // If a stream's reset cannot be sent, only its browser is affected.
        while let Poll::Ready(Some(_)) = self.dropped.poll_next_unpin(cx) {}
        self.waiting = Some(cx.waker().clone());
        Poll::Pending
    }
}
