//! What the tests of the binary share: running it, finding test data, nodes as child processes.
#![allow(dead_code)] // each test binary uses its part

pub mod netns;
pub mod scripted;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

pub use doppler_testing::root;
use serde_json::Value;

/// Far longer than anything here takes; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The output and exit code of a finished command.
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn of(output: std::process::Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The last line of standard output as JSON.
    pub fn json(&self) -> Value {
        let line = self.out.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}; {}", self.err))
    }

    /// Asserts success.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "out: {}\nerr: {}", self.out, self.err);
        self
    }

    /// Asserts a failure with a message of one line that contains all of `words`, and returns it.
    pub fn fails(self, words: &[&str]) -> String {
        let failed = self.code.is_some_and(|code| code != 0);
        assert!(failed, "code {:?}, out: {}\nerr: {}", self.code, self.out, self.err);
        let lines: Vec<_> = self.err.lines().collect();
        let [line] = lines[..] else { panic!("not one line: {}", self.err) };
        assert!(line.starts_with("error: "), "{line}");
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line:?}");
        }
        line.to_owned()
    }
}

/// The binary under test, with only this test's environment.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_doppler-node"));
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
        .env("DOPPLER_CONFIG", "")
        .env_remove("DOPPLER_DATA")
        .env_remove("DOPPLER_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs `doppler-node ARGS` to its end.
pub fn run<I: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = I>) -> Said {
    Said::of(command().args(args).output().unwrap())
}

/// Whether this process ignores SIGHUP, as under `nohup`. Its children inherit that, and then
/// SIGHUP does not end them.
pub fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let ignored = ignored.is_some_and(|mask| mask & 1 != 0);
    if ignored {
        eprintln!("skipped: SIGHUP is ignored here");
    }
    ignored
}

pub fn golden(name: &str) -> PathBuf {
    root().join("tests/data/goldens").join(name)
}

/// The embedded model's directory in the repository.
pub fn model() -> PathBuf {
    root().join("models/tiny-mixtral-q4_k_m")
}

/// Copies a directory's files.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        std::fs::copy(entry.path(), &to).unwrap();
        let mut permissions = std::fs::metadata(&to).unwrap().permissions();
        #[allow(clippy::permissions_set_readonly_false)] // the copy is this test's own
        permissions.set_readonly(false);
        std::fs::set_permissions(&to, permissions).unwrap();
    }
}

/// A `join` process; killed by its pid when dropped.
pub struct Node {
    pub peer_id: String,
    pub address: String,
    pub data: PathBuf,
    child: Child,
    lines: Receiver<Value>,
    /// Events that came before it was ready: on a busy machine a model can.
    early: Vec<Value>,
}

impl Node {
    /// Starts a node on loopback and waits until it is ready.
    pub fn start(data: &Path, swarm: &str, bootstrap: &[&str], extra: &[&str]) -> Self {
        let mut command = command();
        command.args(["join", "--json", "--no-mdns", "--listen", "/ip4/127.0.0.1/tcp/0"]);
        command.args(["--swarm", swarm, "--backend", "cpu"]).arg("--data").arg(data);
        for address in bootstrap {
            command.args(["--bootstrap", address]);
        }
        command.args(extra);
        Self::spawn(command, data)
    }

    /// Starts a `join --json` command and waits until the node is ready.
    pub fn spawn(mut command: Command, data: &Path) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(event) = serde_json::from_str(&line) {
                    let _ = sender.send(event);
                }
            }
        });
        let mut node = Self {
            peer_id: String::new(),
            address: String::new(),
            data: data.into(),
            child,
            lines,
            early: Vec::new(),
        };
        let mut early = Vec::new();
        let ready = loop {
            match node.next_event("ready") {
                event if event["event"] == "ready" => break event,
                event => early.push(event),
            }
        };
        node.early = early;
        node.peer_id = ready["peer_id"].as_str().unwrap().to_owned();
        node.address = ready["addresses"][0].as_str().unwrap().to_owned();
        node
    }

    /// As [`Self::spawn`], but nobody reads the node's standard error, nor its standard output
    /// after it is ready.
    pub fn spawn_mute(mut command: Command, data: &Path) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stderr.take());
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let ready: Value = serde_json::from_str(&ready).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Self {
            peer_id: text(&ready["peer_id"]),
            address: text(&ready["addresses"][0]),
            data: data.into(),
            child,
            lines: channel().1,
            early: Vec::new(),
        }
    }

    /// Waits for the next event of this kind.
    pub fn event(&mut self, kind: &str) -> Value {
        if let Some(at) = self.early.iter().position(|event| event["event"] == kind) {
            return self.early.remove(at);
        }
        loop {
            match self.next_event(kind) {
                event if event["event"] == kind => return event,
                _ => {}
            }
        }
    }

    /// Waits for any event; `kind` is what the test waits for.
    fn next_event(&self, kind: &str) -> Value {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => panic!("no {kind:?} event in {PATIENCE:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("the node ended before {kind:?}"),
        }
    }

    /// Runs `doppler-node COMMAND --data DIR ARGS` against this node.
    pub fn ask(&self, args: &[&str]) -> Said {
        run(args.iter().map(std::ffi::OsStr::new).chain(["--data".as_ref(), self.data.as_os_str()]))
    }

    /// Sends a signal by name, as `kill -NAME` does.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap();
        assert!(status.success());
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the process to end and returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
