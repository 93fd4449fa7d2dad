// Sampling: finds the coarse bin that contains the last of the top_k likeliest tokens, and counts
// its ranks one by one.
// Grid: one chunk of the vocabulary per workgroup; each one finds the bin.
//!include shared/odds.wgsl
//!include shared/reach.wgsl
//!include shared/weigh.wgsl

@group(1) @binding(0) var<storage, read> ranks: array<u32>;
@group(1) @binding(1) var<storage, read_write> bins: array<atomic<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    var counts = array<vec2<u32>, 8>();
    for (var j = 0u; j < 8u; j++) {
        counts[j] = vec2<u32>(atomicLoad(&bins[COUNTS + local * 8u + j]), 0u);
    }
    reach(&counts, 8u, vec2<u32>(params.top_k, 0u), local);
    let bin = reached;
    if (group.x == 0u && local == 0u) {
        atomicStore(&bins[K_AT], bin);
        atomicStore(&bins[K_AT + 1u], select(needed.x, 0u, bin == NEVER));
    }
    for (var j = 0u; j < 4u; j++) {
        let token = group.x * CHUNK + j * 256u + local;
        if (token < params.vocab) {
            let rank = ranks[token];
            if (rank >> FINE_BITS == bin) {
                atomicAdd(&bins[FINE_K + rank % FINE], 1u);
            }
            // The weights that top-p will need: those up to the end of the bin.
            if (params.top_p != 0u && rank < RANK_END && rank >> FINE_BITS <= bin) {
                weigh(rank);
            }
        }
    }
}
