// A column of a value head's state per team of 32 invocations, each of which keeps every 32nd key. The
// grid is one workgroup per eight columns of a head.
//
// With the decayed state D, and a, b, c, kk and qq for the sums of D k, D q, k q, k k and q q over
// the keys as they are stored, what is learned and the result need no further sum:
//   change = beta (v - a / |k|); result = (b + c change / |k|) / |q|

var<workgroup> fours: array<vec4<f32>, 512>;
var<workgroup> ones: array<f32, 512>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let groups = (params.value_dim + 7u) / 8u;
    let number = flat(group, grid);
    if (number >= params.heads * groups) {
        return;
    }
    let head = number / groups;
    let team = local / 32u;
    let lane = local & 31u;
    let value = number % groups * 8u + team;
    let inside = value < params.value_dim;
    let key_dim = min(params.key_dim, 256u);
    let key_head = head / (params.heads / params.key_heads);
    let keys_at = params.key_heads * key_dim;
    let at = head * key_dim * params.value_dim + value;
    var s: array<f32, 8>;
    if (inside && now.position > 0u) {
        let first = entry(now.position) + at;
        for (var j = 0u; j < 8u; j++) {
            if (lane + 32u * j < key_dim) {
                s[j] = states[first + (lane + 32u * j) * params.value_dim];
            }
        }
    }
    let rate = -exp(decays[head]);
    let column = head * params.value_dim + value;
    for (var t = 0u; t < now.tokens; t++) {
        let row = t * params.x_stride;
        let q_at = row + key_head * key_dim;
        let gate = t * params.gates_stride + head;
        let a = gates[gate + params.heads] + shifts[head];
        let decay = exp(rate * softplus(a));
        var k: array<f32, 8>;
        var four = vec4<f32>(0.0);
        var qq = 0.0;
        for (var j = 0u; j < 8u; j++) {
            let i = lane + 32u * j;
            if (i < key_dim) {
                let q = x[q_at + i];
                k[j] = x[q_at + keys_at + i];
                s[j] *= decay;
                four += vec4<f32>(s[j], s[j], k[j], k[j]) * vec4<f32>(k[j], q, q, k[j]);
                qq += q * q;
            }
        }
        var v = 0.0;
        if (inside) {
            v = x[row + 2u * keys_at + column];
        }
        // Two halves in turns, so that nobody overwrites what others still read.
        let first = (t & 1u) * 256u + team * 32u;
        fours[first + lane] = four;
        ones[first + lane] = qq;
        workgroupBarrier();
        four = vec4<f32>(0.0);
        qq = 0.0;
        for (var i = 0u; i < 32u; i++) {
            four += fours[first + i];
            qq += ones[first + i];
        }
        let beta = 1.0 / (1.0 + exp(-gates[gate]));
        let q_factor = 1.0 / (sqrt(qq + 1e-6) * sqrt(f32(key_dim)));
        let k_factor = 1.0 / sqrt(four.w + 1e-6);
        let change = (v - four.x * k_factor) * beta * k_factor;
        for (var j = 0u; j < 8u; j++) {
            s[j] += k[j] * change;
        }
        if (lane == 0u && inside) {
            result[t * params.result_stride + column] = (four.y + four.z * change) * q_factor;
        }
    }
    if (inside) {
        let to = entry(now.position + now.tokens) + at;
        for (var j = 0u; j < 8u; j++) {
            if (lane + 32u * j < key_dim) {
                states[to + (lane + 32u * j) * params.value_dim] = s[j];
            }
        }
    }
}
