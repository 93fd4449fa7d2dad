//! What peers say, in virtual time.

use super::*;
use crate::wire::PartHoldings;

const LEASE: Duration = Duration::from_secs(30);

fn peer(byte: u8) -> PeerId {
    PeerId::from_seed([byte; 32])
}

fn stamp(sequence: u64) -> Stamp {
    Stamp { epoch: 1, sequence }
}

fn says(sequence: u64, model: ModelId, manifest: bool, objects: &[u8]) -> Holdings {
    Holdings {
        peer: Vec::new(),
        stamp: stamp(sequence),
        lease: LEASE,
        next: Duration::ZERO,
        room: 0,
        is_leaving: false,
        addresses: Vec::new(),
        models: vec![ModelHoldings {
            model,
            manifest,
            objects: objects.to_vec(),
            parts: Vec::new(),
            helps: false,
            hot: Vec::new(),
            pins: false,
        }],
        run: 0,
    }
}

fn register(members: &mut Membership, model: ModelId, objects: Vec<ShardId>) {
    members.register(model, objects, |_| false).unwrap();
}

fn whole(members: &Membership, now: Instant, shard: ShardId) -> Vec<PeerId> {
    let holders = members.holders(now, shard).into_iter();
    holders.filter(|(_, chunks)| *chunks == Chunks::ALL).map(|(peer, _)| peer).collect()
}

fn heat_of(members: &Membership, now: Instant, shard: ShardId) -> usize {
    let heat = |(model, bit): &(ModelId, usize)| {
        members.entries_of(now, *model).filter(|(_, held)| held.is_hot(*bit)).count()
    };
    members.places(shard).iter().map(heat).max().unwrap_or(0)
}

fn is_pinned_by(members: &Membership, now: Instant, shard: ShardId, by: &[PeerId]) -> bool {
    let pins = |model, has: &dyn Fn(&Held) -> bool| {
        let mut entries = members.entries_of(now, model);
        entries.any(|(peer, held)| by.contains(&peer) && held.pins() && has(held))
    };
    pins(ModelId::from(*shard.as_bytes()), &Held::has_manifest)
        || members.places(shard).iter().any(|(model, bit)| pins(*model, &|h| h.has_whole(*bit)))
}

#[test]
fn parts_of_objects_are_told_apart_from_whole_ones() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let objects: Vec<ShardId> = (0..3u8).map(|i| ShardId::of(&[i])).collect();
    let mut members = Membership::default();
    register(&mut members, model, objects.clone());
    let mut part = says(1, model, false, &[0b1]);
    part.models[0].parts = [(1, 0b101), (2, 0)]
        .map(|(object, chunks)| PartHoldings { object, chunks: Chunks(chunks) })
        .to_vec();
    assert_eq!(members.hear(now, peer(1), part.clone()), Heard::Changed);
    assert_eq!(members.holders(now, objects[0]), [(peer(1), Chunks::ALL)]);
    assert_eq!(members.holders(now, objects[1]), [(peer(1), Chunks(0b101))]);
    assert_eq!(members.holders(now, objects[2]), [], "no chunk at all");
    part.stamp = stamp(2);
    assert_eq!(members.hear(now, peer(1), part.clone()), Heard::Renewed);
    members.retract(peer(1), objects[1]);
    assert_eq!(members.holders(now, objects[1]), []);
    // Many parts push out what ends first, and never add up to more than the bound.
    for sequence in 3..20u64 {
        let model = ModelId::of(&sequence.to_le_bytes());
        let mut many = says(sequence, model, false, &[]);
        let part = |object| PartHoldings { object, chunks: Chunks::ALL };
        many.models[0].parts = (0..500).map(part).collect();
        members.hear(now + Duration::from_millis(sequence), peer(1), many);
    }
    let parts: usize =
        members.members[&peer(1)].models.values().map(|entry| entry.held.parts.len()).sum();
    assert_eq!(parts, 1000);
    assert!(parts <= MEMBER_PARTS_MAX);
}

#[test]
fn an_object_is_as_hot_as_there_are_peers_that_keep_reading_it() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let objects: Vec<ShardId> = (0..3u8).map(|i| ShardId::of(&[i])).collect();
    let mut members = Membership::default();
    register(&mut members, model, objects.clone());
    for (index, hot) in [vec![0, 1], vec![1, 1], vec![7]].into_iter().enumerate() {
        let mut said = says(1, model, true, &[]);
        said.models[0].hot = hot;
        members.hear(now, peer(index as u8 + 1), said);
    }
    let heat = |now| objects.iter().map(|id| heat_of(&members, now, *id)).collect::<Vec<_>>();
    assert_eq!(heat(now), [1, 2, 0]);
    assert_eq!(heat(now + LEASE), [0, 0, 0]);
    assert_eq!(
        (members.place(model, objects[2]), members.place(model, model.manifest())),
        (Some(2), None)
    );
}

#[test]
fn bitmaps_mean_something_once_the_list_is_registered() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let objects: Vec<ShardId> = (0..10u8).map(|i| ShardId::of(&[i])).collect();
    let mut members = Membership::default();
    assert_eq!(members.hear(now, peer(1), says(1, model, true, &[1, 2])), Heard::Changed);
    assert_eq!(whole(&members, now, objects[0]), []);
    assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
    register(&mut members, model, objects.clone());
    assert_eq!(whole(&members, now, objects[0]), [peer(1)]);
    assert_eq!(whole(&members, now, objects[9]), [peer(1)]);
    assert_eq!(whole(&members, now, objects[1]), []);
    assert_eq!(members.held_by(now, peer(1)), 3);
    assert_eq!(members.holders_of_model(now, model).collect::<Vec<_>>(), [peer(1)]);
    // A shorter list leaves no trace of the longer one.
    register(&mut members, model, objects[..1].to_vec());
    assert_eq!(whole(&members, now, objects[9]), []);
}

#[test]
fn leases_end_and_renewals_and_stale_messages_are_told_apart() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let shard = ShardId::of(b"s");
    let mut members = Membership::default();
    register(&mut members, model, vec![shard]);
    members.hear(now, peer(1), says(5, model, false, &[1]));
    assert_eq!(members.hear(now, peer(1), says(5, model, false, &[0])), Heard::Stale);
    let half = now + LEASE / 2;
    assert_eq!(members.hear(half, peer(1), says(6, model, false, &[1])), Heard::Renewed);
    assert_eq!(whole(&members, half + LEASE - Duration::from_millis(1), shard), [peer(1)]);
    assert_eq!(whole(&members, half + LEASE, shard), [], "at the end of its lease");
    assert!(!members.expire(half + LEASE / 2));
    assert!(members.expire(half + LEASE));
    assert_eq!(members.peers().count(), 0);
    // Whoever is forgotten begins anew.
    assert_eq!(members.hear(half + LEASE, peer(1), says(1, model, false, &[1])), Heard::Changed);
}

#[test]
fn what_a_forgotten_peer_said_before_is_not_news() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let mut members = Membership::default();
    members.hear(now, peer(1), says(5, model, false, &[1]));
    let is_repeated =
        |members: &Membership, at, of, sequence| members.is_repeated(at, peer(of), stamp(sequence));
    assert!(!is_repeated(&members, now, 1, 5), "while its lease runs it is merely stale");
    let later = now + LEASE;
    assert!(members.expire(later));
    assert!(is_repeated(&members, later, 1, 5) && is_repeated(&members, later, 1, 4));
    assert!(!is_repeated(&members, later, 1, 6) && !is_repeated(&members, later, 2, 1));
    let restarted = Stamp { epoch: 2, sequence: 1 };
    assert!(!members.is_repeated(later, peer(1), restarted), "it runs again");
    assert!(!is_repeated(&members, later + FORGOTTEN_FOR, 1, 5));
    members.expire(later + FORGOTTEN_FOR);
    assert!(members.forgotten.is_empty());
}

#[test]
fn a_later_run_wins_over_an_earlier_one_and_never_the_other_way_round() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let shard = ShardId::of(b"s");
    let mut members = Membership::default();
    register(&mut members, model, vec![shard]);
    members.hear(now, peer(1), says(1_000_000, model, false, &[1]));
    let restarted = Stamp { epoch: 2, sequence: 1 };
    let empty = Holdings { stamp: restarted, ..says(1, model, false, &[]) };
    assert_eq!(members.hear(now, peer(1), empty), Heard::Changed);
    assert_eq!(whole(&members, now, shard), []);
    // Whatever the earlier run said is older, however late it comes.
    let replay = says(1_000_001, model, false, &[1]);
    assert_eq!(members.hear(now, peer(1), replay), Heard::Stale);
    assert!(!members.beat(now, peer(1), stamp(2_000_000), Duration::ZERO));
    assert!(!members.part(now, peer(1), stamp(2_000_000)) && members.knows(peer(1)));
    assert_eq!(whole(&members, now, shard), []);
}

#[test]
fn who_says_goodbye_is_forgotten_at_once_and_back_with_a_later_run() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let shard = ShardId::of(b"s");
    let mut members = Membership::default();
    register(&mut members, model, vec![shard]);
    members.hear(now, peer(1), says(1, model, true, &[1]));
    assert!(members.part(now, peer(1), stamp(2)));
    assert_eq!((whole(&members, now, shard), members.entries().0), (vec![], 0));
    assert!(members.by_model.is_empty() && !members.knows(peer(1)));
    assert!(!members.part(now, peer(1), stamp(2)), "once");
    assert!(members.is_repeated(now, peer(1), stamp(1)), "its last holdings come late");
    // A goodbye that overtakes everything else of its run counts, too.
    assert!(!members.part(now, peer(2), stamp(7)));
    assert!(members.is_repeated(now, peer(2), stamp(6)));
    let back = Holdings { stamp: Stamp { epoch: 2, sequence: 1 }, ..says(1, model, true, &[1]) };
    assert!(!members.is_repeated(now, peer(1), back.stamp));
    members.hear(now, peer(1), back);
    assert_eq!(whole(&members, now, shard), [peer(1)]);
}

#[test]
fn a_promised_word_is_waited_for_and_none_that_was_not() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let (next, grace) = (Duration::from_secs(4), Duration::from_secs(1));
    let mut members = Membership::default();
    members.hear(now, peer(1), Holdings { next, ..says(1, model, true, &[]) });
    members.hear(now, peer(2), says(1, model, true, &[]));
    let late = now + next + grace;
    assert_eq!(members.overdue(late - Duration::from_millis(1), now, grace), []);
    assert_eq!(members.overdue(late, now, grace), [peer(1)]);
    assert_eq!(members.overdue(late, now + grace, grace), [], "this node was not awake");
    assert!(members.beat(late, peer(1), stamp(2), next));
    assert_eq!(members.overdue(late, now, grace), []);
    assert!(!members.beat(late, peer(3), stamp(1), next), "nothing is known of it");
    assert_eq!((members.told(peer(1)), members.heard(peer(1))), (Some(now), Some(late)));
}

#[test]
fn a_denied_object_is_not_reported_until_the_next_message() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let shard = ShardId::of(b"s");
    let mut members = Membership::default();
    register(&mut members, model, vec![shard, shard]);
    members.hear(now, peer(1), says(1, model, true, &[0b11]));
    members.retract(peer(1), shard);
    members.retract(peer(2), shard);
    assert_eq!(whole(&members, now, shard), []);
    assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
    members.retract(peer(1), model.manifest());
    assert_eq!(whole(&members, now, model.manifest()), []);
    members.hear(now, peer(1), says(2, model, true, &[0b11]));
    assert_eq!(whole(&members, now, shard), [peer(1)]);
}

#[test]
fn a_manifest_alone_makes_no_holder_of_the_model() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let mut members = Membership::default();
    members.hear(now, peer(1), says(1, model, true, &[0, 0]));
    assert_eq!(members.holders_of_model(now, model).count(), 0);
    members.hear(now, peer(1), says(2, model, true, &[0, 1]));
    assert_eq!(members.holders_of_model(now, model).collect::<Vec<_>>(), [peer(1)]);
    assert!(members.holds_of(now, model, peer(1)) && !members.holds_of(now, model, peer(2)));
    assert_eq!(members.holders_of_model(now + LEASE, model).count(), 0, "its lease has ended");
    members.hear(now, peer(1), says(3, model, true, &[]));
    assert_eq!(members.holders_of_model(now, model).count(), 0, "it was removed");
}

#[test]
fn what_other_models_have_too_makes_no_holder_unless_it_is_all() {
    let (now, model, other) = (Instant::now(), ModelId::of(b"m"), ModelId::of(b"n"));
    let [own, shared] = [ShardId::of(b"weights"), ShardId::of(b"tokenizer")];
    let mut members = Membership::default();
    members.hear(now, peer(1), says(1, model, true, &[0b10]));
    members.hear(now, peer(2), says(1, model, true, &[0b01]));
    let holders = |members: &Membership| members.holders_of_model(now, model).collect::<Vec<_>>();
    // In the order of their ids.
    let both = [peer(2), peer(1)];
    register(&mut members, model, vec![own, shared]);
    assert_eq!(holders(&members), both);
    register(&mut members, other, vec![shared]);
    assert_eq!(holders(&members), [peer(2)]);
    assert_eq!(whole(&members, now, shared), [peer(1)], "it is found all the same");
    // The same weights under another name.
    register(&mut members, other, vec![own, shared]);
    assert_eq!(holders(&members), []);
    members.hear(now, peer(2), says(2, model, true, &[0b11]));
    assert_eq!(holders(&members), [peer(2)]);
    members.unregister(other);
    assert_eq!(holders(&members), both);
}

#[test]
fn who_helps_with_a_model_is_known_while_its_lease_runs() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let mut members = Membership::default();
    let mut helps = says(1, model, false, &[]);
    helps.models[0].helps = true;
    members.hear(now, peer(1), helps.clone());
    members.hear(now, peer(2), says(1, model, true, &[1]));
    assert_eq!(members.helpers(now, model), BTreeSet::from([peer(1)]));
    assert_eq!(members.helpers(now, ModelId::of(b"n")), BTreeSet::new());
    assert_eq!(members.helpers(now + LEASE, model), BTreeSet::new());
    (helps.stamp, helps.models[0].helps) = (stamp(2), false);
    assert_eq!(members.hear(now, peer(1), helps), Heard::Changed);
    assert_eq!(members.helpers(now, model), BTreeSet::new());
}

#[test]
fn all_of_a_peers_models_are_believed() {
    let now = Instant::now();
    let mut members = Membership::default();
    let models: Vec<ModelId> = (0..300u16).map(|i| ModelId::of(&i.to_le_bytes())).collect();
    for (sequence, model) in models.iter().enumerate() {
        members.hear(now, peer(1), says(sequence as u64 + 1, *model, true, &[1]));
    }
    for model in models {
        assert_eq!(members.holders_of_model(now, model).count(), 1);
        assert_eq!(whole(&members, now, model.manifest()), [peer(1)]);
    }
}

#[test]
fn memory_is_bounded() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let mut members = Membership::default();
    let too_many = vec![ShardId::of(b"s"); BITMAP_BYTES_MAX * 8 + 1];
    assert!(members.register(model, too_many, |_| true).is_err());
    let number = |number: u64| ModelId::of(&number.to_le_bytes());
    for sequence in 1..=MEMBER_MODELS_MAX as u64 + 100 {
        let later = now + Duration::from_millis(sequence);
        members.hear(later, peer(1), says(sequence, number(sequence), true, &[]));
    }
    assert_eq!(members.held_by(now, peer(1)), MEMBER_MODELS_MAX as u64);
    // Over all peers: the peer that names the most loses the most.
    for other in 2..=40 {
        for sequence in 1..=900 {
            members.hear(now, peer(other), says(sequence, number(sequence), true, &[1]));
        }
    }
    members.hear(now, peer(99), says(1, model, true, &[1]));
    assert_eq!(members.holders_of_model(now, model).count(), 1);
    let count = |members: &Membership| -> usize {
        members.members.values().map(|member| member.models.len()).sum()
    };
    let linked = |members: &Membership| members.by_model.values().map(BTreeSet::len).sum::<usize>();
    assert_eq!(
        (count(&members), members.entries, linked(&members)),
        (HOLDINGS_MAX, HOLDINGS_MAX, HOLDINGS_MAX)
    );
    assert!(members.expire(now + LEASE * 2));
    assert_eq!((count(&members), members.entries, linked(&members)), (0, 0, 0));

    for index in 0..MODELS_MAX {
        register(&mut members, ModelId::of(&index.to_le_bytes()), Vec::new());
    }
    let more = ModelId::of(b"one more");
    assert!(members.register(more, Vec::new(), |_| false).is_err());
    // An own or kept model has room, and takes none from others.
    members.register(more, vec![ShardId::of(b"s")], |model| model == more).unwrap();
    assert!(members.lists.contains_key(&more));
    members.unregister(more);
    assert!(!members.lists.contains_key(&more) && members.places.is_empty());
}

#[test]
fn of_a_crowd_those_stay_that_share_a_model() {
    let (start, ours) = (Instant::now(), ModelId::of(b"ours"));
    let peer = |number: u32| {
        let mut seed = [7; 32];
        seed[..4].copy_from_slice(&number.to_le_bytes());
        PeerId::from_seed(seed)
    };
    let lease = Duration::from_secs(3000);
    let theirs = ModelId::of(b"theirs");
    let says = |model| Holdings { lease, ..says(1, model, true, &[1]) };
    let mut members = Membership::default();
    register(&mut members, ours, vec![ShardId::of(b"s")]);
    for number in 0..2000 {
        let model = if number % 20 == 0 { ours } else { theirs };
        let now = start + Duration::from_secs(u64::from(number));
        members.hear(now, peer(number), says(model));
        assert!(members.len() <= MEMBERS_MAX);
    }
    let now = start + Duration::from_secs(2000);
    assert_eq!(members.holders_of_model(now, ours).count(), 100, "all of them");
    assert_eq!(members.len(), MEMBERS_MAX);
    // The others are a sample that changes, not whoever came first.
    assert!((0..20).all(|early| early % 20 == 0 || !members.knows(peer(early))));
    let count: usize = members.members.values().map(|member| member.models.len()).sum();
    assert_eq!(count, members.entries);
    // If all share a model, nobody gives way.
    for number in 2000..3000 {
        members.hear(now, peer(number), says(ours));
    }
    assert_eq!(members.hear(now, peer(3001), says(ours)), Heard::Full);
}

#[test]
fn bitmaps_are_as_short_as_they_can_be() {
    assert_eq!(bitmap(20, |bit| bit == 9), [0, 2]);
    assert_eq!(bitmap(20, |_| false), [] as [u8; 0]);
    let map = bitmap(20, |bit| bit % 3 == 0);
    assert!((0..20).all(|bit| has_bit(&map, bit) == (bit % 3 == 0)) && !has_bit(&map, 1000));
}

#[test]
fn an_object_is_pinned_where_all_that_is_held_of_its_model_is() {
    let (now, model) = (Instant::now(), ModelId::of(b"m"));
    let objects = [ShardId::of(b"a"), ShardId::of(b"b")];
    let mut members = Membership::default();
    register(&mut members, model, objects.to_vec());
    let mut pins = says(1, model, true, &[0b01]);
    pins.models[0].pins = true;
    members.hear(now, peer(1), pins);
    members.hear(now, peer(2), says(1, model, true, &[0b11]));
    let is_pinned = |at, shard, by: &[PeerId]| is_pinned_by(&members, at, shard, by);
    assert!(is_pinned(now, objects[0], &[peer(1), peer(2)]));
    assert!(is_pinned(now, model.manifest(), &[peer(1)]));
    assert!(!is_pinned(now, objects[1], &[peer(1), peer(2)]), "only cached");
    assert!(!is_pinned(now, objects[0], &[peer(2)]), "by somebody who does not count");
    assert!(!is_pinned(now + LEASE, objects[0], &[peer(1)]));
}
