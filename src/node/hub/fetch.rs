//! The weight files of a pull: fetched in pieces by a few connections, hashed, and read by the
//! conversion while they arrive.
//!
//! Workers fetch what `pieces` says comes next, one thread hashes each file in order, and the
//! conversion reads through [`infer::load::files`](doppler_infer::load::files). What is fetched and
//! hashed, and no longer needed, gives its blocks back. Invariant: the first failure stops everything
//! and is what the conversion's reads fail with.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::{Client, Failed, Reply, answer};
use super::error::HubError;
use super::hashes::Running;
use super::journal::{Journal, Record};
use super::listing::Expected;
use super::pieces::{At, Bounds, Pieces, Run, State};
use super::{sparse, stream};
use doppler_infer::load::SHARD_BYTES_DEFAULT;
use doppler_infer::load::files::{Files, OnDisk, ReadAt, Stretch};
use doppler_store::regular;

/// How a pull fetches.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub connections: usize,
    /// The largest shard to make.
    pub shard_bytes: u64,
    pub bounds: Bounds,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 8,
            shard_bytes: SHARD_BYTES_DEFAULT,
            bounds: Bounds { piece: 1 << 20, run: 32, ahead: super::AHEAD_BYTES },
        }
    }
}

/// A weight file.
#[derive(Debug, Clone)]
pub struct Weight {
    /// For messages: the repository, and the file's path in it.
    pub repo: String,
    pub name: String,
    pub url: String,
    /// Where the conversion looks for it. Fetched bytes are written there.
    pub path: PathBuf,
    pub size: u64,
    pub hash: Expected,
    /// The same file in the local cache.
    pub cached: Option<PathBuf>,
}

/// An opened weight file.
pub(super) struct Target {
    pub of: Weight,
    file: File,
    /// Where the last redirect led.
    pub located: Mutex<Option<String>>,
}

struct Inner {
    pieces: Pieces,
    journal: Journal,
    /// By file and piece, the BLAKE3 of what was fetched.
    proofs: Vec<Vec<Option<blake3::Hash>>>,
    running: Vec<Running>,
    failure: Option<HubError>,
    /// Nothing more is to be fetched.
    stopped: bool,
}

pub(super) struct Shared {
    pub client: Client,
    pub targets: Vec<Target>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// Weight files that are being fetched. Stops when dropped.
pub struct Weights {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Weights {
    /// Takes over what an earlier run left, and starts to fetch.
    ///
    /// # Errors
    /// If a file cannot be opened or made.
    pub fn start(
        client: Client,
        weights: Vec<Weight>,
        (journal, records): (Journal, &[Record]),
        options: Options,
    ) -> Result<Self, HubError> {
        let sizes: Vec<u64> = weights.iter().map(|weight| weight.size).collect();
        let mut targets = Vec::new();
        for of in weights {
            targets.push(Target { file: opened(&of)?, of, located: Mutex::default() });
        }
        let pieces = Pieces::new(options.bounds, &sizes);
        let proofs =
            sizes.iter().map(|size| vec![None; size.div_ceil(options.bounds.piece) as usize]);
        let mut inner = Inner {
            proofs: proofs.collect(),
            running: vec![Running::default(); targets.len()],
            pieces,
            journal,
            failure: None,
            stopped: false,
        };
        inner.restore(records, &targets);
        let shared =
            Arc::new(Shared { client, targets, inner: Mutex::new(inner), changed: Condvar::new() });
        let mut threads = Vec::new();
        for number in 0..options.connections {
            let shared = Arc::clone(&shared);
            threads.push(spawn(format!("hub {number}"), move || shared.work())?);
        }
        let hashing = Arc::clone(&shared);
        threads.push(spawn("hub hash".to_owned(), move || hashing.hash())?);
        Ok(Self { shared, threads })
    }

    /// For the conversion.
    pub fn files(&self) -> Arc<dyn Files> {
        Arc::new(Reading(Arc::clone(&self.shared)))
    }

    /// For what the conversion has made.
    pub fn journal(&self) -> impl Fn(&Record) -> Result<(), HubError> + use<> {
        let shared = Arc::clone(&self.shared);
        move |record| shared.lock().journal.add(record)
    }

    /// For reports: bytes that are here, and all bytes.
    pub fn counts(&self) -> impl Fn() -> (u64, u64) + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.lock().pieces.counts()
    }

    /// For whoever may stop it: it then fails with [`HubError::Stopped`].
    pub fn stopper(&self) -> impl Fn() + Send + use<> {
        let shared = Arc::clone(&self.shared);
        move || shared.fail(HubError::Stopped)
    }

    /// What went wrong, if something did.
    pub fn failure(&self) -> Option<HubError> {
        self.shared.lock().failure.clone()
    }

    /// Waits until every file's hash is known to be right.
    pub fn finish(self) -> Result<(), HubError> {
        let shared = &self.shared;
        let mut inner = shared.lock();
        if !inner.pieces.is_planned() {
            inner.pieces.plan(&[]);
            shared.changed.notify_all();
        }
        loop {
            if let Some(failure) = &inner.failure {
                return Err(failure.clone());
            }
            if (0..shared.targets.len()).all(|file| inner.pieces.is_hashed(file)) {
                return Ok(());
            }
            inner = shared.wait(inner);
        }
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, HubError> {
    let thread = std::thread::Builder::new().name(name.clone()).spawn(work);
    thread.map_err(HubError::io(Path::new(&name)))
}

/// Opens a file of the cache, or one of the right size to be filled.
fn opened(weight: &Weight) -> Result<File, HubError> {
    if let Some(cached) = &weight.cached {
        return regular::open(cached).map_err(HubError::io(cached));
    }
    let io = HubError::io(&weight.path);
    if let Some(dir) = weight.path.parent() {
        std::fs::create_dir_all(dir).map_err(&io)?;
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(&weight.path);
    let file = file.map_err(&io)?;
    file.set_len(weight.size).map_err(io)?;
    Ok(file)
}

impl Inner {
    /// Takes over what the journal says, as far as the files bear it out.
    fn restore(&mut self, records: &[Record], targets: &[Target]) {
        let known = |proofs: &[Vec<_>], file: usize, piece: usize| {
            targets.get(file).is_some_and(|target| target.of.cached.is_none())
                && proofs[file].len() > piece
        };
        for record in records {
            match record {
                Record::Piece { file, piece, hash } if known(&self.proofs, *file, *piece) => {
                    self.proofs[*file][*piece] = blake3::Hash::from_hex(hash).ok();
                    self.pieces.restore((*file, *piece), State::Here);
                }
                Record::Gone { file, piece } if known(&self.proofs, *file, *piece) => {
                    self.pieces.restore((*file, *piece), State::Gone);
                }
                Record::Hash { file, pieces, state } if *file < targets.len() => {
                    if let Some(running) = Running::restore(state) {
                        self.running[*file] = running;
                        self.pieces.restore_hashed(*file, *pieces);
                    }
                }
                _ => {}
            }
        }
        for (number, target) in targets.iter().enumerate() {
            self.distrust(number, target);
            for piece in 0..self.proofs[number].len() {
                let at = (number, piece);
                if target.of.cached.is_some() {
                    self.pieces.restore(at, State::Here);
                } else if self.pieces.state(at) == State::Here && !self.is_sound(at, target) {
                    self.pieces.restore(at, State::Missing);
                }
            }
        }
    }

    /// Hashes a file anew if its hash has covered a piece that was not fetched: it came from a cache
    /// that is no longer there.
    fn distrust(&mut self, file: usize, target: &Target) {
        let covered = self.pieces.count_hashed(file);
        let proofs = &self.proofs[file];
        if target.of.cached.is_some() || proofs[..covered].iter().all(Option::is_some) {
            return;
        }
        self.running[file] = Running::default();
        self.pieces.restore_hashed(file, 0);
        for piece in 0..proofs.len() {
            if self.pieces.state((file, piece)) == State::Gone {
                self.pieces.restore((file, piece), State::Missing);
            }
        }
    }

    /// Whether a piece's bytes on disk are those that were fetched.
    fn is_sound(&self, at: At, target: &Target) -> bool {
        let (start, end) = self.pieces.range(at);
        let mut bytes = vec![0; (end - start) as usize];
        let read = sparse::read(&target.file, start, &mut bytes);
        read.is_ok() && self.proofs[at.0][at.1] == Some(blake3::hash(&bytes))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic ends its thread between complete changes.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: HubError) {
        let mut inner = self.lock();
        inner.failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Sleeps, unless everything ends meanwhile. False then.
    fn sleep(&self, time: Duration) -> bool {
        let ends = |inner: &mut Inner| !inner.stopped && inner.failure.is_none();
        let waited = self.changed.wait_timeout_while(self.lock(), time, ends);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !inner.stopped && inner.failure.is_none()
    }

    /// A connection's work.
    fn work(&self) {
        loop {
            let mut inner = self.lock();
            let (run, range) = loop {
                if inner.stopped || inner.failure.is_some() {
                    return;
                }
                if let Some(run) = inner.pieces.next_run() {
                    let start = inner.pieces.range((run.file, run.first)).0;
                    let end = inner.pieces.range((run.file, run.first + run.count - 1)).1;
                    break (run, (start, end));
                }
                inner = self.wait(inner);
            };
            drop(inner);
            match self.run(run, range) {
                Ok(()) => {}
                Err(HubError::Stopped) => return,
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Fetches a run of pieces. An attempt that brings anything resets the patience.
    fn run(&self, run: Run, (start, end): (u64, u64)) -> Result<(), HubError> {
        let target = &self.targets[run.file];
        let mut cursor = stream::Cursor::new((run.file, run.first), start);
        let mut tries = 0;
        while cursor.offset < end {
            let before = cursor.offset;
            let Err(failed) = self.attempt(target, &mut cursor, end) else { continue };
            let (error, after) = match failed {
                Failed::Again { error, after } => (error, after),
                other => return Err(stream::refused(&self.client, &target.of, other)),
            };
            tries = if cursor.offset > before { 1 } else { tries + 1 };
            tracing::debug!("{}: {error}", target.of.name);
            if tries >= self.client.patience.tries {
                return Err(error);
            }
            if !self.sleep(self.client.patience.wait(tries, after)) {
                return Err(HubError::Stopped);
            }
        }
        Ok(())
    }

    /// One request for the rest of a run.
    fn attempt(
        &self,
        target: &Target,
        cursor: &mut stream::Cursor,
        end: u64,
    ) -> Result<(), Failed> {
        let Reply { url, response } = stream::request(self, target, (cursor.offset, end))?;
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; stream::BUFFER_BYTES];
        while cursor.offset < end {
            if self.lock().stopped {
                return Err(Failed::Final(HubError::Stopped));
            }
            let most = buffer.len().min((end - cursor.offset) as usize);
            let read = io::Read::read(&mut body, &mut buffer[..most]);
            let read = read.map_err(|error| super::client::cut_off(&url, &error))?;
            if read == 0 {
                let error = answer(&url, "its answer ended early");
                return Err(Failed::Again { error, after: None });
            }
            let io = HubError::io(&target.of.path);
            let written = sparse::write(&target.file, cursor.offset, &buffer[..read]);
            written.map_err(|error| Failed::Final(io(error)))?;
            self.advance(cursor, &buffer[..read]).map_err(Failed::Final)?;
        }
        Ok(())
    }

    /// Notes written bytes, and each piece that they complete.
    fn advance(&self, cursor: &mut stream::Cursor, mut bytes: &[u8]) -> Result<(), HubError> {
        while !bytes.is_empty() {
            let end = self.lock().pieces.range(cursor.at).1;
            let count = bytes.len().min((end - cursor.offset) as usize);
            cursor.hash.update(&bytes[..count]);
            cursor.offset += count as u64;
            bytes = &bytes[count..];
            if cursor.offset == end {
                let hash = cursor.hash.finalize();
                self.arrived(cursor.at, hash)?;
                cursor.next_piece();
            }
        }
        Ok(())
    }

    fn arrived(&self, at: At, hash: blake3::Hash) -> Result<(), HubError> {
        let mut inner = self.lock();
        let proof = &mut inner.proofs[at.0][at.1];
        if let Some(before) = proof.replace(hash).filter(|before| *before != hash) {
            return Err(HubError::Mismatch {
                file: self.targets[at.0].of.name.clone(),
                algorithm: "BLAKE3 of a piece that was fetched twice",
                expected: before.to_string(),
                actual: hash.to_string(),
            });
        }
        let hash = hash.to_string();
        inner.journal.add(&Record::Piece { file: at.0, piece: at.1, hash })?;
        inner.pieces.arrived(at);
        self.changed.notify_all();
        Ok(())
    }

    /// The hashing thread's work: each file in order, as far as it is here.
    fn hash(&self) {
        let mut inner = self.lock();
        loop {
            let files = 0..self.targets.len();
            if inner.stopped
                || inner.failure.is_some()
                || files.clone().all(|file| inner.pieces.is_hashed(file))
            {
                return;
            }
            let Some(at) = files.clone().find_map(|file| inner.pieces.to_hash(file)) else {
                inner = self.wait(inner);
                continue;
            };
            let (start, end) = inner.pieces.range(at);
            let mut running = inner.running[at.0].clone();
            drop(inner);
            let target = &self.targets[at.0];
            let mut bytes = vec![0; (end - start) as usize];
            let read = sparse::read(&target.file, start, &mut bytes);
            running.update(&bytes);
            inner = self.lock();
            let noted = read.map_err(HubError::io(&target.of.path));
            if let Err(error) = noted.and_then(|()| self.hashed(&mut inner, at, running)) {
                inner.failure.get_or_insert(error);
            }
            self.changed.notify_all();
        }
    }

    fn hashed(&self, inner: &mut Inner, at: At, running: Running) -> Result<(), HubError> {
        let of = &self.targets[at.0].of;
        let free = inner.pieces.hashed(at.0);
        if inner.pieces.is_hashed(at.0) {
            let actual = running.clone().finish();
            if actual != of.hash {
                return Err(mismatch(&of.name, of.hash, actual));
            }
        }
        let state = running.save();
        inner.journal.add(&Record::Hash { file: at.0, pieces: at.1 + 1, state })?;
        inner.running[at.0] = running;
        self.give_back(inner, free)
    }

    fn give_back(
        &self,
        inner: &mut Inner,
        free: impl IntoIterator<Item = At>,
    ) -> Result<(), HubError> {
        for at in free {
            let target = &self.targets[at.0];
            if target.of.cached.is_some() {
                continue;
            }
            inner.journal.add(&Record::Gone { file: at.0, piece: at.1 })?;
            inner.pieces.gone(at);
            let (start, end) = inner.pieces.range(at);
            sparse::free(&target.file, start, end);
        }
        Ok(())
    }

    fn number_of(&self, path: &Path) -> Option<usize> {
        self.targets.iter().position(|target| target.of.path == path)
    }
}

pub fn mismatch(file: &str, expected: Expected, actual: Expected) -> HubError {
    HubError::Mismatch {
        file: file.to_owned(),
        algorithm: expected.algorithm(),
        expected: expected.to_string(),
        actual: actual.to_string(),
    }
}

/// The conversion's view of the files.
struct Reading(Arc<Shared>);

impl Files for Reading {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        match self.0.number_of(path) {
            Some(number) => Ok(Box::new(Arriving { shared: Arc::clone(&self.0), number })),
            None => OnDisk.open(path),
        }
    }

    fn expect(&self, order: &[Stretch<'_>]) {
        let place = |of: &Stretch<'_>| Some((self.0.number_of(of.path)?, of.start, of.bytes));
        let order: Vec<_> = order.iter().filter_map(place).collect();
        self.0.lock().pieces.plan(&order);
        self.0.changed.notify_all();
    }

    fn release(&self, of: Stretch<'_>) {
        let Some(number) = self.0.number_of(of.path) else { return };
        let mut inner = self.0.lock();
        let free = inner.pieces.release(number, of.start, of.bytes);
        if let Err(error) = self.0.give_back(&mut inner, free) {
            inner.failure.get_or_insert(error);
        }
        self.0.changed.notify_all();
    }
}

/// A file that is being fetched.
struct Arriving {
    shared: Arc<Shared>,
    number: usize,
}

impl ReadAt for Arriving {
    fn size(&self) -> u64 {
        self.shared.targets[self.number].of.size
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if offset.saturating_add(out.len() as u64) > self.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut inner = self.shared.lock();
        loop {
            if let Some(failure) = &inner.failure {
                return Err(io::Error::other(failure.clone()));
            }
            if inner.stopped {
                return Err(io::Error::other(HubError::Stopped));
            }
            if inner.pieces.need(self.number, offset, out.len() as u64) {
                // Under the lock, so that nothing of it goes meanwhile.
                return sparse::read(&self.shared.targets[self.number].file, offset, out);
            }
            self.shared.changed.notify_all();
            inner = self.shared.wait(inner);
        }
    }
}
