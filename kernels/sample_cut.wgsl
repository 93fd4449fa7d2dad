// Sampling: finds the last rank to keep and how many of its tokens, and what remains of each chunk.
// Grid: one chunk of the vocabulary per workgroup; each one finds the rank.
//!include shared/odds.wgsl
//!include shared/reach.wgsl

@group(1) @binding(0) var<storage, read> ranks: array<u32>;
@group(1) @binding(1) var<storage, read_write> bins: array<u32>;
@group(1) @binding(2) var<storage, read_write> parts: array<u32>;

// The least number of tokens of this weight that reach a mass; at most 2^18.
fn tokens_for(mass: vec2<u32>, weight: u32) -> u32 {
    var fewer = 0u;
    for (var bit = 1u << 17u; bit > 0u; bit = bit / 2u) {
        if (less(product(fewer + bit, weight), mass)) {
            fewer += bit;
        }
    }
    return fewer + 1u;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var cut = RANK_END;
    var keep = 0u;
    if ((params.top_k | params.top_p) != 0u) {
        // Top-p ends where top-k does, or earlier.
        let by_mass = params.top_p != 0u;
        let at = select(K_AT, P_AT, by_mass);
        let counts = select(FINE_K, FINE_P, by_mass);
        let first = bins[at] * FINE;
        var masses = array<vec2<u32>, 8>();
        for (var j = 0u; j < 4u; j++) {
            let place = local * 4u + j;
            let unit = select(1u, weight_of(first + place), by_mass);
            masses[j] = product(bins[counts + place], unit);
        }
        reach(&masses, 4u, vec2<u32>(bins[at + 1u], bins[at + 2u]), local);
        if (reached != NEVER) {
            cut = first + reached;
            keep = needed.x;
            if (by_mass) {
                keep = tokens_for(needed, weight_of(cut));
            }
        }
    }
    if (group.x == 0u && local == 0u) {
        bins[CUT_AT] = cut;
        bins[CUT_AT + 1u] = keep;
    }
    var mass = vec2<u32>(0u);
    for (var j = 0u; j < 4u; j++) {
        let token = group.x * CHUNK + j * 256u + local;
        if (token < params.vocab) {
            let rank = ranks[token];
            if (rank < cut) {
                mass = plus(mass, vec2<u32>(weight_of(rank), 0u));
            }
            // A chunk's mass is below 2^42, so the tokens at the cut are counted in the bits above
            // it.
            if (rank == cut) {
                mass.y += 1u << 16u;
            }
        }
    }
    scan(mass, local);
    if (local == 0u) {
        let all = lane_sums[255];
        parts[group.x * PART] = all.y >> 16u;
        parts[group.x * PART + 1u] = all.x;
        parts[group.x * PART + 2u] = all.y & 0xffffu;
    }
}
