//! How many expert slots of which size: a budget shared out over size classes.
//!
//! Invariant: every class has at least one token's demand (top-k experts in each
//! of its layers) and at most all its experts; a budget that cannot give every
//! class its demand is refused, naming the smallest that can.

use super::backend::{Backend, SlotClass};
use super::error::SessionError;
use super::model::Model;

/// How much device memory the experts' slots may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotBudget {
    /// A slot for every expert.
    #[default]
    All,
    /// Device bytes of everything: trunk, activations, KV cache and slots.
    Device(u64),
    /// Device bytes of expert slots; the trunk and the caches are not in it.
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

/// What is known of a class before slots are shared out.
#[derive(Debug, Clone, Copy)]
struct Need {
    /// Device bytes of one slot.
    slot_bytes: u64,
    /// Slots one token fills: top-k for each layer.
    demand: usize,
    /// Experts in all its layers.
    experts: usize,
}

impl SlotPlan {
    /// Shares `budget` out over the classes of the model's experts.
    pub fn new(
        model: &Model,
        backend: &dyn Backend,
        budget: SlotBudget,
    ) -> Result<Self, SessionError> {
        let mut classes: Vec<SlotClass> = Vec::new();
        let mut needs: Vec<Need> = Vec::new();
        let mut class_of = Vec::new();
        for (layer, moe) in model.moe.iter().zip(&model.graph.moe) {
            let known = classes.iter().position(|class| class.layout == layer.layout);
            let class = known.unwrap_or_else(|| {
                classes.push(SlotClass { layout: layer.layout, count: 0 });
                let slot_bytes = backend.slot_bytes(&layer.layout);
                needs.push(Need { slot_bytes, demand: 0, experts: 0 });
                classes.len() - 1
            });
            needs[class].demand += moe.top_k;
            needs[class].experts += layer.places.len();
            class_of.push(u16::try_from(class).expect("no more classes than layers"));
        }
        let counts = share(&needs, budget, trunk_bytes(model, backend))?;
        for (class, count) in classes.iter_mut().zip(&counts) {
            class.count = *count;
        }
        let bytes = counts.iter().zip(&needs).map(|(count, need)| *count as u64 * need.slot_bytes);
        Ok(Self { classes, class_of, bytes: bytes.sum() })
    }

    /// Slots over all classes.
    pub fn slots(&self) -> usize {
        self.classes.iter().map(|class| class.count).sum()
    }
}

/// Slots a class where only their number counts, as [`SlotBudget::Experts`] shares them
/// out. `classes`: for each, the slots that one token fills and the experts it has.
/// `None` if there are too few for one token.
pub fn share_slots(classes: &[(usize, usize)], slots: usize) -> Option<Vec<usize>> {
    let need = |(demand, experts): &(usize, usize)| Need {
        slot_bytes: 0,
        demand: *demand,
        experts: *experts,
    };
    let needs: Vec<Need> = classes.iter().map(need).collect();
    share(&needs, SlotBudget::Experts(slots), 0).ok()
}

/// Device bytes of all but the slots: trunk weights, activations, KV cache.
pub fn trunk_bytes(model: &Model, backend: &dyn Backend) -> u64 {
    let weights = model.trunk.iter().map(|tensor| backend.weight_bytes(&tensor.spec));
    weights.sum::<u64>() + backend.fixed_bytes()
}

/// Slots a class: first every class's demand, then the class furthest from
/// holding all its experts gets the next, while the budget lasts. `trunk`: device
/// bytes that a [`SlotBudget::Device`] must hold besides.
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
    fn less_than_one_tokens_demand_is_refused_naming_the_smallest_budget() {
        for budget in [SlotBudget::Bytes(99), SlotBudget::Bytes(0), SlotBudget::Experts(7)] {
            let error = share(&NEEDS, budget, 0).unwrap_err();
            assert!(error.to_string().contains("100 bytes"), "{error}");
            assert!(error.to_string().contains("8 slots"), "{error}");
        }
        assert!(share(&NEEDS, SlotBudget::Bytes(100), 0).is_ok());
    }
    #[test]
    fn a_whole_devices_budget_holds_the_trunk_too() {
        let all_but_one = SlotBudget::Device(1099);
        let error = share(&NEEDS, all_but_one, 1000).unwrap_err().to_string();
        assert!(error.contains("1100 bytes") && error.contains("1000 of them"), "{error}");
        for slots in [100, 137, 400] {
            assert_eq!(
                share(&NEEDS, SlotBudget::Device(1000 + slots), 1000).unwrap(),
                share(&NEEDS, SlotBudget::Bytes(slots), 1000).unwrap()
            );
        }
    }
}
