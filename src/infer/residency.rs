//! Which expert is in which slot: pure decisions, no bytes and no I/O.
//!
//! Invariants: a slot holds at most one expert. An expert that the wave being planned needs is
//! never evicted for another of the same wave. Everything that a layer asks for is served after
//! finitely many waves, because every class has at least one slot.
//!
//! A device that brings experts in by itself puts them into free slots. [`Residency::spare`] keeps
//! a few free, depending on how many experts tokens have missed recently. [`Residency::adopt`]
//! records how they were filled.

use std::collections::HashMap;

use super::backend::Slot;
use super::graph::MoeId;
use doppler_store::policy::Policy;

/// One expert of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertKey {
    pub moe: MoeId,
    pub expert: u32,
}

/// What one wave does. Every expert asked for is in exactly one of `hits`, `fills` and `waiting`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wave {
    /// Already resident.
    pub hits: Vec<(u32, Slot)>,
    /// To be filled now. They count as resident from here on (see [`Residency::forget`]).
    pub fills: Vec<(u32, Slot)>,
    /// The experts that lost their slots to these.
    pub evicted: Vec<ExpertKey>,
    /// Left for a later wave, because no slot was free.
    pub waiting: Vec<u32>,
}

/// The slots of one size class.
struct Class {
    free: Vec<u32>,
    slots: HashMap<ExpertKey, u32>,
    /// Costs are in slots: each expert costs 1.
    policy: Box<dyn Policy<ExpertKey>>,
    /// Experts that got a slot since slots were last spared, and how many a token is expected to
    /// need.
    entered: u32,
    expected: f32,
}

/// At most one in this many of a class's slots is kept free.
const SPARE_SHARE: usize = 8;

/// Slots kept free beyond the expected number of fills, in standard deviations of a Poisson
/// distribution.
const SPARE_DEVIATIONS: f32 = 1.5;

/// How fast the expectation follows observations.
const EXPECTED_GAIN: f32 = 0.25;

/// Slots and what they hold, over all classes.
pub struct Residency {
    classes: Vec<Class>,
    /// The class of each MoE layer.
    class_of: Vec<u16>,
}

impl Residency {
    /// `counts` is the number of slots of each class (at least 1); `policy` makes each class's
    /// eviction policy.
    pub fn new(
        counts: &[usize],
        class_of: Vec<u16>,
        mut policy: impl FnMut() -> Box<dyn Policy<ExpertKey>>,
    ) -> Self {
        let classes = counts.iter().map(|count| Class {
            free: (0..u32::try_from(*count).unwrap_or(u32::MAX)).rev().collect(),
            slots: HashMap::new(),
            policy: policy(),
            entered: 0,
            expected: 0.0,
        });
        Self { classes: classes.collect(), class_of }
    }

    /// The slot of a resident expert.
    pub fn slot(&self, key: ExpertKey) -> Option<Slot> {
        let class = self.class_of[usize::from(key.moe.0)];
        let index = *self.classes[usize::from(class)].slots.get(&key)?;
        Some(Slot { class, index })
    }

    /// Resident experts, over all classes.
    pub fn resident(&self) -> usize {
        self.classes.iter().map(|class| class.slots.len()).sum()
    }

    /// Plans slots for as many of `wanted` (distinct experts of one layer) as fit at once.
    pub fn wave(&mut self, moe: MoeId, wanted: &[u32]) -> Wave {
        let id = self.class_of[usize::from(moe.0)];
        let class = &mut self.classes[usize::from(id)];
        let mut wave = Wave::default();
        let mut missing = Vec::new();
        for expert in wanted {
            let key = ExpertKey { moe, expert: *expert };
            match class.slots.get(&key) {
                Some(index) => {
                    class.policy.touch(&key);
                    wave.hits.push((*expert, Slot { class: id, index: *index }));
                }
                None => missing.push(*expert),
            }
        }
        let needed = |key: &ExpertKey| key.moe == moe && wanted.contains(&key.expert);
        let mut missing = missing.into_iter();
        for expert in missing.by_ref() {
            let index = match class.free.pop() {
                Some(index) => Some(index),
                None => class.evict(&needed).map(|(victim, index)| {
                    wave.evicted.push(victim);
                    index
                }),
            };
            let Some(index) = index else {
                wave.waiting.push(expert);
                break; // this wave needs every slot
            };
            let key = ExpertKey { moe, expert };
            class.slots.insert(key, index);
            class.policy.insert(key, 1);
            class.entered += 1;
            wave.fills.push((expert, Slot { class: id, index }));
        }
        wave.waiting.extend(missing);
        wave
    }

    /// Marks experts of one layer as used where they are.
    pub fn touch(&mut self, moe: MoeId, used: &[u32]) {
        let class = &mut self.classes[usize::from(self.class_of[usize::from(moe.0)])];
        for expert in used {
            class.policy.touch(&ExpertKey { moe, expert: *expert });
        }
    }

    /// Call before a single-token step. Empties slots until each class has as many free as the
    /// token will probably fill. Returns the experts that lost theirs.
    pub fn spare(&mut self) -> Vec<ExpertKey> {
        let mut evicted = Vec::new();
        for class in &mut self.classes {
            let most = (class.free.len() + class.slots.len()) / SPARE_SHARE;
            let entered = std::mem::take(&mut class.entered) as f32;
            class.expected += (entered.min(most as f32) - class.expected) * EXPECTED_GAIN;
            let likely = class.expected + SPARE_DEVIATIONS * class.expected.sqrt();
            // A decaying expectation never reaches zero.
            let wanted = ((likely - 0.1).ceil().max(0.0) as usize).min(most);
            while class.free.len() < wanted {
                let Some((victim, index)) = class.evict(&|_| false) else { break };
                class.free.push(index);
                evicted.push(victim);
            }
        }
        evicted
    }

    /// Empty slots, class by class.
    pub fn free(&self) -> Vec<Slot> {
        let slots = (0..).zip(&self.classes).flat_map(|(id, class)| {
            class.free.iter().map(move |index| Slot { class: id, index: *index })
        });
        slots.collect()
    }

    /// Records that an expert is now in a free slot. False if the slot was not free or the expert
    /// already had one.
    pub fn adopt(&mut self, key: ExpertKey, slot: Slot) -> bool {
        let id = self.class_of[usize::from(key.moe.0)];
        let class = &mut self.classes[usize::from(id)];
        let at = class.free.iter().position(|index| *index == slot.index);
        let Some(at) = at.filter(|_| id == slot.class && !class.slots.contains_key(&key)) else {
            return false;
        };
        class.free.swap_remove(at);
        class.slots.insert(key, slot.index);
        class.policy.insert(key, 1);
        class.entered += 1;
        true
    }

    /// Call when a fill failed: the slot is empty.
    pub fn forget(&mut self, key: ExpertKey) {
        let class = &mut self.classes[usize::from(self.class_of[usize::from(key.moe.0)])];
        if let Some(index) = class.slots.remove(&key) {
            class.policy.remove(&key);
            class.free.push(index);
        }
    }
}

impl Class {
    /// Takes the slot of the worst expert that is not needed. `None` if all are needed.
    fn evict(&mut self, needed: &dyn Fn(&ExpertKey) -> bool) -> Option<(ExpertKey, u32)> {
        let victim = *self.policy.victims(1, needed)?.first()?;
        self.policy.remove(&victim);
        Some((victim, self.slots.remove(&victim)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppler_store::PolicyKind;

    const LAYER: MoeId = MoeId(0);

    fn lru(counts: &[usize], class_of: Vec<u16>) -> Residency {
        Residency::new(counts, class_of, || PolicyKind::Lru.make())
    }

    fn fill(residency: &mut Residency, moe: MoeId, wanted: &[u32]) -> Wave {
        let wave = residency.wave(moe, wanted);
        let mut all: Vec<u32> = wave.hits.iter().chain(&wave.fills).map(|(e, _)| *e).collect();
        all.extend(&wave.waiting);
        all.sort_unstable();
        let mut asked = wanted.to_vec();
        asked.sort_unstable();
        assert_eq!(all, asked, "each expert in exactly one list");
        wave
    }

    #[test]
    fn the_least_recently_used_expert_gives_up_its_slot() {
        let mut residency = lru(&[2], vec![0, 0]);
        fill(&mut residency, LAYER, &[3, 5]);
        assert_eq!(fill(&mut residency, LAYER, &[3]).hits.len(), 1);
        let wave = fill(&mut residency, MoeId(1), &[3]);
        assert_eq!(
            (wave.evicted.len(), wave.fills.len()),
            (1, 1),
            "another layer's 3 is another expert"
        );
        assert!(residency.slot(ExpertKey { moe: LAYER, expert: 5 }).is_none());
        assert!(residency.slot(ExpertKey { moe: LAYER, expert: 3 }).is_some());
        assert_eq!(residency.resident(), 2);
    }

    #[test]
    fn more_experts_than_slots_come_in_waves_and_none_of_a_wave_evicts_another() {
        let mut residency = lru(&[3], vec![0]);
        fill(&mut residency, LAYER, &[6]);
        let first = fill(&mut residency, LAYER, &[0, 1, 2, 3, 4, 5, 6]);
        assert_eq!((first.hits.len(), first.fills.len(), first.waiting.len()), (1, 2, 4));
        let second = fill(&mut residency, LAYER, &first.waiting);
        assert_eq!((second.fills.len(), second.evicted.len(), second.waiting.len()), (3, 3, 1));
        let third = fill(&mut residency, LAYER, &second.waiting);
        assert_eq!((third.fills.len(), third.waiting.len()), (1, 0));
        let mut slots: Vec<Slot> = second.fills.iter().map(|(_, slot)| *slot).collect();
        slots.dedup();
        assert_eq!(slots.len(), 3, "three experts, three slots");
    }

    #[test]
    fn slots_are_spared_for_what_tokens_miss_and_adopted_once() {
        let mut residency = lru(&[48, 2], vec![0, 1]);
        fill(&mut residency, LAYER, &(0..48).collect::<Vec<_>>());
        fill(&mut residency, MoeId(1), &[0, 1]);
        // A whole prompt's experts entered; at most an eighth of the slots is freed.
        let mut evicted = residency.spare();
        for _ in 0..20 {
            evicted.extend(residency.spare());
        }
        assert!((1..=6).contains(&evicted.len()), "{evicted:?}");
        assert!(evicted.iter().all(|key| key.moe == LAYER), "two slots are too few to spare one");
        let free = residency.free();
        assert_eq!(free.len(), evicted.len());
        let gone = evicted[0];
        assert!(!residency.adopt(gone, Slot { class: 1, index: 0 }), "it is of another class");
        let taken = residency.slot(ExpertKey { moe: LAYER, expert: 47 }).unwrap();
        assert!(!residency.adopt(gone, taken), "it is not free");
        assert!(residency.adopt(gone, free[0]) && residency.slot(gone) == Some(free[0]));
        assert!(!residency.adopt(gone, free[0]), "twice");
        // Once nothing is missed any more, no expert loses its slot.
        for _ in 0..40 {
            residency.spare();
        }
        assert_eq!(residency.spare(), []);
    }

    #[test]
    fn a_failed_fill_leaves_its_slot_free() {
        let mut residency = lru(&[1], vec![0]);
        fill(&mut residency, LAYER, &[0]);
        residency.forget(ExpertKey { moe: LAYER, expert: 0 });
        assert_eq!(residency.resident(), 0);
        let wave = fill(&mut residency, LAYER, &[1]);
        assert_eq!((wave.fills.len(), wave.evicted.len()), (1, 0));
    }
}
