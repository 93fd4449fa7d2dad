//! Peers that lie about their holdings, and peers that request or say too much, each
//! one real and on a socket. What they cost is bounded, and others are not affected.

use doppler_mesh::wire::PartHoldings;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_denies_what_it_announced_is_no_longer_believed() {
    let model = Model::random(&[40_000]);
    let shard = ShardId::of(&model.shards[0]);
    let reader = node("liar", &[], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let mut rogue = Rogue::join("liar", &reader).await;
    let id = rogue.swarm.peer();
    let fetcher = reader.clone();
    let request = whole(&model.shards[0]);
    let fetch = tokio::spawn(async move { fetcher.fetch(request).await });
    // It announces the shard again and again, and denies it each time.
    let Envelope::Holdings(lie) = rogue.holdings(id, &model) else { unreachable!() };
    let (swarm, topic) = (rogue.swarm.clone(), rogue.topic.clone());
    let say = |sequence| {
        let lie =
            Envelope::Holdings(Holdings { stamp: Stamp { epoch: 1, sequence }, ..lie.clone() });
        swarm.publish(&topic, lie.encode()).unwrap();
    };
    say(1);
    let denial = ShardReply::NotFound.encode();
    let incoming = &mut rogue.incoming;
    let mut denials = 0;
    let mut stream = None;
    loop {
        let open = match &mut stream {
            Some(open) => open,
            None => {
                let next = tokio::time::timeout(PATIENCE, incoming.recv()).await;
                stream.insert(next.expect("asked").unwrap().stream)
            }
        };
        let length = tokio::time::timeout(PATIENCE, open.read_u16()).await.expect("asked again");
        let Ok(length) = length else {
            stream = None;
            continue;
        };
        let mut frame = vec![0; usize::from(length)];
        open.read_exact(&mut frame).await.unwrap();
        open.write_all(&denial).await.unwrap();
        open.flush().await.unwrap();
        denials += 1;
        let retracted = |node: &MeshHandle| node.holders(shard).is_empty();
        until("the retraction", &reader, retracted).await;
        say(denials + 1);
        if denials >= 8 {
            break;
        }
        until("the next lie", &reader, |node| !node.holders(shard).is_empty()).await;
    }
    // Another lie, about partial objects: it is accepted but has no effect.
    let mut holdings = Holdings { stamp: Stamp { epoch: 1, sequence: 100 }, ..lie.clone() };
    let chunks = doppler_store::groups::Chunks::ALL;
    holdings.models[0].objects.clear();
    holdings.models[0].parts = vec![PartHoldings { object: 0, chunks }];
    swarm.publish(&topic, Envelope::Holdings(holdings).encode()).unwrap();
    // The read succeeds with an honest peer.
    let honest = node("liar", &[&reader], Memory::new(Manner::Honest, &model.all())).await;
    honest.register_model(model.id, model.list()).unwrap();
    let part = tokio::time::timeout(PATIENCE, fetch).await.unwrap().unwrap().unwrap();
    assert_eq!(part.bytes(), &model.shards[0]);
    assert_eq!(reader.holders(shard), [honest.peer_id()]);
    assert_eq!(reader.stats().counts.bans, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_opens_endless_streams_is_refused_and_others_are_served() {
    let model = Model::random(&[8 * 1024 * 1024]);
    let holder = node("streams", &[], Memory::new(Manner::Honest, &model.all())).await;
    holder.register_model(model.id, model.list()).unwrap();
    let rogue = Rogue::join("streams", &holder).await;
    let mut events = rogue.events.peers.clone();
    let met = events.wait_for(|peers| !peers.is_empty());
    tokio::time::timeout(PATIENCE, met).await.unwrap().unwrap();
    // It requests the maximum on each stream and reads none of the replies.
    let request = ShardRequest {
        shard: ShardId::of(&model.shards[0]),
        range: range(0, SERVE_BYTES_MAX),
        priority: Priority::Token,
    };
    let mut streams = Vec::new();
    for _ in 0..80 {
        // A refused stream may fail while it is opened.
        let Ok(mut stream) = rogue.swarm.open_stream(holder.peer_id(), SHARD_PROTOCOL).await else {
            continue;
        };
        if stream.write_all(&request.encode()).await.is_ok() && stream.flush().await.is_ok() {
            streams.push(stream);
        }
    }
    until("refusals", &holder, |node| node.stats().counts.refused_streams >= 16).await;
    let reader = node("streams", &[&holder], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let fetched = tokio::time::timeout(PATIENCE, reader.fetch(whole(&model.shards[0]))).await;
    assert_eq!(fetched.expect("served").unwrap().bytes(), &model.shards[0]);
    drop(streams);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_read_its_reply_is_cut_off_and_frees_its_slot() {
    let model = Model::random(&[8 * 1024 * 1024]);
    let mut options = super::options("lazy", &[]);
    // One reply at a time: until it ends, nobody else gets one.
    options.upload_slots = 1;
    options.timing.idle = Duration::from_millis(300);
    let serve = Memory::new(Manner::Honest, &model.all());
    let holder = Mesh::start(options, serve.clone()).await.unwrap();
    holder.register_model(model.id, model.list()).unwrap();
    let rogue = Rogue::join("lazy", &holder).await;
    let mut events = rogue.events.peers.clone();
    let met = events.wait_for(|peers| !peers.is_empty());
    tokio::time::timeout(PATIENCE, met).await.unwrap().unwrap();
    let request = ShardRequest {
        shard: ShardId::of(&model.shards[0]),
        range: range(0, SERVE_BYTES_MAX),
        priority: Priority::Token,
    };
    let mut lazy = rogue.swarm.open_stream(holder.peer_id(), SHARD_PROTOCOL).await.unwrap();
    lazy.write_all(&request.encode()).await.unwrap();
    lazy.flush().await.unwrap();
    let mut asked = serve.asked.subscribe();
    let asked = asked.wait_for(|count| *count > 0);
    tokio::time::timeout(PATIENCE, asked).await.expect("asked").unwrap();
    let reader = node("lazy", &[&holder], nothing()).await;
    reader.register_model(model.id, model.list()).unwrap();
    let fetched = tokio::time::timeout(PATIENCE, reader.fetch(whole(&model.shards[0]))).await;
    assert_eq!(fetched.expect("a place").unwrap().bytes(), &model.shards[0]);
    // The data in flight arrives, then the stream ends.
    let mut got = Vec::new();
    let end = tokio::time::timeout(PATIENCE, lazy.read_to_end(&mut got)).await;
    // The multiplexer decides whether the end is an error.
    let _ = end.expect("an end");
    assert!((got.len() as u64) < SERVE_BYTES_MAX, "{} bytes", got.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_floods_gossip_is_ignored_and_others_are_heard() {
    let model = Model::random(&[10]);
    let listener = node("noise", &[], nothing()).await;
    let flooder = Rogue::join("noise", &listener).await;
    let mut peers = flooder.events.peers.clone();
    let heard = peers.wait_for(|peers| peers.values().any(|peer| !peer.topics.is_empty()));
    tokio::time::timeout(PATIENCE, heard).await.unwrap().unwrap();
    let id = flooder.swarm.peer();
    let mut sequence = 1;
    let mut changes = listener.watch_changes();
    let flooded = async {
        while listener.stats().counts.ignored_messages == 0 {
            changes.borrow_and_update();
            for _ in 0..64 {
                let holdings = flooder.holdings(
                    id,
                    &Model {
                        id: ModelId::of(&u64::to_le_bytes(sequence)),
                        manifest: Bytes::new(),
                        shards: Vec::new(),
                    },
                );
                let Envelope::Holdings(mut holdings) = holdings else { unreachable!() };
                holdings.stamp.sequence = sequence;
                sequence += 1;
                // The queue is full: repeated in the next round.
                let _ =
                    flooder.swarm.publish(&flooder.topic, Envelope::Holdings(holdings).encode());
            }
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, flooded).await.expect("too much at some point");
    let honest = node("noise", &[&listener], Memory::new(Manner::Honest, &model.all())).await;
    honest.register_model(model.id, model.list()).unwrap();
    honest.publish(model.signed([1; 32])).unwrap();
    learn(&listener, model.id).await;
    listener.register_model(model.id, model.list()).unwrap();
    let part = tokio::time::timeout(PATIENCE, listener.fetch(whole(&model.shards[0]))).await;
    assert_eq!(part.unwrap().unwrap().bytes(), &model.shards[0]);
    let flooded = listener.peers().into_iter().find(|peer| peer.id == id);
    // A manifest and an object of each of 1,024 models.
    assert!(flooded.is_none_or(|peer| peer.shards_held <= 2048), "its holdings are bounded");
}
