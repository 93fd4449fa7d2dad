// How the lanes of a part of decode_attention.wgsl exchange scores and weights, in workgroup memory.
// Same names as in attend_subgroup.wgsl. All must be reached by the whole workgroup.

// Weights by position (0 to 3) and head, and by head what earlier sums are multiplied with.
struct Weights { w0: vec4<f32>, w1: vec4<f32>, w2: vec4<f32>, w3: vec4<f32>, less: vec4<f32> }

// Sums of each of 16 values over the lanes of a part: lane k gets the sum of value k % 16, which is
// of head k % 4 at position k / 4 % 4.
fn one_of_16(s0: vec4<f32>, s1: vec4<f32>, s2: vec4<f32>, s3: vec4<f32>, lanes: u32, local: u32) -> f32 {
    scratch[4u * local] = s0;
    scratch[4u * local + 1u] = s1;
    scratch[4u * local + 2u] = s2;
    scratch[4u * local + 3u] = s3;
    workgroupBarrier();
    let at = 4u * (local & ~(lanes - 1u)) + local / 4u % 4u;
    var sum = 0.0;
    for (var i = 0u; i < lanes; i++) {
        sum += scratch[at + 4u * i][local % 4u];
    }
    workgroupBarrier();
    return sum;
}

// The maximum of a head's four scores.
fn most_of_4(score: f32, local: u32) -> f32 {
    team_sums[local] = score;
    workgroupBarrier();
    let at = local & 0xf3u;
    let most = max(max(team_sums[at], team_sums[at + 4u]), max(team_sums[at + 8u], team_sums[at + 12u]));
    workgroupBarrier();
    return most;
}

// The sum of a head's four values.
fn sum_of_4(value: f32, local: u32) -> f32 {
    team_sums[local] = value;
    workgroupBarrier();
    let at = local & 0xf3u;
    let sum = (team_sums[at] + team_sums[at + 4u]) + (team_sums[at + 8u] + team_sums[at + 12u]);
    workgroupBarrier();
    return sum;
}

fn of_4(at: u32) -> vec4<f32> {
    return vec4<f32>(team_sums[at], team_sums[at + 1u], team_sums[at + 2u], team_sums[at + 3u]);
}

fn to_all(weight: f32, less: f32, local: u32, own: u32) -> Weights {
    team_sums[local] = weight;
    team_sums[128u + local] = less;
    workgroupBarrier();
    let base = local & 0xf0u;
    let given = Weights(of_4(base), of_4(base + 4u), of_4(base + 8u), of_4(base + 12u), of_4(128u + base));
    workgroupBarrier();
    return given;
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    attend(group, local, local);
}
