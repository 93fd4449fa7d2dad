//! The soak's nodes: starting, killing and cutting them off, asking them within a time, reading
//! what they use.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::report::{Measure, Report};
use super::usage;
use crate::common::netns::Namespace;
use crate::common::{Node, Said, command};

/// A reading of every steady node.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// How soon a model is known, or known to be gone, everywhere.
const NEWS: Duration = Duration::from_secs(60);

/// How often nodes are asked whether they know by now.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How soon each command answers.
const LIMITS: [(&str, Duration); 9] = [
    ("publish", Duration::from_secs(30)),
    ("run", Duration::from_secs(60)),
    ("pin", Duration::from_secs(60)),
    ("unpin", Duration::from_secs(15)),
    ("rm", Duration::from_secs(15)),
    ("gc", Duration::from_secs(15)),
    ("ls", Duration::from_secs(5)),
    ("peers", Duration::from_secs(5)),
    ("status", Duration::from_secs(5)),
];

pub struct Fleet {
    namespace: Option<Namespace>,
    dir: tempfile::TempDir,
    /// `None` while a node is killed.
    nodes: Vec<Option<Node>>,
    addresses: Vec<String>,
    pub report: Report,
    readings: Option<Receiver<Reading>>,
}

struct Reading {
    node: usize,
    usage: usage::Usage,
    disk: u64,
}

/// Reads until it is stopped.
pub struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Sampler {
    pub fn stop(self) {
        drop(self.stop);
        self.thread.join().unwrap();
    }
}

impl Fleet {
    /// Starts nodes that know each other.
    pub fn new(count: usize, report: Report) -> Self {
        let mut fleet = Self {
            namespace: Namespace::create("soak"),
            dir: tempfile::tempdir().unwrap(),
            nodes: (0..count).map(|_| None).collect(),
            addresses: vec![String::new(); count],
            report,
            readings: None,
        };
        (0..count).for_each(|node| fleet.start(node));
        fleet
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn data(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("node-{node}"))
    }

    fn command(&self) -> Command {
        self.namespace.as_ref().map_or_else(command, Namespace::command)
    }

    /// Starts a node, new or killed before. It is told of two others.
    pub fn start(&mut self, node: usize) {
        let data = self.data(node);
        let mut join = self.command();
        join.args(["join", "--json", "--no-mdns", "--no-upnp", "--swarm", "soak"]);
        join.args(["--listen", "/ip4/127.0.0.1/tcp/0", "--backend", "cpu"]);
        join.args(["--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--log", "error", "--data"]);
        join.arg(&data);
        for address in self.addresses.iter().filter(|address| !address.is_empty()).take(2) {
            join.args(["--bootstrap", address]);
        }
        let started = Node::spawn(join, &data);
        self.addresses[node].clone_from(&started.address);
        self.nodes[node] = Some(started);
    }

    pub fn kill(&mut self, node: usize) {
        // Dropping it kills the process and waits for its end.
        self.nodes[node] = None;
    }

    pub fn signal(&self, node: usize, name: &str) {
        self.node(node).signal(name);
    }

    /// Drops what comes to a node's ports, and what it sends from them. Does nothing without root.
    pub fn cut(&self, node: usize) {
        let Some(namespace) = &self.namespace else { return };
        let address = |transport: &str| {
            let listen = self.data(node).join("listen.json");
            let listen = std::fs::read_to_string(listen).unwrap();
            let listen: serde_json::Value = serde_json::from_str(&listen).unwrap();
            let last = listen["last"].as_array().unwrap().iter();
            let mut of = last.filter(|last| last["listen"].as_str().unwrap().contains(transport));
            of.next().unwrap()["port"].as_u64().unwrap()
        };
        let (tcp, udp) = (address("/tcp/"), address("/udp/"));
        namespace.nft(&format!(
            "table inet soak {{
                chain cut {{
                    type filter hook input priority filter
                    tcp dport {tcp} drop
                    tcp sport {tcp} drop
                    udp dport {udp} drop
                    udp sport {udp} drop
                }}
            }}"
        ));
    }

    pub fn mend(&self) {
        if let Some(namespace) = &self.namespace {
            namespace.nft("delete table inet soak");
        }
    }

    fn node(&self, node: usize) -> &Node {
        self.nodes[node].as_ref().expect("a node that runs")
    }

    pub fn check(&mut self, holds: bool, what: &str) {
        if !holds {
            eprintln!("{what}");
            self.report.failures.push(what.to_owned());
        }
    }

    /// Asks a node; `None` if it fails or takes too long, which is a failure of the soak.
    pub fn ask(&mut self, node: usize, verb: &'static str, args: &[&str]) -> Option<Said> {
        let limit = LIMITS.iter().find(|(name, _)| *name == verb).expect("a limit").1;
        let mut command = self.command();
        command.arg(verb).args(args).arg("--data").arg(self.data(node));
        let began = Instant::now();
        let said = within(command, limit);
        self.report.answered(verb, began.elapsed(), limit);
        self.drain();
        let said = match said {
            Some(said) if said.code == Some(0) => return Some(said),
            Some(said) => said.err,
            None => format!("no answer within {limit:?}"),
        };
        self.check(false, &format!("node {node}: {verb} {}: {}", args.join(" "), said.trim()));
        None
    }

    /// The names of the models that a node lists.
    pub fn models(&mut self, node: usize) -> Vec<String> {
        let listed = self.ask(node, "ls", &["--json"]).map(|said| said.json());
        let rows = listed.as_ref().and_then(serde_json::Value::as_array);
        let name = |row: &serde_json::Value| row["name"].as_str().unwrap_or_default().to_owned();
        rows.map(|rows| rows.iter().map(name).collect()).unwrap_or_default()
    }

    /// Waits until all these nodes list a model, or no longer do.
    pub fn until(&mut self, nodes: impl IntoIterator<Item = usize>, name: &str, listed: bool) {
        let end = Instant::now() + NEWS;
        let mut left: Vec<usize> = nodes.into_iter().collect();
        loop {
            left.retain(|node| self.models(*node).iter().any(|have| have == name) != listed);
            if left.is_empty() {
                return;
            }
            if Instant::now() >= end {
                let what = if listed { "do not know" } else { "still list" };
                self.check(false, &format!("nodes {left:?} {what} {name} after {NEWS:?}"));
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Waits until every node is connected to all others.
    pub fn all_met(&mut self, limit: Duration) {
        let began = Instant::now();
        for node in 0..self.nodes.len() {
            loop {
                let peers = self.ask(node, "peers", &["--json"]).map(|said| said.json());
                let met = peers.as_ref().and_then(serde_json::Value::as_array).map_or(0, Vec::len);
                if met + 1 >= self.nodes.len() {
                    break;
                }
                if began.elapsed() > limit {
                    self.check(false, &format!("node {node} has {met} peers after {limit:?}"));
                    break;
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    /// Reads these nodes every few seconds from now on.
    pub fn sample(&mut self, nodes: Range<usize>) -> Sampler {
        self.report.begin();
        let watched: Vec<_> =
            nodes.map(|node| (node, self.node(node).pid(), self.data(node))).collect();
        let (sender, readings) = channel();
        let (stop, stopped) = channel::<()>();
        self.readings = Some(readings);
        let thread = std::thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(SAMPLE_EVERY) {
                for (node, pid, data) in &watched {
                    let Some(usage) = usage::read(*pid) else { continue };
                    let disk = usage::disk_bytes(data);
                    let _ = sender.send(Reading { node: *node, usage, disk });
                }
            }
        });
        Sampler { stop, thread }
    }

    /// Notes what has been read.
    fn drain(&mut self) {
        let Some(readings) = &self.readings else { return };
        while let Ok(Reading { node, usage, disk }) = readings.try_recv() {
            self.report.add(node, Measure::Memory, usage.resident_bytes as f64);
            self.report.add(node, Measure::Descriptors, usage.descriptors as f64);
            self.report.add(node, Measure::Threads, usage.threads as f64);
            self.report.add(node, Measure::Disk, disk as f64);
        }
    }

    /// What every node takes of a core while nobody asks it anything.
    pub fn measure_idle(&mut self, quiet: Duration) {
        let pids: Vec<u32> = self.nodes.iter().flatten().map(Node::pid).collect();
        let read = || -> Vec<Duration> {
            pids.iter().map(|pid| usage::read(*pid).expect("it runs").processor).collect()
        };
        let (began, before) = (Instant::now(), read());
        std::thread::sleep(quiet);
        let (after, wall) = (read(), began.elapsed());
        let spent = before.iter().zip(after).map(|(before, after)| after - *before);
        self.report.idle = spent.map(|spent| spent.div_duration_f64(wall)).collect();
    }

    /// Stops the nodes in order.
    pub fn finish(mut self, rounds: usize) -> Report {
        self.drain();
        self.report.rounds = rounds;
        for at in 0..self.nodes.len() {
            let Some(mut node) = self.nodes[at].take() else { continue };
            node.signal("TERM");
            let code = node.wait();
            self.check(code == Some(0), &format!("node {at} ended with {code:?}"));
        }
        self.report
    }
}

/// Runs a command to its end. It is killed, and there is nothing to tell, after `limit`.
fn within(mut command: Command, limit: Duration) -> Option<Said> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pid = child.id();
    let (sender, done) = channel();
    let waiting = std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let output = done.recv_timeout(limit).ok();
    if output.is_none() {
        let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    }
    let _ = waiting.join();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    output.map(|output| Said {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    })
}
