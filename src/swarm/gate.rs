//! The gate of a private swarm, between a connection's encryption and its first protocol.
//!
//! Invariant: no protocol of this node talks to a peer that has not proved the key. The
//! gate is below every protocol and above every transport, so it cannot be bypassed.

use std::future::{pending, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use futures::{AsyncRead, AsyncWrite, AsyncWriteExt, FutureExt, StreamExt};
use libp2p::Transport;
use libp2p::core::Endpoint;
use libp2p::core::connection::ConnectedPoint;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::transport::Boxed;
use libp2p::identity::Keypair;
use multistream_select::{Version, dialer_select_proto, listener_select_proto};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::key::{KEY_PROTOCOL, KEY_TIMEOUT, KeyFailure, Side, SwarmKey, decline, prove};
use crate::options::{DECLINES_MAX, VERDICT_TIMEOUT};
use crate::transport::Connection;
use crate::{Address, PeerId, convert};

/// A peer that was refused, or that refused this node.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub peer: PeerId,
    /// Its address, if it was refused before its connection was established.
    pub remote: Option<Address>,
    pub why: KeyFailure,
}

/// Runs the key's proof on every connection.
#[derive(Clone)]
pub(crate) struct Gate {
    key: Arc<SwarmKey>,
    own: PeerId,
    /// Receives each refusal; those that do not fit are dropped.
    refusals: mpsc::Sender<Refusal>,
}

impl Gate {
    pub(crate) fn new(key: SwarmKey, keys: &Keypair, refusals: mpsc::Sender<Refusal>) -> Self {
        Self { key: Arc::new(key), own: convert::peer(keys.public().to_peer_id()), refusals }
    }

    /// Puts this gate behind a transport.
    pub(crate) fn guard(self, transport: Boxed<Connection>) -> Boxed<Connection> {
        transport
            .and_then(move |(peer, muxer), point| async move {
                let id = convert::peer(peer);
                match self.pass(id, muxer, &point).await {
                    Ok(muxer) => Ok((peer, muxer)),
                    Err(why) => {
                        let remote = convert::address(point.get_remote_address());
                        let refusal = Refusal { peer: id, remote, why };
                        let _ = self.refusals.try_send(refusal);
                        Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
                    }
                }
            })
            .boxed()
    }

    async fn pass(
        &self,
        peer: PeerId,
        mut muxer: StreamMuxerBox,
        point: &ConnectedPoint,
    ) -> Result<StreamMuxerBox, KeyFailure> {
        // Both ends of a hole punch dial; one of them acts as the listener.
        let side = match point {
            ConnectedPoint::Dialer { role_override: Endpoint::Dialer, .. } => Side::Dialer,
            ConnectedPoint::Dialer { .. } | ConnectedPoint::Listener { .. } => Side::Listener,
        };
        let prove = tokio::time::timeout(KEY_TIMEOUT, self.prove(side, peer, &mut muxer));
        let outcome = prove.await.unwrap_or(Err(KeyFailure::Silent));
        if let Err(why) = outcome {
            // On some transports closing loses data in flight, such as the refusal just sent. So
            // wait briefly until the peer has received it and hangs up.
            if side == Side::Listener && why == KeyFailure::WrongKey {
                let hung_up = drive(&mut muxer, pending::<Result<(), KeyFailure>>());
                let _ = tokio::time::timeout(VERDICT_TIMEOUT, hung_up).await;
            }
            let _ = tokio::time::timeout(KEY_TIMEOUT, muxer.close()).await;
            return Err(why);
        }
        Ok(muxer)
    }

    async fn prove(
        &self,
        side: Side,
        peer: PeerId,
        muxer: &mut StreamMuxerBox,
    ) -> Result<(), KeyFailure> {
        let stream = open(side, muxer).await?;
        drive(muxer, prove_key(&self.key, side, self.own, peer, stream)).await
    }
}

/// The whole exchange on a proof's stream: negotiates the protocol, then proves the key both ways.
/// The connection must have proved `remote`, and the caller must bound the time.
pub async fn prove_key<S: AsyncRead + AsyncWrite + Unpin>(
    key: &SwarmKey,
    side: Side,
    own: PeerId,
    remote: PeerId,
    stream: S,
) -> Result<(), KeyFailure> {
    let mut stream = match side {
        Side::Listener => dialer_select_proto(stream, [KEY_PROTOCOL], Version::V1).await,
        Side::Dialer => listener_select_proto(stream, [KEY_PROTOCOL]).await,
    }
    .map_err(|_| KeyFailure::NoKey)?
    .1;
    prove(key, side, own, remote, &mut stream).await?;
    // Close only the writing half: the other side may not have read everything yet.
    stream.close().await.map_err(|_| KeyFailure::Broken)
}

/// The listener opens the stream, and the dialer takes the first one that arrives. Other streams
/// that the peer opens meanwhile stay unread in the connection.
async fn open(side: Side, muxer: &mut StreamMuxerBox) -> Result<SubstreamBox, KeyFailure> {
    poll_fn(|cx| {
        if let Poll::Ready(Err(_)) = muxer.poll_unpin(cx) {
            return Poll::Ready(Err(KeyFailure::Broken));
        }
        let stream = match side {
            Side::Listener => muxer.poll_outbound_unpin(cx),
            Side::Dialer => muxer.poll_inbound_unpin(cx),
        };
        stream.map_err(|_| KeyFailure::Broken)
    })
    .await
}

/// A node without a key answers each peer that asks for one, so that both can report the reason.
pub(crate) async fn decline_all(
    mut incoming: libp2p_stream::IncomingStreams,
    refusals: mpsc::Sender<Refusal>,
) {
    let mut answers = JoinSet::new();
    while let Some((peer, mut stream)) = incoming.next().await {
        while answers.try_join_next().is_some() {}
        if answers.len() >= DECLINES_MAX {
            continue;
        }
        let refusals = refusals.clone();
        answers.spawn(async move {
            // It will refuse this node whether or not the answer arrives.
            let _ = tokio::time::timeout(KEY_TIMEOUT, decline(&mut stream)).await;
            let refusal =
                Refusal { peer: convert::peer(peer), remote: None, why: KeyFailure::Private };
            let _ = refusals.try_send(refusal);
        });
    }
}

/// Drives the connection while `talk` uses one of its streams.
async fn drive<T>(
    muxer: &mut StreamMuxerBox,
    talk: impl Future<Output = Result<T, KeyFailure>>,
) -> Result<T, KeyFailure> {
    let mut talk = pin!(talk);
    poll_fn(|cx| {
        // Poll `talk` first: its last data may have arrived together with the connection's end.
        if let Poll::Ready(outcome) = talk.poll_unpin(cx) {
            return Poll::Ready(outcome);
        }
        match muxer.poll_unpin(cx) {
            Poll::Ready(Err(_)) => match talk.poll_unpin(cx) {
                Poll::Ready(outcome) => Poll::Ready(outcome),
                Poll::Pending => Poll::Ready(Err(KeyFailure::Broken)),
            },
            Poll::Ready(Ok(_)) => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}
