// result[pair, row] = act(gate_e[row] . x[t]) * (up_e[row] . x[t]) for each (token, choice) pair
// whose expert e is in this wave. Other pairs are left unchanged.
// Grid: one row of the reduction for each (pair, row).
//!for format
//!for reduce in lane group
//!include shared/expert_gate_up.wgsl
//!include shared/joined.wgsl
