// Sampling, the second pass: how far each token is below the likeliest, and how many tokens or how
// much weight each coarse bin of ranks holds.
// Grid: one chunk of the vocabulary per workgroup.
//!include shared/odds.wgsl
//!include shared/highest.wgsl
//!include shared/weigh.wgsl

@group(1) @binding(0) var<storage, read> parts: array<u32>;
// Keys, replaced by ranks.
@group(1) @binding(1) var<storage, read_write> ranks: array<u32>;
@group(1) @binding(2) var<storage, read_write> bins: array<atomic<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var key = 0u;
    if (local * CHUNK < params.vocab) {
        key = parts[local * PART];
    }
    let ruler = ruler_of(highest(key, local, local).x);
    for (var j = 0u; j < 4u; j++) {
        let token = group.x * CHUNK + j * 256u + local;
        if (token < params.vocab) {
            let rank = rank_of(ruler, ranks[token]);
            ranks[token] = rank;
            if (rank < RANK_END) {
                if (params.top_k != 0u) {
                    atomicAdd(&bins[COUNTS + (rank >> FINE_BITS)], 1u);
                } else if (params.top_p != 0u) {
                    weigh(rank);
                }
            }
        }
    }
}
