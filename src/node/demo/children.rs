//! Nodes as separate operating-system processes, which are started, waited for and killed by pid.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, bail};

use crate::client::Client;
use crate::events::NodeEvent;
use crate::settings;

/// A node that has not reported that it is ready by then has failed.
const READY_MAX: Duration = Duration::from_secs(20);

/// One `doppler-node join` process; killed when dropped.
pub struct NodeProcess {
    pub name: String,
    pub peer_id: String,
    /// A dialable address with its `/p2p/` id.
    pub address: String,
    pub data: PathBuf,
    child: Arc<Mutex<Child>>,
}

/// All nodes that were started, to be killed when this process is told to end.
#[derive(Clone, Default)]
pub struct Children(Arc<Mutex<Vec<Arc<Mutex<Child>>>>>);

impl Children {
    /// Kills the nodes that still run.
    pub fn kill(&self) {
        for child in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn adopt(&self, child: Child) -> Arc<Mutex<Child>> {
        let child = Arc::new(Mutex::new(child));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&child));
        child
    }
}

impl NodeProcess {
    /// Starts `join --swarm SWARM --data DIR/NAME` on loopback, and waits until it is ready.
    pub fn start(
        (dir, children): (&Path, &Children),
        name: &str,
        swarm: &str,
        bootstrap: &[String],
        extra: &[String],
    ) -> anyhow::Result<Self> {
        let data = dir.join(name.replace(' ', "-"));
        let log_path = data.with_extension("log");
        let log = File::create(&log_path)
            .with_context(|| format!("cannot write {}", log_path.display()))?;
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut command = Command::new(program);
        // What the user configured is for their own nodes.
        command.env(settings::VARIABLE, "");
        command.args(["join", "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
        command.args(["--swarm", swarm]).arg("--data").arg(&data);
        for address in bootstrap {
            command.args(["--bootstrap", address]);
        }
        command.args(extra);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("cannot start another node process")?;

        let stdout = child.stdout.take().context("the node's output is not piped")?;
        let child = children.adopt(child);
        let (sender, ready) = mpsc::sync_channel(1);
        // Reads to the end, so that the child never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(NodeEvent::Ready { peer_id, addresses, .. }) = serde_json::from_str(&line)
                {
                    let _ = sender.try_send((peer_id, addresses));
                }
            }
        });
        let ready = ready.recv_timeout(READY_MAX);
        let Ok((peer_id, addresses)) = ready else {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            let last = log.lines().last().unwrap_or("it said nothing");
            bail!("{name} did not start: {last}");
        };
        let mut node = Self { name: name.to_owned(), peer_id, address: String::new(), data, child };
        node.address = addresses.into_iter().next().context("the node listens nowhere")?;
        Ok(node)
    }

    pub fn client(&self) -> anyhow::Result<Client> {
        Client::open(&self.data)
    }

    /// Sends SIGKILL, so the node cannot flush or say goodbye.
    pub fn kill(&mut self) -> std::io::Result<()> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.kill()?;
        child.wait().map(drop)
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
