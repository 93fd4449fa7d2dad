//! Network namespaces of a test's own, as root with iproute2; deleted when dropped.

use std::path::Path;
use std::process::Command;

use super::Node;

pub struct Namespace {
    name: String,
}

impl Namespace {
    /// With loopback up. `None`, with the reason printed, where namespaces cannot be made.
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

    /// Runs `ip` in it.
    pub fn ip(&self, line: &str) {
        let status =
            Command::new("ip").args(["-n", &self.name]).args(line.split(' ')).status().unwrap();
        assert!(status.success(), "ip {line}");
    }

    /// `doppler-node`, to be run inside.
    pub fn command(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, env!("CARGO_BIN_EXE_doppler-node")]);
        command.env_remove("DOPPLER_DATA").env_remove("DOPPLER_LOG");
        command
    }

    /// A node that listens at `address`.
    pub fn join(&self, data: &Path, address: &str, extra: &[&str]) -> Node {
        let mut command = self.command();
        command.args(["join", "--json", "--swarm", "lan", "--backend", "cpu"]);
        command.args(["--listen", &format!("/ip4/{address}/tcp/0")]).args(extra);
        command.arg("--data").arg(data);
        Node::spawn(command, data)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
