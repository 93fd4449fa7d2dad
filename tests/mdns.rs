//! Nodes of one local network find each other without being told an address. Needs
//! multicast, so it runs in a network namespace of its own: as root, with iproute2.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Node, model};

/// A network namespace with one multicast-capable link; deleted when dropped.
struct Namespace {
    name: String,
}

const ADDRESS: &str = "10.213.77.1";

impl Namespace {
    /// `None`, with the reason printed, where namespaces cannot be made.
    fn create() -> Option<Self> {
        let namespace = Self { name: format!("doppler-mdns-{}", std::process::id()) };
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
        for line in [
            "link set lo up",
            "link add near type veth peer name far",
            "link set near up",
            "link set far up",
            &format!("addr add {ADDRESS}/24 dev near"),
            "route add 224.0.0.0/4 dev near",
        ] {
            let status = Command::new("ip")
                .args(["-n", &namespace.name])
                .args(line.split(' '))
                .status()
                .unwrap();
            assert!(status.success(), "ip {line}");
        }
        Some(namespace)
    }

    /// `doppler-node`, to be run inside.
    fn command(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, env!("CARGO_BIN_EXE_doppler-node")]);
        command.env_remove("DOPPLER_DATA").env_remove("DOPPLER_LOG");
        command
    }

    fn join(&self, data: &Path) -> Node {
        let mut command = self.command();
        command.args(["join", "--json", "--swarm", "lan", "--backend", "cpu"]);
        command.args(["--listen", &format!("/ip4/{ADDRESS}/tcp/0")]).arg("--data").arg(data);
        Node::spawn(command, data)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[test]
fn nodes_of_one_network_need_no_address() {
    let Some(namespace) = Namespace::create() else { return };
    let dir = tempfile::tempdir().unwrap();
    let first = namespace.join(&dir.path().join("a"));
    let mut second = namespace.join(&dir.path().join("b"));
    let published = namespace
        .command()
        .arg("publish")
        .arg(model())
        .args(["--shards", "0"])
        .arg("--data")
        .arg(&first.data)
        .output()
        .unwrap();
    assert!(published.status.success(), "{}", String::from_utf8_lossy(&published.stderr));
    assert_eq!(second.event("model")["name"], "tiny-mixtral-q4_k_m");
}
