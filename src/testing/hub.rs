//! A server that speaks the Hugging Face Hub's API, on loopback: models, trees in pages, small files
//! from the Hub itself, LFS files by a redirect to another host (a second port), ranges. And its
//! failures, as told.
//!
//! It keeps a log of what was asked and sent, for tests to look at.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::Digest;

/// A commit's id.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Entries of a page of a tree.
const PAGE: usize = 3;
/// Bytes sent at a time.
const CHUNK: usize = 4096;

/// A file of a repository.
#[derive(Clone)]
struct Blob {
    bytes: Arc<Vec<u8>>,
    lfs: bool,
    hash: String,
}

/// What the server does besides answering.
#[derive(Clone, Default)]
pub struct Behaviour {
    /// Every request to the API is refused with this status and error code.
    pub refuse: Option<(u16, &'static str)>,
    /// So many range requests are answered with 429 and `Retry-After: 0`.
    pub busy: usize,
    /// So many range requests are cut off after a third of their bytes.
    pub cut: usize,
    /// Bytes of LFS files that are sent, over all requests; then it falls silent.
    pub silent_after: Option<u64>,
    /// As `silent_after`, but then it answers 500.
    pub broken_after: Option<u64>,
    /// The last byte of this file is wrong when it is sent.
    pub wrong: Option<&'static str>,
    /// Bytes a second, over all connections.
    pub rate: Option<u64>,
    /// The same for this file alone.
    pub slow: Option<(&'static str, u64)>,
    /// The token that every request needs.
    pub token: Option<&'static str>,
}

/// A request, and what was sent for it.
#[derive(Clone, Debug)]
pub struct Logged {
    /// Whether it was the second host.
    pub is_cdn: bool,
    pub path: String,
    /// First byte, and the one behind the last.
    pub range: Option<(u64, u64)>,
    pub authorization: Option<String>,
    /// Bytes of the body that were sent.
    pub sent: u64,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, BTreeMap<String, Blob>>,
    behaviour: Behaviour,
    log: Vec<Logged>,
    /// Bytes of LFS files that were sent.
    sent: u64,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    cdn: String,
}

/// See the module. Its threads end with the process.
pub struct Hub {
    pub endpoint: String,
    shared: Arc<Shared>,
}

impl Hub {
    pub fn start() -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, cdn) = (listen(), listen());
        let address = |of: &TcpListener| format!("http://{}", of.local_addr().unwrap());
        let endpoint = address(&hub);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            cdn: address(&cdn),
        });
        for (listener, is_cdn) in [(hub, false), (cdn, true)] {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || while shared.answer(&stream, is_cdn).is_some() {});
                }
            });
        }
        Self { endpoint, shared }
    }

    /// Adds a repository's files, from a directory. Files of more than `lfs` bytes are LFS files.
    pub fn add(&self, repo: &str, files: &[(&str, &Path)], lfs: usize) {
        let files = files.iter().map(|(name, path)| {
            let bytes = std::fs::read(path).unwrap();
            ((*name).to_owned(), Blob::new(bytes, lfs))
        });
        let files: BTreeMap<_, _> = files.collect();
        self.shared.state.lock().unwrap().repos.entry(repo.to_owned()).or_default().extend(files);
    }

    pub fn behave(&self, behaviour: Behaviour) {
        self.shared.state.lock().unwrap().behaviour = behaviour;
        self.shared.changed.notify_all();
    }

    /// Everything that was asked since the last call.
    pub fn log(&self) -> Vec<Logged> {
        std::mem::take(&mut self.shared.state.lock().unwrap().log)
    }

    /// Waits until so many bytes of LFS files were sent.
    pub fn wait_for(&self, bytes: u64) {
        let state = self.shared.state.lock().unwrap();
        let wait = Duration::from_secs(60);
        let lacks = |state: &mut State| state.sent < bytes;
        let (state, ended) = self.shared.changed.wait_timeout_while(state, wait, lacks).unwrap();
        assert!(!ended.timed_out(), "only {} bytes were asked for", state.sent);
    }

    /// Bytes of LFS files that were sent.
    pub fn sent(&self) -> u64 {
        self.shared.state.lock().unwrap().sent
    }
}

impl Blob {
    fn new(bytes: Vec<u8>, lfs: usize) -> Self {
        let hex = |bytes: &[u8]| {
            bytes.iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            })
        };
        let lfs = bytes.len() > lfs;
        let hash = match lfs {
            true => hex(&sha2::Sha256::digest(&bytes)),
            false => {
                let blob = [format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat();
                hex(&<sha1::Sha1 as sha1::Digest>::digest(blob))
            }
        };
        Self { bytes: Arc::new(bytes), lfs, hash }
    }
}

/// An answer's head, and its body if it is a file's.
enum Answer {
    Json(u16, Value, Vec<(&'static str, String)>),
    Redirect(String),
    Bytes { name: String, blob: Blob, range: Option<(u64, u64)> },
}

impl Shared {
    /// Answers one request. `None` once the connection has ended.
    fn answer(&self, stream: &TcpStream, is_cdn: bool) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let path = line.split(' ').nth(1)?.to_owned();
        let (mut range, mut authorization) = (None, None);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
            let Some((name, value)) = line.trim().split_once(": ") else { break };
            match name.to_lowercase().as_str() {
                "range" => {
                    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                    range = Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1));
                }
                "authorization" => authorization = Some(value.to_owned()),
                _ => {}
            }
        }
        let (path_, authorization_) = (path.clone(), authorization.clone());
        let number = {
            let mut state = self.state.lock().unwrap();
            state.log.push(Logged {
                is_cdn,
                path: path_,
                range,
                authorization: authorization_,
                sent: 0,
            });
            state.log.len() - 1
        };
        let mut stream = stream;
        match self.decide(&path, range, authorization.as_deref(), is_cdn) {
            Answer::Json(status, body, headers) => {
                let body = body.to_string();
                let headers = headers.iter().fold(String::new(), |mut all, (name, value)| {
                    let _ = write!(all, "{name}: {value}\r\n");
                    all
                });
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status} X\r\n{headers}content-length: {length}\r\n\r\n");
                stream.write_all((head + &body).as_bytes()).ok()
            }
            Answer::Redirect(to) => {
                let head = format!("HTTP/1.1 302 X\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(head.as_bytes()).ok()
            }
            Answer::Bytes { name, blob, range } => self.send(stream, &name, &blob, range, number),
        }
    }

    fn decide(
        &self,
        path: &str,
        range: Option<(u64, u64)>,
        authorization: Option<&str>,
        is_cdn: bool,
    ) -> Answer {
        let mut state = self.state.lock().unwrap();
        let refuse = |status: u16, code: &str| {
            Answer::Json(status, json!({ "error": code }), vec![("x-error-code", code.to_owned())])
        };
        if let Some((status, code)) = state.behaviour.refuse.filter(|_| !is_cdn) {
            return refuse(status, code);
        }
        if let Some(token) = state.behaviour.token.filter(|_| !is_cdn)
            && authorization != Some(&format!("Bearer {token}"))
        {
            return refuse(401, "GatedRepo");
        }
        if range.is_some() && is_cdn && state.behaviour.busy > 0 {
            state.behaviour.busy -= 1;
            let headers = vec![("retry-after", "0".to_owned())];
            return Answer::Json(429, json!({}), headers);
        }
        if let Some(most) = state.behaviour.broken_after
            && is_cdn
            && state.sent >= most
        {
            return Answer::Json(500, json!({}), Vec::new());
        }
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        if let Some(rest) = path.strip_prefix("/api/models/") {
            return self.api(&state, rest, query);
        }
        let found = path.split_once("/resolve/").and_then(|(repo, rest)| {
            let (commit, name) = rest.split_once('/')?;
            let files = state.repos.get(&repo[1..]).filter(|_| commit == COMMIT)?;
            Some((name.to_owned(), files.get(name)?.clone()))
        });
        match found {
            None => refuse(404, "EntryNotFound"),
            Some((_, blob)) if blob.lfs && !is_cdn => {
                Answer::Redirect(format!("{}{path}?signature=secret", self.cdn))
            }
            Some((name, blob)) => Answer::Bytes { name, blob, range },
        }
    }

    fn api(&self, state: &State, rest: &str, query: &str) -> Answer {
        let missing =
            |code: &str| Answer::Json(404, json!({}), vec![("x-error-code", code.to_owned())]);
        let cut = ["/revision/", "/tree/", "/refs"].iter().find_map(|cut| {
            rest.split_once(cut).map(|(repo, rest)| (repo.to_owned(), *cut, rest.to_owned()))
        });
        let Some((repo, what, of)) = cut else { return missing("RepoNotFound") };
        let Some(files) = state.repos.get(&repo) else { return missing("RepoNotFound") };
        if what == "/refs" {
            let refs = json!({ "branches": [{ "name": "main" }], "tags": [{ "name": "v1" }] });
            return Answer::Json(200, refs, Vec::new());
        }
        if ![COMMIT, "main", "v1"].contains(&of.as_str()) {
            return missing("RevisionNotFound");
        }
        if what == "/revision/" {
            return Answer::Json(200, json!({ "id": repo, "sha": COMMIT }), Vec::new());
        }
        let entry = |(path, blob): (&String, &Blob)| match blob.lfs {
            true => json!({
                "type": "file", "path": path, "size": 134, "oid": "00".repeat(20),
                "lfs": { "oid": blob.hash, "size": blob.bytes.len(), "pointerSize": 134 },
                "xetHash": "00".repeat(32),
            }),
            false => {
                json!({ "type": "file", "path": path, "size": blob.bytes.len(), "oid": blob.hash })
            }
        };
        let first: usize = query.rsplit_once("cursor=").map_or(0, |(_, at)| at.parse().unwrap());
        let page: Vec<Value> = files.iter().skip(first).take(PAGE).map(entry).collect();
        let next = first + page.len();
        let link = format!("</api/models/{rest}?recursive=true&cursor={next}>; rel=\"next\"");
        let more = (next < files.len()).then_some(("link", link));
        Answer::Json(200, page.into(), more.into_iter().collect())
    }

    /// Sends a file or a range of it, within what the behaviour allows.
    fn send(
        &self,
        mut stream: &TcpStream,
        name: &str,
        blob: &Blob,
        range: Option<(u64, u64)>,
        number: usize,
    ) -> Option<()> {
        let size = blob.bytes.len() as u64;
        let (start, end) = range.map_or((0, size), |(start, end)| (start, end.min(size)));
        let head = match range {
            None => format!("HTTP/1.1 200 X\r\ncontent-length: {size}\r\n\r\n"),
            Some(_) => format!(
                "HTTP/1.1 206 X\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{size}\r\n\r\n",
                end - start,
                end - 1
            ),
        };
        stream.write_all(head.as_bytes()).ok()?;
        let mut bytes = blob.bytes[start as usize..end as usize].to_vec();
        let mut until = end;
        {
            let mut state = self.state.lock().unwrap();
            if state.behaviour.wrong.is_some_and(|wrong| wrong == name) && end == size {
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
            }
            if range.is_some() && state.behaviour.cut > 0 {
                state.behaviour.cut -= 1;
                until = start + (end - start) / 3;
            }
        }
        let mut at = start;
        while at < until {
            let count = CHUNK.min((until - at) as usize);
            let rate = {
                let mut state = self.state.lock().unwrap();
                let most = state.behaviour.silent_after.filter(|_| blob.lfs);
                while most.is_some_and(|most| state.sent >= most) {
                    // For ever, unless it is told otherwise.
                    state = self.changed.wait(state).unwrap();
                    if state.behaviour.silent_after != most {
                        return None;
                    }
                }
                let slow = state.behaviour.slow.filter(|(slow, _)| *slow == name);
                slow.map(|(_, rate)| rate).or(state.behaviour.rate.filter(|_| blob.lfs))
            };
            let from = (at - start) as usize;
            stream.write_all(&bytes[from..from + count]).ok()?;
            at += count as u64;
            let mut state = self.state.lock().unwrap();
            if let Some(logged) = state.log.get_mut(number) {
                logged.sent += count as u64;
            }
            if blob.lfs {
                state.sent += count as u64;
                self.changed.notify_all();
            }
            drop(state);
            if let Some(rate) = rate {
                std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
            }
        }
        (until == end).then_some(())
    }
}
