// Sorts the step's (token, choice) pairs by expert and divides each expert's pairs into tiles of at
// most `tile`. Unused tiles have count 0. The order within an expert is unspecified.
// Grid: one workgroup.
//!include shared/step.wgsl

struct Params {
    // At most EXPERTS_MAX.
    experts: u32,
    top_k: u32,
    // Pairs of a tile.
    tile: u32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> ids: array<u32>;
@group(1) @binding(1) var<storage, read_write> pair_order: array<u32>;
@group(1) @binding(2) var<storage, read_write> tiles: array<vec4<u32>>;

const EXPERTS_MAX: u32 = 1024u;
// By expert, the number of pairs that have no place yet.
var<workgroup> counts: array<atomic<u32>, 1024>;
// By expert, its first pair and its first tile.
var<workgroup> starts: array<vec2<u32>, 1024>;
var<workgroup> used: u32;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
    let experts = min(params.experts, EXPERTS_MAX);
    let pairs = min(now.tokens * params.top_k, arrayLength(&ids));
    for (var e = local; e < experts; e += 256u) {
        atomicStore(&counts[e], 0u);
    }
    workgroupBarrier();
    for (var p = local; p < pairs; p += 256u) {
        atomicAdd(&counts[ids[p]], 1u);
    }
    workgroupBarrier();
    if (local == 0u) {
        var at = vec2<u32>(0u);
        for (var e = 0u; e < experts; e++) {
            starts[e] = at;
            let count = atomicLoad(&counts[e]);
            at += vec2<u32>(count, (count + params.tile - 1u) / params.tile);
        }
        used = at.y;
    }
    workgroupBarrier();
    for (var e = local; e < experts; e += 256u) {
        let start = starts[e];
        let count = atomicLoad(&counts[e]);
        for (var i = 0u; i * params.tile < count; i++) {
            let done = i * params.tile;
            tiles[start.y + i] = vec4<u32>(e, start.x + done, min(params.tile, count - done), 0u);
        }
    }
    for (var i = used + local; i < arrayLength(&tiles); i += 256u) {
        tiles[i] = vec4<u32>(0u);
    }
    workgroupBarrier();
    for (var p = local; p < pairs; p += 256u) {
        let e = ids[p];
        pair_order[starts[e].x + atomicSub(&counts[e], 1u) - 1u] = p;
    }
}
