// The body of decode_expert_down.wgsl and decode_expert_down_biased.wgsl.
//!include shared/{step}.wgsl
//!include shared/pieces.wgsl
//!pieces {format}
//!include shared/team_{team}.wgsl
//!include shared/routed.wgsl
//!include shared/decode_expert_down_params.wgsl

// The packed inner activations of the tokens' choices, one after the other.
@group(1) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(1) @binding(1) var<storage, read> weights: array<vec4<u32>>;
// By token and choice: (slot, routing weight).
@group(1) @binding(2) var<storage, read> routed: array<vec2<u32>>;
@group(1) @binding(3) var<storage, read_write> result: array<f32>;

var<workgroup> parts: array<vec2<f32>, 8>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let place = row_and_item(group, grid);
    let pairs_at = place.x * params.top_k;
    if (routed[pairs_at].x == EMPTY) {
        return;
    }
    let row = place.y * 2u;
    let result_at = place.x * ((params.rows + 31u) / 32u) * 32u;
    let a = min(row, params.rows - 1u);
    let b = min(row + 1u, params.rows - 1u);
    let team = local / 32u;
    let first = (team % params.split) * 32u + (local & 31u);
    let top_k = min(params.top_k, arrayLength(&routed));
    var sum = vec2<f32>(0.0);
    for (var choice = team / params.split; choice < top_k; choice += 8u / params.split) {
        let route = routed[pairs_at + choice];
        let m = in_slot(params.down, route.x * params.slot_stride);
        let at = (pairs_at + choice) * params.down.pieces * 13u;
        sum += bitcast<f32>(route.y) * two_rows(m, a, b, at, first, params.split * 32u);
    }
    let first_row = sum32(sum.x, local);
    let second_row = sum32(sum.y, local);
    if ((local & 31u) == 0u) {
        parts[team] = vec2<f32>(first_row, second_row);
    }
    workgroupBarrier();
    if (local == 0u) {
        var total = begun(place.x, a, b, top_k);
        for (var i = 0u; i < 8u; i++) {
            total += parts[i];
        }
        if (row < params.rows) {
            result[result_at + row] = select(0.0, result[result_at + row], params.adds == 1u) + total.x;
        }
        if (row + 1u < params.rows) {
            result[result_at + row + 1u] = select(0.0, result[result_at + row + 1u], params.adds == 1u) + total.y;
        }
    }
}
