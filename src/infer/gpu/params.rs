//! The kernels' uniforms, as `src/infer/build.rs` generates them from naga's layouts, and the arena
//! that holds them.
//!
//! All parameters of a plan are written once, when it is made, into one uniform buffer. A dispatch
//! selects its slot by a dynamic offset. Only [`Step`] changes from step to step.

use bytemuck::Pod;

/// Bytes of one slot of the arena. No kernel's `Params` is larger.
pub(super) const ARENA_SLOT: u64 = 256;

/// A kernel's `Params`. Each kernel gives the name of its type
/// ([`super::kernels::Kernel::params`]).
pub trait Params: Pod {
    const NAME: &str;
}

include!(concat!(env!("OUT_DIR"), "/params.rs"));

/// Parameters collected while a plan is made.
#[derive(Default)]
pub(super) struct Arena {
    bytes: Vec<u8>,
}

impl Arena {
    /// Adds a kernel's parameters. Returns their dynamic offset.
    pub fn push(&mut self, params: &[u8]) -> u32 {
        let offset = self.bytes.len();
        self.bytes.extend_from_slice(params);
        self.bytes.resize(offset + ARENA_SLOT as usize, 0);
        u32::try_from(offset).expect("a plan has fewer than 2^24 dispatches")
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::gpu::kernels::{KERNELS, Kernel};
    use crate::gpu::lower::checked;

    #[test]
    fn a_struct_lies_in_memory_as_its_kernels_read_it() {
        // `Pieces` is five words, and `@align(16)` pads what follows it.
        assert_eq!((size_of::<Pieces>(), size_of::<DecodeGateUp>()), (20, 80));
        assert_eq!((offset_of!(DecodeGateUp, up), offset_of!(DecodeGateUp, rows)), (32, 64));
        assert_eq!(offset_of!(DecodeLinear, split), 3 * size_of::<Segment>());
        let size = |name| match name {
            "DecodeGateUp" => size_of::<DecodeGateUp>(),
            "DecodeLinear" => size_of::<DecodeLinear>(),
            _ => size_of::<Linear>(),
        };
        let of =
            |kernel: &&Kernel| ["DecodeGateUp", "DecodeLinear", "Linear"].contains(&kernel.params);
        for kernel in KERNELS.iter().filter(of) {
            assert_eq!(kernel.params_bytes as usize, size(kernel.params), "{}", kernel.name);
        }
    }

    #[test]
    fn forms_of_one_kernel_share_their_parameters() {
        for kernel in KERNELS {
            let shared =
                [("linear_", "Linear"), ("expert_down_", "ExpertDown"), ("sample_", "Sample")];
            for (file, params) in shared {
                assert_eq!(
                    kernel.name.starts_with(file),
                    kernel.params == params,
                    "{}",
                    kernel.name
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "the parameters of decode_linear_any_group")]
    fn parameters_of_another_kernel_are_refused() {
        checked("decode_linear_any_group", &Linear::default());
    }
}
