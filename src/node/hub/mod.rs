//! Models of the Hugging Face Hub: `pull hf:ORG/MODEL`, and the same for commands that run a model.
//!
//! Owns what is asked for (`asked`), requests (`client`, `tls`, `stream`), what a repository has
//! (`listing`) and which of it is needed (`choose`), the Hub's own cache on this disk (`cache`),
//! fetching (`pieces`, `fetch`, `hashes`, `journal`, `sparse`), where the shards go (`sink`, `keep`) and
//! what was pulled as what (`origins`).
//!
//! A model is converted while it is fetched: pieces of the weight files arrive in about the order in
//! which the conversion reads them, and go once they are hashed and what was made of them is durable.
//! Invariant: the model is what `convert` makes of the same files, and enters the store only after the
//! hash of every file was found right.

mod asked;
mod cache;
mod choose;
mod client;
mod error;
mod fetch;
mod hashes;
mod journal;
mod keep;
mod listing;
mod origins;
mod pieces;
mod sink;
mod sparse;
mod stream;
#[cfg(test)]
mod tests;
mod tls;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

pub use self::asked::{Asked, is_hub};
pub use self::error::HubError;

use self::cache::LocalCache;
use self::choose::{Chosen, INDEX};
use self::client::{Client, Settings};
use self::fetch::{Options, Weight, Weights};
use self::journal::Journal;
use self::listing::{Expected, Listing, RepoFile};
use self::origins::Origin;
use self::sink::PullSink;
use crate::commands::note_restored;
use crate::output::note;
use crate::progress;
use crate::size::ByteSize;
use crate::work::Report;
use doppler_infer::load::{Quantization, convert, open_with};
use doppler_mesh::Meter;
use doppler_store::{ModelId, Replicas};

/// Bytes of weights that may lie on the disk before they are converted.
const AHEAD_BYTES: u64 = 1 << 30;
/// The longest file that is read whole: a config, a tokenizer, an index.
const SMALL_BYTES_MAX: u64 = 64 << 20;
/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(250);

/// What is to be pulled, and how it is kept.
pub struct Order<'a> {
    pub asked: &'a Asked,
    pub data: &'a Path,
    /// `None`: as `convert` does by default.
    pub quantize: Option<Quantization>,
    pub replicas: Replicas,
}

/// What `--json` prints.
#[derive(Debug, Clone, Serialize)]
pub struct Pulled {
    pub model: String,
    pub name: String,
    /// `hf:ORG/MODEL`, and so on.
    pub origin: String,
    pub commit: String,
    /// Of the converted model.
    pub bytes: u64,
    /// Of the files that were read, in this run or before.
    pub source_bytes: u64,
    /// How many of these the Hub's cache on this disk had.
    pub cached_bytes: u64,
    pub seconds: f64,
    /// It was here already.
    pub present: bool,
}

/// Who is asked: the Hub, and its cache on this disk; and who is told how far it is.
struct Places {
    client: Client,
    cache: LocalCache,
    options: Options,
    /// The terminal, if there is none.
    report: Option<Report>,
    stop: CancellationToken,
}

impl Order<'_> {
    /// The name under which the model is remembered.
    fn text(&self) -> String {
        match self.quantize {
            None => self.asked.to_string(),
            Some(quantize) => format!("{} as {quantize}", self.asked),
        }
    }

    /// The model, if it was pulled before and is here. Needs no network.
    pub fn remembered(&self) -> Option<ModelId> {
        let origin = origins::find(self.data, &self.text())?;
        keep::is_here(self.data, origin.model).then_some(origin.model)
    }
}

/// Pulls a model.
///
/// # Errors
/// [`HubError`] if the Hub or the disk is at fault; the conversion's and the store's own.
pub fn pull(order: &Order<'_>) -> anyhow::Result<Pulled> {
    pull_for(order, None, CancellationToken::new())
}

/// As [`pull`]. `report` is told how far it is, and nothing is shown. Once `stop` is cancelled it ends
/// soon; what had come stays for the next pull.
///
/// # Errors
/// As `pull`; [`HubError::Stopped`] if it was stopped.
pub fn pull_telling(
    order: &Order<'_>,
    report: Report,
    stop: CancellationToken,
) -> anyhow::Result<Pulled> {
    pull_for(order, Some(report), stop)
}

fn pull_for(
    order: &Order<'_>,
    report: Option<Report>,
    stop: CancellationToken,
) -> anyhow::Result<Pulled> {
    let client = Client::new(Settings::of_environment())?;
    let cache = LocalCache::of_environment();
    pull_from(order, Places { client, cache, options: Options::default(), report, stop })
}

fn pull_from(order: &Order<'_>, places: Places) -> anyhow::Result<Pulled> {
    let started = Instant::now();
    let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| value == "1");
    let listing = match offline {
        true => Err(HubError::Offline {
            host: "the Hub".to_owned(),
            problem: "HF_HUB_OFFLINE is set".to_owned(),
        }),
        false => Listing::fetch(&places.client, order.asked),
    };
    let listing = match listing {
        Err(error @ HubError::Offline { .. }) => match places.cache.listing(order.asked) {
            Some(listing) => {
                note!("{error}: taking what the Hub's cache on this disk has");
                listing
            }
            None => return Err(error.into()),
        },
        listing => listing?,
    };
    let chosen = Chosen::of(&listing, order.asked.selector.as_deref(), &mut |file| {
        index_files(&small(&places, &listing, file)?.0)
    })?;
    let key = key(&listing, &chosen, order.quantize);
    let done = origins::find(order.data, &order.text()).filter(|origin| origin.key == key);
    if let Some(Origin { model, name, commit, .. }) = done
        && keep::is_here(order.data, model)
    {
        let (model, origin) = (model.to_string(), order.asked.to_string());
        let seconds = started.elapsed().as_secs_f64();
        let (bytes, source_bytes, cached_bytes) = (0, 0, 0);
        return Ok(Pulled {
            model,
            name,
            origin,
            commit,
            bytes,
            source_bytes,
            cached_bytes,
            seconds,
            present: true,
        });
    }
    if places.stop.is_cancelled() {
        return Err(HubError::Stopped.into());
    }
    let work = Work::open(order.data, &listing, &key)?;
    let made = convert_arriving(order, places, &listing, &chosen, &work);
    if let Err(error) = &made
        && error
            .chain()
            .any(|cause| matches!(cause.downcast_ref(), Some(HubError::Mismatch { .. })))
    {
        work.remove();
    }
    let (source_bytes, cached_bytes) = made?;
    let reply = keep::keep(order.data, &work.out(), order.replicas)?;
    let origin = Origin {
        model: reply.model.parse().context("the store's answer is no model")?,
        name: reply.name.clone(),
        key,
        commit: listing.commit.clone(),
        number: 0,
    };
    origins::add(order.data, &order.text(), origin)?;
    work.remove();
    Ok(Pulled {
        model: reply.model,
        name: reply.name,
        origin: order.asked.to_string(),
        commit: listing.commit,
        bytes: reply.bytes_stored,
        source_bytes,
        cached_bytes,
        seconds: started.elapsed().as_secs_f64(),
        present: false,
    })
}

/// Names a choice of files with their hashes, and the way to convert them.
fn key(listing: &Listing, chosen: &Chosen, quantize: Option<Quantization>) -> String {
    let mut text = format!("{} {}", env!("CARGO_PKG_VERSION"), listing.repo);
    text += &quantize.map_or_else(String::new, |quantize| format!(" {quantize}"));
    for file in chosen.small.iter().chain(&chosen.weights) {
        text += &format!("\n{} {} {}", file.hash, file.size, file.path);
    }
    blake3::hash(text.as_bytes()).to_hex()[..16].to_owned()
}

/// The names of the weight files in an index, each once.
fn index_files(bytes: &[u8]) -> Result<Vec<String>, HubError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes)
        .map_err(|error| HubError::Choice(format!("{INDEX}: {error}")))?;
    let names: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
    Ok(names.into_iter().collect())
}

/// The directory in which a model is made, until the store has it.
struct Work {
    dir: PathBuf,
    /// The repository's last name, which the conversion uses.
    name: String,
    _lock: File,
}

impl Work {
    /// # Errors
    /// If another process is pulling the same, or it cannot be made.
    fn open(data: &Path, listing: &Listing, key: &str) -> anyhow::Result<Self> {
        let name = listing.repo.rsplit('/').next().unwrap_or(&listing.repo).to_owned();
        let dir = data.join("pulls").join(format!("{name}-{key}"));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lock = dir.join("lock");
        let lock = File::create(&lock).map_err(HubError::io(&lock))?;
        ensure!(
            lock.try_lock().is_ok(),
            "{} is being pulled into {} by another process",
            listing.repo,
            data.display()
        );
        Ok(Self { dir, name, _lock: lock })
    }

    fn source(&self) -> PathBuf {
        self.dir.join("source").join(&self.name)
    }

    fn out(&self) -> PathBuf {
        self.dir.join("out")
    }

    fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            note!("{} could not be removed: {error}", self.dir.display());
        }
        // Fails while other models are being pulled.
        let _ = self.dir.parent().map(fs::remove_dir);
    }
}

/// A file that is read whole, and whether the Hub's cache had it.
///
/// # Errors
/// If it is not sent, is too long, or is not what the listing says.
fn small(places: &Places, listing: &Listing, file: &RepoFile) -> Result<(Vec<u8>, bool), HubError> {
    if file.size > SMALL_BYTES_MAX {
        let size = ByteSize(file.size);
        return Err(HubError::Choice(format!("{}: {size} are too much for it", file.path)));
    }
    let cached = places.cache.find(listing, file);
    let cached = cached.and_then(|path| doppler_store::regular::read(&path).ok());
    if let Some(bytes) = cached.filter(|bytes| hashes::of(bytes, file.hash) == file.hash) {
        return Ok((bytes, true));
    }
    let url = listing.url(&places.client, &file.path);
    let (bytes, _) = places
        .client
        .whole(&url, file.size)
        .map_err(|failed| listing::explain(&places.client, &listing.repo, None, failed))?;
    match hashes::of(&bytes, file.hash) {
        hash if hash == file.hash => Ok((bytes, false)),
        other => Err(fetch::mismatch(&file.path, file.hash, other)),
    }
}

/// Fetches and converts at once. Returns the bytes of all files, and how many the cache had.
fn convert_arriving(
    order: &Order<'_>,
    places: Places,
    listing: &Listing,
    chosen: &Chosen,
    work: &Work,
) -> anyhow::Result<(u64, u64)> {
    let source = work.source();
    let (mut weights, mut total, mut cached) = (Vec::new(), 0, 0);
    for file in chosen.small.iter().chain(&chosen.weights) {
        let path = source.join(&file.path);
        total += file.size;
        if matches!(file.hash, Expected::Sha256(_)) && chosen.weights.contains(file) {
            let (repo, name, size) = (listing.repo.clone(), file.path.clone(), file.size);
            let url = listing.url(&places.client, &file.path);
            let found = places.cache.find(listing, file);
            cached += found.as_ref().map_or(0, |_| size);
            weights.push(Weight { repo, name, url, path, size, hash: file.hash, cached: found });
            continue;
        }
        let kept = doppler_store::regular::read(&path).ok();
        if kept.is_some_and(|bytes| hashes::of(&bytes, file.hash) == file.hash) {
            continue;
        }
        let (bytes, was_cached) = small(&places, listing, file)?;
        cached += if was_cached { file.size } else { 0 };
        let io = HubError::io(&path);
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(&io)?;
        fs::write(&path, bytes).map_err(io)?;
    }
    for weight in weights.iter().filter(|weight| weight.cached.is_some()) {
        // The reader only looks whether it is there.
        let io = HubError::io(&weight.path);
        weight.path.parent().map_or(Ok(()), fs::create_dir_all).map_err(&io)?;
        File::create(&weight.path).map_err(io)?;
    }
    let fetched: u64 = weights.iter().filter(|w| w.cached.is_none()).map(|w| w.size).sum();
    let (journal, records) = Journal::open(&work.dir.join("journal"))?;
    let room = keep::room(order.data)?;
    let options = places.options;
    let weights = Weights::start(places.client, weights, (journal, &records), options)?;
    let stop = places.stop;
    let stopping = weights.stopper();
    let counts = weights.counts();
    let counts = move || {
        if stop.is_cancelled() {
            stopping();
        }
        counts()
    };
    let shown = Shown::start(order.asked.to_string(), counts, places.report);
    let note = weights.journal();
    let beside = fetched.min(options.bounds.ahead);
    let mut sink = PullSink::new(work.out(), &records, &note, room, beside)?;
    let path = chosen.gguf.as_ref().map_or(source.clone(), |file| source.join(file));
    let shard_bytes = options.shard_bytes;
    let converted = convert_into((order.quantize, shard_bytes), &path, &weights, &mut sink);
    // What the conversion met may only be the consequence of what went wrong before.
    let failure = weights.failure().or_else(|| sink.failure.take());
    drop(sink);
    let ended = match (failure, converted) {
        (Some(failure), _) => Err(failure.into()),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => weights.finish().map_err(anyhow::Error::from),
    };
    drop(shown);
    ended.map(|()| (total, cached))
}

fn convert_into(
    (quantize, shard_bytes): (Option<Quantization>, u64),
    path: &Path,
    weights: &Weights,
    sink: &mut PullSink<'_>,
) -> anyhow::Result<()> {
    let checkpoint = open_with(path, weights.files())?;
    let checkpoint = checkpoint.as_ref();
    note_restored(checkpoint);
    let quantization = quantize.unwrap_or(match checkpoint.quantization() {
        Some(_) => Quantization::Keep,
        None => Quantization::Q4KM,
    });
    convert(checkpoint, quantization, shard_bytes, sink, &mut |_| ())?;
    Ok(())
}

/// Shows what has arrived, until it is dropped.
struct Shown {
    ends: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Shown {
    fn start(
        what: String,
        counts: impl Fn() -> (u64, u64) + Send + 'static,
        report: Option<Report>,
    ) -> Self {
        let ends = std::sync::Arc::new(AtomicBool::new(false));
        let spinner = report.is_none().then(|| progress::spinner(what.clone()));
        let until = ends.clone();
        let show = move || {
            let (before, total) = counts();
            let mut meter = Meter::new(Instant::now(), total - before);
            while !until.load(Ordering::SeqCst) {
                let (done, total) = counts();
                let mut now = meter.note(Instant::now(), done.saturating_sub(before));
                (now.done, now.total) = (done, total);
                let doing = if done == total { "converting" } else { "fetching" };
                if let Some(spinner) = &spinner {
                    spinner.set_message(progress::describe(&format!("{doing} {what}"), &now));
                }
                if let Some(report) = &report {
                    report(now);
                }
                std::thread::park_timeout(SHOWN_EVERY);
            }
            if let Some(spinner) = spinner {
                spinner.finish_and_clear();
            }
        };
        // Without a thread, nothing is shown.
        let thread = std::thread::Builder::new().name("progress".to_owned()).spawn(show).ok();
        Self { ends, thread }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
