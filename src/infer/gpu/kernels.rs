//! The table of composed kernels that `src/infer/build.rs` generates: plain WGSL text, validated at
//! build time, looked up by name and by hash.

use std::sync::LazyLock;

/// A storage buffer of a kernel, in group 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storage {
    pub name: &'static str,
    /// `read_write` rather than `read`.
    pub write: bool,
}

/// One composed kernel. Its entry point is `main`.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// The file's stem and its choices: `linear_q4_k_lane`.
    pub name: &'static str,
    pub source: &'static str,
    /// Whether it uses cooperative matrices of f16, which few adapters have.
    pub cooperative: bool,
    /// The Rust type of its `Params`, and its size.
    pub params: &'static str,
    pub params_bytes: u32,
    /// Whether it uses subgroup operations, and needs subgroups of at least 32.
    pub subgroups: bool,
    pub storage: &'static [Storage],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The BLAKE3 hash of the texts of all kernels, in the order of their names.
pub(super) static ALL: LazyLock<blake3::Hash> = LazyLock::new(|| {
    let mut all = blake3::Hasher::new();
    for kernel in KERNELS {
        all.update(kernel.source.as_bytes());
    }
    all.finalize()
});

impl Kernel {
    /// The kernel of that name, if there is one.
    pub fn find(name: &str) -> Option<&'static Self> {
        KERNELS.binary_search_by(|kernel| kernel.name.cmp(name)).ok().map(|at| &KERNELS[at])
    }

    /// Whether every WebGPU implementation can run it.
    pub const fn portable(&self) -> bool {
        !self.cooperative && !self.subgroups
    }

    /// The kernel for browsers whose text has this hash.
    pub fn by_hash(hash: &blake3::Hash) -> Option<&'static Self> {
        KERNELS.iter().find(|kernel| kernel.portable() && kernel.hash() == *hash)
    }

    /// Whether a browser can run it, perhaps only on adapters with subgroups. The page puts
    /// `enable subgroups;` before the text of such a kernel.
    pub const fn in_browsers(&self) -> bool {
        !self.cooperative
    }

    /// BLAKE3 of the composed text, which is the kernel's id.
    pub fn hash(&self) -> blake3::Hash {
        blake3::hash(self.source.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use doppler_store::DType;

    #[test]
    fn names_are_sorted_and_found_and_hashes_differ() {
        assert!(KERNELS.is_sorted_by(|a, b| a.name < b.name));
        let hashes: HashSet<_> = KERNELS.iter().map(|k| *k.hash().as_bytes()).collect();
        assert_eq!(hashes.len(), KERNELS.len());
        assert_eq!(Kernel::find("linear_q4_k_lane").unwrap().storage.len(), 4);
        assert!(Kernel::find("linear_q3_k_lane").is_none());
    }

    #[test]
    fn each_format_has_its_kernels_and_a_decode_kernel_holds_no_format_more() {
        let items = |name: &str| -> Vec<DType> {
            let kernel = Kernel::find(name).unwrap_or_else(|| panic!("there is no kernel {name}"));
            let has = |of: &DType| kernel.source.contains(&format!("fn times_{}(", of.file_name()));
            DType::ALL.into_iter().filter(has).collect()
        };
        for dtype in DType::ALL {
            let format = dtype.file_name();
            for kernel in ["embed", "linear_tile", "expert_gate_up_tile", "expert_down_tile"] {
                assert_eq!(items(&format!("{kernel}_{format}")), [], "those speak of units");
            }
            for kernel in ["linear", "gate_up", "expert_gate_up", "expert_down"] {
                assert_eq!(items(&format!("decode_{kernel}_{format}_subgroup")), [dtype]);
            }
        }
        for pair in DType::TOGETHER {
            let name = pair.map(DType::file_name).join("_");
            assert_eq!(items(&format!("decode_linear_{name}_group")), pair);
        }
        assert_eq!(items("decode_linear_any_group"), DType::ALL);
    }

    #[test]
    fn no_other_kernel_asks_for_an_extension() {
        assert!(KERNELS.iter().any(|kernel| kernel.cooperative));
        for kernel in KERNELS.iter().filter(|kernel| !kernel.cooperative) {
            for line in kernel.source.lines() {
                assert!(!line.starts_with("enable ") && !line.starts_with("requires "), "{line}");
            }
        }
    }
}
