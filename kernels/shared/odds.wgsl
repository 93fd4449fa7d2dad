// The arithmetic of sampling, in integers only. src/infer/odds.rs explains keys, ranks and weights,
// and computes the same bits. Logits are read as bit patterns.
//!include shared/wide.wgsl
//!include shared/sample_params.wgsl

// Tokens that one workgroup handles.
const CHUNK: u32 = 1024u;
const FLOOR: u32 = 0x007fffffu;
const INFINITE: u32 = 0xff800000u;
const RANK_END: u32 = 0x200000u;
const NEVER: u32 = 0xffffffffu;
const FINE_BITS: u32 = 10u;
const FINE: u32 = 1024u;
const COARSE: u32 = 2048u;

// Offsets of the histograms of ranks, and of what was found in them, in words of one buffer.
const COUNTS: u32 = 0u;
const MASS_LOW: u32 = 2048u;
const MASS_HIGH: u32 = 4096u;
const FINE_K: u32 = 6144u;
const FINE_P: u32 = 7168u;
// The bin in which top-k or top-p ends, and what is needed of it (low, high).
const K_AT: u32 = 8192u;
const P_AT: u32 = 8196u;
// The last rank to keep, and how many of its tokens.
const CUT_AT: u32 = 8200u;
const BIN_WORDS: u32 = 8208u;

// Words of a chunk's part: at first its highest key and that token; later its number of tokens at
// the cut and the weight of those above it (low, high). The last word does not change: 1 if a logit
// of the chunk is infinite or NaN.
const PART: u32 = 4u;
const NON_FINITE: u32 = 3u;

// Offsets of what is remembered from token to token: the number of draws (low, high), the number of
// accepted tokens, then a ring of the last `window` of them.
const DRAWS: u32 = 0u;
const ACCEPTED: u32 = 2u;
const RING: u32 = 4u;

fn key_of(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return FLOOR;
    }
    if (magnitude == 0u) {
        return 0x80000000u;
    }
    return select(~bits, bits | 0x80000000u, bits == magnitude);
}

fn logit_of(key: u32) -> u32 {
    return select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u);
}

// An f32's bits as a multiple of 2^-unit, in two's complement.
fn fixed(bits: u32, unit: i32) -> vec2<u32> {
    let exponent = (bits >> 23u) & 0xffu;
    let digits = (bits & 0x7fffffu) | select(0x800000u, 0u, exponent == 0u);
    let shift = i32(max(exponent, 1u)) - 150 + unit;
    var size = vec2<u32>(0u);
    if (shift >= 40) {
        size = vec2<u32>(0xffffffffu, 0x7fffffffu);
    } else if (shift >= 32) {
        size.y = digits << u32(shift - 32);
    } else if (shift > 0) {
        size = vec2<u32>(digits << u32(shift), digits >> u32(32 - shift));
    } else if (shift > -24) {
        size.x = digits >> u32(-shift);
    }
    if ((bits & 0x80000000u) != 0u) {
        return minus(vec2<u32>(0u), size);
    }
    return size;
}

struct Ruler {
    max: u32,
    unit: i32,
    lift: u32,
    top: vec2<u32>,
}

fn ruler_of(max_key: u32) -> Ruler {
    let bits = logit_of(max_key);
    let exponent = i32(max((bits >> 23u) & 0xffu, 1u)) - 127;
    let unit = min(params.unit, 61 - exponent);
    return Ruler(max_key, unit, u32(params.unit - unit), fixed(bits, unit));
}

fn rank_of(ruler: Ruler, key: u32) -> u32 {
    if (key == FLOOR || ruler.max == INFINITE) {
        return select(NEVER, 0u, key == INFINITE);
    }
    let apart = minus(ruler.top, fixed(logit_of(key), ruler.unit));
    var below = 0xffffffffu;
    if ((apart.x | apart.y) == 0u) {
        below = 0u;
    } else if (apart.y == 0u && ruler.lift < 32u && apart.x <= (0xffffffffu >> ruler.lift)) {
        below = apart.x << ruler.lift;
    }
    let rank = product(below, params.scale).y >> 3u;
    return select(NEVER, rank, rank < RANK_END);
}

// a * x / 65536 of a 16-bit x.
fn times(a: u32, x: u32) -> u32 {
    return (a >> 16u) * x + (((a & 0xffffu) * x) >> 16u);
}

fn weight_of(rank: u32) -> u32 {
    if (rank >= RANK_END) {
        return 0u;
    }
    let x = rank & 0xffffu;
    var sum = 40133167u - times(4310560u, x);
    sum = 237977951u - times(sum, x);
    sum = 1031714237u - times(sum, x);
    sum = 2977043459u - times(sum, x);
    return (0x80000000u - (times(sum, x) >> 1u)) >> (rank >> 16u);
}
