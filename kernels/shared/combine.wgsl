// The body of decode_combine.wgsl and decode_combine_sinks.wgsl.
//!include shared/{step}.wgsl
//!include shared/splits.wgsl
//!include shared/pack.wgsl
//!include shared/decode_combine_params.wgsl

@group(1) @binding(0) var<storage, read> partial: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read_write> packed: array<u32>;

const LEAST: f32 = -3.0e38;

// By group of splits and vec4 of the elements: values, (highest score, sum of weights).
var<workgroup> parts: array<vec4<f32>, 256>;
var<workgroup> weights: array<vec2<f32>, 256>;
var<workgroup> outs: array<vec4<f32>, 16>;

// A split's (highest score, sum of weights) of a head, and four of its values.
struct Part { weight: vec2<f32>, value: vec4<f32> }

// Where the token's parts begin.
var<private> partial_at: u32;

// Past the last split it is empty.
fn part_at(head: u32, split: u32, count: u32, column: u32) -> Part {
    let at = partial_at + (head * count + min(split, count - 1u)) * (params.head_dim / 4u + 1u);
    let weight = partial[at + params.head_dim / 4u].xy;
    let value = partial[at + column];
    if (split >= count) {
        return Part(vec2<f32>(LEAST, 0.0), vec4<f32>(0.0));
    }
    return Part(weight, value);
}

// Merges parts `first`, `first + step`, `first + 2 step` and `first + 3 step` into the first.
fn merge(first: u32, step: u32) {
    let w = array<vec2<f32>, 4>(weights[first], weights[first + step], weights[first + 2u * step], weights[first + 3u * step]);
    let most = max(max(w[0].x, w[1].x), max(w[2].x, w[3].x));
    let factor = exp(vec4<f32>(w[0].x, w[1].x, w[2].x, w[3].x) - vec4<f32>(most));
    parts[first] = parts[first] * factor.x + parts[first + step] * factor.y
        + parts[first + 2u * step] * factor.z + parts[first + 3u * step] * factor.w;
    weights[first] = vec2<f32>(most, dot(vec4<f32>(w[0].y, w[1].y, w[2].y, w[3].y), factor));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    take_row(group.y);
    partial_at = group.y * params.heads * params.splits_max * (params.head_dim / 4u + 1u);
    let splits = splits_of(position_of(group.y), params.window, params.splits_max);
    let count = min(splits.count, arrayLength(&partial));
    let element = group.x * 64u + local % 16u * 4u;
    let head = element / params.head_dim;
    // Every sixteenth split, four of them at a time, as a running softmax.
    var most = LEAST;
    var total = 0.0;
    var value = vec4<f32>(0.0);
    if (head < params.heads) {
        if (local < 16u) {
            let before = begun(head);
            most = before.x;
            total = before.y;
        }
        let column = element % params.head_dim / 4u;
        for (var base = local / 16u; base < count; base += 64u) {
            let a = part_at(head, base, count, column);
            let b = part_at(head, base + 16u, count, column);
            let c = part_at(head, base + 32u, count, column);
            let d = part_at(head, base + 48u, count, column);
            let scores = vec4<f32>(a.weight.x, b.weight.x, c.weight.x, d.weight.x);
            let highest = max(most, max(max(scores.x, scores.y), max(scores.z, scores.w)));
            let less = exp(most - highest);
            let factor = exp(scores - vec4<f32>(highest));
            most = highest;
            total = total * less + dot(vec4<f32>(a.weight.y, b.weight.y, c.weight.y, d.weight.y), factor);
            value = value * less + a.value * factor.x + b.value * factor.y + c.value * factor.z + d.value * factor.w;
        }
    }
    parts[local] = value;
    weights[local] = vec2<f32>(most, total);
    workgroupBarrier();
    if (local < 64u) {
        merge(local, 64u);
    }
    workgroupBarrier();
    if (local < 16u) {
        merge(local, 16u);
        outs[local] = select(vec4<f32>(0.0), parts[local] / weights[local].y, head < params.heads);
    }
    workgroupBarrier();
    if (local < 16u) {
        let i = local & 12u;
        pack16(group.y * params.pieces * 13u, params.pieces, group.x * 4u + local / 4u,
            array<vec4<f32>, 4>(outs[i], outs[i + 1u], outs[i + 2u], outs[i + 3u]), local & 3u);
    }
}
