//! Whole connections on loopback, from a browser built with the same library. Nothing remains of those that end.

use std::future::poll_fn;
use std::time::Duration;

use libp2p::core::muxing::StreamMuxer;
use tokio::time::timeout;
use webrtc::api::APIBuilder;
use webrtc::api::setting_engine::SettingEngine;
use webrtc::ice::mdns::MulticastDnsMode;
use webrtc::ice::network_type::NetworkType;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::configuration::RTCConfiguration;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

use super::clients::ClientSlot;
use super::connection::ClosedOnDrop;
use super::*;

#[test]
fn a_certificate_survives_its_text_and_a_damaged_one_is_refused() {
    let pem = generate_certificate().unwrap();
    let keys = crate::convert::keypair([3; 32]);
    assert!(listener(&keys, Some(&pem)).is_ok());
    assert_ne!(pem, generate_certificate().unwrap());
    let damaged = pem.replace("CERTIFICATE", "TESTIMONIAL");
    let error = listener(&keys, Some(&damaged)).err().unwrap().to_string();
    assert!(error.contains("WebRTC certificate"), "{error}");
    assert!(listener(&keys, Some("")).is_err());
}

/// Far above what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until only the test itself is running, so that tasks that outlive their connection are noticed.
async fn nothing_is_left() {
    let metrics = tokio::runtime::Handle::current().metrics();
    let ended = async {
        while metrics.num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    };
    let left = timeout(PATIENCE, ended).await.map_err(|_| metrics.num_alive_tasks());
    assert_eq!(left, Ok(()));
}

fn slot() -> (Arc<Mutex<Clients>>, ClientSlot) {
    let clients = Arc::new(Mutex::new(Clients::default()));
    let slot = ClientSlot::begin(&clients, "somebody").unwrap();
    (clients, slot)
}

/// An end of a connection on loopback whose ICE time-outs are too long to matter.
async fn end() -> RTCPeerConnection {
    let mut settings = SettingEngine::default();
    settings.detach_data_channels();
    settings.set_include_loopback_candidate(true);
    settings.set_ice_multicast_dns_mode(MulticastDnsMode::Disabled);
    settings.set_network_types(vec![NetworkType::Udp4]);
    settings.set_ice_timeouts(Some(10 * PATIENCE), Some(10 * PATIENCE), None);
    let api = APIBuilder::new().with_setting_engine(settings).build();
    api.new_peer_connection(RTCConfiguration::default()).await.unwrap()
}

async fn described(
    end: &RTCPeerConnection,
    description: RTCSessionDescription,
) -> RTCSessionDescription {
    let mut gathered = end.gathering_complete_promise().await;
    end.set_local_description(description).await.unwrap();
    gathered.recv().await;
    end.local_description().await.unwrap()
}

#[tokio::test]
async fn a_connection_ends_with_its_browser_and_leaves_nothing() {
    crate::install_crypto();
    let (clients, slot) = slot();
    let browser = end().await;
    let mut node =
        super::connection::Connection::watch(ClosedOnDrop::new(end().await, slot)).await.unwrap();

    let channel = browser.create_data_channel("", None).await.unwrap();
    let (opened, is_open) = tokio::sync::oneshot::channel();
    channel.on_open(Box::new(|| async move { opened.send(()).unwrap() }.boxed()));
    drop(channel);
    let offer = described(&browser, browser.create_offer(None).await.unwrap()).await;
    node.inner().set_remote_description(offer).await.unwrap();
    let answer = described(node.inner(), node.inner().create_answer(None).await.unwrap()).await;
    browser.set_remote_description(answer).await.unwrap();
    timeout(PATIENCE, is_open).await.unwrap().unwrap();
    let stream = timeout(PATIENCE, poll_fn(|cx| Pin::new(&mut node).poll_inbound(cx))).await;
    let stream = stream.unwrap().unwrap();
    assert!(poll_fn(|cx| Pin::new(&mut node).poll(cx)).now_or_never().is_none());

    browser.close().await.unwrap();
    let end = timeout(PATIENCE, poll_fn(|cx| Pin::new(&mut node).poll(cx))).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let inner = Arc::downgrade(node.inner());
    drop((stream, node, browser));
    nothing_is_left().await;
    assert!(inner.upgrade().is_none());
    assert_eq!(clients.lock().unwrap().count(), 0);
}

#[tokio::test]
async fn a_request_is_accepted_once_and_leaves_nothing_when_cancelled() {
    let keys = crate::convert::keypair([4; 32]);
    let mut direct = Direct::new(&keys, None).unwrap();
    let id = ListenerId::next();
    direct.listen_on(id, "/ip4/127.0.0.1/udp/0/webrtc-direct".parse().unwrap()).unwrap();
    let address = direct.listeners[0].address;
    let mut next = async || poll_fn(|cx| Pin::new(&mut direct).poll(cx)).await;
    let listening = next().await.into_new_address().unwrap();
    assert!(listening.to_string().contains("/webrtc-direct/certhash/"), "{listening}");

    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for name in ["libp2p+webrtc+v1/first", "libp2p+webrtc+v1/second"] {
        let packet = super::clients::request(&[(6, format!("{name}:{name}").as_bytes())]);
        // The second packet of each starts nothing: the next arrival is the other client.
        for _ in 0..2 {
            socket.send_to(&packet, address).await.unwrap();
        }
        let (upgrade, from) = timeout(PATIENCE, next()).await.unwrap().into_incoming().unwrap();
        assert!(from.to_string().contains(&socket.local_addr().unwrap().port().to_string()));
        // Give it time to begin; nothing answers it.
        let begun = async {
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            outcome = upgrade => panic!("{:?}", outcome.err()),
            () = begun => {}
        }
    }
    assert!(direct.remove_listener(id));
    nothing_is_left().await;
}
