//! Whether an adapter has the cooperative matrices for which the `*_coop` kernels are written: f16
//! inputs and f32 sums, with a shape and a subgroup width that some kernel supports. Attention has
//! a form for each shape, products only for 16 x 16.

use wgpu::{AdapterInfo, CooperativeMatrixProperties, CooperativeScalarType, Features, Limits};

use super::trusted;

/// Workgroup memory that the kernels may take (`COOPERATIVE_BYTES_MAX` in src/infer/build.rs).
const COOPERATIVE_BYTES: u32 = 48 << 10;

/// The shape of the matrices in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cooperative {
    /// 16 x 16 x 16 by subgroups of 32.
    Sixteen,
    /// 8 x 8 x 8 by subgroups of 8.
    Eight,
}

impl Cooperative {
    /// Rows and columns of one matrix; invocations of a subgroup.
    const fn shape(self) -> (u32, u32) {
        match self {
            Self::Sixteen => (16, 32),
            Self::Eight => (8, 8),
        }
    }

    /// The widest head of attention (`HEAD_MAX` of attention_coop.wgsl).
    pub const fn head_dim_max(self) -> u32 {
        8 * self.shape().0
    }

    /// Queries of a workgroup of attention (`QUERIES` there).
    pub const fn queries(self) -> u32 {
        4 * self.shape().0
    }

    /// The suffix of the kernel for attention.
    pub const fn attention(self) -> &'static str {
        match self {
            Self::Sixteen => "16",
            Self::Eight => "8",
        }
    }

    /// Whether products have a kernel of this shape.
    pub const fn multiplies(self) -> bool {
        matches!(self, Self::Sixteen)
    }

    /// Whether a kernel on cooperative matrices is of this shape.
    pub fn runs(self, kernel: &str) -> bool {
        let attention = kernel.starts_with("attention");
        if attention {
            kernel.ends_with(&format!("_{}", self.attention()))
        } else {
            self.multiplies()
        }
    }

    /// The best shape that the adapter offers, if any.
    pub fn of(adapter: &wgpu::Adapter) -> Option<Self> {
        if !trusted::experimental().is_enabled() || !adapter.features().contains(Self::features()) {
            return None;
        }
        let offered = adapter.cooperative_matrix_properties();
        let bytes = adapter.limits().max_compute_workgroup_storage_size;
        Self::among(&offered, &adapter.get_info(), bytes)
    }

    fn among(
        offered: &[CooperativeMatrixProperties],
        info: &AdapterInfo,
        workgroup_bytes: u32,
    ) -> Option<Self> {
        [Self::Sixteen, Self::Eight].into_iter().find(|kind| {
            let (side, lanes) = kind.shape();
            let fits = |p: &CooperativeMatrixProperties| {
                [p.m_size, p.n_size, p.k_size] == [side; 3]
                    && p.ab_type == CooperativeScalarType::F16
                    && p.cr_type == CooperativeScalarType::F32
                    && !p.saturating_accumulation
            };
            workgroup_bytes >= COOPERATIVE_BYTES.min(side * side * 192)
                && [info.subgroup_min_size, info.subgroup_max_size] == [lanes; 2]
                && offered.iter().any(fits)
        })
    }

    /// The features to request from the adapter.
    pub const fn features() -> Features {
        Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            .union(Features::SHADER_F16)
            .union(Features::SHADER_I16)
    }

    /// Raises the limits to request from the adapter, given what it offers.
    pub fn raise(limits: &mut Limits, offered: &Limits) {
        limits.max_compute_workgroup_storage_size =
            offered.max_compute_workgroup_storage_size.min(COOPERATIVE_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_matches_are_taken_and_the_larger_first() {
        use CooperativeScalarType::{F16, F32};
        let of = |side, ab_type, cr_type| CooperativeMatrixProperties {
            m_size: side,
            n_size: side,
            k_size: side,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        };
        let info = |lanes| AdapterInfo {
            subgroup_min_size: lanes,
            subgroup_max_size: lanes,
            ..AdapterInfo::new(wgpu::DeviceType::DiscreteGpu, wgpu::Backend::Vulkan)
        };
        let both = [of(8, F16, F32), of(16, F16, F16), of(16, F16, F32)];
        let among =
            |offered: &[_], lanes, kib: u32| Cooperative::among(offered, &info(lanes), kib << 10);
        assert_eq!(among(&both, 32, 48), Some(Cooperative::Sixteen));
        assert_eq!(among(&both, 8, 32), Some(Cooperative::Eight));
        assert_eq!(among(&both, 64, 64), None);
        assert_eq!(among(&both, 32, 32), None, "too little workgroup memory");
        assert_eq!(among(&both[..2], 32, 48), None, "sums in f16");
        let narrow = CooperativeMatrixProperties { n_size: 8, ..of(16, F16, F32) };
        assert_eq!(among(&[narrow], 32, 48), None);
    }
}
