// The same as decode_gate_up, for each of one token's chosen experts, in its slot.
// Grid: one workgroup per 16 rows of each choice.
//!for format
//!for step in -alone together
//!for team in subgroup group
//!include shared/decode_expert_gate_up.wgsl
//!include shared/joined.wgsl

fn expert_of(row: u32, choice: u32) -> u32 {
    return 0u;
}
