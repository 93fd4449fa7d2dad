//! Connections that something other than the system's sockets carries, for many nodes in one
//! process on lines that can be slow, cut or lossy.
//!
//! Only raw bytes are carried. Invariant: encryption, multiplexing, the gate, the time-outs and every
//! protocol are those of TCP, so what is seen over a carrier holds for sockets.

use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{AsyncRead, AsyncWrite, FutureExt, StreamExt};
use libp2p::core::transport::{DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::{Multiaddr, Transport};

use crate::{Address, convert};

/// Bytes in order, in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A raw connection.
pub type RawStream = Box<dyn Duplex>;

/// A raw connection that another node opened, and its address there.
pub struct Arrival {
    pub stream: RawStream,
    pub from: Address,
}

/// A listener's own address, with its port, and what arrives there. Dropping the stream ends the
/// listening.
pub type Listening = (Address, BoxStream<'static, Arrival>);

/// Carries one node's connections. Its futures and streams are polled in the swarm's tokio runtime.
pub trait Carrier: Send + Sync {
    /// Begins to listen.
    ///
    /// # Errors
    /// If nothing can listen there.
    fn listen(&self, address: &Address) -> io::Result<Listening>;

    /// Opens a connection. The swarm drops the future once its handshake's time-out has passed.
    fn dial(&self, address: Address) -> BoxFuture<'static, io::Result<RawStream>>;
}

/// A [`Carrier`] as libp2p's transport.
pub(crate) struct Carried {
    carrier: Arc<dyn Carrier>,
    listeners: Vec<Listener>,
}

struct Listener {
    id: ListenerId,
    address: Multiaddr,
    arrivals: BoxStream<'static, Arrival>,
    /// Its address was reported.
    is_known: bool,
}

impl Carried {
    pub(crate) const fn new(carrier: Arc<dyn Carrier>) -> Self {
        Self { carrier, listeners: Vec::new() }
    }
}

fn address(multiaddr: Multiaddr) -> Result<Address, TransportError<io::Error>> {
    let address = convert::address(&multiaddr).map(|address| address.without_peer());
    address.ok_or(TransportError::MultiaddrNotSupported(multiaddr))
}

impl Transport for Carried {
    type Output = RawStream;
    type Error = io::Error;
    type ListenerUpgrade = Ready<io::Result<RawStream>>;
    type Dial = BoxFuture<'static, io::Result<RawStream>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        multiaddr: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let (own, arrivals) =
            self.carrier.listen(&address(multiaddr.clone())?).map_err(TransportError::Other)?;
        let address = convert::multiaddr(&own).unwrap_or(multiaddr);
        self.listeners.push(Listener { id, address, arrivals, is_known: false });
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let before = self.listeners.len();
        self.listeners.retain(|listener| listener.id != id);
        self.listeners.len() < before
    }

    fn dial(
        &mut self,
        multiaddr: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let (carrier, address) = (self.carrier.clone(), address(multiaddr)?);
        // Nothing may happen before the future is polled.
        Ok(async move { carrier.dial(address).await }.boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        for at in 0..self.listeners.len() {
            let listener = &mut self.listeners[at];
            let listener_id = listener.id;
            if !std::mem::replace(&mut listener.is_known, true) {
                let listen_addr = listener.address.clone();
                return Poll::Ready(TransportEvent::NewAddress { listener_id, listen_addr });
            }
            match listener.arrivals.poll_next_unpin(cx) {
                Poll::Pending => {}
                Poll::Ready(None) => {
                    self.listeners.remove(at);
                    let reason = Ok(());
                    return Poll::Ready(TransportEvent::ListenerClosed { listener_id, reason });
                }
                Poll::Ready(Some(Arrival { stream, from })) => {
                    let local_addr = listener.address.clone();
                    let send_back_addr = convert::multiaddr(&from).unwrap_or_else(Multiaddr::empty);
                    let upgrade = ready(Ok(stream));
                    return Poll::Ready(TransportEvent::Incoming {
                        listener_id,
                        upgrade,
                        local_addr,
                        send_back_addr,
                    });
                }
            }
        }
        Poll::Pending
    }
}
