//! Network namespaces of a test's own (needs root and iproute2), deleted when dropped; and a
//! small internet made of them: a public network (the street) and home networks behind NATs
//! (houses).

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::Node;

pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Creates a namespace with loopback up. Prints the reason and returns `None` if that fails.
    pub fn create(purpose: &str) -> Option<Self> {
        let namespace = Self { name: format!("doppler-{purpose}-{}", std::process::id()) };
        let made = Command::new("ip").args(["netns", "add", &namespace.name]).output();
        match made {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                eprintln!("skipped: no network namespace can be made here: {}", said.trim());
                return None;
            }
            Err(error) => {
                eprintln!("skipped: ip (iproute2) does not run here: {error}");
                return None;
            }
        }
        namespace.ip("link set lo up");
        Some(namespace)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    pub fn ip(&self, line: &str) {
        let status =
            Command::new("ip").args(["-n", &self.name]).args(line.split(' ')).status().unwrap();
        assert!(status.success(), "ip {line}");
    }

    /// A command that runs a program inside.
    pub fn program(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// A command that runs `doppler-node` inside.
    pub fn command(&self) -> Command {
        let mut command = self.program(env!("CARGO_BIN_EXE_doppler-node"));
        command.env_remove("DOPPLER_DATA").env_remove("DOPPLER_LOG");
        command
    }

    /// Starts a node that listens at `address`.
    pub fn join(&self, data: &Path, address: &str, extra: &[&str]) -> Node {
        let listen = format!("/ip4/{address}/tcp/0");
        self.join_at(data, &[&listen], extra)
    }

    /// Starts a node that listens at these addresses.
    pub fn join_at(&self, data: &Path, listen: &[&str], extra: &[&str]) -> Node {
        let mut command = self.command();
        command.args(["join", "--json", "--swarm", "lan", "--backend", "cpu"]);
        command.args(listen.iter().flat_map(|address| ["--listen", address])).args(extra);
        command.arg("--data").arg(data);
        Node::spawn(command, data)
    }

    /// Loads nftables rules. Prints the reason and returns false if that fails.
    pub fn nft(&self, rules: &str) -> bool {
        let nft = self.program("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn();
        let Ok(mut nft) = nft else { return false };
        nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
        let loaded = nft.wait().unwrap().success();
        if !loaded {
            eprintln!("skipped: nft (nftables) does not run here, or not with these rules");
        }
        loaded
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// The public network: a bridge with globally routable addresses, which no packet leaves.
pub struct Street {
    wire: Namespace,
    purpose: String,
}

/// The public address of a machine, or of a router.
pub const fn street_address(number: u8) -> [u8; 4] {
    [45, 45, 45, number]
}

/// An address in dotted form.
pub fn dotted(address: [u8; 4]) -> String {
    std::net::Ipv4Addr::from(address).to_string()
}

/// A home network behind a router with NAT.
pub struct House {
    pub router: Namespace,
    pub inside: Namespace,
    /// The address of the machine inside, and the router's public address.
    pub address: String,
    pub street: String,
}

impl Street {
    pub fn create(purpose: &str) -> Option<Self> {
        let wire = Namespace::create(&format!("{purpose}-wire"))?;
        wire.ip("link add wire type bridge");
        wire.ip("link set wire up");
        Some(Self { wire, purpose: purpose.to_owned() })
    }

    fn plug(&self, namespace: &Namespace, number: u8) -> String {
        let (port, address) = (format!("port{number}"), dotted(street_address(number)));
        let name = namespace.name();
        self.wire.ip(&format!("link add {port} type veth peer name street netns {name}"));
        self.wire.ip(&format!("link set {port} master wire"));
        self.wire.ip(&format!("link set {port} up"));
        namespace.ip(&format!("addr add {address}/24 dev street"));
        namespace.ip("link set street up");
        address
    }

    /// A machine on the public network, and its address.
    pub fn machine(&self, number: u8) -> Option<(Namespace, String)> {
        let machine = Namespace::create(&format!("{}-m{number}", self.purpose))?;
        let address = self.plug(&machine, number);
        Some((machine, address))
    }

    /// A house behind a typical home router: it translates addresses, keeps ports where it can,
    /// and drops packets that nobody inside asked for.
    pub fn house(&self, number: u8) -> Option<House> {
        let router = Namespace::create(&format!("{}-r{number}", self.purpose))?;
        let inside = Namespace::create(&format!("{}-h{number}", self.purpose))?;
        let street = self.plug(&router, number);
        let (gate, address) = (format!("192.168.{number}.1"), format!("192.168.{number}.2"));
        let name = inside.name();
        router.ip(&format!("link add home type veth peer name wall netns {name}"));
        router.ip(&format!("addr add {gate}/24 dev home"));
        inside.ip(&format!("addr add {address}/24 dev wall"));
        router.ip("link set home up");
        inside.ip("link set wall up");
        inside.ip(&format!("route add default via {gate}"));
        let forward = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        assert!(router.program("sh").args(["-c", forward]).status().unwrap().success());
        router
            .nft(
                "table ip home {
                    chain in {
                        type nat hook prerouting priority dstnat
                    }
                    chain out {
                        type nat hook postrouting priority srcnat
                        oifname street masquerade
                    }
                    chain here {
                        type filter hook input priority filter
                        iifname street ct state established,related accept
                        iifname street drop
                    }
                    chain through {
                        type filter hook forward priority filter
                        iifname street ct state established,related accept
                        iifname street ct status dnat accept
                        iifname street drop
                    }
                }",
            )
            .then_some(House { router, inside, address, street })
    }
}
