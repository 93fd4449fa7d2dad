//! The lines between real swarms: who reaches whom, how fast, and what goes wrong.
//!
//! A cut is silent, as a broken cable is: what was sent arrives when it ends, dials wait, and only
//! time-outs notice. A tear breaks connections at once, as a reset does. A killed node's connections
//! are torn, and nobody reaches it until it is revived.
//!
//! Lock order: a pipe's lock may be held when the network's is taken, never the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use doppler_ids::Address;
use doppler_swarm::{Arrival, Carrier, Listening, RawStream};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, stream};
use tokio::sync::{mpsc, watch};

use super::pipe::{End, Pipe};
use crate::net::latency;
use crate::rng::Rng;

/// The port at which a node listens if it leaves the choice to the network.
const PORT: u16 = 4001;
/// Connections that wait until a node takes them.
const ARRIVALS_MAX: usize = 64;
/// Nodes of one network.
pub const NODES_MAX: usize = 250 * 250;

/// What all lines have in common.
#[derive(Debug, Clone, Copy)]
pub struct Lines {
    /// Delays between pairs of nodes follow from it, as in level 1; so does what is lost.
    pub seed: u64,
    /// How many times as long as there they are.
    pub stretch: u64,
    /// Bytes a second that a node can send.
    pub rate: u64,
    /// Of a hundred pieces, so many are lost and sent again, which takes 0.1 to 0.9 s.
    pub loss_percent: u64,
}

impl Lines {
    /// Lines of 1 Gbit/s that lose nothing.
    pub const fn new(seed: u64) -> Self {
        Self { seed, stretch: 1, rate: 125_000_000, loss_percent: 0 }
    }
}

/// Bytes that a node has sent and received, encryption and framing included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bytes {
    pub sent: u64,
    pub received: u64,
}

pub struct Network {
    lines: Lines,
    nodes: usize,
    state: Mutex<State>,
    bytes: Vec<[AtomicU64; 2]>,
    /// Changes when somebody reaches somebody else again.
    changed: watch::Sender<u64>,
}

struct State {
    hosts: Vec<Host>,
    /// From whom nothing reaches whom.
    cuts: BTreeSet<(usize, usize)>,
    pipes: Vec<Weak<Pipe>>,
}

struct Host {
    listeners: BTreeMap<u16, mpsc::Sender<Arrival>>,
    next_port: u16,
    /// When its uplink is free again.
    free: Instant,
    is_down: bool,
    rng: Rng,
}

/// Where a node listens.
pub fn address_of(node: usize) -> Address {
    let ip = Ipv4Addr::new(10, 77, (node / 250) as u8, (node % 250 + 1) as u8);
    let text = format!("/ip4/{ip}/tcp/{PORT}");
    text.parse().expect("it is an address")
}

fn node_at(address: &Address) -> Option<(usize, u16)> {
    let IpAddr::V4(ip) = address.ip()? else { return None };
    let [10, 77, high, low] = ip.octets() else { return None };
    let node = usize::from(high) * 250 + usize::from(low).checked_sub(1)?;
    Some((node, address.tcp_socket()?.port()))
}

impl Network {
    pub fn new(nodes: usize, lines: Lines) -> Arc<Self> {
        assert!(nodes <= NODES_MAX, "{nodes} nodes of at most {NODES_MAX}");
        let host = |node: usize| Host {
            listeners: BTreeMap::new(),
            next_port: 49_152,
            free: Instant::now(),
            is_down: false,
            rng: Rng::fork(lines.seed, "line", node as u64),
        };
        let hosts = (0..nodes).map(host).collect();
        let state = State { hosts, cuts: BTreeSet::new(), pipes: Vec::new() };
        let bytes = (0..nodes).map(|_| <[AtomicU64; 2]>::default()).collect();
        let changed = watch::Sender::new(0);
        Arc::new(Self { lines, nodes, state: Mutex::new(state), bytes, changed })
    }

    /// What carries a node's connections.
    pub fn carrier(self: &Arc<Self>, node: usize) -> Arc<dyn Carrier> {
        Arc::new(Seat { network: Arc::clone(self), node })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing arrives from one node at another.
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.lock().cuts.contains(&(from, to))
    }

    /// What a node has sent and received so far.
    pub fn bytes(&self, node: usize) -> Bytes {
        let [sent, received] = &self.bytes[node];
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Bytes { sent: read(sent), received: read(received) }
    }

    /// Cuts every direction for which `is_cut(from, to)` holds, beside those that are cut.
    pub fn cut(&self, is_cut: impl Fn(usize, usize) -> bool) {
        let pairs = (0..self.nodes).flat_map(|from| (0..self.nodes).map(move |to| (from, to)));
        let cuts: Vec<_> = pairs.filter(|(from, to)| from != to && is_cut(*from, *to)).collect();
        self.lock().cuts.extend(cuts);
    }

    /// Ends every cut: what waited arrives.
    pub fn mend(&self) {
        self.lock().cuts.clear();
        self.changed.send_modify(|version| *version += 1);
        for pipe in self.pipes(|_, _| true) {
            pipe.wake();
        }
    }

    /// Breaks every connection between nodes for which `is_torn` holds; both ends are told at once.
    pub fn tear(&self, is_torn: impl Fn(usize, usize) -> bool) {
        for pipe in self.pipes(|from, to| is_torn(from, to) || is_torn(to, from)) {
            pipe.break_off();
        }
    }

    /// Flips a bit of what is on its way from one node to another. False if nothing is.
    pub fn flip(&self, from: usize, to: usize) -> bool {
        let pipes = self.pipes(|one, other| (one, other) == (from, to));
        pipes.iter().any(|pipe| pipe.flip())
    }

    /// The node's process is gone: the system resets its connections and refuses new ones.
    pub fn kill(&self, node: usize) {
        {
            let host = &mut self.lock().hosts[node];
            host.is_down = true;
            host.listeners.clear();
        }
        self.tear(|one, other| one == node || other == node);
    }

    /// The node may listen and dial again.
    pub fn revive(&self, node: usize) {
        self.lock().hosts[node].is_down = false;
    }

    fn pipes(&self, which: impl Fn(usize, usize) -> bool) -> Vec<Arc<Pipe>> {
        // Dropping the last one may drop what waits for it, so not while the lock is held.
        let live: Vec<_> = self.lock().pipes.iter().filter_map(Weak::upgrade).collect();
        live.into_iter().filter(|pipe| which(pipe.from, pipe.to)).collect()
    }

    /// Nanoseconds that a packet takes at least.
    fn trip(&self, from: usize, to: usize) -> u64 {
        self.lines.stretch * latency(self.lines.seed, self.nodes, from, to)
    }

    /// When bytes that are sent now arrive.
    pub(super) fn arrival(&self, from: usize, to: usize, bytes: usize) -> Instant {
        self.bytes[from][0].fetch_add(bytes as u64, Ordering::Relaxed);
        let takes = Duration::from_secs_f64(bytes as f64 / self.lines.rate.max(1) as f64);
        let mut state = self.lock();
        let host = &mut state.hosts[from];
        host.free = host.free.max(Instant::now()) + takes;
        let base = self.trip(from, to);
        let jitter = host.rng.below(base / 8 + 1);
        let is_lost = bytes > 0 && host.rng.percent(self.lines.loss_percent);
        let again = if is_lost { host.rng.between(100, 900) } else { 0 };
        host.free + Duration::from_nanos(base + jitter) + Duration::from_millis(again)
    }

    pub(super) fn received(&self, node: usize, bytes: usize) {
        self.bytes[node][1].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn connect(self: &Arc<Self>, from: usize, to: usize, port: u16) -> io::Result<RawStream> {
        let (there, back) = (Pipe::new(self.clone(), from, to), Pipe::new(self.clone(), to, from));
        let mut state = self.lock();
        if state.hosts[from].is_down {
            return Err(ErrorKind::NetworkUnreachable.into());
        }
        let own_port = state.hosts[from].next_port;
        state.hosts[from].next_port = own_port.checked_add(1).unwrap_or(49_152);
        let listener = state.hosts.get(to).and_then(|host| host.listeners.get(&port)).cloned();
        state.pipes.retain(|pipe| pipe.strong_count() > 0);
        state.pipes.extend([Arc::downgrade(&there), Arc::downgrade(&back)]);
        drop(state);
        let stream = Box::new(End::new(there.clone(), back.clone()));
        let arrival = Arrival { stream, from: address_of(from).with_port(own_port) };
        let sent = listener.is_some_and(|listener| listener.try_send(arrival).is_ok());
        if !sent {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        Ok(Box::new(End::new(back, there)))
    }
}

/// A node's place in the network.
struct Seat {
    network: Arc<Network>,
    node: usize,
}

impl Carrier for Seat {
    fn listen(&self, address: &Address) -> io::Result<Listening> {
        let (node, port) = node_at(address).ok_or(ErrorKind::AddrNotAvailable)?;
        if node != self.node {
            return Err(ErrorKind::AddrNotAvailable.into());
        }
        let port = if port == 0 { PORT } else { port };
        let mut state = self.network.lock();
        let listeners = &mut state.hosts[node].listeners;
        if listeners.get(&port).is_some_and(|listener| !listener.is_closed()) {
            return Err(ErrorKind::AddrInUse.into());
        }
        let (sender, receiver) = mpsc::channel(ARRIVALS_MAX);
        listeners.insert(port, sender);
        let arrivals = stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|arrival| (arrival, receiver))
        });
        Ok((address.with_port(port), arrivals.boxed()))
    }

    fn dial(&self, address: Address) -> BoxFuture<'static, io::Result<RawStream>> {
        let (network, from) = (self.network.clone(), self.node);
        async move {
            let (to, port) = node_at(&address).ok_or(ErrorKind::HostUnreachable)?;
            if to >= network.nodes {
                return Err(ErrorKind::HostUnreachable.into());
            }
            let mut changed = network.changed.subscribe();
            // Its first packet is sent until it is answered.
            while network.is_cut(from, to) || network.is_cut(to, from) {
                if changed.changed().await.is_err() {
                    return Err(ErrorKind::NetworkDown.into());
                }
            }
            tokio::time::sleep(Duration::from_nanos(2 * network.trip(from, to))).await;
            network.connect(from, to, port)
        }
        .boxed()
    }
}
