//! Nodes that see the same swarm, in virtual time.

use std::sync::LazyLock;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const SIZE: u64 = 10;

/// Made once: a key takes longer than a look at the swarm.
static PEERS: LazyLock<Vec<PeerId>> =
    LazyLock::new(|| (1..=10).map(|byte| PeerId::from_seed([byte; 32])).collect());

fn peer(index: usize) -> PeerId {
    PEERS[index]
}

fn shard(index: u32) -> ShardId {
    ShardId::of(&index.to_le_bytes())
}

fn healer(index: usize, budget: u64) -> Healing {
    Healing::new(peer(index), HealOptions { budget, rate: None })
}

/// Which nodes hold what. Those that have left are not holders.
struct Swarm {
    now: Instant,
    live: Vec<usize>,
    room: u64,
    holders: BTreeMap<ShardId, Vec<usize>>,
    /// How many peers keep reading an object.
    heat: BTreeMap<ShardId, usize>,
    replicas: Replicas,
    /// Holders that are leaving, and the volunteers that copy anything of this.
    leaving: BTreeMap<ShardId, usize>,
    helpers: Option<Arc<BTreeSet<PeerId>>>,
    is_busy: bool,
}

impl Swarm {
    fn new(nodes: usize, min: usize, max: usize) -> Self {
        Self {
            now: Instant::now(),
            live: (0..nodes).collect(),
            room: 1000 * SIZE,
            holders: BTreeMap::new(),
            heat: BTreeMap::new(),
            replicas: Replicas { min, max },
            leaving: BTreeMap::new(),
            helpers: None,
            is_busy: false,
        }
    }

    /// The objects as a node sees them. All copies except node 0's are replicas.
    fn kept(&self, own: usize) -> Vec<Kept> {
        let kept = |(shard, all): (&ShardId, &Vec<usize>)| {
            let live = all.iter().filter(|node| self.live.contains(node) && **node != own);
            let is_here = all.contains(&own);
            Kept {
                shard: *shard,
                size: SIZE,
                replicas: self.replicas,
                holders: live.map(|node| peer(*node)).collect(),
                leaving: self.leaving.get(shard).copied().unwrap_or(0),
                helpers: self.helpers.clone(),
                heat: self.heat.get(shard).copied().unwrap_or(0),
                is_pinned_elsewhere: false,
                is_here,
                is_replica: is_here && own != 0,
            }
        };
        self.holders.iter().map(kept).collect()
    }

    fn look(&self, own: usize, healing: &mut Healing) -> Vec<HealAction> {
        let objects = self.kept(own);
        let others = self.live.iter().filter(|node| **node != own);
        let volunteers: Vec<(PeerId, u64)> = others.map(|node| (peer(*node), self.room)).collect();
        let (objects, volunteers) = (&objects[..], &volunteers[..]);
        let is_busy = self.is_busy;
        let view = HealView { objects, volunteers, is_busy, is_leaving: false };
        healing.look(self.now, &view)
    }

    /// Lets all live nodes look once a second for `seconds`. Returns which began to copy what.
    fn run(&mut self, healers: &mut [Healing], seconds: u64) -> Vec<(usize, HealAction)> {
        let mut all = Vec::new();
        for _ in 0..seconds {
            self.now += SECOND;
            for node in self.live.clone() {
                let actions = self.look(node, &mut healers[node]);
                all.extend(actions.into_iter().map(|action| (node, action)));
            }
        }
        all
    }

    /// The copies that were begun arrive.
    fn done(&mut self, healers: &mut [Healing], actions: &[(usize, HealAction)]) {
        for (node, action) in actions {
            match action {
                HealAction::Copy { shard, .. } => {
                    healers[*node].copied(*shard);
                    self.holders.entry(*shard).or_default().push(*node);
                }
                HealAction::Drop(shard) => {
                    self.holders.entry(*shard).or_default().retain(|other| other != node);
                }
                HealAction::Stop(_) => {}
            }
        }
    }
}

#[test]
fn nodes_agree_without_a_leader_on_who_copies() {
    let mut swarm = Swarm::new(10, 3, 4);
    let mut healers: Vec<Healing> = (0..10).map(|node| healer(node, 1000)).collect();
    swarm.holders.insert(shard(1), vec![0]);
    assert_eq!(swarm.run(&mut healers, HEAL_CONFIRM.as_secs()), [], "not at once");
    let begun = swarm.run(&mut healers, 10);
    assert_eq!(begun.len(), 2, "as many as are missing: {begun:?}");
    swarm.done(&mut healers, &begun);
    assert_eq!(swarm.run(&mut healers, 300), [], "it is enough");
}

#[test]
fn a_cached_copy_goes_unless_nobody_better_has_one_and_a_replica_stays_for_longer() {
    for index in 0..30 {
        let copy = |own: usize, holders: usize, is_replica| Kept {
            shard: shard(index),
            size: SIZE,
            replicas: Replicas { min: 2, max: 4 },
            holders: (0..holders).filter(|other| *other != own).map(peer).collect(),
            leaving: 0,
            helpers: None,
            heat: 0,
            is_pinned_elsewhere: false,
            is_here: true,
            is_replica,
        };
        for holders in 1..6 {
            let stay = |is_replica| {
                let stays = |own: &usize| !copy(*own, holders, is_replica).may_go(peer(*own));
                (0..holders).filter(stays).count()
            };
            assert_eq!((stay(false), stay(true)), (1, holders.min(2)), "{holders} holders");
        }
        let pinned = Kept { is_pinned_elsewhere: true, ..copy(0, 2, false) };
        assert!(pinned.may_go(peer(0)), "beside one publisher, the cache keeps changing");
        assert!(!Kept { is_replica: true, ..pinned }.may_go(peer(0)));
    }
}

#[test]
fn the_only_holder_that_leaves_is_copied_from_and_what_nobody_has_is_not() {
    let mut swarm = Swarm::new(5, 2, 3);
    let mut healers: Vec<Healing> = (0..5).map(|node| healer(node, 1000)).collect();
    swarm.holders.insert(shard(1), vec![]);
    assert_eq!(swarm.run(&mut healers, 20), [], "nobody has it");
    assert!(healers.iter().all(|healer| !healer.is_pending()));
    swarm.leaving.insert(shard(1), 1);
    let begun = swarm.run(&mut healers, HEAL_PATIENCE.as_secs() - 3);
    assert_eq!(begun.len(), 2, "as many as it must have: {begun:?}");
}

#[test]
fn volunteers_that_do_not_copy_a_model_are_not_waited_for() {
    let mut swarm = Swarm::new(6, 3, 4);
    // Whoever is best placed, the two that help copy it at once.
    for index in 0..20 {
        swarm.holders.insert(shard(index), vec![0]);
    }
    swarm.helpers = Some(Arc::new([peer(1), peer(2)].into()));
    let mut healers: Vec<Healing> = (0..6).map(|node| healer(node, 1000)).collect();
    swarm.live = vec![0, 1, 2];
    let others: Vec<(PeerId, u64)> = (0..6).map(|node| (peer(node), 1000 * SIZE)).collect();
    let mut begun = 0;
    for _ in 0..15 {
        swarm.now += SECOND;
        for node in [1, 2] {
            let objects = swarm.kept(node);
            let mine = others.iter().filter(|(other, _)| *other != peer(node)).copied();
            let volunteers: Vec<_> = mine.collect();
            let (objects, volunteers) = (&objects[..], &volunteers[..]);
            let view = HealView { objects, volunteers, is_busy: false, is_leaving: false };
            let actions = healers[node].look(swarm.now, &view);
            begun += actions.len();
            let actions: Vec<_> = actions.into_iter().map(|action| (node, action)).collect();
            swarm.done(&mut healers, &actions);
        }
    }
    assert_eq!(begun, 40, "both copy everything, long before {HEAL_PATIENCE:?}");
}

#[test]
fn a_holder_that_is_back_in_time_costs_nothing() {
    let mut swarm = Swarm::new(5, 2, 3);
    let mut healers: Vec<Healing> = (0..5).map(|node| healer(node, 1000)).collect();
    swarm.holders.insert(shard(1), vec![0, 1]);
    for _ in 0..20 {
        swarm.live.retain(|node| *node != 1);
        assert_eq!(swarm.run(&mut healers, HEAL_CONFIRM.as_secs()), []);
        swarm.live.push(1);
        assert_eq!(swarm.run(&mut healers, 1), []);
    }
    // One that comes back later stops the copy.
    swarm.live.retain(|node| *node != 1);
    let begun = swarm.run(&mut healers, 10);
    let [(healer, HealAction::Copy { .. })] = begun[..] else { panic!("{begun:?}") };
    swarm.live.push(1);
    assert_eq!(swarm.run(&mut healers, 1), [(healer, HealAction::Stop(shard(1)))]);
}

#[test]
fn who_should_copy_and_does_not_is_replaced() {
    let mut swarm = Swarm::new(6, 2, 3);
    let mut healers: Vec<Healing> = (0..6).map(|node| healer(node, 1000)).collect();
    swarm.holders.insert(shard(1), vec![0]);
    let first = swarm.run(&mut healers, 10);
    assert_eq!(first.len(), 1);
    assert_eq!(swarm.run(&mut healers, HEAL_PATIENCE.as_secs() - 11), []);
    let second = swarm.run(&mut healers, 10);
    assert!(second.len() == 1 && second[0].0 != first[0].0, "{first:?} {second:?}");
    // One that fails tries again, but not at once.
    let healer = first[0].0;
    healers[healer].failed(swarm.now, shard(1));
    assert_eq!(swarm.run(&mut healers, HEAL_RETRY.as_secs() - 1), []);
    assert_eq!(swarm.run(&mut healers, 2), first);
}

#[test]
fn what_was_lost_at_once_is_spread_over_all_survivors() {
    let mut swarm = Swarm::new(10, 2, 3);
    let mut healers: Vec<Healing> = (0..10).map(|node| healer(node, 1_000_000)).collect();
    for index in 0..350 {
        swarm.holders.insert(shard(index), vec![0, 1 + index as usize % 9]);
    }
    swarm.live.retain(|node| *node > 3);
    for holders in swarm.holders.values_mut() {
        holders[0] = 4 + holders[1] % 3;
        holders.dedup();
    }
    let mut copies = vec![0; 10];
    for _ in 0..200 {
        let begun = swarm.run(&mut healers, 1);
        for (node, _) in begun.iter().filter(|(_, a)| matches!(a, HealAction::Copy { .. })) {
            copies[*node] += 1;
        }
        swarm.done(&mut healers, &begun);
    }
    let total: usize = copies.iter().sum();
    let lacking = swarm
        .holders
        .values()
        .filter(|holders| holders.iter().filter(|node| swarm.live.contains(node)).count() < 2);
    assert_eq!(lacking.count(), 0);
    let (least, most) = (copies[4..].iter().min().unwrap(), copies[4..].iter().max().unwrap());
    assert!(*least * 6 > total / 2 && *most * 6 < total * 2, "{copies:?}");
}

#[test]
fn the_budget_and_the_cap_are_kept() {
    let mut swarm = Swarm::new(2, 2, 2);
    for index in 0..20 {
        swarm.holders.insert(shard(index), vec![0]);
    }
    let mut healing = vec![healer(0, 0), healer(1, 7 * SIZE + 3)];
    let mut begun = Vec::new();
    for _ in 0..60 {
        let new = swarm.run(&mut healing, 1);
        assert!(new.len() <= HEAL_SMALL_AT_ONCE);
        swarm.done(&mut healing, &new);
        begun.extend(new);
    }
    assert_eq!((begun.len(), healing[1].room()), (7, 3));
    // A cap of half an object a second, and one at a time while a token waits.
    let options = HealOptions { budget: 1000, rate: Some(SIZE / 2) };
    let mut slow = Healing::new(peer(1), options);
    for index in 0..20 {
        swarm.holders.insert(shard(index), vec![0]);
    }
    let mut count = 0;
    for _ in 0..24 {
        swarm.now += SECOND;
        for action in swarm.look(1, &mut slow) {
            let HealAction::Copy { shard, .. } = action else { panic!() };
            slow.copied(shard);
            swarm.holders.get_mut(&shard).unwrap().push(1);
            count += 1;
        }
    }
    assert!((9..=11).contains(&count), "{count} in some 20 s");
    let mut busy = healer(1, 1000);
    swarm.is_busy = true;
    swarm.holders.values_mut().for_each(|holders| *holders = vec![0]);
    let begun: Vec<_> = (0..20)
        .flat_map(|_| {
            swarm.now += SECOND;
            swarm.look(1, &mut busy)
        })
        .collect();
    assert_eq!(begun.len(), 1);
}

#[test]
fn a_surplus_goes_slowly_and_never_the_last_copies() {
    let mut swarm = Swarm::new(8, 2, 3);
    let mut healers: Vec<Healing> = (0..8).map(|node| healer(node, 1000)).collect();
    for index in 0..50 {
        swarm.holders.insert(shard(index), (1..8).collect());
    }
    assert_eq!(swarm.run(&mut healers, HEAL_SURPLUS_AFTER.as_secs()), []);
    // All drop in the same second what each alone would drop; the maximum remains.
    let dropped = swarm.run(&mut healers, 3);
    swarm.done(&mut healers, &dropped);
    assert!(swarm.holders.values().all(|holders| holders.len() == 3), "{:?}", swarm.holders);
    assert_eq!(swarm.run(&mut healers, 200), []);
    // If all evict at once what they may, the minimum remains.
    for index in 0..50 {
        let stay = swarm.holders[&shard(index)].iter().filter(|node| {
            let kept = swarm.kept(**node);
            !kept.iter().find(|kept| kept.shard == shard(index)).unwrap().may_go(peer(**node))
        });
        assert_eq!(stay.count(), 2);
    }
}

#[test]
fn hot_objects_get_more_copies_up_to_the_maximum_and_keep_them_without_flapping() {
    let mut swarm = Swarm::new(8, 2, 4);
    let mut healers: Vec<Healing> = (0..8).map(|node| healer(node, 1000)).collect();
    for index in 0..6 {
        swarm.holders.insert(shard(index), vec![0, 1]);
    }
    swarm.heat = BTreeMap::from([(shard(1), 1), (shard(2), 50)]);
    assert_eq!(swarm.run(&mut healers, HEAL_HOT_AFTER.as_secs()), [], "it may pass");
    for _ in 0..10 {
        let begun = swarm.run(&mut healers, 1);
        swarm.done(&mut healers, &begun);
    }
    let copies = |swarm: &Swarm| -> Vec<usize> { swarm.holders.values().map(Vec::len).collect() };
    let of = |swarm: &Swarm, index| swarm.holders[&shard(index)].len();
    assert_eq!([0, 1, 2, 3, 4, 5].map(|index| of(&swarm, index)), [2, 3, 4, 2, 2, 2]);
    // The heat comes and goes, and moves; the copies stay.
    let before = copies(&swarm);
    for round in 0..100 {
        swarm.heat = match round % 3 {
            0 => BTreeMap::from([(shard(1), 1), (shard(2), 50)]),
            1 => BTreeMap::from([(shard(3), 2)]),
            _ => BTreeMap::new(),
        };
        assert_eq!(swarm.run(&mut healers, 15), [], "round {round}");
    }
    assert_eq!(copies(&swarm), before);
}

#[test]
fn what_is_hot_and_lacking_is_healed_with_no_copy_more_than_it_must_have() {
    let mut swarm = Swarm::new(7, 4, 5);
    let mut healers: Vec<Healing> = (0..7).map(|node| healer(node, 1000 * SIZE)).collect();
    swarm.holders = (0..20).map(|index| (shard(index), vec![index as usize % 7])).collect();
    swarm.heat = swarm.holders.keys().map(|shard| (*shard, 3)).collect();
    // Nobody hears of a copy before all have decided.
    let begun = swarm.run(&mut healers, 6);
    swarm.done(&mut healers, &begun);
    assert!(swarm.holders.values().all(|holders| holders.len() <= 4), "{:?}", swarm.holders);
    for _ in 0..12 {
        let begun = swarm.run(&mut healers, 1);
        swarm.done(&mut healers, &begun);
    }
    assert!(swarm.holders.values().all(|holders| holders.len() == 4), "{:?}", swarm.holders);
    for _ in 0..30 {
        let begun = swarm.run(&mut healers, 1);
        swarm.done(&mut healers, &begun);
    }
    assert!(swarm.holders.values().all(|holders| holders.len() == 5), "it has stayed hot");
}

#[test]
fn a_lack_drives_out_copies_that_only_heat_had_made_and_nothing_else() {
    let mut swarm = Swarm::new(3, 2, 3);
    swarm.room = 0;
    // Node 2 has room for three. Two are needed here; one was made because it was hot.
    let mut healing = vec![healer(0, 0), healer(1, 0), healer(2, 3 * SIZE)];
    let spare = (0..100).find(|index| {
        let kept = Kept {
            shard: shard(*index),
            size: SIZE,
            replicas: swarm.replicas,
            holders: vec![peer(0), peer(1)],
            leaving: 0,
            helpers: None,
            heat: 0,
            is_pinned_elsewhere: false,
            is_here: true,
            is_replica: true,
        };
        kept.may_go(peer(2))
    });
    let spare = shard(spare.unwrap());
    swarm.holders.insert(spare, vec![0, 1, 2]);
    for index in 200..202 {
        swarm.holders.insert(shard(index), vec![0, 2]);
    }
    assert_eq!(swarm.run(&mut healing, 30), [], "it is at rest");
    assert_eq!(healing[2].room(), SIZE, "which others may count on");
    // While it is hot, it is not offered.
    swarm.heat.insert(spare, 1);
    swarm.run(&mut healing, 1);
    assert_eq!(healing[2].room(), 0);
    swarm.heat.clear();
    // Another hot object does not drive it out, a lacking one does.
    swarm.heat.insert(shard(300), 1);
    swarm.holders.insert(shard(300), vec![0, 1]);
    assert_eq!(swarm.run(&mut healing, 60), []);
    swarm.holders.insert(shard(301), vec![0]);
    let begun = swarm.run(&mut healing, 10);
    let copy = HealAction::Copy { shard: shard(301), size: SIZE };
    assert_eq!(begun, [(2, HealAction::Drop(spare)), (2, copy)]);
}

#[test]
fn many_small_objects_are_copied_at_once() {
    let mut swarm = Swarm::new(2, 2, 2);
    for index in 0..40 {
        swarm.holders.insert(shard(index), vec![0]);
    }
    let mut healing = vec![healer(0, 0), healer(1, 1000)];
    assert_eq!(swarm.run(&mut healing, 10).len(), HEAL_SMALL_AT_ONCE);
}
