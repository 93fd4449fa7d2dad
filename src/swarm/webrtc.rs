//! WebRTC-direct (libp2p's specification, version 1), for browsers only: it listens and never
//! dials.
//!
//! It is built on the `webrtc` crate and not on libp2p's transport above it. That transport does
//! not notice a browser that has gone (its connections stay until a ping fails), does not close
//! connections that fail half-way, opens a multicast socket for each connection, and loses frames.
//!
//! Invariants: every connection that is started is closed, however far it got; a connection
//! leaves this module only after its remote has proved its peer id; nothing from a packet enters
//! a session description unchecked.

mod clients;
mod connection;
mod flush;
mod socket;
#[cfg(test)]
mod tests;
mod upgrade;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use futures::FutureExt;
use futures::future::BoxFuture;
use if_watch::IfEvent;
use if_watch::tokio::IfWatcher;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, Transport};
use libp2p_webrtc_utils::Fingerprint;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use webrtc::ice::udp_mux::{UDPMux, UDPMuxDefault, UDPMuxParams};
use webrtc::peer_connection::certificate::RTCCertificate;

use self::clients::Clients;
use self::socket::{Arrival, Socket};
use self::upgrade::Identity;
use crate::SwarmError;
use crate::behaviour::setup;
use crate::options::WEBRTC_ARRIVALS_MAX;
use crate::transport::Connection;

fn certificate(keys: Result<rcgen::KeyPair, rcgen::Error>) -> Result<RTCCertificate, SwarmError> {
    let keys = keys.map_err(|error| setup("a WebRTC certificate", &error))?;
    RTCCertificate::from_key_pair(keys).map_err(|error| setup("a WebRTC certificate", &error))
}

/// A new certificate with its private key, in PEM. Its hash is part of every
/// WebRTC address of the node, so it should be kept.
pub fn generate_certificate() -> Result<String, SwarmError> {
    crate::install_crypto();
    Ok(certificate(rcgen::KeyPair::generate())?.serialize_pem())
}

/// Checks that a PEM text is a certificate with its private key, as returned by
/// [`generate_certificate`].
///
/// # Errors
/// Says what is wrong with it.
pub fn check_certificate(pem: &str) -> Result<(), SwarmError> {
    crate::install_crypto();
    // The first block is a time of 8 bytes, 12 base64 digits. The parser panics if it is shorter.
    let digits = |line: &str| line.trim().len();
    let first = pem.lines().skip(1).take_while(|line| !line.starts_with("-----"));
    if first.map(digits).sum::<usize>() < 12 {
        return Err(setup("the WebRTC certificate", &"its first block is too short"));
    }
    RTCCertificate::from_pem(pem).map(drop).map_err(|error| setup("the WebRTC certificate", &error))
}

/// A transport that only listens. Without a certificate it generates one for this run.
pub(crate) fn listener(keys: &Keypair, pem: Option<&str>) -> Result<Boxed<Connection>, SwarmError> {
    Ok(Direct::new(keys, pem)?
        .map(|(peer, connection), _| (peer, StreamMuxerBox::new(connection)))
        .boxed())
}

struct Direct {
    identity: Arc<Identity>,
    listeners: Vec<Listener>,
    waiting: Option<Waker>,
}

impl Direct {
    fn new(keys: &Keypair, pem: Option<&str>) -> Result<Self, SwarmError> {
        let certificate = match pem {
            Some(pem) => RTCCertificate::from_pem(pem)
                .map_err(|error| setup("the WebRTC certificate", &error))?,
            None => certificate(rcgen::KeyPair::generate())?,
        };
        let identity = Identity::new(keys.clone(), certificate)
            .ok_or_else(|| setup("the WebRTC certificate", &"it has no SHA-256 hash"))?;
        Ok(Self { identity: Arc::new(identity), listeners: Vec::new(), waiting: None })
    }
}

type Event = TransportEvent<BoxFuture<'static, io::Result<upgrade::Upgraded>>, io::Error>;

/// One listening address: its socket, and the browsers that request a connection there.
struct Listener {
    id: ListenerId,
    address: SocketAddr,
    identity: Arc<Identity>,
    mux: Arc<UDPMuxDefault>,
    arrivals: mpsc::Receiver<Arrival>,
    /// Watches the machine's addresses, if it listens on all of them.
    interfaces: Option<IfWatcher>,
    events: VecDeque<Event>,
}

impl Listener {
    fn new(id: ListenerId, address: SocketAddr, identity: Arc<Identity>) -> io::Result<Self> {
        let socket = std::net::UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        let address = socket.local_addr()?;
        let (knock, arrivals) = mpsc::channel(WEBRTC_ARRIVALS_MAX);
        let clients = Arc::new(Mutex::new(Clients::default()));
        let socket = Socket { socket, clients, arrivals: knock };
        let mut events = VecDeque::new();
        let interfaces = if address.ip().is_unspecified() {
            Some(IfWatcher::new()?)
        } else {
            let listen_addr = multiaddr(address, Some(identity.fingerprint));
            events.push_back(TransportEvent::NewAddress { listener_id: id, listen_addr });
            None
        };
        let mux = UDPMuxDefault::new(UDPMuxParams::new(socket));
        Ok(Self { id, address, identity, mux, arrivals, interfaces, events })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(event);
        }
        while let Some(Poll::Ready(event)) =
            self.interfaces.as_mut().map(|interfaces| interfaces.poll_if_event(cx))
        {
            if let Some(event) = self.on_interface(event) {
                return Poll::Ready(event);
            }
        }
        // `None` cannot happen: the socket holds the sender.
        if let Poll::Ready(Some(arrival)) = self.arrivals.poll_recv(cx) {
            return Poll::Ready(self.on_arrival(arrival));
        }
        Poll::Pending
    }

    fn on_interface(&self, event: io::Result<IfEvent>) -> Option<Event> {
        let listener_id = self.id;
        let here = |ip: IpAddr| {
            let same = ip.is_ipv4() == self.address.is_ipv4();
            let address = SocketAddr::new(ip, self.address.port());
            same.then(|| multiaddr(address, Some(self.identity.fingerprint)))
        };
        match event {
            Ok(IfEvent::Up(net)) => here(net.addr())
                .map(|listen_addr| TransportEvent::NewAddress { listener_id, listen_addr }),
            Ok(IfEvent::Down(net)) => here(net.addr())
                .map(|listen_addr| TransportEvent::AddressExpired { listener_id, listen_addr }),
            Err(error) => Some(TransportEvent::ListenerError { listener_id, error }),
        }
    }

    fn on_arrival(&self, arrival: Arrival) -> Event {
        TransportEvent::Incoming {
            listener_id: self.id,
            local_addr: multiaddr(self.address, Some(self.identity.fingerprint)),
            send_back_addr: multiaddr(arrival.address, None),
            upgrade: upgrade::accept(arrival, self.mux.clone(), self.identity.clone()).boxed(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mux = self.mux.clone();
        // Its reading task keeps it alive, so it must be closed. Without a runtime there is no task.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { mux.close().await });
        }
    }
}

impl Transport for Direct {
    type Output = upgrade::Upgraded;
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, io::Result<Self::Output>>;
    type Dial = BoxFuture<'static, io::Result<Self::Output>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let Some(socket) = listened(&address) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let listener = Listener::new(id, socket, self.identity.clone());
        self.listeners.push(listener.map_err(TransportError::Other)?);
        if let Some(waiting) = self.waiting.take() {
            waiting.wake();
        }
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let before = self.listeners.len();
        self.listeners.retain(|listener| listener.id != id);
        self.listeners.len() < before
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        _: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        for listener in &mut self.listeners {
            if let Poll::Ready(event) = listener.poll(cx) {
                return Poll::Ready(event);
            }
        }
        self.waiting = Some(cx.waker().clone());
        Poll::Pending
    }
}

fn listened(address: &Multiaddr) -> Option<SocketAddr> {
    let parts: Vec<_> = address.iter().collect();
    let [host, Protocol::Udp(port), Protocol::WebRTCDirect] = &parts[..] else { return None };
    let ip = match host {
        Protocol::Ip4(ip) => IpAddr::from(*ip),
        Protocol::Ip6(ip) => IpAddr::from(*ip),
        _ => return None,
    };
    Some(SocketAddr::new(ip, *port))
}

fn multiaddr(address: SocketAddr, fingerprint: Option<Fingerprint>) -> Multiaddr {
    let plain = Multiaddr::empty()
        .with(address.ip().into())
        .with(Protocol::Udp(address.port()))
        .with(Protocol::WebRTCDirect);
    match fingerprint {
        Some(fingerprint) => plain.with(Protocol::Certhash(fingerprint.to_multihash())),
        None => plain,
    }
}
