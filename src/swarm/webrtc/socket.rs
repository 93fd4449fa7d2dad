//! The UDP socket under a listener: it carries the packets of all its connections, and reports
//! browsers that were not seen before. It never answers; the connections do.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use webrtc::util::{Conn, Error};

use super::clients::{ClientSlot, Clients, ufrag};

/// A browser that requests a connection.
pub(crate) struct Arrival {
    pub(crate) address: SocketAddr,
    pub(crate) slot: ClientSlot,
}

/// The pause after a failed read, so that a failing socket does not keep a core busy.
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) struct Socket {
    pub(crate) socket: UdpSocket,
    pub(crate) clients: Arc<Mutex<Clients>>,
    pub(crate) arrivals: mpsc::Sender<Arrival>,
}

impl Socket {
    fn notice(&self, packet: &[u8], address: SocketAddr) {
        let Some(name) = ufrag(packet) else { return };
        // If too many are waiting, ignore it; the browser repeats its request.
        let Ok(place) = self.arrivals.try_reserve() else { return };
        if let Some(slot) = ClientSlot::begin(&self.clients, name) {
            place.send(Arrival { address, slot });
        }
    }
}

fn nowhere<T>() -> Result<T, Error> {
    Err(io::Error::from(io::ErrorKind::NotConnected).into())
}

#[async_trait]
impl Conn for Socket {
    async fn connect(&self, _: SocketAddr) -> Result<(), Error> {
        nowhere()
    }

    async fn recv(&self, _: &mut [u8]) -> Result<usize, Error> {
        nowhere()
    }

    async fn recv_from(&self, buf: &mut [u8]) -> Result<(usize, SocketAddr), Error> {
        loop {
            match self.socket.recv_from(buf).await {
                Ok((length, address)) => {
                    self.notice(&buf[..length], address);
                    return Ok((length, address));
                }
                // The error concerns one packet, but the reader would treat it as the socket's end.
                Err(error) => {
                    tracing::debug!(%error, "a WebRTC socket");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn send(&self, _: &[u8]) -> Result<usize, Error> {
        nowhere()
    }

    async fn send_to(&self, buf: &[u8], target: SocketAddr) -> Result<usize, Error> {
        Ok(self.socket.send_to(buf, target).await?)
    }

    fn local_addr(&self) -> Result<SocketAddr, Error> {
        Ok(self.socket.local_addr()?)
    }

    fn remote_addr(&self) -> Option<SocketAddr> {
        None
    }

    async fn close(&self) -> Result<(), Error> {
        Ok(())
    }

    fn as_any(&self) -> &(dyn std::any::Any + Send + Sync) {
        self
    }
}
