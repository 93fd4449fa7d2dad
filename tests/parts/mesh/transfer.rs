//! Transfers from several peers: partial objects, restarts, peers that hang, limits.

use std::path::Path;

use doppler_store::RangeReader;
use doppler_store::disk::{DiskOptions, DiskTier};
use doppler_store::groups::{CHUNK_BYTES, Chunks};
use doppler_store::ladder::{Ladder, LadderOptions};

use super::*;

/// A node with a store on disk.
async fn stored(name: &str, bootstrap: &[&MeshHandle], dir: &Path) -> (MeshHandle, Ladder) {
    let disk = DiskTier::open(dir, DiskOptions { budget: 1 << 30 }).unwrap();
    let options = LadderOptions { ram_budget: 1 << 20 };
    let ladder = Ladder::new(options, Some(Arc::new(disk)), None, Vec::new());
    let mesh =
        Mesh::start(super::options(name, bootstrap), Arc::new(ladder.clone())).await.unwrap();
    ladder.set_peers(Arc::new(mesh.clone()));
    (mesh, ladder)
}

async fn read_bulk(ladder: &Ladder, shard: ShardId, range: ByteRange) -> Bytes {
    let request = ReadRequest { shard, range, priority: Priority::Bulk, deadline: None };
    ladder.read(request).await.unwrap().bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn partial_objects_are_announced_and_served() {
    let model = Model::random(&[6 * CHUNK_BYTES as usize + 77]);
    let shard = ShardId::of(&model.shards[0]);
    let source = node("parts", &[], Memory::new(Manner::Honest, &model.all())).await;
    let dir = tempfile::tempdir().unwrap();
    let (middle, ladder) = stored("parts", &[&source], dir.path()).await;
    for node in [&source, &middle] {
        node.register_model(model.id, model.list()).unwrap();
    }
    // Chunks 1 and 2 whole, half of chunk 4, and the short last one.
    for (start, end) in [(1, 3), (4, 5), (6, 7)] {
        let end = (end * CHUNK_BYTES - if start == 4 { CHUNK_BYTES / 2 } else { 0 })
            .min(model.shards[0].len() as u64);
        let wanted = range(start * CHUNK_BYTES, end);
        let got = read_bulk(&ladder, shard, wanted).await;
        assert_eq!(got[..], model.shards[0][wanted.start() as usize..end as usize]);
    }
    ladder.flush().await.unwrap();
    source.shutdown().await;

    let reader = node("parts", &[&middle], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let parts = [(middle.peer_id(), Chunks(0b100_0110))];
    until("the parts", &reader, |node| node.holdings(shard) == parts).await;
    assert_eq!(reader.holders(shard), [], "nobody has it whole");
    let wanted = range(CHUNK_BYTES + 5, 3 * CHUNK_BYTES - 9);
    let part = reader.fetch(read(shard, wanted)).await.unwrap();
    let got = part.slice(wanted).unwrap();
    assert_eq!(got[..], model.shards[0][wanted.start() as usize..wanted.end() as usize]);
    // It is not asked for what it does not announce.
    let deadline = Some(Instant::now() + Duration::from_millis(700));
    let hole = ReadRequest { deadline, ..read(shard, range(0, 10)) };
    assert!(reader.fetch(hole).await.is_err());
    let denied = reader.peers().iter().any(|peer| peer.score < 0.5);
    assert!(!denied, "it was asked for what it does not hold");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_resumes_after_a_restart_from_what_is_on_disk() {
    let model = Model::random(&[12 * CHUNK_BYTES as usize + 5]);
    let (shard, size) = (ShardId::of(&model.shards[0]), model.shards[0].len() as u64);
    let source = node("resume", &[], Memory::new(Manner::Honest, &model.all())).await;
    source.register_model(model.id, model.list()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let kept = 5 * CHUNK_BYTES + GROUP_BYTES;
    {
        let (first, ladder) = stored("resume", &[&source], dir.path()).await;
        first.register_model(model.id, model.list()).unwrap();
        read_bulk(&ladder, shard, range(0, kept)).await;
        ladder.flush().await.unwrap();
        first.shutdown().await;
        // The directory is unlocked when its last user is dropped.
        ladder.set_peers(Arc::new(source.clone()));
    }
    let (second, ladder) = stored("resume", &[&source], dir.path()).await;
    second.register_model(model.id, model.list()).unwrap();
    let bytes = read_bulk(&ladder, shard, range(0, size)).await;
    assert_eq!(bytes, model.shards[0]);
    assert_eq!(second.stats().counts.verified_bytes, size - kept, "only what was missing");
    ladder.flush().await.unwrap();
    assert!(ladder.disk().unwrap().is_whole(shard));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_peer_is_abandoned_long_before_its_time_out() {
    let model = Model::random(&[3_000_000; 6]);
    let hanging_store = Memory::new(Manner::HangAfter(0), &model.all());
    let hanging = node("hang", &[], hanging_store.clone()).await;
    let honest = node("hang", &[], Memory::new(Manner::Honest, &model.all())).await;
    let mut patient = options("hang", &[&hanging, &honest]);
    // Its silence alone would end nothing within the test.
    patient.timing.idle = 10 * PATIENCE;
    let reader = Mesh::start(patient, nothing()).await.unwrap();
    for node in [&hanging, &honest, &reader] {
        node.register_model(model.id, model.list()).unwrap();
    }
    for shard in model.list() {
        until("both holdings", &reader, |node| node.holders(shard).len() == 2).await;
    }
    for shard in &model.shards {
        let fetched = tokio::time::timeout(PATIENCE, reader.fetch(whole(shard))).await;
        assert_eq!(fetched.expect("left in time").unwrap().bytes(), shard);
    }
    let asked = *hanging_store.asked.borrow();
    let stats = reader.stats();
    assert!(asked > 0 && stats.counts.hedges > 0, "asked {asked} times: {:?}", stats.counts);
    let score = |id: PeerId| reader.peers().iter().find(|peer| peer.id == id).unwrap().score;
    assert!(score(hanging.peer_id()) < score(honest.peer_id()));
    assert_eq!(stats.counts.bans, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_before_a_peer_hung_or_failed_is_not_requested_again() {
    for hangs in [true, false] {
        let model = Model::random(&[3 * 1024 * 1024 + 5]);
        let object = &model.shards[0];
        let mut options = options("midst", &[]);
        // Its silence alone would end nothing within the test.
        options.timing.idle = 10 * PATIENCE;
        let reader = Mesh::start(options, nothing()).await.unwrap();
        reader.register_model(model.id, model.list()).unwrap();
        let mut rogue = Rogue::join("midst", &reader).await;
        let id = rogue.swarm.peer();
        let mut events = rogue.events.peers.clone();
        let met = events.wait_for(|peers| peers.values().any(|peer| !peer.topics.is_empty()));
        tokio::time::timeout(PATIENCE, met).await.unwrap().unwrap();
        rogue.say(&rogue.holdings(id, &model));
        let fetcher = reader.clone();
        let request = whole(object);
        let fetch = tokio::spawn(async move { fetcher.fetch(request).await });

        // It sends the head and two thirds of the body, ending within a group.
        let (mut stream, request) = rogue.asked().await;
        assert_eq!(request.range, range(0, object.len() as u64), "all of one peer");
        let encoded = verified::encode(object, &Outboard::of(object).unwrap(), request.range);
        let Encoded { size, bytes } = encoded.unwrap();
        let head = ShardReply::Ok { object_size: size, body_bytes: bytes.len() as u64 };
        stream.write_all(&head.encode()).await.unwrap();
        stream.write_all(&bytes[..2 * 1024 * 1024 + 777]).await.unwrap();
        stream.flush().await.unwrap();
        if !hangs {
            stream.shutdown().await.unwrap();
        }
        let store = Memory::new(Manner::Honest, &model.all());
        let honest = node("midst", &[&reader], store.clone()).await;
        honest.register_model(model.id, model.list()).unwrap();
        let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap().unwrap();
        assert_eq!(part.bytes(), object, "hangs: {hangs}");

        let stats = reader.stats();
        let came = |id: PeerId| stats.peers[&id.to_string()].bytes_in;
        let (rogue_sent, honest_sent) = (came(id), came(honest.peer_id()));
        assert!(rogue_sent > 1024 * 1024, "{rogue_sent} bytes of the first were kept");
        assert_eq!(rogue_sent + honest_sent, size);
        let asked: u64 = store.ranges.lock().unwrap().iter().map(ByteRange::len).sum();
        assert_eq!(asked, honest_sent, "the other was asked for what was missing");
        assert_eq!((stats.counts.verified_bytes, stats.counts.rejected_bytes), (size, 0));
        drop(stream);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_and_download_limits_are_kept() {
    const LIMIT: u64 = 512 * 1024;
    let model = Model::random(&[1024 * 1024]);
    for upload in [true, false] {
        let mut holding = options("limit", &[]);
        holding.upload_limit = upload.then_some(LIMIT);
        let holder = Mesh::start(holding, Memory::new(Manner::Honest, &model.all())).await.unwrap();
        let mut reading = options("limit", &[&holder]);
        reading.download_limit = (!upload).then_some(LIMIT);
        let reader = Mesh::start(reading, nothing()).await.unwrap();
        for node in [&holder, &reader] {
            node.register_model(model.id, model.list()).unwrap();
        }
        let shard = ShardId::of(&model.shards[0]);
        until("its holdings", &reader, |node| !node.holders(shard).is_empty()).await;
        let started = Instant::now();
        let part = reader.fetch(whole(&model.shards[0])).await.unwrap();
        assert_eq!(part.bytes(), &model.shards[0]);
        // Twice the limit's bytes. At most one burst is free, and one frame is not waited for.
        assert!(started.elapsed() > Duration::from_millis(1700), "{:?}", started.elapsed());
        assert_eq!(reader.stats().counts.hedges, 0, "a limited peer does not count as late");
    }
    let mut low = options("limit", &[]);
    low.download_limit = Some(1000);
    let Err(refused) = Mesh::start(low, nothing()).await else { panic!("too low a limit") };
    assert!(refused.to_string().contains("at least 65536"), "{refused}");
}
