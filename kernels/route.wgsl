// Chooses top_k experts per token, in order of descending logit, then ascending id. The weights are
// the softmax over all experts or the sigmoid of each logit, renormalised over the chosen ones if
// asked. With a bias, the order is that of softmax or sigmoid plus bias; weights do not contain it. If a logit is not
// finite the weights are NaN, so that it shows in the model's output.
// Grid: one token per invocation.
//!include shared/step.wgsl
//!include shared/scored.wgsl
//!include shared/groups.wgsl

struct Params {
    experts: u32,
    top_k: u32,
    stride: u32,
    renormalise: u32,
    // 1 for sigmoids, 0 for the softmax, 2 for a softmax of each choice among those close to it.
    sigmoid: u32,
    // 1 to choose with the bias; 2 if it is a factor of each expert's weight instead.
    biased: u32,
    // The factor of all weights; with 2, how far from a choice others may be.
    scale: f32,
    // Groups of experts, and how many of them may be chosen from; with a bias.
    groups: u32,
    kept: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> logits: array<f32>;
@group(1) @binding(1) var<storage, read_write> ids: array<u32>;
@group(1) @binding(2) var<storage, read_write> routing_weights: array<f32>;
@group(1) @binding(3) var<storage, read> bias: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let token = flat(group, grid) * 64u + local;
    if (token >= now.tokens) {
        return;
    }
    // Bounded by the buffers. This also keeps lavapipe from recompiling the kernel for each
    // dispatch (6 ms), which it does if a loop's only bound is a uniform.
    let experts = min(params.experts, arrayLength(&logits));
    let top_k = min(params.top_k, arrayLength(&ids));
    let row = token * params.stride;
    let to = token * params.top_k;
    var highest = -3.0e38;
    for (var e = 0u; e < experts; e++) {
        highest = max(highest, logits[row + e]);
    }
    // The sum of a softmax over all experts.
    var all = 1.0;
    if (params.sigmoid == 0u && (params.renormalise == 0u || params.biased == 1u)) {
        all = 0.0;
        for (var e = 0u; e < experts; e++) {
            all += exp(logits[row + e] - highest);
        }
    }
    // By group, whether its experts may be chosen.
    var open = 0xffffffffu;
    let each = experts / max(params.groups, 1u);
    if (params.groups > 1u) {
        open = 0u;
        var sums: array<f32, 32>;
        let groups = min(params.groups, 32u);
        for (var g = 0u; g < groups; g++) {
            var best = NO_SCORES;
            for (var e = g * each; e < (g + 1u) * each; e++) {
                best = best_two(best, scored(logits[row + e], highest, 1u) + bias[e]);
            }
            sums[g] = best.x + best.y;
        }
        for (var g = 0u; g < groups; g++) {
            var before = 0u;
            for (var h = 0u; h < groups; h++) {
                before += u32(sums[h] > sums[g] || (sums[h] == sums[g] && h < g));
            }
            open |= u32(before < params.kept) << g;
        }
    }
    var last = 0.0;
    var last_id = 0u;
    var chosen = 0.0;
    for (var j = 0u; j < top_k; j++) {
        // The largest of those that come after the last choice. NaN logits are never the largest;
        // if there are only NaNs the id is j, which is valid.
        var best = -3.0e38;
        var best_id = j;
        var found = false;
        for (var e = 0u; e < experts; e++) {
            var l = logits[row + e];
            if (params.biased == 1u) {
                l = scored(l, highest, params.sigmoid) / all + bias[e];
                if (params.groups > 1u && ((open >> (e / each)) & 1u) == 0u) {
                    l = 0.0;
                }
            }
            let after = j == 0u || l < last || (l == last && e > last_id);
            if (after && (!found || l > best)) {
                best = l;
                best_id = e;
                found = true;
            }
        }
        // Among the experts that are left and close to this one.
        var close = 0.0;
        if (params.sigmoid == 2u) {
            let top = logits[row + best_id];
            for (var e = 0u; e < experts; e++) {
                let l = logits[row + e];
                let left = j == 0u || l < last || (l == last && e > last_id);
                let far = top - l > params.scale * max(abs(l), top);
                close += select(0.0, exp(l - top), left && !far);
            }
        }
        last = best;
        last_id = best_id;
        ids[to + j] = best_id;
        var weight = scored(logits[row + best_id], highest, params.sigmoid);
        if (params.sigmoid == 2u) {
            weight = 1.0 / close;
        }
        routing_weights[to + j] = weight;
        chosen += weight;
    }
    var total = all;
    if (params.renormalise == 1u) {
        total = chosen + select(0.0, 1e-20, params.sigmoid == 1u);
    }
    // The bits of a logit that is not finite.
    var non_finite = 0u;
    for (var e = 0u; e < experts; e++) {
        let bits = bitcast<u32>(logits[row + e]);
        non_finite = select(non_finite, bits, (bits & 0x7f800000u) == 0x7f800000u);
    }
    if (non_finite != 0u) {
        total = bitcast<f32>(non_finite | 0x7fc00000u);
    }
    for (var j = 0u; j < top_k; j++) {
        var weight = routing_weights[to + j] / total * select(params.scale, 1.0, params.sigmoid == 2u);
        if (params.biased == 2u) {
            weight *= bias[ids[to + j]];
        }
        routing_weights[to + j] = weight;
    }
}
