//! `store-exercise`: imports, downloads, collects and removes without end, and prints on standard
//! output what is durable, one JSON object per line. It exists to be killed: what it printed must
//! be true for the next process that opens the directory.
//!
//! `stored` is printed after the store has reported an object as durable and pinned, `held` after
//! the same for a range, and `dropping` before anything may remove them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::json;

use crate::args::ExerciseArgs;
use crate::output;
use doppler_store::disk::{DiskOptions, DiskTier};
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::verified::{GROUP_BYTES, Outboard, VerifiedRange, align};
use doppler_store::{
    ByteRange, ModelId, Priority, RangeReader, ReadError, ReadRequest, ShardId, ShardSource,
    StoreError,
};

/// The number of different objects, each of which is generated from its number.
const OBJECTS: u64 = 64;
/// Models that pin some of the objects.
const MODELS: u64 = 4;
/// The bytes of the largest object.
const BYTES_MAX: u64 = 40 * GROUP_BYTES;
/// The store's budget: less than all of them.
const BUDGET: u64 = 8 << 20;

/// The object with this number. Its bytes are always the same.
fn object(number: u64) -> Bytes {
    let mut rng = StdRng::seed_from_u64(number);
    // Mostly small, so that much happens between kills.
    let size = match number % 4 {
        0 => rng.random_range(1..GROUP_BYTES),
        1 | 2 => rng.random_range(1..4 * GROUP_BYTES),
        _ => rng.random_range(1..BYTES_MAX),
    };
    let mut bytes = vec![0; size as usize];
    rng.fill_bytes(&mut bytes);
    Bytes::from(bytes)
}

/// A peer that has every object.
struct Everything(HashMap<ShardId, Bytes>);

impl ShardSource for Everything {
    fn fetch(&self, request: ReadRequest) -> BoxFuture<'_, Result<VerifiedRange, ReadError>> {
        async move {
            let shard = request.shard;
            let bytes =
                self.0.get(&shard).ok_or(ReadError::NotFound { shard, waited: Duration::ZERO })?;
            let corrupt = |detail: String| ReadError::Corrupt { shard, detail };
            let outboard = Outboard::of(bytes).map_err(|e| corrupt(e.to_string()))?;
            let range = align(request.range, bytes.len() as u64)
                .ok_or_else(|| corrupt("out of range".to_owned()))?;
            let slice = bytes.slice(range.start() as usize..range.end() as usize);
            outboard.prove(range, slice).map_err(|e| corrupt(e.to_string()))
        }
        .boxed()
    }
}

pub fn exercise(args: &ExerciseArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build()?;
    runtime.block_on(work(args))
}

async fn work(args: &ExerciseArgs) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(args.seed);
    let objects: Vec<Bytes> = (0..OBJECTS).map(object).collect();
    let everything = objects.iter().map(|bytes| (ShardId::of(bytes), bytes.clone()));
    let everything = Everything(everything.collect());
    let outside = args.data.join("outside");
    std::fs::create_dir_all(&outside)?;
    let disk = DiskTier::open(&args.data, DiskOptions { budget: BUDGET })?;
    let ladder = Ladder::new(
        LadderOptions { ram_budget: 1 << 20 },
        Some(Arc::new(disk.clone())),
        Some(Arc::new(everything)),
        Vec::new(),
    );
    say(&json!({ "event": "open" }))?;
    for _ in 0..args.operations {
        let number = rng.random_range(0..OBJECTS);
        let bytes = &objects[number as usize];
        step(&mut rng, &disk, &ladder, &outside, (number, bytes)).await?;
    }
    ladder.flush().await?;
    Ok(())
}

async fn step(
    rng: &mut StdRng,
    disk: &DiskTier,
    ladder: &Ladder,
    outside: &Path,
    (number, bytes): (u64, &Bytes),
) -> anyhow::Result<()> {
    let (shard, size) = (ShardId::of(bytes), bytes.len() as u64);
    let stored = json!({ "event": "stored", "shard": shard, "number": number });
    match rng.random_range(0..8) {
        0 | 1 => {
            let path = outside.join(format!("{number}.bin"));
            if !path.exists() {
                std::fs::write(&path, bytes)?;
            }
            // The file may be from a killed process. It is then refused and written again.
            match ladder.import_file(path.clone(), shard, true).await {
                Ok(_) => say(&stored)?,
                Err(_) => std::fs::remove_file(&path)?,
            }
        }
        2 => match ladder.put(bytes.clone(), true).await {
            Ok(_) => say(&stored)?,
            // Too much is pinned; a collection will unpin some.
            Err(StoreError::Budget { .. }) => {}
            Err(error) => return Err(error.into()),
        },
        3 => {
            ladder.get_whole(shard, size, Priority::Bulk, None).await?;
            ladder.flush().await?;
            // A few models pin new objects, so their records change all the time.
            let model = ModelId::of(&rng.random_range(0..MODELS).to_le_bytes());
            let pinned = disk.pin_model(model, String::new(), vec![(shard, size)]).await?;
            if disk.is_whole(shard) && !pinned.is_empty() {
                say(&stored)?;
            }
        }
        4 | 5 => {
            let start = rng.random_range(0..size);
            let end = rng.random_range(start + 1..=size);
            let Some(range) = ByteRange::new(start, end) else { return Ok(()) };
            let request =
                ReadRequest { priority: Priority::Bulk, ..ReadRequest::token(shard, range) };
            ladder.read(request).await?;
            ladder.flush().await?;
            if disk.pin(shard).await.is_ok()
                && disk.groups(shard).await.is_some_and(|g| g.holds(range))
            {
                say(&json!({ "event": "held", "shard": shard, "number": number, "range": range }))?;
            }
        }
        6 => {
            say(&json!({ "event": "dropping", "shard": shard }))?;
            if rng.random() {
                let _ = disk.remove(shard).await;
            } else {
                let _ = disk.unpin(shard).await;
            }
        }
        _ => {
            // Everything may be pinned by now, so unpin some, then collect.
            for object in disk.list().await? {
                if rng.random_range(0..3) == 0 {
                    say(&json!({ "event": "dropping", "shard": object.shard }))?;
                    disk.unpin(object.shard).await?;
                }
            }
            let budget = rng.random_range(0..BUDGET);
            disk.collect(Some(budget), false).await?;
        }
    }
    Ok(())
}

/// Prints a line and flushes it before anything else happens.
fn say(event: &serde_json::Value) -> anyhow::Result<()> {
    let line = serde_json::to_string(event)? + "\n";
    ensure!(output::piece(&line), "nobody reads what is durable");
    Ok(())
}
