//! Models of this disk that are still read from their files: `serve` answers meanwhile and says how far it
//! is.
//!
//! Owns only what is shown: the file's names, its bytes, how many are done. Entries end with their guard.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::progress;
use doppler_mesh::Progress;

/// Before that much time a rate says nothing.
const RATE_FROM: Duration = Duration::from_secs(1);
/// The longest that a client is told to wait, in seconds.
const RETRY_MAX_S: u64 = 60;

/// A model that is being read.
#[derive(Debug)]
pub struct Opening {
    /// What it may be called, the first for people. Its own name is not known yet.
    names: Vec<String>,
    began: Instant,
    done: AtomicU64,
    total: AtomicU64,
}

impl Opening {
    /// So many bytes of all are read.
    pub fn show(&self, done: u64, total: u64) {
        self.done.store(done, Relaxed);
        self.total.store(total, Relaxed);
    }

    pub fn progress(&self) -> Progress {
        let (done, total) = (self.done.load(Relaxed), self.total.load(Relaxed));
        let took = self.began.elapsed();
        let rate = (took >= RATE_FROM && done > 0).then(|| done as f64 / took.as_secs_f64());
        let left_s = rate.map(|rate| total.saturating_sub(done) as f64 / rate);
        Progress { done, total, rate, left_s, ..Progress::default() }
    }

    /// What it does, in words: bytes, rate, time left.
    pub fn describe(&self) -> String {
        let (what, progress) = (format!("reading {}", self.names[0]), self.progress());
        // Its header is read before anything is known of its bytes.
        if progress.total == 0 { what } else { progress::describe(&what, &progress) }
    }
}

/// A request for a model that is still being read.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the model is not ready yet: {what}; ask again in {retry_s} s")]
pub struct NotReady {
    what: String,
    /// When it may be worth asking again.
    pub retry_s: u64,
}

/// All models that are being read.
#[derive(Debug, Default)]
pub struct Openings(Arc<Mutex<Vec<Arc<Opening>>>>);

/// An entry, which ends with it.
#[derive(Debug)]
pub struct Entry {
    pub opening: Arc<Opening>,
    all: Arc<Mutex<Vec<Arc<Opening>>>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|one| !Arc::ptr_eq(one, &self.opening));
    }
}

impl Openings {
    /// Begins to read a model of these names, at least one.
    pub fn begin(&self, names: Vec<String>) -> Entry {
        let opening = Arc::new(Opening {
            names,
            began: Instant::now(),
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
        });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(opening.clone());
        Entry { opening, all: self.0.clone() }
    }

    /// One that is being read: of this name, or else any, because its own name may be this one.
    pub fn find(&self, name: &str) -> Option<Arc<Opening>> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let means =
            |one: &&Arc<Opening>| one.names.iter().any(|have| have.eq_ignore_ascii_case(name));
        all.iter().find(means).or_else(|| all.first()).cloned()
    }

    /// What a request for a model is told that is not known, while any is being read.
    pub fn not_ready(&self, name: &str) -> Option<NotReady> {
        let opening = self.find(name)?;
        let left = opening.progress().left_s.map_or(1, |left| left.ceil() as u64);
        Some(NotReady { what: opening.describe(), retry_s: left.clamp(1, RETRY_MAX_S) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_read_is_told_by_any_name_until_it_is_there() {
        let openings = Openings::default();
        assert!(openings.not_ready("m").is_none());
        let entry = openings.begin(vec!["m.gguf".into(), "m".into()]);
        let other = openings.begin(vec!["other".into()]);
        let first = openings.not_ready("m").unwrap().to_string();
        assert_eq!(first, "the model is not ready yet: reading m.gguf; ask again in 1 s");
        entry.opening.show(1 << 20, 3 << 20);
        for name in ["M", "m.gguf", "the name in its file"] {
            let said = openings.not_ready(name).unwrap();
            let said = (said.to_string(), said.retry_s);
            let text = "the model is not ready yet: reading m.gguf: 1.00 MiB of 3.00 MiB; ask again in 1 s";
            assert_eq!(said, (text.to_owned(), 1));
        }
        assert!(openings.not_ready("other").unwrap().to_string().contains("reading other"));
        drop(entry);
        assert!(openings.not_ready("m").unwrap().to_string().contains("reading other"));
        drop(other);
        assert!(openings.find("m").is_none());
    }
}
