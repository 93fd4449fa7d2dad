// One token's attention over one split of the positions, for all query heads that share a
// key head: a running softmax over tiles of 64 (flash decoding: Dao et al., 2023).
// A head's result is its weighted values, the highest score and the sum of weights;
// decode_combine puts the splits together.
// Grid: a workgroup for each (key head, split). head_dim is a multiple of 8;
// heads / kv_heads is at most 16 and that times head_dim at most 2048.
//!include shared/step.wgsl
//!include shared/splits.wgsl

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Positions the token sees, itself included; 0 for all.
    window: u32,
    splits_max: u32,
    scale: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
@group(1) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> keys: array<vec4<u32>>;
@group(1) @binding(2) var<storage, read> values: array<u32>;
// By head and split: head_dim values, the highest score, the sum of weights.
@group(1) @binding(3) var<storage, read_write> partial: array<f32>;

const LEAST: f32 = -3.0e38;

var<workgroup> query: array<vec4<f32>, 512>;
var<workgroup> scores: array<f32, 1024>;
var<workgroup> highest: array<f32, 16>;
var<workgroup> shrink: array<f32, 16>;
var<workgroup> total: array<f32, 16>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let splits = splits_of(params.window, params.splits_max);
    let kv_head = group.x / splits.count;
    let split = group.x % splits.count;
    let shared_by = min(params.heads / params.kv_heads, 16u);
    let dim = params.head_dim;
    let quads = dim / 4u;
    for (var i = local; i < shared_by * quads; i += 256u) {
        query[i] = q[kv_head * shared_by * quads + i] * params.scale;
    }
    if (local < 16u) {
        highest[local] = LEAST;
        total[local] = 0.0;
    }
    workgroupBarrier();
    // Two neighbouring dimensions of a head for each of up to four items.
    let pairs = dim / 2u;
    let items = shared_by * pairs;
    var sums = array<vec2<f32>, 4>();
    for (var n = 0u; n < splits.tiles_each; n++) {
        let start = splits.first + (split * splits.tiles_each + n) * TILE;
        if (start >= splits.end) {
            break;
        }
        let count = min(TILE, splits.end - start);
        for (var i = local; i < shared_by * TILE; i += 256u) {
            let h = i / TILE;
            let j = i % TILE;
            var score = LEAST;
            if (j < count) {
                let at = ((start + j) * params.kv_heads + kv_head) * (dim / 8u);
                score = 0.0;
                for (var d = 0u; d < dim / 8u; d++) {
                    let k = keys[at + d];
                    score += dot(vec4<f32>(unpack2x16float(k.x), unpack2x16float(k.y)), query[h * quads + 2u * d])
                        + dot(vec4<f32>(unpack2x16float(k.z), unpack2x16float(k.w)), query[h * quads + 2u * d + 1u]);
                }
            }
            scores[i] = score;
        }
        workgroupBarrier();
        if (local < shared_by) {
            var most = highest[local];
            for (var j = 0u; j < TILE; j++) {
                most = max(most, scores[local * TILE + j]);
            }
            shrink[local] = exp(highest[local] - most);
            highest[local] = most;
        }
        workgroupBarrier();
        for (var i = local; i < shared_by * TILE; i += 256u) {
            scores[i] = select(0.0, exp(scores[i] - highest[i / TILE]), i % TILE < count);
        }
        workgroupBarrier();
        if (local < shared_by) {
            var sum = total[local] * shrink[local];
            for (var j = 0u; j < TILE; j++) {
                sum += scores[local * TILE + j];
            }
            total[local] = sum;
        }
        for (var n = 0u; n < 4u; n++) {
            let item = local + n * 256u;
            if (item < items) {
                let h = item / pairs;
                var sum = sums[n] * shrink[h];
                var at = (start * params.kv_heads + kv_head) * pairs + item % pairs;
                for (var j = 0u; j < count; j++) {
                    sum += scores[h * TILE + j] * unpack2x16float(values[at]);
                    at += params.kv_heads * pairs;
                }
                sums[n] = sum;
            }
        }
        workgroupBarrier();
    }
    for (var n = 0u; n < 4u; n++) {
        let item = local + n * 256u;
        if (item < items) {
            let head = kv_head * shared_by + item / pairs;
            let to = (head * splits.count + split) * (dim + 2u) + 2u * (item % pairs);
            partial[to] = sums[n].x;
            partial[to + 1u] = sums[n].y;
        }
    }
    if (local < shared_by) {
        let to = ((kv_head * shared_by + local) * splits.count + split) * (dim + 2u) + dim;
        partial[to] = highest[local];
        partial[to + 1u] = total[local];
    }
}
