// expert_gate_up.wgsl for many tokens: tiles of 32 rows of gate and of up by 64 pairs of one
// expert. Tiles whose expert is not in this wave leave their pairs unchanged.
// Grid: x by tile of pairs, y by row tile.
//!for format
//!include shared/expert_gate_up_tile.wgsl
//!include shared/joined.wgsl
