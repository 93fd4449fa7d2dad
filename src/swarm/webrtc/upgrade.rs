//! From a browser's first packet to an authenticated connection: ICE (lite), DTLS, an association
//! of data channels, and a Noise handshake that binds the peer id to both certificates.
//!
//! Both ends know each other's session description in advance: the ICE names and passwords are the
//! name in the first packet, and Noise proves the certificates (webrtc-direct's specification).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p_webrtc_utils::sdp::render_description;
use libp2p_webrtc_utils::{Fingerprint, SHA256, noise};
use tokio::time::timeout;
use webrtc::api::APIBuilder;
use webrtc::api::setting_engine::SettingEngine;
use webrtc::dtls_transport::dtls_role::DTLSRole;
use webrtc::ice::mdns::MulticastDnsMode;
use webrtc::ice::network_type::NetworkType;
use webrtc::ice::udp_mux::UDPMuxDefault;
use webrtc::ice::udp_network::UDPNetwork;
use webrtc::peer_connection::certificate::RTCCertificate;
use webrtc::peer_connection::configuration::RTCConfiguration;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

use super::connection::{ClosedOnDrop, Connection, open, stream};
use super::socket::Arrival;
use crate::options::{HANDSHAKE_TIMEOUT, WEBRTC_DISCONNECTED_TIMEOUT, WEBRTC_FAILED_TIMEOUT};

/// The offer that the browser would have sent. DTLS supplies its real fingerprint, and Noise proves it.
const OFFER: &str = "v=0
o=- 0 0 IN {ip_version} {target_ip}
s=-
c=IN {ip_version} {target_ip}
t=0 0
m=application {target_port} UDP/DTLS/SCTP webrtc-datachannel
a=mid:0
a=ice-options:ice2
a=ice-ufrag:{ufrag}
a=ice-pwd:{pwd}
a=fingerprint:{fingerprint_algorithm} {fingerprint_value}
a=setup:actpass
a=sctp-port:5000
a=max-message-size:16384
";

/// The data channel of the Noise handshake.
const NOISE_CHANNEL: u16 = 0;

pub(crate) type Upgraded = (PeerId, Connection);

/// This node's keys and certificate.
pub(crate) struct Identity {
    keys: Keypair,
    certificate: RTCCertificate,
    pub(crate) fingerprint: Fingerprint,
}

impl Identity {
    /// None if the certificate has no SHA-256 hash.
    pub(crate) fn new(keys: Keypair, certificate: RTCCertificate) -> Option<Self> {
        let hashes = certificate.get_fingerprints();
        let hash = hashes.iter().find(|hash| hash.algorithm.eq_ignore_ascii_case(SHA256))?;
        let bytes = hash.value.split(':').map(|byte| u8::from_str_radix(byte, 16));
        let bytes: Vec<u8> = bytes.collect::<Result<_, _>>().ok()?;
        let fingerprint = Fingerprint::raw(bytes.try_into().ok()?);
        Some(Self { keys, certificate, fingerprint })
    }
}

fn settings(name: &str, address: SocketAddr, mux: Arc<UDPMuxDefault>) -> io::Result<SettingEngine> {
    let mut settings = SettingEngine::default();
    settings.set_lite(true);
    settings.set_udp_network(UDPNetwork::Muxed(mux));
    settings.set_ice_credentials(name.to_owned(), name.to_owned());
    settings.set_ice_multicast_dns_mode(MulticastDnsMode::Disabled);
    settings.set_ice_timeouts(Some(WEBRTC_DISCONNECTED_TIMEOUT), Some(WEBRTC_FAILED_TIMEOUT), None);
    let family = if address.is_ipv4() { NetworkType::Udp4 } else { NetworkType::Udp6 };
    settings.set_network_types(vec![family]);
    // All candidates share one socket, so offer only the first.
    let first = AtomicBool::new(true);
    settings.set_ip_filter(Box::new(move |_| first.swap(false, Ordering::Relaxed)));
    settings.detach_data_channels();
    settings.disable_certificate_fingerprint_verification(true);
    settings.set_answering_dtls_role(DTLSRole::Server).map_err(io::Error::other)?;
    Ok(settings)
}

/// Connects a browser that requested it. If that fails or is cancelled, everything is closed and the
/// client slot is released.
pub(crate) async fn accept(
    arrival: Arrival,
    mux: Arc<UDPMuxDefault>,
    identity: Arc<Identity>,
) -> io::Result<Upgraded> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    timeout(HANDSHAKE_TIMEOUT, connect(arrival, mux, identity)).await.map_err(late)?
}

async fn connect(
    arrival: Arrival,
    mux: Arc<UDPMuxDefault>,
    identity: Arc<Identity>,
) -> io::Result<Upgraded> {
    let Arrival { address, slot } = arrival;
    let name = slot.ufrag().to_owned();
    let api = APIBuilder::new().with_setting_engine(settings(&name, address, mux)?).build();
    let certificates = vec![identity.certificate.clone()];
    let configuration = RTCConfiguration { certificates, ..RTCConfiguration::default() };
    let connection = api.new_peer_connection(configuration).await.map_err(io::Error::other)?;
    let connection = Connection::watch(ClosedOnDrop::new(connection, slot)).await?;
    let inner = connection.inner();

    let handshake = open(inner, Some(NOISE_CHANNEL)).await?;
    let offer = render_description(OFFER, address, Fingerprint::FF, &name);
    let offer = RTCSessionDescription::offer(offer).map_err(io::Error::other)?;
    inner.set_remote_description(offer).await.map_err(io::Error::other)?;
    let answer = inner.create_answer(None).await.map_err(io::Error::other)?;
    inner.set_local_description(answer).await.map_err(io::Error::other)?;

    let (handshake, _) = stream(handshake.await.map_err(io::Error::other)?);
    let theirs = inner.sctp().transport().get_remote_certificate().await;
    let theirs = Fingerprint::from_certificate(&theirs);
    let proven = noise::inbound(identity.keys.clone(), handshake, theirs, identity.fingerprint);
    let peer = proven.await.map_err(io::Error::other)?;
    Ok((peer, connection))
}
