// Sampling, the first pass: each logit's key, with recent tokens penalised; the highest key of each
// chunk; and whether all of its logits are finite. Clears the histograms for the passes that
// follow.
// Grid: one chunk of the vocabulary per workgroup.
//!include shared/odds.wgsl
//!include shared/highest.wgsl

@group(1) @binding(0) var<storage, read> logits: array<u32>;
@group(1) @binding(1) var<storage, read> memory: array<u32>;
@group(1) @binding(2) var<storage, read_write> keys: array<u32>;
@group(1) @binding(3) var<storage, read_write> bins: array<u32>;
@group(1) @binding(4) var<storage, read_write> parts: array<u32>;

// A bit for each token of the chunk that is recent. A token that occurs twice is penalised once.
var<workgroup> recent: array<atomic<u32>, 32>;
var<workgroup> non_finite: atomic<u32>;

// An f32's exponent bits, which are all ones if it is infinite or NaN.
const INFINITY: u32 = 0x7f800000u;

// The product of two f32s, of which the second is positive, rounded by IEEE 754: to nearest, ties
// to even.
fn times_f32(bits: u32, factor: u32) -> u32 {
    let a = bits & 0x7fffffffu;
    let sign = bits & 0x80000000u;
    if (a == 0u || a >= 0x7f800000u) {
        return bits;
    }
    if (factor >= 0x7f800000u) {
        return sign | 0x7f800000u;
    }
    // Subnormals get a leading one and an exponent below 1.
    let a_shift = select(0u, countLeadingZeros(a) - 8u, a < 0x800000u);
    let b_shift = select(0u, countLeadingZeros(factor) - 8u, factor < 0x800000u);
    let a_digits = select((a & 0x7fffffu) | 0x800000u, a << a_shift, a < 0x800000u);
    let b_digits = select((factor & 0x7fffffu) | 0x800000u, factor << b_shift, factor < 0x800000u);
    var exponent = i32(max(a >> 23u, 1u) + max(factor >> 23u, 1u)) - i32(a_shift + b_shift) - 127;
    // Between 2^46 and 2^48; normalised to start at 2^47.
    var full = product(a_digits, b_digits);
    if (full.y >= 0x8000u) {
        exponent += 1;
    } else {
        full = plus(full, full);
    }
    // The upper 32 of its 48 bits. If a lost bit is set, so is the last bit.
    let upper = (full.y << 16u) | (full.x >> 16u) | select(0u, 1u, (full.x & 0xffffu) != 0u);
    if (exponent >= 255) {
        return sign | 0x7f800000u;
    }
    // 24 bits are kept, fewer for a subnormal.
    let drop = u32(8 + max(1 - exponent, 0));
    if (drop > 32u) {
        return sign;
    }
    let half = 1u << (drop - 1u);
    let rest = upper & (half | (half - 1u));
    var digits = select(0u, upper >> (drop & 31u), drop < 32u);
    if (rest > half || (rest == half && (digits & 1u) == 1u)) {
        digits += 1u;
    }
    // The leading one increments the exponent, and so does a carry, up to infinity.
    return sign | ((u32(max(exponent, 1) - 1) << 23u) + digits);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
        @builtin(local_invocation_index) local: u32) {
    if (params.greedy == 0u) {
        for (var i = group.x * 256u + local; i < BIN_WORDS; i += grid.x * 256u) {
            bins[i] = 0u;
        }
    }
    if (local < 32u) {
        atomicStore(&recent[local], 0u);
    }
    if (local == 0u) {
        atomicStore(&non_finite, 0u);
    }
    workgroupBarrier();
    if (local < min(memory[ACCEPTED], params.window)) {
        let token = memory[RING + local];
        if (token / CHUNK == group.x) {
            atomicOr(&recent[token % CHUNK / 32u], 1u << (token % 32u));
        }
    }
    workgroupBarrier();
    var best = 0u;
    var best_token = NEVER;
    for (var j = 0u; j < 4u; j++) {
        let place = j * 256u + local;
        let token = group.x * CHUNK + place;
        if (token < params.vocab) {
            var bits = logits[token];
            if ((bits & INFINITY) == INFINITY) {
                atomicStore(&non_finite, 1u);
            }
            if ((atomicLoad(&recent[place / 32u]) & (1u << (place % 32u))) != 0u) {
                // NaN is neither, and stays NaN.
                bits = times_f32(bits, select(params.penalty, params.penalty_inverse, bits < 0x80000000u));
            }
            let key = key_of(bits);
            if (params.greedy == 0u) {
                keys[token] = key;
            }
            if (key > best) {
                best = key;
                best_token = token;
            }
        }
    }
    let found = highest(best, best_token, local);
    if (local == 0u) {
        parts[group.x * PART] = found.x;
        parts[group.x * PART + 1u] = found.y;
        parts[group.x * PART + NON_FINITE] = atomicLoad(&non_finite);
    }
}
