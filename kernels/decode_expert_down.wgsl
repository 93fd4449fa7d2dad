// result[row] (+)= sum over one token's choices, in their order, of weight * down_e[row] . inner.
// The eight teams of a workgroup divide the choices among themselves. Their parts are added in the
// teams' order, whatever slots the experts are in.
// Grid: one workgroup per two rows.
//!for format
//!for step in -alone together
//!for team in subgroup group
//!include shared/decode_expert_down.wgsl

// What a token's sums of rows a and b begin with.
fn begun(token: u32, a: u32, b: u32, top_k: u32) -> vec2<f32> {
    return vec2<f32>(0.0);
}
