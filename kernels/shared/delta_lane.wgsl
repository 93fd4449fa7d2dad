// A column of a value head's state per invocation, without barriers: for software adapters. The grid
// is one workgroup per 64 columns.

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    let column = flat(group, grid) * 64u + local;
    if (column >= params.heads * params.value_dim) {
        return;
    }
    let head = column / params.value_dim;
    let key_dim = min(params.key_dim, 256u);
    let key_head = head / (params.heads / params.key_heads);
    let keys_at = params.key_heads * key_dim;
    let at = head * key_dim * params.value_dim + column % params.value_dim;
    var s: array<f32, 256>;
    if (now.position > 0u) {
        let first = entry(now.position) + at;
        for (var i = 0u; i < key_dim; i++) {
            s[i] = states[first + i * params.value_dim];
        }
    }
    for (var t = 0u; t < now.tokens; t++) {
        let row = t * params.x_stride;
        let q_at = row + key_head * key_dim;
        let k_at = q_at + keys_at;
        var qq = 0.0;
        var kk = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let q = x[q_at + i];
            let k = x[k_at + i];
            qq += q * q;
            kk += k * k;
        }
        let q_factor = 1.0 / (sqrt(qq + 1e-6) * sqrt(f32(key_dim)));
        let k_factor = 1.0 / sqrt(kk + 1e-6);
        let gate = t * params.gates_stride + head;
        let beta = 1.0 / (1.0 + exp(-gates[gate]));
        let a = gates[gate + params.heads] + shifts[head];
        let decay = exp(-exp(decays[head]) * softplus(a));
        var known = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let kept = s[i] * decay;
            s[i] = kept;
            known += kept * (x[k_at + i] * k_factor);
        }
        let change = (x[row + 2u * keys_at + column] - known) * beta;
        var sum = 0.0;
        for (var i = 0u; i < key_dim; i++) {
            let next = s[i] + x[k_at + i] * k_factor * change;
            s[i] = next;
            sum += next * (x[q_at + i] * q_factor);
        }
        result[t * params.result_stride + column] = sum;
    }
    let to = entry(now.position + now.tokens) + at;
    for (var i = 0u; i < key_dim; i++) {
        states[to + i * params.value_dim] = s[i];
    }
}
