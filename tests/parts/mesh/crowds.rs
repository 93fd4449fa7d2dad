//! A crowd's topics of models over real sockets: a node joins the topic of what it holds, speaks there, and
//! hears those that share the model. One peer pretends that the swarm is large.

use doppler_mesh::core::{TOPIC_PREFIX, model_topic};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn in_a_crowd_holdings_are_told_on_the_models_own_topic() {
    let model = Model::random(&[40_000]);
    let shard = ShardId::of(&model.shards[0]);
    let objects = [model.manifest.clone(), model.shards[0].clone()];
    let holder = node("crowd", &[], Memory::new(Manner::Honest, &objects)).await;
    holder.register_model(model.id, model.list()).unwrap();
    let topic = topic("crowd").unwrap();
    let near = model_topic(&topic, model.id);
    let (swarm, mut events) = SwarmHandle::spawn(Options {
        bootstrap: holder.listen_addrs(),
        agent: "crowd/1".into(),
        protocol_version: PROTOCOL_VERSION.into(),
        topics: vec![topic.clone()],
        topic_prefix: Some(TOPIC_PREFIX.into()),
        ..Options::new(rand::random())
    })
    .await
    .unwrap();
    // Whoever speaks every 200 s is one of two thousand.
    let next = Duration::from_secs(200);
    let heartbeat = Envelope::Heartbeat { stamp: Stamp { epoch: 1, sequence: 1 }, next };
    swarm.publish(&topic, heartbeat.encode()).unwrap();
    let joined =
        |peers: &doppler_swarm::Peers| peers.values().any(|peer| peer.topics.contains(&near));
    let joined = events.peers.wait_for(joined);
    tokio::time::timeout(PATIENCE, joined).await.expect("joined").unwrap();
    swarm.join(&near).unwrap();
    let said = async {
        loop {
            let message = events.messages.recv().await.unwrap();
            swarm.judge(&message, true).unwrap();
            if message.topic == near {
                return Envelope::decode(&message.data).unwrap();
            }
        }
    };
    let said = tokio::time::timeout(PATIENCE, said).await.expect("a word on the model's topic");
    let Envelope::Holdings(said) = said else { panic!("{said:?}") };
    assert_eq!(said.peer, holder.peer_id().to_bytes());
    assert_eq!(said.models.len(), 1);
    assert_eq!((said.models[0].model, said.models[0].objects.as_slice()), (model.id, &[1][..]));
    // And it hears what others hold.
    let entry = ModelHoldings { objects: vec![1], ..ModelHoldings::nothing(model.id) };
    let holdings = Holdings {
        peer: swarm.peer().to_bytes(),
        stamp: Stamp { epoch: 1, sequence: 2 },
        lease: Duration::from_secs(60),
        next: Duration::from_secs(10),
        room: 0,
        is_leaving: false,
        addresses: Vec::new(),
        models: vec![entry],
        run: 1,
    };
    swarm.tell(&near, Envelope::Holdings(holdings).encode()).unwrap();
    until("the other holder", &holder, |node| !node.holders(shard).is_empty()).await;
}
