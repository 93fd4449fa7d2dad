//! A transport without its link-local IPv6 addresses.
//!
//! Such an address means nothing without the name of its link, and libp2p dials none with one. Every
//! interface has one, those of containers included, and with all of them a node could not identify
//! itself any more: that message has 4 KiB.
//!
//! Invariant: nothing else is changed.

use std::pin::Pin;
use std::task::{Context, Poll};

use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, Transport};

use crate::transport::Connection;

/// Reports no link-local address as one to listen at.
pub(crate) struct Wide(pub(crate) Boxed<Connection>);

fn is_link_local(address: &Multiaddr) -> bool {
    matches!(address.iter().next(), Some(Protocol::Ip6(ip)) if ip.is_unicast_link_local())
}

impl Transport for Wide {
    type Output = Connection;
    type Error = <Boxed<Connection> as Transport>::Error;
    type ListenerUpgrade = <Boxed<Connection> as Transport>::ListenerUpgrade;
    type Dial = <Boxed<Connection> as Transport>::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<Self::Error>> {
        self.0.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.0.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Self::Dial, TransportError<Self::Error>> {
        self.0.dial(address, options)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Self::Error>> {
        loop {
            match Pin::new(&mut self.0).poll(cx) {
                Poll::Ready(
                    TransportEvent::NewAddress { listen_addr, .. }
                    | TransportEvent::AddressExpired { listen_addr, .. },
                ) if is_link_local(&listen_addr) => {}
                other => return other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_link_local_addresses_are_left_out() {
        for (text, is_one) in [
            ("/ip6/fe80::1/tcp/1", true),
            ("/ip6/febf::1/udp/1/quic-v1", true),
            ("/ip6/fd00::1/tcp/1", false),
            ("/ip6/::1/tcp/1", false),
            ("/ip4/169.254.1.1/tcp/1", false),
        ] {
            assert_eq!(is_link_local(&text.parse().unwrap()), is_one, "{text}");
        }
    }
}
