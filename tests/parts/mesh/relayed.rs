//! Peers that are reachable only through a relay: manifests and gossip pass it, shards
//! do not, whoever asks.

use doppler_mesh::{Address, Path, RelayMode};

use super::*;

/// A node that nobody can dial.
fn hidden(name: &str, bootstrap: &[&MeshHandle]) -> MeshOptions {
    MeshOptions {
        listen: Vec::new(),
        relay: RelayMode::Client,
        find_timeout: Duration::from_millis(300),
        ..options(name, bootstrap)
    }
}

fn circuit(node: &MeshHandle) -> Option<Address> {
    node.listen_addrs().into_iter().find(|address| address.relay().is_some())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_comes_over_a_relay_and_shards_do_not() {
    let model = Model::random(&[100_003, 20]);
    let offering = MeshOptions { relay: RelayMode::Server, ..options("relayed", &[]) };
    let relay = Mesh::start(offering, nothing()).await.unwrap();
    let serve = Memory::new(Manner::Honest, &model.all());
    let holder = Mesh::start(hidden("relayed", &[&relay]), serve).await.unwrap();
    holder.register_model(model.id, model.list()).unwrap();
    holder.publish(model.signed([7; 32])).unwrap();
    until("a reservation at the relay", &holder, |node| circuit(node).is_some()).await;
    assert_eq!(holder.reach().relays, [relay.peer_id()]);

    let reader = Mesh::start(hidden("relayed", &[&relay]), nothing()).await.unwrap();
    learn(&reader, model.id).await;
    let relayed = |node: &MeshHandle| {
        let peers = node.peers();
        let found = peers.iter().find(|peer| peer.id == holder.peer_id());
        found.is_some_and(|peer| peer.path == Path::Relayed { by: Some(relay.peer_id()) })
    };
    until("a circuit to the holder", &reader, relayed).await;
    let manifest = reader.fetch(whole(&model.manifest)).await.unwrap();
    assert_eq!(manifest.bytes(), &model.manifest);
    reader.register_model(model.id, model.list()).unwrap();
    let told = |node: &MeshHandle| {
        let peers = node.peers();
        peers.iter().any(|peer| peer.id == holder.peer_id() && peer.shards_held == 3)
    };
    until("its holdings", &reader, told).await;
    // Not even a small one, which the circuit could carry.
    for shard in &model.shards {
        let error = reader.fetch(whole(shard)).await.unwrap_err();
        assert_eq!(error.label(), "deadline", "{error}");
        assert!(error.to_string().contains("through a relay, which carries no shards"), "{error}");
    }
    let manifest_bytes = model.manifest.len() as u64;
    assert_eq!(reader.stats().counts.verified_bytes, manifest_bytes);
    assert!(holder.stats().counts.served_bytes < 2 * manifest_bytes, "the manifest, and a proof");
    assert_eq!(reader.peers().iter().filter(|peer| peer.score < 0.5).count(), 0, "nobody's fault");

    // A peer that asks anyway is told why not.
    let (swarm, mut events) = SwarmHandle::spawn(Options {
        bootstrap: circuit(&holder).into_iter().collect(),
        protocol_version: PROTOCOL_VERSION.into(),
        relay: RelayMode::Client,
        ..Options::new(rand::random())
    })
    .await
    .unwrap();
    let met = events.peers.wait_for(|peers| peers.contains_key(&holder.peer_id()));
    tokio::time::timeout(PATIENCE, met).await.expect("a circuit").unwrap();
    let mut stream = swarm.open_stream(holder.peer_id(), SHARD_PROTOCOL).await.unwrap();
    assert!(stream.is_relayed());
    for (object, may) in [(&model.shards[1], false), (&model.manifest, true)] {
        let request = ShardRequest {
            shard: ShardId::of(object),
            range: range(0, object.len() as u64),
            priority: Priority::Token,
        };
        stream.write_all(&request.encode()).await.unwrap();
        stream.flush().await.unwrap();
        let length = tokio::time::timeout(PATIENCE, stream.read_u16()).await.unwrap().unwrap();
        let mut frame = vec![0; usize::from(length)];
        stream.read_exact(&mut frame).await.unwrap();
        match ShardReply::decode(&frame).unwrap() {
            ShardReply::Ok { object_size, .. } => assert!(may && object_size == manifest_bytes),
            reply => assert_eq!((may, reply), (false, ShardReply::Relayed)),
        }
    }
    swarm.shutdown().await;
}
