//! How many expert slots of which size: divides a budget among size classes.
//!
//! If a class is larger than what a dispatch can bind at once (its reach), it is divided into
//! classes of whole layers, so that each layer's slots are within one reach.
//!
//! Invariant: every class has slots for at least one token's demand (top-k experts in each of its
//! layers) and at most for all its experts. A budget that cannot give every class its demand is
//! refused; the error names the smallest that can.

use super::backend::{Backend, BackendError, SlotClass};
use super::error::SessionError;
use super::graph::ExpertLayout;
use super::model::Model;

/// How much device memory the experts' slots may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotBudget {
    /// A slot for every expert.
    #[default]
    All,
    /// Device bytes for everything: trunk, activations, KV cache and slots.
    Device(u64),
    /// Device bytes for expert slots only, without trunk and caches.
    Bytes(u64),
    /// This many experts.
    Experts(usize),
}

/// Slots by class, and the class of each layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPlan {
    pub classes: Vec<SlotClass>,
    /// Indexed by MoE layer of the graph.
    pub class_of: Vec<u16>,
    /// Device bytes of all slots.
    pub bytes: u64,
}

/// What a class needs, known before slots are divided.
#[derive(Debug, Clone, Copy)]
struct Need {
    /// Device bytes of one slot.
    slot_bytes: u64,
    /// Slots that one token fills: top-k for each layer.
    demand: usize,
    /// Experts in all its layers.
    experts: usize,
}

impl SlotPlan {
    /// Divides `budget` among the classes of the model's experts.
    pub fn new(
        model: &Model,
        backend: &dyn Backend,
        budget: SlotBudget,
    ) -> Result<Self, SessionError> {
        let slot_bytes = |layout: &ExpertLayout| backend.slot_bytes(layout);
        let trunk = trunk_bytes(model, backend);
        Self::over(model, slot_bytes, backend.class_bytes_max(), trunk, budget)
    }

    /// As `new`, where a slot of a layout takes `slot_bytes`, at most `class_bytes_max` of a class
    /// are within reach, and everything else takes `trunk` bytes.
    pub fn over(
        model: &Model,
        slot_bytes: impl Fn(&ExpertLayout) -> u64,
        class_bytes_max: u64,
        trunk: u64,
        budget: SlotBudget,
    ) -> Result<Self, SessionError> {
        let mut classes: Vec<SlotClass> = Vec::new();
        let mut needs: Vec<Need> = Vec::new();
        let mut class_of = Vec::new();
        for (layer, moe) in model.moe.iter().zip(&model.graph.moe) {
            let known = classes.iter().position(|class| class.layout == layer.layout);
            let class = known.unwrap_or_else(|| {
                classes.push(SlotClass { layout: layer.layout, count: 0 });
                let slot_bytes = slot_bytes(&layer.layout);
                needs.push(Need { slot_bytes, demand: 0, experts: 0 });
                classes.len() - 1
            });
            needs[class].demand += moe.top_k;
            needs[class].experts += layer.places.len();
            class_of.push(u16::try_from(class).expect("no more classes than layers"));
        }
        let counts = share(&needs, budget, trunk)?;
        for (class, count) in classes.iter_mut().zip(&counts) {
            class.count = *count;
        }
        let reach = |class: usize| {
            let most = class_bytes_max / needs[class].slot_bytes.max(1);
            usize::try_from(most).unwrap_or(usize::MAX)
        };
        let layers: Vec<Layer> = class_of
            .iter()
            .zip(&model.graph.moe)
            .map(|(class, moe)| Layer {
                class: usize::from(*class),
                demand: moe.top_k,
                experts: moe.experts.len(),
            })
            .collect();
        let (counts, divided, class_of) = divide(&counts, &layers, reach);
        let bytes = counts
            .iter()
            .zip(&divided)
            .map(|(count, from)| *count as u64 * needs[*from].slot_bytes);
        let bytes = bytes.sum();
        let layouts = divided.iter().map(|from| classes[*from].layout);
        let classes =
            layouts.zip(&counts).map(|(layout, count)| SlotClass { layout, count: *count });
        Ok(Self { classes: classes.collect(), class_of, bytes })
    }

    /// Slots over all classes.
    pub fn slots(&self) -> usize {
        self.classes.iter().map(|class| class.count).sum()
    }
}

/// After an allocation fails, this fraction of its bytes is tried next.
const SMALLER: (u64, u64) = (3, 4);

/// Tries `plan`, then smaller plans, until `alloc` finds room on `device`. `smaller` makes a plan
/// of at most the given bytes, or the smallest that serves one token.
///
/// # Errors
/// The error of `alloc` for the last plan, or its first error other than a lack of memory.
pub fn settle<D: ?Sized>(
    device: &mut D,
    mut plan: SlotPlan,
    smaller: impl Fn(&D, u64) -> Option<SlotPlan>,
    mut alloc: impl FnMut(&mut D, &SlotPlan) -> Result<(), BackendError>,
) -> Result<SlotPlan, BackendError> {
    loop {
        let error = match alloc(device, &plan) {
            Ok(()) => return Ok(plan),
            Err(error @ BackendError::OutOfMemory { .. }) => error,
            Err(error) => return Err(error),
        };
        let less = smaller(device, plan.bytes / SMALLER.1 * SMALLER.0);
        let Some(next) = less.filter(|less| less.bytes < plan.bytes) else { return Err(error) };
        tracing::warn!("{error}: trying {} expert slots instead of {}", next.slots(), plan.slots());
        plan = next;
    }
}

/// A MoE layer's class, and what the layer needs of it.
#[derive(Debug, Clone, Copy)]
struct Layer {
    class: usize,
    demand: usize,
    experts: usize,
}

/// Divides each class that is larger than `reach` (in slots) by layers. Returns the slots of each
/// new class, the class that it comes from, and the class of each layer.
///
/// If a single layer is larger than the reach, its slots are reduced to the reach, provided that
/// its demand fits.
fn divide(
    counts: &[usize],
    layers: &[Layer],
    reach: impl Fn(usize) -> usize,
) -> (Vec<usize>, Vec<usize>, Vec<u16>) {
    let (mut divided, mut from, mut class_of) = (Vec::new(), Vec::new(), vec![0; layers.len()]);
    for (class, count) in counts.iter().enumerate() {
        let reach = reach(class).max(1);
        let members: Vec<usize> = (0..layers.len()).filter(|i| layers[*i].class == class).collect();
        let demand: usize = members.iter().map(|i| layers[*i].demand).sum();
        // The fewest parts that are within reach, each of about the same number of whole layers.
        let layer_slots = count.div_ceil(members.len().max(1)).max(1);
        let parts = members.len().div_ceil((reach / layer_slots).max(1)).max(1);
        let mut spare = count - demand;
        let (mut start, mut spread) = (0, members.len());
        for part in 0..parts {
            let end = members.len() * (part + 1) / parts;
            let part_members = &members[start..end];
            let demand: usize = part_members.iter().map(|i| layers[*i].demand).sum();
            let experts: usize = part_members.iter().map(|i| layers[*i].experts).sum();
            let share = spare * part_members.len() / spread.max(1);
            let most = experts.min(if demand <= reach { reach } else { usize::MAX });
            let slots = (demand + share).min(most);
            spare -= slots - demand;
            spread -= part_members.len();
            for i in part_members {
                class_of[*i] = u16::try_from(divided.len()).expect("no more classes than layers");
            }
            divided.push(slots);
            from.push(class);
            start = end;
        }
    }
    (divided, from, class_of)
}

/// Slots of each class for a budget in slots, as [`SlotBudget::Experts`] divides it. `classes`
/// holds for each class the slots that one token fills and its number of experts. `None` if there
/// are too few slots for one token.
pub fn share_slots(classes: &[(usize, usize)], slots: usize) -> Option<Vec<usize>> {
    let need = |(demand, experts): &(usize, usize)| Need {
        slot_bytes: 0,
        demand: *demand,
        experts: *experts,
    };
    let needs: Vec<Need> = classes.iter().map(need).collect();
    share(&needs, SlotBudget::Experts(slots), 0).ok()
}

/// Device bytes of everything except slots: trunk weights, activations, KV cache.
pub fn trunk_bytes(model: &Model, backend: &dyn Backend) -> u64 {
    let weights = model.trunk.iter().map(|tensor| backend.weight_bytes(&tensor.spec));
    weights.sum::<u64>() + backend.fixed_bytes()
}

/// Slots of each class. Every class first gets its demand. Then, while the budget lasts, the next
/// slot goes to the class that is furthest from holding all its experts. `trunk` is the device
/// bytes that a [`SlotBudget::Device`] must hold as well.
fn share(needs: &[Need], budget: SlotBudget, trunk: u64) -> Result<Vec<usize>, SessionError> {
    let smallest_slots: usize = needs.iter().map(|need| need.demand).sum();
    let smallest_bytes: u64 = needs.iter().map(|n| n.demand as u64 * n.slot_bytes).sum();
    let whole_device = smallest_bytes + trunk;
    let refuse = |given: String, smallest_bytes: u64| {
        Err(SessionError::BudgetTooSmall { given, smallest_bytes, smallest_slots })
    };
    let mut counts: Vec<usize> = needs.iter().map(|need| need.demand).collect();
    let (mut bytes_left, mut slots_left) = match budget {
        SlotBudget::All => return Ok(needs.iter().map(|need| need.experts).collect()),
        SlotBudget::Device(bytes) if bytes < whole_device => {
            let given = format!("{bytes} bytes of device memory, {trunk} of them for the trunk,");
            return refuse(given, whole_device);
        }
        SlotBudget::Bytes(bytes) if bytes < smallest_bytes => {
            return refuse(format!("{bytes} bytes"), smallest_bytes);
        }
        SlotBudget::Experts(slots) if slots < smallest_slots => {
            return refuse(format!("{slots} slots"), smallest_bytes);
        }
        SlotBudget::Device(bytes) => (bytes - whole_device, usize::MAX),
        SlotBudget::Bytes(bytes) => (bytes - smallest_bytes, usize::MAX),
        SlotBudget::Experts(slots) => (u64::MAX, slots - smallest_slots),
    };
    loop {
        let fraction = |i: usize| counts[i] as f64 / needs[i].experts as f64;
        let next = (0..needs.len())
            .filter(|i| counts[*i] < needs[*i].experts && needs[*i].slot_bytes <= bytes_left)
            .min_by(|a, b| fraction(*a).total_cmp(&fraction(*b)));
        let Some(class) = next.filter(|_| slots_left > 0) else { return Ok(counts) };
        counts[class] += 1;
        bytes_left -= needs[class].slot_bytes;
        slots_left -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: [Need; 2] = [
        Need { slot_bytes: 10, demand: 4, experts: 16 },
        Need { slot_bytes: 15, demand: 4, experts: 16 },
    ];

    #[test]
    fn a_budget_is_shared_out_evenly_and_never_exceeded() {
        assert_eq!(share(&NEEDS, SlotBudget::All, 0).unwrap(), [16, 16]);
        assert_eq!(share(&NEEDS, SlotBudget::Experts(8), 0).unwrap(), [4, 4]);
        assert_eq!(share(&NEEDS, SlotBudget::Experts(20), 0).unwrap(), [10, 10]);
        assert_eq!(share(&NEEDS, SlotBudget::Experts(1000), 0).unwrap(), [16, 16]);
        for bytes in 100..=420 {
            let counts = share(&NEEDS, SlotBudget::Bytes(bytes), 0).unwrap();
            let used = counts[0] as u64 * 10 + counts[1] as u64 * 15;
            assert!(used <= bytes, "{used} of {bytes}");
            assert!(used + 15 > bytes || counts == [16, 16], "{used} of {bytes}: room was left");
        }
    }

    #[test]
    fn a_class_out_of_reach_is_divided_by_layers_and_every_demand_is_kept() {
        let layers: Vec<Layer> =
            (0..7).map(|i| Layer { class: usize::from(i == 6), demand: 2, experts: 16 }).collect();
        // Within reach: unchanged.
        let (counts, from, class_of) = divide(&[96, 16], &layers, |_| 96);
        assert_eq!((counts, from), (vec![96, 16], vec![0, 1]));
        assert_eq!(class_of, [0, 0, 0, 0, 0, 0, 1]);
        for (count, reach) in [(96, 40), (96, 33), (50, 17), (12, 5), (96, 16), (31, 16)] {
            let (counts, from, class_of) = divide(&[count, 16], &layers, |_| reach);
            for (class, slots) in counts.iter().enumerate() {
                let of: Vec<usize> =
                    (0..7).filter(|i| usize::from(class_of[*i]) == class).collect();
                assert!(
                    *slots <= reach && *slots >= of.len() * 2,
                    "{count} in {reach}: {counts:?}"
                );
                assert!(of.iter().all(|i| layers[*i].class == from[class]));
            }
            let used: usize = counts[..counts.len() - 1].iter().sum();
            assert!(used <= count && used + reach > count.min(6 * 16), "{counts:?}");
        }
        // Layers stay whole: 21 slots reach two layers of eight, not two and a half.
        let sixteen = [Layer { class: 0, demand: 2, experts: 8 }; 16];
        let (counts, ..) = divide(&[128], &sixteen, |_| 21);
        assert_eq!(counts, [16; 8]);
        // One layer's demand is larger than the reach: it is left as it is.
        let (counts, ..) = divide(&[12, 2], &layers, |_| 1);
        assert_eq!(counts, [2; 7]);
    }

    #[test]
    fn slots_settle_for_what_there_is_room_for() {
        let plan = |bytes| SlotPlan { classes: Vec::new(), class_of: Vec::new(), bytes };
        let smaller = |_: &(), bytes: u64| Some(plan(bytes.max(100)));
        let short = |bytes| BackendError::OutOfMemory { what: "slots".into(), bytes };
        for room in [1000_u64, 999, 640, 100] {
            let mut tried = Vec::new();
            let settled = settle(&mut (), plan(1000), smaller, |(), plan| {
                tried.push(plan.bytes);
                if plan.bytes <= room { Ok(()) } else { Err(short(plan.bytes)) }
            });
            let bytes = settled.unwrap().bytes;
            assert!(bytes <= room && bytes > room / 2, "{bytes} of {room}");
            assert!(tried.is_sorted_by(|a, b| a > b) && tried.last() == Some(&bytes), "{tried:?}");
        }
        let error =
            settle(&mut (), plan(1000), smaller, |(), plan| Err(short(plan.bytes))).unwrap_err();
        assert!(matches!(error, BackendError::OutOfMemory { bytes: 100, .. }), "{error}");
        let mut tried = 0;
        let error = settle(&mut (), plan(1000), smaller, |(), _| {
            tried += 1;
            Err(BackendError::Lost("gone".into()))
        });
        assert!(matches!(error, Err(BackendError::Lost(_))) && tried == 1);
    }

    #[test]
    fn less_than_one_tokens_demand_is_refused_naming_the_smallest_budget() {
        for budget in [SlotBudget::Bytes(99), SlotBudget::Bytes(0), SlotBudget::Experts(7)] {
            let error = share(&NEEDS, budget, 0).unwrap_err();
            assert!(error.to_string().contains("100B"), "{error}");
            assert!(error.to_string().contains("8 slots"), "{error}");
        }
        assert!(share(&NEEDS, SlotBudget::Bytes(100), 0).is_ok());
    }
    #[test]
    fn a_whole_devices_budget_holds_the_trunk_too() {
        let all_but_one = SlotBudget::Device(1099);
        let error = share(&NEEDS, all_but_one, 1000).unwrap_err().to_string();
        assert!(error.contains("1100B") && error.contains("1000 of them"), "{error}");
        for slots in [100, 137, 400] {
            assert_eq!(
                share(&NEEDS, SlotBudget::Device(1000 + slots), 1000).unwrap(),
                share(&NEEDS, SlotBudget::Bytes(slots), 1000).unwrap()
            );
        }
    }
}
