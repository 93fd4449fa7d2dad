// Sampling: finds the coarse bin in which the likeliest tokens reach top_p of the weight that top-k
// kept, and counts its ranks one by one.
// Grid: one chunk of the vocabulary per workgroup; each one finds the bin.
//!include shared/odds.wgsl
//!include shared/reach.wgsl

@group(1) @binding(0) var<storage, read> ranks: array<u32>;
@group(1) @binding(1) var<storage, read_write> bins: array<atomic<u32>>;

// The least mass that top_p requires of a total: its share, rounded up.
fn enough(total: vec2<u32>) -> vec2<u32> {
    let low = product(total.x, params.top_p);
    let share = plus(product(total.y, params.top_p), vec2<u32>(low.y, 0u));
    return plus(share, vec2<u32>(select(0u, 1u, low.x != 0u), 0u));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    // The bin in which top-k ends. Only its first `need` tokens are kept.
    var end = NEVER;
    var need = 0u;
    if (params.top_k != 0u) {
        end = atomicLoad(&bins[K_AT]);
        need = atomicLoad(&bins[K_AT + 1u]);
    }
    var masses = array<vec2<u32>, 8>();
    var sum = vec2<u32>(0u);
    for (var j = 0u; j < 8u; j++) {
        let bin = local * 8u + j;
        masses[j] = vec2<u32>(atomicLoad(&bins[MASS_LOW + bin]), atomicLoad(&bins[MASS_HIGH + bin]));
        if (bin < end) {
            sum = plus(sum, masses[j]);
        }
    }
    if (params.top_k != 0u) {
        var counts = array<u32, 4>();
        var count = 0u;
        for (var j = 0u; j < 4u; j++) {
            counts[j] = atomicLoad(&bins[FINE_K + local * 4u + j]);
            count += counts[j];
        }
        let before = scan(vec2<u32>(count, 0u), local).x;
        need -= min(need, before);
        for (var j = 0u; j < 4u; j++) {
            let kept = min(need, counts[j]);
            need -= kept;
            sum = plus(sum, product(kept, weight_of(end * FINE + local * 4u + j)));
        }
    }
    scan(sum, local);
    let goal = enough(lane_sums[255]);
    reach(&masses, 8u, goal, local);
    let bin = reached;
    if (group.x == 0u && local == 0u) {
        let missing = bin == NEVER;
        atomicStore(&bins[P_AT], bin);
        atomicStore(&bins[P_AT + 1u], select(needed.x, 0u, missing));
        atomicStore(&bins[P_AT + 2u], select(needed.y, 0u, missing));
    }
    for (var j = 0u; j < 4u; j++) {
        let token = group.x * CHUNK + j * 256u + local;
        if (token < params.vocab) {
            let rank = ranks[token];
            if (rank >> FINE_BITS == bin) {
                atomicAdd(&bins[FINE_P + rank % FINE], 1u);
            }
        }
    }
}
