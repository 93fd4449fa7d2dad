//! Where each tensor goes: first the trunk, in separate shards, then the experts.
//!
//! Invariants: a trunk tensor is in one shard unless it is larger than one (then it fills several,
//! span by span). An expert's tensors are adjacent, begin at a 4 KiB boundary, and cross a shard's
//! end only if the expert is larger than a shard. Sizes follow from shapes and types, so the whole
//! plan is made before a weight is read.

use doppler_store::DType;
use doppler_store::manifest::{Role, Span, TensorEntry};

/// Alignment of experts: a page, so that each can be read or mapped alone.
pub const EXPERT_ALIGN: u64 = 4096;
/// Alignment of trunk tensors.
const TRUNK_ALIGN: u64 = 64;

/// A tensor to place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
    /// Stored bytes.
    pub size: u64,
    pub role: Role,
    pub group: String,
}

/// The placed tensors, in the order of their bytes, and the size of each shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub tensors: Vec<(String, TensorEntry)>,
    pub shards: Vec<u64>,
}

/// Places the trunk, then the experts (each a list of tensors), in shards of at most `shard_bytes`,
/// a multiple of 4 KiB.
pub fn place(trunk: Vec<Item>, experts: Vec<Vec<Item>>, shard_bytes: u64) -> Plan {
    let mut packer = Packer { shards: vec![0], limit: shard_bytes };
    let mut tensors = Vec::new();
    for item in trunk {
        packer.open(item.size, TRUNK_ALIGN);
        tensors.push(packer.put(item));
    }
    packer.close();
    for expert in experts {
        packer.open(expert.iter().map(|item| item.size).sum(), EXPERT_ALIGN);
        tensors.extend(expert.into_iter().map(|item| packer.put(item)));
    }
    packer.shards.retain(|&size| size > 0);
    Plan { tensors, shards: packer.shards }
}

struct Packer {
    /// The shards' sizes. The last shard is the one being filled.
    shards: Vec<u64>,
    limit: u64,
}

impl Packer {
    fn fill(&mut self) -> &mut u64 {
        self.shards.last_mut().expect("there is always a shard")
    }

    /// Starts a new shard unless the current one is empty.
    fn close(&mut self) {
        if *self.fill() > 0 {
            self.shards.push(0);
        }
    }

    /// Moves to an aligned offset at which `size` bytes fit, or to a new shard.
    fn open(&mut self, size: u64, align: u64) {
        let start = self.fill().next_multiple_of(align);
        if start.saturating_add(size) <= self.limit {
            // An empty expert gets no padding.
            *self.fill() = if size > 0 { start } else { *self.fill() };
        } else {
            self.close();
        }
    }

    /// Takes the next bytes, continuing in further shards when one is full.
    fn put(&mut self, item: Item) -> (String, TensorEntry) {
        let mut spans = Vec::new();
        let mut left = item.size;
        while left > 0 {
            if *self.fill() == self.limit {
                self.close();
            }
            let offset = *self.fill();
            let size = left.min(self.limit - offset);
            // Each shard is at least a page, so their number fits u32.
            let shard = (self.shards.len() - 1) as u32;
            spans.push(Span { shard, offset, size });
            *self.fill() += size;
            left -= size;
        }
        let layout = item.dtype.is_quantised().then(|| "row".to_owned());
        let Item { name, shape, dtype, size, role, group } = item;
        (name, TensorEntry { spans, size, shape, dtype, role, group, layout })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str, size: u64) -> Item {
        let (name, group) = (name.to_owned(), String::new());
        Item { name, shape: vec![size / 2], dtype: DType::Bf16, size, role: Role::Other, group }
    }

    /// Shard, offset and size.
    type Triple = (u32, u64, u64);

    fn spans(plan: &Plan) -> Vec<(&str, Vec<Triple>)> {
        let triple = |s: &Span| (s.shard, s.offset, s.size);
        plan.tensors
            .iter()
            .map(|(name, t)| (name.as_str(), t.spans.iter().map(triple).collect()))
            .collect()
    }

    #[test]
    fn trunk_and_experts_keep_apart_and_experts_stay_whole() {
        let expert = |n: u32| vec![item(&format!("{n}g"), 3000), item(&format!("{n}d"), 1500)];
        let plan = place(
            vec![item("a", 100), item("b", 8000), item("c", 200)],
            (0..3).map(expert).collect(),
            16384,
        );
        assert_eq!(
            spans(&plan),
            [
                ("a", vec![(0, 0, 100)]),
                ("b", vec![(0, 128, 8000)]),
                ("c", vec![(0, 8128, 200)]),
                ("0g", vec![(1, 0, 3000)]),
                ("0d", vec![(1, 3000, 1500)]),
                ("1g", vec![(1, 8192, 3000)]),
                ("1d", vec![(1, 11192, 1500)]),
                ("2g", vec![(2, 0, 3000)]),
                ("2d", vec![(2, 3000, 1500)]),
            ]
        );
        assert_eq!(plan.shards, [8328, 12692, 4500]);
    }

    #[test]
    fn what_is_larger_than_a_shard_fills_several() {
        let plan = place(
            vec![item("small", 64), item("big", 10000), item("after", 100)],
            vec![vec![item("gate", 4000), item("up", 4000)], vec![item("whole", 4096)]],
            4096,
        );
        assert_eq!(
            spans(&plan),
            [
                ("small", vec![(0, 0, 64)]),
                ("big", vec![(1, 0, 4096), (2, 0, 4096), (3, 0, 1808)]),
                ("after", vec![(3, 1856, 100)]),
                ("gate", vec![(4, 0, 4000)]),
                ("up", vec![(4, 4000, 96), (5, 0, 3904)]),
                ("whole", vec![(6, 0, 4096)]),
            ]
        );
        assert_eq!(plan.shards, [64, 4096, 4096, 1956, 4096, 3904, 4096]);
    }

    #[test]
    fn a_dense_model_has_no_expert_shard() {
        assert_eq!(place(vec![item("a", 10)], vec![], 4096).shards, [10]);
    }
}
