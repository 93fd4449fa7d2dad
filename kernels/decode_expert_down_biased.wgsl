// decode_expert_down.wgsl with a bias of each expert.
// Grid: one workgroup per two rows.
//!for format
//!for step in -alone together
//!for team in subgroup group
//!include shared/decode_expert_down.wgsl

// The choices' experts are at ids_at.
@group(1) @binding(4) var<storage, read> state: array<u32>;
@group(1) @binding(5) var<storage, read> biases: array<f32>;

// What a token's sums of rows a and b begin with.
fn begun(token: u32, a: u32, b: u32, top_k: u32) -> vec2<f32> {
    var sum = vec2<f32>(0.0);
    for (var choice = 0u; choice < top_k; choice++) {
        let at = state[token * params.state_stride + params.ids_at + choice] * params.rows;
        sum += bitcast<f32>(routed[token * params.top_k + choice].y) * vec2<f32>(biases[at + a], biases[at + b]);
    }
    return sum;
}
