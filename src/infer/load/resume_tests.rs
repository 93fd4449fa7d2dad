//! Conversions that are interrupted, and files that go while they are converted.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::files::{Files, OnDisk, ReadAt, Stretch};
use super::*;
use doppler_store::ShardId;
use doppler_testing::root;

const SHARD: u64 = 64 << 10;

/// Gives its shards to nobody, and fails at one of them.
#[derive(Default)]
struct Sink {
    finished: Vec<(ShardId, u64)>,
    given: Vec<(ShardId, u64)>,
    fails_at: Option<usize>,
}

impl ShardSink for Sink {
    fn finished(&self) -> Vec<(ShardId, u64)> {
        self.finished.clone()
    }

    fn shard(&mut self, filename: &str, id: ShardId, bytes: Vec<u8>) -> Result<()> {
        let number = self.finished.len() + self.given.len();
        assert_eq!(filename, format!("shard_{number:05}.bin"));
        if self.fails_at == Some(number) {
            let source = io::Error::other("stopped");
            return Err(LoadError::Io { path: filename.to_owned(), source });
        }
        self.given.push((id, bytes.len() as u64));
        Ok(())
    }

    fn file(&mut self, _name: &str, _bytes: Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self, _manifest: Vec<u8>) -> Result<()> {
        Ok(())
    }
}

/// What was expected and released, and where it was read.
#[derive(Default)]
struct Watch {
    expected: Mutex<Vec<(PathBuf, u64, u64)>>,
    released: Arc<Mutex<Vec<(PathBuf, u64, u64)>>>,
}

struct Watched {
    path: PathBuf,
    of: Box<dyn ReadAt>,
    released: Arc<Mutex<Vec<(PathBuf, u64, u64)>>>,
}

fn owned(of: &Stretch<'_>) -> (PathBuf, u64, u64) {
    (of.path.to_owned(), of.start, of.bytes)
}

impl Files for Watch {
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadAt>> {
        let (of, released) = (OnDisk.open(path)?, Arc::clone(&self.released));
        Ok(Box::new(Watched { path: path.to_owned(), of, released }))
    }

    fn expect(&self, order: &[Stretch<'_>]) {
        let mut expected = self.expected.lock().unwrap();
        assert!(expected.is_empty(), "once");
        expected.extend(order.iter().map(owned));
    }

    fn release(&self, stretch: Stretch<'_>) {
        self.released.lock().unwrap().push(owned(&stretch));
    }
}

impl ReadAt for Watched {
    fn size(&self) -> u64 {
        self.of.size()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset + out.len() as u64;
        for (path, start, bytes) in self.released.lock().unwrap().iter() {
            let apart = *path != self.path || end <= *start || start + bytes <= offset;
            assert!(apart, "bytes {offset}..{end} are read after they were released");
        }
        self.of.read_at(offset, out)
    }
}

fn models() -> [PathBuf; 3] {
    let data = root().join("tests/data");
    ["goldens/mixtral", "goldens/granite-moe", "gguf/mixtral/model.gguf"].map(|at| data.join(at))
}

fn run(path: &Path, sink: &mut Sink, watch: &Arc<Watch>) -> Result<doppler_store::Manifest> {
    let checkpoint = open_with(path, watch.clone())?;
    let quantization = match checkpoint.quantization() {
        Some(_) => Quantization::Keep,
        None => Quantization::Q4KM,
    };
    convert(checkpoint.as_ref(), quantization, SHARD, sink, &mut |_| ())
}

#[test]
fn what_is_released_was_expected_and_is_not_read_again() {
    for path in models() {
        let watch = Arc::new(Watch::default());
        run(&path, &mut Sink::default(), &watch).unwrap();
        let (expected, released) = (watch.expected.lock().unwrap(), watch.released.lock().unwrap());
        let set = |list: &[(PathBuf, u64, u64)]| list.iter().cloned().collect::<BTreeSet<_>>();
        assert!(expected.len() > 5);
        assert_eq!((set(&expected).len(), released.len()), (expected.len(), expected.len()));
        assert_eq!(set(&expected), set(&released), "{}", path.display());
    }
}

#[test]
fn an_interrupted_conversion_goes_on_behind_its_last_shard() {
    for path in models() {
        let mut whole = Sink::default();
        let manifest = run(&path, &mut whole, &Arc::default()).unwrap();
        let shards = whole.given.len();
        assert!(shards > 1, "{}", path.display());
        for stop in 0..=shards {
            let mut first = Sink { fails_at: Some(stop), ..Sink::default() };
            assert_eq!(run(&path, &mut first, &Arc::default()).is_err(), stop < shards);
            assert_eq!(first.given, whole.given[..stop]);
            let mut second = Sink { finished: first.given, ..Sink::default() };
            let again = run(&path, &mut second, &Arc::default()).unwrap();
            assert_eq!(second.given, whole.given[stop..]);
            assert_eq!(again.model_id_hash(), manifest.model_id_hash());
        }
    }
}

#[test]
fn nothing_is_released_before_its_shard_is_given() {
    for path in models() {
        let watch = Arc::new(Watch::default());
        let mut sink = Sink { fails_at: Some(0), ..Sink::default() };
        assert!(run(&path, &mut sink, &watch).is_err());
        assert!(watch.released.lock().unwrap().is_empty(), "{}", path.display());
    }
}
