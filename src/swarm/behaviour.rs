//! The protocols of every connection, in the order in which they may refuse it.

use libp2p::allow_block_list::{self, BlockedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{dcutr, gossipsub, identify, mdns, ping, relay};

use crate::SwarmError;
use crate::options::{GOSSIP_BYTES_MAX, MDNS_INTERVAL, Options, PING_INTERVAL, PING_TIMEOUT};
use crate::reach::BoundedAutoNat;
use crate::runs::agent_with_run;
use crate::streams::PathStreams;
use crate::topics::{self, Filter};

pub(crate) type Gossip = gossipsub::Behaviour<gossipsub::IdentityTransform, Filter>;

/// `limits` and `bans` come first, so that they refuse a connection before any
/// other protocol spends memory on it.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    limits: connection_limits::Behaviour,
    pub(crate) bans: allow_block_list::Behaviour<BlockedPeers>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(crate) gossip: Gossip,
    mdns: Toggle<mdns::tokio::Behaviour>,
    /// The same over IPv6: one behaviour speaks one family.
    mdns6: Toggle<mdns::tokio::Behaviour>,
    pub(crate) autonat: Toggle<BoundedAutoNat>,
    pub(crate) relay_server: Toggle<relay::Behaviour>,
    relay_client: Toggle<relay::client::Behaviour>,
    dcutr: Toggle<dcutr::Behaviour>,
    pub(crate) streams: PathStreams,
    pub(crate) relayed_streams: PathStreams,
}

impl Behaviour {
    /// `circuits` drives the relayed transport, if there is one.
    pub(crate) fn new(
        keypair: &Keypair,
        options: &Options,
        circuits: Option<relay::client::Behaviour>,
    ) -> Result<Self, SwarmError> {
        let peer = keypair.public().to_peer_id();
        let limits = ConnectionLimits::default()
            .with_max_pending_incoming(Some(options.limits.pending_incoming))
            .with_max_pending_outgoing(Some(options.limits.pending_outgoing))
            .with_max_established_incoming(Some(options.limits.established_incoming))
            .with_max_established(Some(options.limits.established))
            .with_max_established_per_peer(Some(options.limits.established_per_peer));
        let mdns = |enable_ipv6| {
            let query_interval = MDNS_INTERVAL;
            let config = mdns::Config { query_interval, enable_ipv6, ..Default::default() };
            let behaviour = options.mdns.then(|| mdns::tokio::Behaviour::new(config, peer));
            behaviour.transpose().map_err(|error| setup("mDNS", &error))
        };
        let serves = options.relay.may_serve();
        let relay_server = serves.then(|| relay::Behaviour::new(peer, crate::relay::limits()));
        Ok(Self {
            limits: connection_limits::Behaviour::new(limits),
            bans: allow_block_list::Behaviour::default(),
            identify: identify::Behaviour::new(
                identify::Config::new(options.protocol_version.clone(), keypair.public())
                    .with_agent_version(agent_with_run(&options.agent, options.run))
                    .with_push_listen_addr_updates(true),
            ),
            ping: ping::Behaviour::new(
                ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT),
            ),
            gossip: gossip(keypair, options)?,
            mdns: mdns(false)?.into(),
            mdns6: mdns(true)?.into(),
            autonat: options.ask_reach.then(|| BoundedAutoNat::new(peer)).into(),
            relay_server: relay_server.into(),
            dcutr: circuits.is_some().then(|| dcutr::Behaviour::new(peer)).into(),
            relay_client: circuits.into(),
            streams: PathStreams::new(false),
            relayed_streams: PathStreams::new(true),
        })
    }
}

/// Signed gossip on our topics only. Messages are forwarded only after the caller has judged them.
fn gossip(keypair: &Keypair, options: &Options) -> Result<Gossip, SwarmError> {
    let config = gossipsub::ConfigBuilder::default()
        .max_transmit_size(GOSSIP_BYTES_MAX)
        .validation_mode(gossipsub::ValidationMode::Strict)
        .validate_messages()
        .build()
        .map_err(|error| setup("gossip", &error))?;
    let topics: Vec<_> = options.topics.iter().map(gossipsub::IdentTopic::new).collect();
    let mut gossip = Gossip::new_with_subscription_filter(
        gossipsub::MessageAuthenticity::Signed(keypair.clone()),
        config,
        topics::filter(&topics, options.topic_prefix.clone()),
    )
    .map_err(|error| setup("gossip", &error))?;
    for topic in &topics {
        gossip.subscribe(topic).map_err(|error| setup("gossip", &error))?;
    }
    Ok(gossip)
}

pub(crate) fn setup(what: &'static str, reason: &dyn std::fmt::Display) -> SwarmError {
    SwarmError::Setup { what, reason: reason.to_string() }
}
