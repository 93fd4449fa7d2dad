//! `bench mesh`: the cost of a verified transfer between two nodes in this process, compared with a
//! raw stream over the same transport.
//!
//! Every round measures each variant once, so that the ratios are meaningful even on a busy
//! machine. Both ends run in this process and share its processors. Bytes are served from memory
//! and discarded once verified.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use doppler_swarm::{Options, SwarmEvents, SwarmHandle};
use futures::{StreamExt, TryStreamExt};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bench::{cpu_seconds, processor, rss_bytes};
use super::print_json;
use crate::args::BenchMeshArgs;
use crate::output::outln;
use crate::size::ByteSize;
use doppler_mesh::{Address, Mesh, MeshHandle, MeshOptions, PROTOCOL_VERSION};
use doppler_store::ladder::{Ladder, LadderOptions};
use doppler_store::verified::{OBJECT_BYTES_MAX, SERVE_BYTES_MAX};
use doppler_store::{ByteRange, ModelId, Priority, ReadRequest, ShardId, ShardSource};

/// The protocol of the raw stream: eight bytes of length in one direction, that many bytes in the
/// other.
const RAW_PROTOCOL: &str = "/doppler/bench/1";
/// Bytes written and read at a time on a raw stream, as the shard protocol does.
const RAW_BYTES: usize = 64 * 1024;
/// The number of parallel raw streams.
const RAW_STREAMS: usize = 4;
/// Ranges of at most one request each that are fetched at once, as the ladder does for two objects.
const PIECES_AT_ONCE: usize = 8;
/// Providers of the throttled transfer, and the bytes that each may send a second.
const THROTTLED: usize = 3;
const THROTTLED_RATE: u64 = 20_000_000;
/// Connections made before memory is first measured.
const CONNECTS_FIRST: usize = 200;
/// Peers that come and go at once.
const CONNECTS_AT_ONCE: usize = 8;
/// How long a connection or an announcement may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What `--json` prints. Speeds are in millions of bytes a second.
#[derive(Serialize)]
struct Record {
    host_cpu: String,
    commit: Option<&'static str>,
    command: String,
    /// Bytes of each measurement.
    bytes: u64,
    rounds: usize,
    raw_mb_s: Speeds,
    raw_4_streams_mb_s: Speeds,
    verified_mb_s: Speeds,
    /// Median of the rounds' ratios to the faster of the two raw variants.
    verified_to_raw: f64,
    /// Median processor seconds of both ends together per billion bytes. On a busy machine they say
    /// more than speeds.
    raw_cpu_s_per_gb: f64,
    verified_cpu_s_per_gb: f64,
    /// From three providers that send at most 20 MB/s each.
    throttled_mb_s: f64,
    /// Memory of the process before and after `connects` connections of new peers.
    connects: usize,
    rss_before: u64,
    rss_after: u64,
}

#[derive(Serialize)]
struct Speeds {
    median: f64,
    all: Vec<f64>,
}

impl Speeds {
    fn of(all: Vec<f64>) -> Self {
        Self { median: median(&all), all }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        len => (sorted[(len - 1) / 2] + sorted[len / 2]) / 2.0,
    }
}

pub fn bench_mesh(args: &BenchMeshArgs) -> anyhow::Result<()> {
    ensure!((1..=100).contains(&args.rounds), "--rounds must be 1 to 100");
    ensure!(
        (1 << 20..=4 << 30).contains(&args.size.0),
        "--size must be at least 1 MiB and at most 4 GiB: it is held in memory"
    );
    let listen: Address = args
        .listen
        .parse()
        .map_err(|error| anyhow::anyhow!("--listen {}: {error}", args.listen))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let record = runtime.block_on(measure(args, &listen))?;
    if args.json {
        return print_json(&record);
    }
    outln!(
        "mesh: {} in each of {} rounds over {}, on {}",
        ByteSize(record.bytes),
        record.rounds,
        args.listen,
        record.host_cpu
    );
    outln!("  raw          {:>6.0} MB/s   one stream", record.raw_mb_s.median);
    outln!("  raw          {:>6.0} MB/s   {RAW_STREAMS} streams", record.raw_4_streams_mb_s.median);
    outln!(
        "  verified     {:>6.0} MB/s   {:.2} of the faster raw variant (median of the rounds' ratios)",
        record.verified_mb_s.median,
        record.verified_to_raw
    );
    outln!(
        "  processor    {:>6.2} s/GB   raw ({RAW_STREAMS} streams), {:.2} verified, both ends together",
        record.raw_cpu_s_per_gb,
        record.verified_cpu_s_per_gb
    );
    outln!(
        "  throttled    {:>6.1} MB/s   from {THROTTLED} providers of 20 MB/s each",
        record.throttled_mb_s
    );
    if record.connects > 0 {
        outln!(
            "  memory       {} after the first {CONNECTS_FIRST} connections, {} after {} more",
            ByteSize(record.rss_before),
            ByteSize(record.rss_after),
            record.connects
        );
    }
    Ok(())
}

async fn measure(args: &BenchMeshArgs, listen: &Address) -> anyhow::Result<Record> {
    // Measured first, while the process is small.
    let (rss_before, rss_after) = connects(listen, args.connects).await?;
    let objects = objects(args.size.0);
    let raw = RawPair::start(listen).await?;
    let pair = Swarm::start(listen, &objects, 1, None).await?;
    let mut speeds: [Vec<f64>; 3] = Default::default();
    let (mut ratios, mut raw_cpu, mut verified_cpu) = (Vec::new(), Vec::new(), Vec::new());
    let bytes = args.size.0;
    // One more round than asked for; the first is not counted.
    for round in 0..=args.rounds {
        let one = speed(bytes, raw.transfer(bytes, 1)).await?;
        let cpu_before = cpu_seconds().unwrap_or_default();
        let four = speed(bytes, raw.transfer(bytes, RAW_STREAMS)).await?;
        let cpu_between = cpu_seconds().unwrap_or_default();
        let verified = speed(bytes, pair.transfer()).await?;
        let cpu_after = cpu_seconds().unwrap_or_default();
        if round > 0 {
            let gb = bytes as f64 / 1e9;
            raw_cpu.push((cpu_between - cpu_before) / gb);
            verified_cpu.push((cpu_after - cpu_between) / gb);
            for (all, speed) in speeds.iter_mut().zip([one, four, verified]) {
                all.push(speed);
            }
            ratios.push(verified / one.max(four));
        }
    }
    raw.stop().await;
    pair.stop().await;
    let throttled = Swarm::start(listen, &objects, THROTTLED, Some(THROTTLED_RATE)).await?;
    let throttled_mb_s = speed(bytes, throttled.transfer()).await?;
    throttled.stop().await;
    let [one, four, verified] = speeds.map(Speeds::of);
    Ok(Record {
        host_cpu: processor(),
        commit: option_env!("DOPPLER_COMMIT"),
        command: crate::commands::command_line(),
        bytes,
        rounds: args.rounds,
        raw_mb_s: one,
        raw_4_streams_mb_s: four,
        verified_mb_s: verified,
        verified_to_raw: median(&ratios),
        raw_cpu_s_per_gb: median(&raw_cpu),
        verified_cpu_s_per_gb: median(&verified_cpu),
        throttled_mb_s,
        connects: args.connects,
        rss_before,
        rss_after,
    })
}

async fn speed(
    bytes: u64,
    transfer: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    transfer.await?;
    Ok(bytes as f64 / 1e6 / started.elapsed().as_secs_f64())
}

fn objects(bytes: u64) -> Vec<Bytes> {
    let mut rng = SmallRng::seed_from_u64(rand::random());
    let sizes = (0..bytes).step_by(OBJECT_BYTES_MAX as usize);
    let object = |start| {
        let mut object = vec![0; OBJECT_BYTES_MAX.min(bytes - start) as usize];
        rng.fill_bytes(&mut object);
        Bytes::from(object)
    };
    sizes.map(object).collect()
}

/// Nodes that hold all objects, and a node that holds nothing and fetches them.
struct Swarm {
    providers: Vec<MeshHandle>,
    reader: MeshHandle,
    pieces: Vec<(ShardId, ByteRange)>,
}

impl Swarm {
    async fn start(
        listen: &Address,
        objects: &[Bytes],
        providers: usize,
        upload_limit: Option<u64>,
    ) -> anyhow::Result<Self> {
        let ladder = || Ladder::new(LadderOptions { ram_budget: 16 << 30 }, None, None, Vec::new());
        let options = || {
            let mut options = MeshOptions::new("bench", rand::random());
            options.listen = vec![listen.clone()];
            options
        };
        let model = ModelId::of(b"bench");
        let ids: Vec<ShardId> = objects.iter().map(|object| ShardId::of(object)).collect();
        let mut started = Vec::new();
        let full = ladder();
        for object in objects {
            full.put(object.clone(), true).await?;
        }
        for _ in 0..providers {
            let options = MeshOptions { upload_limit, ..options() };
            let provider = Mesh::start(options, Arc::new(full.clone())).await?;
            provider.register_model(model, ids.clone())?;
            started.push(provider);
        }
        let bootstrap = started.iter().flat_map(MeshHandle::listen_addrs).collect();
        let options = MeshOptions { bootstrap, ..options() };
        let reader = Mesh::start(options, Arc::new(ladder())).await?;
        reader.register_model(model, ids.clone())?;
        let mut changes = reader.watch_changes();
        let found = async {
            while reader.peers().len() < providers
                || ids.iter().any(|id| reader.holders(*id).len() < providers)
            {
                changes.changed().await?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .context("the nodes do not find each other")??;
        let mut pieces = Vec::new();
        for (id, object) in ids.iter().zip(objects) {
            let size = object.len() as u64;
            for start in (0..size).step_by(SERVE_BYTES_MAX as usize) {
                let piece = ByteRange::new(start, (start + SERVE_BYTES_MAX).min(size));
                pieces.extend(piece.map(|piece| (*id, piece)));
            }
        }
        Ok(Self { providers: started, reader, pieces })
    }

    async fn transfer(&self) -> anyhow::Result<()> {
        futures::stream::iter(&self.pieces)
            .map(|(shard, range)| async move {
                let (shard, range) = (*shard, *range);
                let (priority, deadline) = (Priority::Bulk, None);
                let request = ReadRequest { shard, range, priority, deadline };
                let got = self.reader.fetch(request).await?;
                ensure!(got.range() == range, "too few bytes came");
                Ok(())
            })
            .buffer_unordered(PIECES_AT_ONCE)
            .try_collect()
            .await
    }

    async fn stop(self) {
        self.reader.shutdown().await;
        for provider in self.providers {
            provider.shutdown().await;
        }
    }
}

/// Two bare swarms with a stream between them.
struct RawPair {
    server: SwarmHandle,
    client: SwarmHandle,
    _events: [SwarmEvents; 2],
    serving: tokio::task::JoinHandle<()>,
}

impl RawPair {
    async fn start(listen: &Address) -> anyhow::Result<Self> {
        let (server, server_events) = SwarmHandle::spawn(bare(Some(listen), &[])).await?;
        let mut incoming = server.accept(RAW_PROTOCOL)?;
        let serving = tokio::spawn(async move {
            let mut rng = SmallRng::seed_from_u64(rand::random());
            let mut bytes = vec![0; RAW_BYTES];
            rng.fill_bytes(&mut bytes);
            let bytes: Arc<[u8]> = bytes.into();
            while let Some(mut asked) = incoming.recv().await {
                let bytes = bytes.clone();
                tokio::spawn(async move {
                    while let Ok(mut left) = asked.stream.read_u64().await {
                        while left > 0 {
                            let now = left.min(RAW_BYTES as u64);
                            asked.stream.write_all(&bytes[..now as usize]).await?;
                            left -= now;
                        }
                        asked.stream.flush().await?;
                    }
                    std::io::Result::Ok(())
                });
            }
        });
        let mut listening = server_events.listening.clone();
        let addresses = listening.wait_for(|addresses| !addresses.is_empty()).await?.clone();
        let (client, client_events) = SwarmHandle::spawn(bare(None, &addresses)).await?;
        connected(&client_events).await?;
        Ok(Self { server, client, _events: [server_events, client_events], serving })
    }

    async fn transfer(&self, bytes: u64, streams: usize) -> anyhow::Result<()> {
        let mut running = tokio::task::JoinSet::new();
        for index in 0..streams as u64 {
            let share = bytes * (index + 1) / streams as u64 - bytes * index / streams as u64;
            let (client, server) = (self.client.clone(), self.server.peer());
            running.spawn(async move {
                let mut stream = client.open_stream(server, RAW_PROTOCOL).await?;
                stream.write_u64(share).await?;
                stream.flush().await?;
                let (mut left, mut buffer) = (share, vec![0; RAW_BYTES]);
                while left > 0 {
                    let read = stream.read(&mut buffer).await?;
                    ensure!(read > 0, "the raw stream ended early");
                    left -= read as u64;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        Ok(())
    }

    async fn stop(self) {
        self.client.shutdown().await;
        self.server.shutdown().await;
        self.serving.abort();
    }
}

fn bare(listen: Option<&Address>, bootstrap: &[Address]) -> Options {
    Options {
        listen: listen.into_iter().cloned().collect(),
        bootstrap: bootstrap.to_vec(),
        agent: "bench/1".to_owned(),
        protocol_version: PROTOCOL_VERSION.to_owned(),
        ..Options::new(rand::random())
    }
}

async fn connected(events: &SwarmEvents) -> anyhow::Result<()> {
    let mut peers = events.peers.clone();
    let met = peers.wait_for(|peers| !peers.is_empty());
    tokio::time::timeout(PATIENCE, met).await.context("the nodes do not connect")??;
    Ok(())
}

/// Resident bytes of the process before and after `count` peers came and went.
async fn connects(listen: &Address, count: usize) -> anyhow::Result<(u64, u64)> {
    if count == 0 {
        return Ok((0, 0));
    }
    let mut options = MeshOptions::new("bench", rand::random());
    options.listen = vec![listen.clone()];
    let ladder = Ladder::new(LadderOptions { ram_budget: 1 << 20 }, None, None, Vec::new());
    let node = Mesh::start(options, Arc::new(ladder)).await?;
    let addresses = node.listen_addrs();
    let come_and_go = |count: usize| {
        let one = |_| async {
            let (peer, events) = SwarmHandle::spawn(bare(None, &addresses)).await?;
            connected(&events).await?;
            peer.shutdown().await;
            anyhow::Ok(())
        };
        // Each mostly waits for the other end.
        let peers = futures::stream::iter(0..count).map(one).buffer_unordered(CONNECTS_AT_ONCE);
        peers.try_collect::<()>()
    };
    come_and_go(CONNECTS_FIRST).await?;
    let before = rss_bytes().unwrap_or_default();
    come_and_go(count).await?;
    let after = rss_bytes().unwrap_or_default();
    node.shutdown().await;
    Ok((before, after))
}
