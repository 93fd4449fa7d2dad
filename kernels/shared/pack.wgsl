// Packs activations for shared/pieces.wgsl. A vector of `pieces` pieces (a pair of pieces is 64
// elements) has 13 vec4s per piece: the high bytes of the first sixteens, then of the second; the
// low bytes likewise; (scale, scale, sum, sum); and the unchanged elements, in order. A rounded
// element is scale * (256 * high + low), where both bytes are signed. If one of sixteen elements is
// not finite, their scale is NaN, and so is every result.

const NOT_A_NUMBER: u32 = 0x7fc00000u;

// The bits of the elements' magnitudes. They are ordered as the magnitudes are, with infinity and then
// NaN last.
fn magnitudes(v: vec4<f32>) -> vec4<u32> {
    return bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu);
}

// Writes elements 16 t .. 16 t + 16 of the vector at vec4 `at` of `packed`, together with
// three more invocations: `k` of 0 to 3 writes v[k].
fn pack16(at: u32, pieces: u32, t: u32, v: array<vec4<f32>, 4>, k: u32) {
    let a = max(max(magnitudes(v[0]), magnitudes(v[1])), max(magnitudes(v[2]), magnitudes(v[3])));
    let bits = max(max(a.x, a.y), max(a.z, a.w));
    let most = bitcast<f32>(bits);
    // Below this the reciprocal is not finite; such a group counts as zero.
    let tiny = most < 1e-32;
    let inverse = select(32512.0 / most, 0.0, tiny);
    let second = (t >> 1u) & 1u;
    let piece = (t >> 2u) * 2u + (t & 1u);
    let high_at = (at + second * pieces + piece) * 4u;
    let low_at = high_at + pieces * 8u;
    let plain_at = (at + 5u * pieces) * 4u + t * 16u + k * 4u;
    let mine = select(select(v[0], v[1], k == 1u), select(v[2], v[3], k == 3u), k >= 2u);
    let q = vec4<i32>(round(mine * inverse));
    let high = (q + vec4<i32>(128)) >> vec4<u32>(8u);
    packed[high_at + k] = pack4xI8(high);
    packed[low_at + k] = pack4xI8(q - (high << vec4<u32>(8u)));
    for (var i = 0u; i < 4u; i++) {
        packed[plain_at + i] = bitcast<u32>(mine[i]);
    }
    if (k == 0u) {
        let sum = vec4<i32>(round(v[0] * inverse)) + vec4<i32>(round(v[1] * inverse))
            + vec4<i32>(round(v[2] * inverse)) + vec4<i32>(round(v[3] * inverse));
        let scale = select(most / 32512.0, 0.0, tiny);
        let scales = (at + 4u * pieces + piece) * 4u + second;
        let bad = bits >= 0x7f800000u;
        let sums = scale * f32(sum.x + sum.y + sum.z + sum.w);
        packed[scales] = select(bitcast<u32>(scale), NOT_A_NUMBER, bad);
        packed[scales + 2u] = select(bitcast<u32>(sums), NOT_A_NUMBER, bad);
    }
}
