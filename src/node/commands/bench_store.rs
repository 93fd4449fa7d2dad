//! `bench store`: how fast the store verifies, imports, reads, checks and reopens.
//!
//! Every figure is the median over rounds. Plain hashing and plain file reads are measured for
//! comparison, because on a busy machine only ratios are meaningful. Files are read back from the
//! page cache.

use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::bench::processor;
use super::print_json;
use crate::args::BenchStoreArgs;
use crate::output::outln;
use crate::size::ByteSize;
use doppler_store::disk::{DiskOptions, DiskTier};
use doppler_store::verified::{OBJECT_BYTES_MAX, Outboard, SERVE_BYTES_MAX, decode, encode};
use doppler_store::{ByteRange, ShardId};

/// How often each thing is measured.
const ROUNDS: usize = 3;
/// Bytes of each object in the store that is reopened.
const SMALL_BYTES: usize = 64;

/// What `--json` prints. Speeds are in millions of bytes a second.
#[derive(Serialize)]
struct Record {
    host_cpu: String,
    commit: Option<&'static str>,
    command: String,
    bytes: u64,
    /// Median over the rounds, for each step.
    mb_s: Vec<(&'static str, f64)>,
    reopen_objects: usize,
    /// Seconds to open that store, with and without its index.
    reopen_s: f64,
    reopen_without_index_s: f64,
}

/// What is measured in each round, in this order, and its description for people.
const STEPS: [(&str, &str); 9] = [
    ("hash", "BLAKE3 alone, in memory"),
    ("encode", "verifying and encoding 4 MiB ranges, as served to a peer"),
    ("decode", "decoding and verifying them, memory to memory, as received"),
    ("put", "storing objects from memory, durable"),
    ("import", "importing files of the same file system, durable"),
    ("file_read", "reading those files, nothing verified"),
    ("read", "reading 4 MiB ranges from the store, verified"),
    ("read_expert", "reading 1 MiB ranges from the store, verified"),
    ("check", "checking whole objects"),
];

pub fn bench_store(args: &BenchStoreArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.size.0 >= SERVE_BYTES_MAX, "--size must be at least 4 MiB");
    anyhow::ensure!(args.objects > 0, "--objects must be at least 1");
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new().prefix("doppler-bench").tempdir_in(parent)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let record = runtime.block_on(measure(args, dir.path()))?;
    if args.json {
        return print_json(&record);
    }
    outln!("store: {} in each of {ROUNDS} rounds, on {}", ByteSize(record.bytes), record.host_cpu);
    for (name, speed) in &record.mb_s {
        let what = STEPS.iter().find(|(step, _)| step == name).map_or("", |(_, what)| what);
        outln!("  {name:<12} {speed:>8.0} MB/s   {what}");
    }
    outln!(
        "  reopening {} objects: {:.3} s, {:.3} s without the index",
        record.reopen_objects,
        record.reopen_s,
        record.reopen_without_index_s
    );
    Ok(())
}

async fn measure(args: &BenchStoreArgs, dir: &Path) -> anyhow::Result<Record> {
    let mut rng = SmallRng::seed_from_u64(rand::random());
    let mut left = args.size.0;
    let mut objects = Vec::new();
    while left > 0 {
        let size = left.min(OBJECT_BYTES_MAX);
        let mut bytes = vec![0; size as usize];
        rng.fill_bytes(&mut bytes);
        objects.push(Bytes::from(bytes));
        left -= size;
    }
    let mut times = vec![Vec::with_capacity(ROUNDS); STEPS.len()];
    for round in 0..ROUNDS {
        let done = one_round(&objects, &dir.join(round.to_string())).await?;
        for (times, seconds) in times.iter_mut().zip(done) {
            times.push(seconds);
        }
    }
    let speed = |times: &Vec<f64>| args.size.0 as f64 / 1e6 / median(times);
    let mb_s = STEPS.iter().zip(&times).map(|((name, _), times)| (*name, speed(times))).collect();
    let (reopen_s, reopen_without_index_s) = reopen(args.objects, &dir.join("many")).await?;
    Ok(Record {
        host_cpu: processor(),
        commit: option_env!("DOPPLER_COMMIT"),
        command: crate::commands::command_line(),
        bytes: args.size.0,
        mb_s,
        reopen_objects: args.objects,
        reopen_s,
        reopen_without_index_s,
    })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0
}

/// Seconds of each of [`STEPS`].
async fn one_round(objects: &[Bytes], dir: &Path) -> anyhow::Result<[f64; STEPS.len()]> {
    let open = |name: &str| DiskTier::open(&dir.join(name), DiskOptions { budget: u64::MAX });
    std::fs::create_dir_all(dir)?;
    let ids: Vec<ShardId> = objects.iter().map(|bytes| ShardId::of(bytes)).collect();

    let started = Instant::now();
    for (bytes, id) in objects.iter().zip(&ids) {
        anyhow::ensure!(ShardId::of(bytes) == *id, "hashing is not repeatable");
    }
    let hash = started.elapsed();

    let outboards = objects.iter().map(|b| Outboard::of(b)).collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    let mut encoded = Vec::new();
    for (bytes, outboard) in objects.iter().zip(&outboards) {
        for range in pieces(bytes, SERVE_BYTES_MAX) {
            encoded.push((outboard.shard(), range, encode(bytes, outboard, range)?));
        }
    }
    let encoding = started.elapsed();

    let started = Instant::now();
    for (shard, range, encoded) in &encoded {
        let mut body = &encoded.bytes[..];
        decode(*shard, encoded.size, *range, &mut body).await?;
    }
    let decoding = started.elapsed();
    drop(encoded);

    let disk = open("put")?;
    let started = Instant::now();
    for bytes in objects {
        disk.put(bytes.clone(), true).await?;
    }
    let put = started.elapsed();
    drop(disk);

    let mut files = Vec::new();
    for (number, bytes) in objects.iter().enumerate() {
        let path = dir.join(format!("{number}.bin"));
        std::fs::write(&path, bytes)?;
        std::fs::File::open(&path)?.sync_all()?;
        files.push(path);
    }
    let disk = open("import")?;
    let started = Instant::now();
    for (path, id) in files.iter().zip(&ids) {
        disk.import(path.clone(), *id, true).await?;
    }
    let import = started.elapsed();

    let started = Instant::now();
    for path in &files {
        std::hint::black_box(std::fs::read(path)?);
    }
    let file_read = started.elapsed();

    let read = read_all(&disk, objects, &ids, SERVE_BYTES_MAX).await?;
    let read_expert = read_all(&disk, objects, &ids, 1 << 20).await?;

    let started = Instant::now();
    for id in &ids {
        let checkup = disk.check(*id).await?;
        anyhow::ensure!(checkup.is_some_and(|c| c.damaged.is_empty()), "damaged: {id}");
    }
    let check = started.elapsed();
    drop(disk);
    std::fs::remove_dir_all(dir)?;
    let times = [hash, encoding, decoding, put, import, file_read, read, read_expert, check];
    Ok(times.map(|time| time.as_secs_f64()))
}

fn pieces(bytes: &Bytes, longest: u64) -> impl Iterator<Item = ByteRange> {
    let size = bytes.len() as u64;
    (0..size)
        .step_by(longest as usize)
        .filter_map(move |start| ByteRange::new(start, (start + longest).min(size)))
}

async fn read_all(
    disk: &DiskTier,
    objects: &[Bytes],
    ids: &[ShardId],
    piece: u64,
) -> anyhow::Result<std::time::Duration> {
    let started = Instant::now();
    for (bytes, id) in objects.iter().zip(ids) {
        for range in pieces(bytes, piece) {
            let got = disk.read(*id, range).await?;
            anyhow::ensure!(got.is_some(), "{id} is not whole");
        }
    }
    Ok(started.elapsed())
}

/// Seconds to open a store of many small objects, with and without its index.
async fn reopen(count: usize, dir: &Path) -> anyhow::Result<(f64, f64)> {
    let options = DiskOptions { budget: u64::MAX };
    drop(DiskTier::open(dir, options)?);
    for number in 0..count as u64 {
        // As the store would have written them, but without syncing.
        let mut bytes = [0; SMALL_BYTES];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        let name = ShardId::of(&bytes).to_string();
        std::fs::write(dir.join("objects").join(&name[..2]).join(&name), bytes)?;
    }
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (without, times) in times.iter_mut().enumerate() {
            if without == 1 {
                std::fs::remove_dir_all(dir.join("index"))?;
            }
            let started = Instant::now();
            let disk = DiskTier::open(dir, options)?;
            times.push(started.elapsed().as_secs_f64());
            anyhow::ensure!(disk.complete().len() == count, "objects were lost");
            disk.flush().await?;
        }
    }
    Ok((median(&times[0]), median(&times[1])))
}
