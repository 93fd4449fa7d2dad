//! What nodes know of models: many from one peer, withdrawn ones, kept ones.

use super::*;

fn numbered(index: u8) -> Model {
    let objects = vec![ShardId::of(&[index, 1])];
    Model { id: ModelId::of(&[index, 0]), objects, size: MIB }
}

/// Everything of these models is at the node, which has published them.
fn publish(world: &mut World, node: usize, models: &[Model]) {
    for model in models {
        store(world, node, model);
        world.tell(node, Event::Publish(model.signed()));
    }
}

fn store(world: &mut World, node: usize, model: &Model) {
    let mut all = model.objects.clone();
    all.push(model.id.manifest());
    world.hold(node, model, &all);
}

fn known(world: &World, node: usize) -> Vec<ModelId> {
    world.nodes[node].core.announced().into_iter().map(|signed| signed.model).collect()
}

#[test]
fn all_models_of_one_peer_are_learned_and_can_be_reached() {
    let mut world = World::new(Instant::now(), &[50e6, 50e6]);
    let models: Vec<Model> = (0..200).map(numbered).collect();
    publish(&mut world, 0, &models);
    world.run_for(Duration::from_secs(20));
    assert_eq!(known(&world, 1).len(), 200);
    for model in &models {
        world.register(1, model);
    }
    // As long as it is there, later announcements push out nothing.
    for _ in 0..10 {
        world.run_for(Duration::from_secs(7));
        let core = &world.nodes[1].core;
        assert!(core.models(world.now).iter().all(|(_, holders)| *holders == 1));
        for model in &models {
            assert_eq!(core.holders(world.now, model.objects[0]).ready.len(), 1);
        }
    }
    assert_eq!(world.nodes[1].core.counts().ignored_messages, 0, "its pace was heeded");
}

#[test]
fn a_model_that_was_withdrawn_is_forgotten_by_all() {
    let mut world = World::new(Instant::now(), &[50e6, 50e6]);
    let model = numbered(1);
    publish(&mut world, 0, std::slice::from_ref(&model));
    world.run_for(Duration::from_secs(5));
    assert_eq!(known(&world, 1), [model.id]);
    // The other one has read the manifest, as nodes do, and nothing else.
    world.register(1, &model);
    world.tell(1, Event::Whole([model.id.manifest()].into()));
    world.run_for(Duration::from_secs(60));
    assert_eq!(known(&world, 1), [model.id], "it is still published");
    world.tell(0, Event::Whole(BTreeSet::new()));
    world.tell(0, Event::Release { model: model.id, own: true });
    assert_eq!(known(&world, 0), [], "at once");
    world.run_for(Duration::from_secs(45));
    assert_eq!(known(&world, 1), []);
    world.run_for(Duration::from_secs(60));
    assert_eq!((known(&world, 0), known(&world, 1)), (vec![], vec![]), "and not told back");
    // It can be published again.
    publish(&mut world, 0, std::slice::from_ref(&model));
    world.run_for(Duration::from_secs(2));
    assert_eq!(known(&world, 1), [model.id]);
}

#[test]
fn what_is_kept_is_told_on_when_its_publisher_has_gone() {
    let mut world = World::new(Instant::now(), &[50e6, 50e6, 50e6]);
    let model = numbered(1);
    for other in 0..2 {
        world.disconnect(other, 2);
    }
    publish(&mut world, 0, std::slice::from_ref(&model));
    world.run_for(Duration::from_secs(2));
    store(&mut world, 1, &model);
    world.tell(1, Event::Keep(model.signed()));
    world.run_for(Duration::from_secs(2));
    // The publisher leaves, and no node is there for a long time.
    world.disconnect(0, 1);
    world.run_for(Duration::from_secs(600));
    assert_eq!(known(&world, 1), [model.id]);
    world.connect(1, 2);
    world.run_for(Duration::from_secs(2));
    assert_eq!(known(&world, 2), [model.id]);
    world.register(2, &model);
    world.read(2, 1, model.objects[0], model.size);
    assert_eq!(world.run_read(2, 1), Ok(()));
    // Once it has stopped keeping the model and nothing of it is left, the model is gone
    // everywhere.
    world.tell(1, Event::Whole([model.id.manifest()].into()));
    world.tell(1, Event::Release { model: model.id, own: false });
    world.run_for(Duration::from_secs(60));
    assert_eq!((known(&world, 1), known(&world, 2)), (vec![], vec![]));
}

#[test]
fn a_shared_tokenizer_does_not_keep_a_withdrawn_model_alive() {
    let mut world = World::new(Instant::now(), &[50e6, 50e6]);
    let (mut first, mut second) = (numbered(1), numbered(2));
    let tokenizer = ShardId::of(b"tokenizer");
    for model in [&mut first, &mut second] {
        model.objects.push(tokenizer);
    }
    publish(&mut world, 0, &[first, second]);
    let (mut first, mut second) = (numbered(1), numbered(2));
    for model in [&mut first, &mut second] {
        model.objects.push(tokenizer);
    }
    world.run_for(Duration::from_secs(2));
    // The other node has read both manifests and keeps the second model.
    world.register(1, &first);
    store(&mut world, 1, &second);
    world.tell(1, Event::Keep(second.signed()));
    let mut here = BTreeSet::from([first.id.manifest(), second.id.manifest()]);
    here.extend(&second.objects);
    world.tell(1, Event::Whole(here));
    world.run_for(Duration::from_secs(60));
    assert_eq!(known(&world, 1).len(), 2);
    // The tokenizer is found there, whichever model it is for.
    let holders = world.nodes[0].core.holders(world.now, tokenizer);
    assert_eq!(holders.ready.len(), 1);
    let mut left = BTreeSet::from([second.id.manifest()]);
    left.extend(&second.objects);
    world.tell(0, Event::Whole(left));
    world.tell(0, Event::Release { model: first.id, own: true });
    world.run_for(Duration::from_secs(60));
    assert_eq!((known(&world, 0), known(&world, 1)), (vec![second.id], vec![second.id]));
}
