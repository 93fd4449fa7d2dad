// How the lanes of a part of decode_attention.wgsl exchange scores and weights, by shuffles.
// Subgroups must have at least 32 invocations.
//!needs subgroups

// Weights by position (0 to 3) and head, and by head what earlier sums are multiplied with.
struct Weights { w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, less: vec4<f32> }

fn xor2(v: vec2<f32>, mask: u32) -> vec2<f32> {
    return vec2<f32>(subgroupShuffleXor(v.x, mask), subgroupShuffleXor(v.y, mask));
}

fn xor4(v: vec4<f32>, mask: u32) -> vec4<f32> {
    return vec4<f32>(xor2(v.xy, mask), xor2(v.zw, mask));
}

// Sums of each of 16 values over the lanes of a part, by halves: lane k gets the sum of value
// k % 16, which is of head k % 4 at position k / 4 % 4.
fn one_of_16(s0: vec4<f32>, s1: vec4<f32>, s2: vec4<f32>, s3: vec4<f32>, lanes: u32, local: u32) -> f32 {
    let by8 = (local & 8u) != 0u;
    let a = select(s0, s2, by8) + xor4(select(s2, s0, by8), 8u);
    let b = select(s1, s3, by8) + xor4(select(s3, s1, by8), 8u);
    let by4 = (local & 4u) != 0u;
    let c = select(a, b, by4) + xor4(select(b, a, by4), 4u);
    let by2 = (local & 2u) != 0u;
    let d = select(c.xy, c.zw, by2) + xor2(select(c.zw, c.xy, by2), 2u);
    let by1 = (local & 1u) != 0u;
    let e = select(d.x, d.y, by1) + subgroupShuffleXor(select(d.y, d.x, by1), 1u);
    return e + select(0.0, subgroupShuffleXor(e, 16u), lanes == 32u);
}

// The maximum of a head's four scores.
fn most_of_4(score: f32, local: u32) -> f32 {
    let most = max(score, subgroupShuffleXor(score, 4u));
    return max(most, subgroupShuffleXor(most, 8u));
}

// The sum of a head's four values.
fn sum_of_4(value: f32, local: u32) -> f32 {
    let sum = value + subgroupShuffleXor(value, 4u);
    return sum + subgroupShuffleXor(sum, 8u);
}

fn of_4(value: f32, first: u32) -> vec4<f32> {
    return vec4<f32>(subgroupShuffle(value, first), subgroupShuffle(value, first + 1u),
        subgroupShuffle(value, first + 2u), subgroupShuffle(value, first + 3u));
}

// `own` is the invocation's number in its subgroup.
fn to_all(weight: f32, less: f32, local: u32, own: u32) -> Weights {
    let base = own & 0xfffffff0u;
    return Weights(of_4(weight, base), of_4(weight, base + 4u), of_4(weight, base + 8u), of_4(weight, base + 12u),
        of_4(less, base));
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32,
        @builtin(subgroup_invocation_id) own: u32) {
    attend(group, local, own);
}
