// Chooses each token's experts in a layer (as route.wgsl) and looks up their slots. An expert that
// has no slot but is in host memory will be fetched into a free slot (decode_fetch.wgsl), if there
// are free slots for all experts that this layer misses and no other token has taken any since they
// were offered. Otherwise the step is halted: the state says at which layer, what is needed to
// restart the layer is saved (here the residual; decode_aside.wgsl does the rest), and later
// kernels find no slots.
// Grid: one workgroup for each token, in y. At most 1024 experts.
//!for step in -alone together
//!include shared/{step}.wgsl
//!include shared/scored.wgsl
//!include shared/groups.wgsl

struct Params {
    experts: u32,
    top_k: u32,
    renormalise: u32,
    // Where the layer's row begins in slot_table.
    table_at: u32,
    // Where its choices go in `state`.
    ids_at: u32,
    // The value of word 0 of the state after a miss.
    halt: u32,
    // vec4s of the residual.
    quads: u32,
    // Where in slot_table the layer's places in host memory begin, and the free slots of its class:
    // their number, then the slots.
    spill_at: u32,
    free_at: u32,
    // Words of `state`: the token that takes free slots (its position, counted from 1), and how
    // many of the class it took.
    taker_at: u32,
    taken_at: u32,
    // 1 for sigmoids, 0 for the softmax, 2 for a softmax of each choice among those close to it.
    sigmoid: u32,
    // 1 to choose with the bias; 2 if it is a factor of each expert's weight instead.
    biased: u32,
    // The factor of all weights; with 2, how far from a choice others may be.
    scale: f32,
    // Groups of experts, and how many of them may be chosen from; with a bias.
    groups: u32,
    kept: u32,
    // Words of `state` from one token's choices to the next's.
    state_stride: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> logits: array<f32>;
@group(1) @binding(1) var<storage, read> slot_table: array<u32>;
@group(1) @binding(2) var<storage, read> x: array<vec4<f32>>;
// Word 0: 0, or the layer that halted, counted from 1. Word 2: the token that halted (its position,
// counted from 1). Then the chosen ids, of each token.
@group(1) @binding(3) var<storage, read_write> state: array<u32>;
// By token and choice: (slot, routing weight).
@group(1) @binding(4) var<storage, read_write> routed: array<vec2<u32>>;
@group(1) @binding(5) var<storage, read_write> aside: array<vec4<f32>>;
// By token and choice: (place in host memory, slot), or EMPTY.
@group(1) @binding(6) var<storage, read_write> fetches: array<vec2<u32>>;
@group(1) @binding(7) var<storage, read> bias: array<f32>;

const EMPTY: u32 = 0xffffffffu;

// Below every logit.
const NONE: f32 = -3.4e38;

// Logits, or scores plus bias.
var<workgroup> scores: array<vec4<f32>, 256>;
var<workgroup> ids: array<u32, 64>;
var<workgroup> slots: array<u32, 64>;
// By expert: its slot, and how many experts come before it.
var<workgroup> slot_of: array<u32, 1024>;
var<workgroup> places: array<atomic<u32>, 1024>;
// By group, the sum of its two best scores.
var<workgroup> sums: array<f32, 32>;
var<workgroup> missing: atomic<u32>;
// How many of the missing are not in host memory, either.
var<workgroup> absent: atomic<u32>;
// Set if a logit is not finite; the weights are then NaN.
var<workgroup> non_finite: atomic<u32>;
var<workgroup> halted: u32;
var<workgroup> taker: u32;
var<workgroup> taken: u32;
var<workgroup> free: u32;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    take_row(group.y);
    let logits_at = group.y * ((params.experts + 31u) / 32u) * 32u;
    let choices_at = group.y * params.top_k;
    let ids_at = group.y * params.state_stride + params.ids_at;
    let experts = min(params.experts, arrayLength(&logits));
    let top_k = min(params.top_k, arrayLength(&routed));
    let quads = (experts + 3u) / 4u;
    if (local == 0u) {
        halted = select(0u, 1u, has_halted(state[0], params.halt));
        taker = state[params.taker_at];
        taken = state[params.taken_at];
        free = slot_table[params.free_at];
        atomicStore(&missing, 0u);
        atomicStore(&absent, 0u);
        atomicStore(&non_finite, 0u);
    }
    var bad = false;
    for (var e = local; e < quads * 4u; e += 256u) {
        var score = NONE;
        if (e < experts) {
            // NaN is never chosen while there is a number. (Tested by its bits, because a driver
            // may optimise `l != l` to false.)
            let l = logits[logits_at + e];
            let bits = bitcast<u32>(l) & 0x7fffffffu;
            bad = bad || bits >= 0x7f800000u;
            score = select(l, -3.0e38, bits > 0x7f800000u);
            slot_of[e] = slot_table[params.table_at + e];
            atomicStore(&places[e], 0u);
        }
        scores[e / 4u][e % 4u] = score;
    }
    if (local < top_k) {
        ids[local] = local;
        slots[local] = EMPTY;
    }
    if (workgroupUniformLoad(&halted) != 0u) {
        if (local < top_k) {
            routed[choices_at + local] = vec2<u32>(EMPTY, 0u);
            fetches[choices_at + local] = vec2<u32>(EMPTY, 0u);
        }
        return;
    }
    if (bad) {
        atomicStore(&non_finite, 1u);
    }
    var highest = NONE;
    // The sum of a softmax over all experts.
    var all = 1.0;
    if (params.biased == 1u) {
        if (params.sigmoid == 0u) {
            for (var q = 0u; q < quads; q++) {
                let l = scores[q];
                highest = max(highest, max(max(l.x, l.y), max(l.z, l.w)));
            }
            all = 0.0;
            for (var q = 0u; q < quads; q++) {
                let e = exp(scores[q] - vec4<f32>(highest));
                all += e.x + e.y + e.z + e.w;
            }
        }
        workgroupBarrier();
        for (var e = local; e < experts; e += 256u) {
            let score = scored(scores[e / 4u][e % 4u], highest, params.sigmoid) / all + bias[e];
            let bits = bitcast<u32>(score) & 0x7fffffffu;
            scores[e / 4u][e % 4u] = select(score, -3.0e38, bits > 0x7f800000u);
        }
        workgroupBarrier();
        if (params.groups > 1u) {
            let groups = min(params.groups, 32u);
            let each = experts / groups;
            if (local < groups) {
                var best = NO_SCORES;
                for (var e = local * each; e < (local + 1u) * each; e++) {
                    best = best_two(best, scores[e / 4u][e % 4u]);
                }
                sums[local] = best.x + best.y;
            }
            workgroupBarrier();
            for (var e = local; e < experts; e += 256u) {
                let g = e / each;
                var before = 0u;
                for (var h = 0u; h < groups; h++) {
                    before += u32(sums[h] > sums[g] || (sums[h] == sums[g] && h < g));
                }
                if (before >= params.kept) {
                    scores[e / 4u][e % 4u] = 0.0;
                }
            }
            workgroupBarrier();
        }
    }
    // An expert's place is the number of experts before it, in order of descending score, then
    // ascending id. With few experts, several invocations count for each.
    let sharing = clamp(256u / experts, 1u, quads);
    let each = (quads + sharing - 1u) / sharing;
    for (var i = local; i < experts * sharing; i += 256u) {
        let e = i % experts;
        let start = i / experts * each;
        let mine = vec4<f32>(scores[e / 4u][e % 4u]);
        var before = vec4<u32>(0u);
        for (var q = start; q < min(start + each, quads); q++) {
            let l = scores[q];
            let others = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u);
            let first = (l > mine) | ((l == mine) & (others < vec4<u32>(e)));
            before += select(vec4<u32>(0u), vec4<u32>(1u), first);
        }
        atomicAdd(&places[e], before.x + before.y + before.z + before.w);
    }
    workgroupBarrier();
    for (var e = local; e < experts; e += 256u) {
        let place = atomicLoad(&places[e]);
        if (place < top_k) {
            ids[place] = e;
            slots[place] = slot_of[e];
            if (slot_of[e] == EMPTY) {
                atomicAdd(&missing, 1u);
                if (slot_table[params.spill_at + e] == EMPTY) {
                    atomicAdd(&absent, 1u);
                }
            }
        }
    }
    workgroupBarrier();
    let misses = atomicLoad(&missing);
    let next = now.position + 1u;
    let fetched = atomicLoad(&absent) == 0u && (taker == 0u || taker == next) && taken + misses <= free;
    let miss = misses > 0u && !fetched;
    if (local < top_k) {
        if (params.biased != 1u) {
            highest = scores[ids[0] / 4u][ids[0] % 4u];
        }
        var total = 0.0;
        if (params.renormalise == 1u) {
            for (var j = 0u; j < top_k; j++) {
                total += scored(logits[logits_at + ids[j]], highest, params.sigmoid);
            }
            total += select(0.0, 1e-20, params.sigmoid == 1u);
        } else if (params.biased == 1u || params.sigmoid != 0u) {
            total = all;
        } else {
            for (var q = 0u; q < quads; q++) {
                let e = exp(scores[q] - vec4<f32>(highest));
                total += e.x + e.y + e.z + e.w;
            }
        }
        var weight = scored(logits[logits_at + ids[local]], highest, params.sigmoid) / total * params.scale;
        if (params.biased == 2u) {
            weight *= bias[ids[local]];
        }
        if (params.sigmoid == 2u) {
            let top = logits[logits_at + ids[local]];
            var close = 0.0;
            for (var e = 0u; e < experts; e++) {
                let l = logits[logits_at + e];
                let far = top - l > params.scale * max(abs(l), top);
                close += select(0.0, exp(l - top), atomicLoad(&places[e]) >= local && !far);
            }
            weight = 1.0 / close;
        }
        state[ids_at + local] = ids[local];
        var slot = slots[local];
        var fetch = vec2<u32>(EMPTY, 0u);
        if (slot == EMPTY && !miss) {
            // The free slots are taken in the order of choice.
            var before = 0u;
            for (var j = 0u; j < local; j++) {
                before += u32(slots[j] == EMPTY);
            }
            slot = slot_table[params.free_at + 1u + taken + before];
            fetch = vec2<u32>(slot_table[params.spill_at + ids[local]], slot);
        }
        let bits = select(bitcast<u32>(weight), 0x7fc00000u, atomicLoad(&non_finite) != 0u);
        routed[choices_at + local] = vec2<u32>(select(slot, EMPTY, miss), bits);
        fetches[choices_at + local] = fetch;
    }
    if (local == 0u && misses > 0u && fetched) {
        state[params.taker_at] = next;
        state[params.taken_at] = taken + misses;
    }
    if (miss) {
        if (local == 0u) {
            state[0] = params.halt;
            state[2] = next;
        }
        for (var i = local; i < params.quads; i += 256u) {
            aside[i] = x[i];
        }
    }
}
