// Sampling, the last pass: finds the token at which the kept weights, summed in order of token id,
// pass a random number that depends on the seed and the count of draws. Chooses no token if a logit
// is not finite.
// Grid: one workgroup.
//!include shared/odds.wgsl
//!include shared/reach.wgsl
//!include shared/chosen.wgsl

@group(1) @binding(0) var<storage, read> ranks: array<u32>;
@group(1) @binding(1) var<storage, read> bins: array<u32>;
@group(1) @binding(2) var<storage, read> parts: array<u32>;
@group(1) @binding(3) var<storage, read> state: array<u32>;
@group(1) @binding(4) var<storage, read_write> memory: array<u32>;
@group(1) @binding(5) var<storage, read_write> tokens: array<u32>;
@group(1) @binding(6) var<storage, read_write> chosen: array<u32>;

// The draw's random bits, and how many tokens at the cut the found chunk keeps.
var<workgroup> bits: vec2<u32>;
var<workgroup> chunk_keep: u32;
var<workgroup> non_finite: atomic<u32>;

// a >> count, 0 < count < 32.
fn shifted(a: vec2<u32>, count: u32) -> vec2<u32> {
    return vec2<u32>((a.x >> count) | (a.y << (32u - count)), a.y >> count);
}

// SplitMix64 (Steele, Lea and Flood, 2014), as odds::random.
fn random(draw: vec2<u32>) -> vec2<u32> {
    let steps = product_low(plus(draw, vec2<u32>(1u, 0u)), vec2<u32>(0x7f4a7c15u, 0x9e3779b9u));
    var z = plus(vec2<u32>(params.seed_low, params.seed_high), steps);
    z = product_low(z ^ shifted(z, 30u), vec2<u32>(0x1ce4e5b9u, 0xbf58476du));
    z = product_low(z ^ shifted(z, 27u), vec2<u32>(0x133111ebu, 0x94d049bbu));
    return z ^ shifted(z, 31u);
}

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) local: u32) {
    let cut = bins[CUT_AT];
    let keep = bins[CUT_AT + 1u];
    var ties = 0u;
    var masses = array<vec2<u32>, 8>();
    if (local == 0u) {
        atomicStore(&non_finite, 0u);
    }
    workgroupBarrier();
    if (local * CHUNK < params.vocab) {
        atomicOr(&non_finite, parts[local * PART + NON_FINITE]);
        ties = parts[local * PART];
        masses[0] = vec2<u32>(parts[local * PART + 1u], parts[local * PART + 2u]);
    }
    let before = scan(vec2<u32>(ties, 0u), local).x;
    let kept = min(ties, keep - min(keep, before));
    masses[0] = plus(masses[0], product(kept, weight_of(cut)));
    if (local == 0u) {
        bits = random(vec2<u32>(memory[DRAWS], memory[DRAWS + 1u]));
    }
    scan(masses[0], local);
    let goal = plus(product_high(bits, lane_sums[255]), vec2<u32>(1u, 0u));
    reach(&masses, 1u, goal, local);
    // If nothing has a weight, no chunk is found, and the token is 0.
    let empty = reached == NEVER;
    let chunk = select(reached, 0u, empty);
    let chunk_goal = needed;
    if (local == chunk) {
        chunk_keep = kept;
    }
    workgroupBarrier();

    let first = chunk * CHUNK + local * 4u;
    var here = array<u32, 4>(NEVER, NEVER, NEVER, NEVER);
    ties = 0u;
    for (var j = 0u; j < 4u; j++) {
        if (first + j < params.vocab) {
            here[j] = ranks[first + j];
            ties += select(0u, 1u, here[j] == cut);
        }
    }
    var left = scan(vec2<u32>(ties, 0u), local).x;
    left = chunk_keep - min(chunk_keep, left);
    for (var j = 0u; j < 4u; j++) {
        let tie = here[j] == cut && left > 0u;
        left -= select(0u, 1u, tie);
        masses[j] = vec2<u32>(select(0u, weight_of(here[j]), here[j] < cut || tie), 0u);
    }
    reach(&masses, 4u, chunk_goal, local);
    if (local == 0u && state[0] == 0u && atomicLoad(&non_finite) != 0u) {
        refuse();
    } else if (local == 0u && state[0] == 0u) {
        let draws = plus(vec2<u32>(memory[DRAWS], memory[DRAWS + 1u]), vec2<u32>(1u, 0u));
        memory[DRAWS] = draws.x;
        memory[DRAWS + 1u] = draws.y;
        accept(select(chunk * CHUNK + reached, 0u, empty));
    }
}
