//! A router that maps ports by UPnP: it answers a search (SSDP), describes itself over HTTP,
//! accepts SOAP requests, and forwards ports. It is the test binary run once more, inside the
//! router's namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use crate::common::PATIENCE;
use crate::common::netns::House;

const SEARCH: &str = "urn:schemas-upnp-org:device:InternetGatewayDevice:1";
const SERVICE: &str = "urn:schemas-upnp-org:service:WANIPConnection:1";
/// The router's inside and outside address. Without this variable the test is not a router.
const PLACES: &str = "DOPPLER_TEST_GATEWAY";

/// A running router; killed by its pid when dropped.
pub struct Gateway {
    child: Child,
    lines: Receiver<String>,
}

impl Gateway {
    pub fn start(house: &House) -> Self {
        let program = std::env::current_exe().unwrap();
        let inside = house.address.replace(".2", ".1");
        let mut command = house.router.program(program.to_str().unwrap());
        command.args(["--exact", "nat::gateway::gateway", "--ignored", "--nocapture"]);
        command.env(PLACES, format!("{inside} {}", house.street));
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let said = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix("gateway: ") {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        let mut gateway = Self { child, lines };
        gateway.says("ready");
        gateway
    }

    /// Waits for its next line that begins with `word` and returns the rest of it.
    pub fn says(&mut self, word: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|error| panic!("no {word:?} from the router: {error}"));
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "the router's part of another test"]
fn gateway() {
    let Ok(places) = std::env::var(PLACES) else { return };
    let (inside, outside) = places.split_once(' ').unwrap();
    let inside: Ipv4Addr = inside.parse().unwrap();
    let http = TcpListener::bind((inside, 0)).unwrap();
    let port = http.local_addr().unwrap().port();
    let ssdp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 1900)).unwrap();
    ssdp.join_multicast_v4(&Ipv4Addr::new(239, 255, 255, 250), &inside).unwrap();
    std::thread::spawn(move || {
        let mut search = [0; 2048];
        while let Ok((bytes, from)) = ssdp.recv_from(&mut search) {
            let text = String::from_utf8_lossy(&search[..bytes]);
            if text.starts_with("M-SEARCH * HTTP/1.1") && text.contains(SEARCH) {
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: {SEARCH}\r\nEXT:\r\n\
                     LOCATION: http://{inside}:{port}/root.xml\r\n\r\n"
                );
                ssdp.send_to(answer.as_bytes(), from).unwrap();
            }
        }
    });
    println!("\ngateway: ready");
    for stream in http.incoming() {
        answer(stream.unwrap(), outside);
    }
}

fn answer(mut stream: TcpStream, outside: &str) {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut length) = (String::new(), 0);
    lines.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let Some((name, value)) = line.split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut order = vec![0; length];
    lines.read_exact(&mut order).unwrap();
    let order = String::from_utf8(order).unwrap();
    let body = if first.starts_with("GET /root.xml ") {
        format!(
            "<?xml version=\"1.0\"?><root xmlns=\"urn:schemas-upnp-org:device-1-0\"><device>\
             <deviceType>{SEARCH}</deviceType><deviceList><device><serviceList><service>\
             <serviceType>{SERVICE}</serviceType><SCPDURL>/ip.xml</SCPDURL>\
             <controlURL>/ctl/ip</controlURL></service></serviceList></device></deviceList>\
             </device></root>"
        )
    } else {
        assert!(first.starts_with("POST /ctl/ip "), "{first}");
        let answered = obey(&order, outside);
        format!("<s:Envelope><s:Body>{answered}</s:Body></s:Envelope>")
    };
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
}

fn obey(order: &str, outside: &str) -> String {
    let tag = |name: &str| {
        let (_, rest) = order.split_once(&format!("<{name}>")).unwrap_or_default();
        rest.split_once("</").unwrap_or_default().0.to_owned()
    };
    let (protocol, port) = (tag("NewProtocol"), tag("NewExternalPort"));
    if order.contains("GetExternalIPAddress") {
        return format!(
            "<u:GetExternalIPAddressResponse><NewExternalIPAddress>{outside}\
             </NewExternalIPAddress></u:GetExternalIPAddressResponse>"
        );
    }
    if order.contains("DeletePortMapping") {
        println!("gateway: delete {protocol} {port}");
        return "<u:DeletePortMappingResponse/>".into();
    }
    assert!(order.contains("AddPortMapping"), "{order}");
    let (client, to) = (tag("NewInternalClient"), tag("NewInternalPort"));
    let rule = format!(
        "add rule ip home in iifname street {} dport {port} dnat to {client}:{to}",
        protocol.to_lowercase()
    );
    assert!(Command::new("nft").arg(rule).status().unwrap().success());
    println!("gateway: add {protocol} {port} {client} {to} {}", tag("NewLeaseDuration"));
    "<u:AddPortMappingResponse/>".into()
}
