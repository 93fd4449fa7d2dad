//! Asks the router of a home network to forward ports (UPnP, Internet Gateway Device 1 and
//! 2): a search by SSDP, a description over HTTP, then SOAP.
//!
//! Anyone on the local network can answer a search. So it refuses routers that name a machine
//! other than the one that answered, and answers longer than [`ANSWER_BYTES_MAX`] or slower
//! than [`ANSWER_TIMEOUT`]. Invariant: mappings are removed at the end, and one that remains
//! expires after [`LEASE`].

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, info};

use crate::options::MAPPED_PORTS_MAX;
use crate::{Address, Transport};

/// Where routers listen for searches (UPnP Device Architecture 1.1, section 1).
const SSDP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(239, 255, 255, 250), 1900);
const SEARCH: &str = "M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n\
    MAN: \"ssdp:discover\"\r\nMX: 2\r\n\
    ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n";

/// The services that map ports.
const SERVICES: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];

/// How long routers may take to answer a search, and a request.
const SEARCH_TIME: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Answers read in one search.
const ANSWERS_MAX: usize = 8;
/// The longest answer that is read. Descriptions have a few KiB.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// How long a mapping lasts unless it is renewed, and the renewal interval: half of that, so
/// that one renewal may fail.
const LEASE: Duration = Duration::from_secs(3600);
const RENEW_EVERY: Duration = Duration::from_secs(1800);
/// The wait after a search that found nothing.
const SEARCH_AGAIN: Duration = Duration::from_secs(600);
/// The error of routers that support only permanent mappings (IGD 1, 2.4.16).
const ONLY_PERMANENT: &str = "725";

/// A port of this machine to be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Port {
    pub(crate) udp: bool,
    pub(crate) inside: SocketAddrV4,
}

impl Port {
    /// The port of a listen address, if it is one that a router could forward to.
    pub(crate) fn of(address: &Address) -> Option<Self> {
        // A circuit's address begins with its relay's.
        if address.transport() == Transport::Relay {
            return None;
        }
        let (udp, inside) = address.ipv4_socket()?;
        inside.ip().is_private().then_some(Self { udp, inside })
    }
}

/// The ports that a router forwards.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Mapped {
    /// The router's public address; present if there are ports.
    pub(crate) external_ip: Option<Ipv4Addr>,
    pub(crate) ports: BTreeSet<Port>,
}

/// Keeps the wanted ports mapped until the sender of `wanted` is dropped, then removes the mappings.
/// Sends no packet before there is a port.
pub(crate) async fn keep(mut wanted: watch::Receiver<BTreeSet<Port>>, out: watch::Sender<Mapped>) {
    let mut router = None;
    loop {
        let ports = wanted.borrow_and_update().clone();
        let mut mapped = Mapped::default();
        if !ports.is_empty() {
            router = refresh(router, &ports, &mut mapped).await;
        }
        // Remove the mappings that are no longer wanted, if the router is still there.
        let gone: Vec<Port> = out.borrow().ports.difference(&ports).copied().collect();
        unmap(router.as_ref(), &gone).await;
        out.send_if_modified(|known| std::mem::replace(known, mapped.clone()) != mapped);
        let pause = if router.is_some() { RENEW_EVERY } else { SEARCH_AGAIN };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(pause) => {}
        }
    }
    let last: Vec<Port> = out.borrow().ports.iter().copied().collect();
    unmap(router.as_ref(), &last).await;
}

/// Maps or renews the wanted ports. Searches for a router if none is known or it does not answer.
async fn refresh(
    known: Option<Router>,
    ports: &BTreeSet<Port>,
    mapped: &mut Mapped,
) -> Option<Router> {
    let (mut router, mut external_ip) = (known, None);
    if let Some(known) = &router {
        external_ip = known.external_ip().await.inspect_err(|error| debug!(%error, "router")).ok();
    }
    if external_ip.is_none() {
        router = search().await.inspect_err(|error| debug!(%error, "no router")).ok();
        if let Some(found) = &router {
            external_ip =
                found.external_ip().await.inspect_err(|error| debug!(%error, "router")).ok();
        }
    }
    let (found, ip) = (router?, external_ip?);
    if !Address::is_global_v4(ip) {
        info!(%ip, "the router maps ports, but has no public address itself");
        return Some(found);
    }
    for port in ports.iter().take(MAPPED_PORTS_MAX) {
        match found.map(*port).await {
            Ok(()) => {
                mapped.external_ip = Some(ip);
                mapped.ports.insert(*port);
            }
            Err(error) => {
                info!(port = port.inside.port(), %error, "the router refuses to map a port")
            }
        }
    }
    Some(found)
}

async fn unmap(router: Option<&Router>, ports: &[Port]) {
    let Some(router) = router else { return };
    for port in ports {
        if let Err(error) = router.unmap(*port).await {
            debug!(port = port.inside.port(), %error, "the router keeps a mapping until it expires");
        }
    }
}

/// A router that maps ports.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Router {
    address: SocketAddr,
    /// The control URL's path and the service behind it.
    path: String,
    service: &'static str,
}

async fn search() -> io::Result<Router> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.send_to(SEARCH.as_bytes(), SSDP).await?;
    let looked = timeout(SEARCH_TIME, async {
        for _ in 0..ANSWERS_MAX {
            let mut answer = [0; 2048];
            let (bytes, from) = socket.recv_from(&mut answer).await?;
            let text = String::from_utf8_lossy(&answer[..bytes]);
            let Some((address, path)) = location(&text, from.ip()) else { continue };
            match describe(address, &path).await {
                Ok(router) => return Ok(router),
                Err(error) => debug!(%address, %error, "maps no ports"),
            }
        }
        Err(io::ErrorKind::NotFound.into())
    });
    looked.await.unwrap_or_else(|_| Err(io::ErrorKind::NotFound.into()))
}

async fn describe(address: SocketAddr, path: &str) -> io::Result<Router> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let description = ask(address, &request).await?;
    let (service, path) = control(&description, address)
        .ok_or_else(|| io::Error::other("it describes no service that maps ports"))?;
    Ok(Router { address, path, service })
}

impl Router {
    async fn external_ip(&self) -> io::Result<Ipv4Addr> {
        let answer = self.call("GetExternalIPAddress", "").await?;
        let ip = tag(&answer, "NewExternalIPAddress").and_then(|text| text.trim().parse().ok());
        ip.ok_or_else(|| io::Error::other("it does not report its public address"))
    }

    async fn map(&self, port: Port) -> io::Result<()> {
        let order = |lease: u64| {
            let (protocol, inside) = (protocol(port), port.inside);
            let (ip, number) = (inside.ip(), inside.port());
            format!(
                "<NewRemoteHost></NewRemoteHost><NewExternalPort>{number}</NewExternalPort>\
                 <NewProtocol>{protocol}</NewProtocol><NewInternalPort>{number}</NewInternalPort>\
                 <NewInternalClient>{ip}</NewInternalClient><NewEnabled>1</NewEnabled>\
                 <NewPortMappingDescription>doppler-node</NewPortMappingDescription>\
                 <NewLeaseDuration>{lease}</NewLeaseDuration>"
            )
        };
        match self.call("AddPortMapping", &order(LEASE.as_secs())).await {
            Err(error) if error.to_string().contains(ONLY_PERMANENT) => {
                self.call("AddPortMapping", &order(0)).await.map(drop)
            }
            answer => answer.map(drop),
        }
    }

    async fn unmap(&self, port: Port) -> io::Result<()> {
        let (protocol, number) = (protocol(port), port.inside.port());
        let what = format!(
            "<NewRemoteHost></NewRemoteHost><NewExternalPort>{number}</NewExternalPort>\
             <NewProtocol>{protocol}</NewProtocol>"
        );
        self.call("DeletePortMapping", &what).await.map(drop)
    }

    /// One SOAP call. An error returned by the router begins with its number.
    async fn call(&self, action: &str, what: &str) -> io::Result<String> {
        let Self { address, path, service } = self;
        let body = format!(
            "<?xml version=\"1.0\"?>\r\n\
             <s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>\
             <u:{action} xmlns:u=\"{service}\">{what}</u:{action}></s:Body></s:Envelope>\r\n"
        );
        let request = format!(
            "POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: text/xml; charset=\"utf-8\"\
             \r\nSOAPAction: \"{service}#{action}\"\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        ask(*address, &request).await
    }
}

const fn protocol(port: Port) -> &'static str {
    if port.udp { "UDP" } else { "TCP" }
}

/// One HTTP exchange. Returns the body of a successful answer.
async fn ask(address: SocketAddr, request: &str) -> io::Result<String> {
    let exchange = timeout(ANSWER_TIMEOUT, async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let mut stream = stream.take(ANSWER_BYTES_MAX);
        // Some routers do not close the connection, so stop at the stated length.
        while !is_whole(&answer) && stream.read_buf(&mut answer).await? > 0 {}
        Ok::<_, io::Error>(answer)
    });
    let answer = exchange.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" {
        return Ok(body.to_owned());
    }
    let code = tag(body, "errorCode").unwrap_or(status).trim();
    let text = tag(body, "errorDescription").unwrap_or_default().trim();
    let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(64).collect::<String>();
    Err(io::Error::other(format!("{} {}", shown(code), shown(text))))
}

/// Whether an answer is complete by its stated length. False if it states none.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, _)) = text.split_once("\r\n\r\n") else { return false };
    let length = header(head, "content-length").and_then(|text| text.parse::<usize>().ok());
    length.is_some_and(|length| answer.len() >= head.len() + 4 + length)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// The socket and path of the router's description, from an answer to a search. `None` unless it is
/// on the machine that answered.
fn location(answer: &str, from: IpAddr) -> Option<(SocketAddr, String)> {
    if !answer.starts_with("HTTP/1.1 200") && !answer.starts_with("HTTP/1.0 200") {
        return None;
    }
    url(header(answer, "location")?, from)
}

/// The socket and path of an `http://IP[:PORT]/PATH` on the machine `host`.
fn url(text: &str, host: IpAddr) -> Option<(SocketAddr, String)> {
    let rest = text.strip_prefix("http://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let socket = match authority.parse::<SocketAddr>() {
        Ok(socket) => socket,
        Err(_) => SocketAddr::new(authority.parse().ok()?, 80),
    };
    let path = format!("/{path}");
    (socket.ip() == host && is_plain(&path)).then_some((socket, path))
}

/// Whether a path has no spaces or line ends, which would end the request line.
fn is_plain(path: &str) -> bool {
    path.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The first service of a description that maps ports, and the path of its control URL.
fn control(description: &str, router: SocketAddr) -> Option<(&'static str, String)> {
    description.split("<service>").skip(1).find_map(|service| {
        let kind = tag(service, "serviceType")?.trim();
        let kind = SERVICES.into_iter().find(|known| *known == kind)?;
        let place = tag(service, "controlURL")?.trim();
        if place.starts_with("http://") {
            let (socket, path) = url(place, router.ip())?;
            return (socket == router).then_some((kind, path));
        }
        let path = format!("/{}", place.trim_start_matches('/'));
        is_plain(&path).then_some((kind, path))
    })
}

/// The text of the first element of this name.
fn tag<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once("</")?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 1));

    #[test]
    fn a_router_may_only_describe_itself() {
        let answer = |location: &str| {
            format!("HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=9\r\nLocation: {location}\r\n\r\n")
        };
        let router: SocketAddr = "192.168.1.1:5000".parse().unwrap();
        let found = location(&answer("http://192.168.1.1:5000/desc/root.xml"), HOST);
        assert_eq!(found, Some((router, "/desc/root.xml".into())));
        let found = location(&answer("http://192.168.1.1"), HOST);
        assert_eq!(found, Some(("192.168.1.1:80".parse().unwrap(), "/".into())));
        for bad in [
            "http://192.168.1.2:5000/x",
            "http://10.0.0.1/",
            "https://192.168.1.1/",
            "http://router/",
            "http://192.168.1.1:5000/a b",
            "http://192.168.1.1:99999/",
            "",
        ] {
            assert_eq!(location(&answer(bad), HOST), None, "{bad}");
        }
        assert_eq!(location("NOTIFY * HTTP/1.1\r\nLocation: http://192.168.1.1/\r\n", HOST), None);

        let service = |kind: &str, place: &str| {
            format!(
                "<service><serviceType>{kind}</serviceType><SCPDURL>/s</SCPDURL>\
                 <controlURL>{place}</controlURL></service>"
            )
        };
        let other = service("urn:schemas-upnp-org:service:Layer3Forwarding:1", "/no");
        for (place, path) in [
            ("/ctl/IP", Some("/ctl/IP")),
            ("ctl", Some("/ctl")),
            ("http://192.168.1.1:5000/c", Some("/c")),
            ("http://192.168.1.1:22/c", None),
            ("http://10.0.0.1/c", None),
            ("/c\r\nX: y", None),
        ] {
            let text = format!("<root>{other}{}</root>", service(SERVICES[1], place));
            let found = control(&text, router);
            assert_eq!(found, path.map(|path| (SERVICES[1], path.to_owned())), "{place}");
        }
        assert_eq!(control(&other, router), None);
        assert_eq!(control("<service>", router), None);
    }

    #[test]
    fn answers_are_complete_by_their_stated_length() {
        let answer = b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH: 3\r\n\r\nabc";
        assert!(is_whole(answer) && !is_whole(&answer[..answer.len() - 1]));
        assert!(!is_whole(b"HTTP/1.0 200 OK\r\n\r\nuntil the end"));
        assert_eq!(tag("<a><b>1</b></a>", "b"), Some("1"));
        assert_eq!(tag("<b>1", "b"), None);
    }

    #[test]
    fn only_ports_behind_a_router_are_mapped() {
        let port = |text: &str| Port::of(&text.parse().unwrap());
        let udp = port("/ip4/192.168.1.2/udp/7/quic-v1").unwrap();
        assert!(udp.udp);
        assert_eq!(udp.inside, SocketAddrV4::new(Ipv4Addr::new(192, 168, 1, 2), 7));
        assert!(!port("/ip4/10.0.0.2/tcp/7/ws").unwrap().udp);
        let relay = crate::PeerId::from_seed([1; 32]);
        assert_eq!(port(&format!("/ip4/10.0.0.2/tcp/7/p2p/{relay}/p2p-circuit")), None);
        for text in
            ["/ip4/127.0.0.1/tcp/7", "/ip4/5.5.5.5/tcp/7", "/ip6/::1/tcp/7", "/dns4/a/tcp/7"]
        {
            assert_eq!(port(text), None, "{text}");
        }
    }
}
