// A tile of ROWS rows of weights by TOKENS rows of f16 activations on cooperative matrices of 16 x
// 16: f16 products, f32 sums. Four subgroups of 32, two by two, each sum 64 rows by TOKENS / 2
// tokens.
//
// A step multiplies 32 columns. What a step needs is in registers when the step before it
// multiplies: activations as they are, weights as they are stored, for two steps at a time (a piece
// of shared/words.wgsl holds sixteen columns of an even step and sixteen of the odd one after it).
// They are unpacked on their way into workgroup memory, of which there is one stage: two workgroups
// share a multiprocessor and hide each other's barriers.
//
// The kernel defines `x_row(i)`, the row of activations for row `i` of the tile, and `emit(row,
// token, low, high)`, which receives the sums of the tile's rows `row` and `row + HALF`.
// Activations are bound as `x`, eight f16 in each vec4.

const THREADS: u32 = 128u;
const ROWS: u32 = 128u;
const HALF: u32 = 32u;
// {blocks} blocks of 16 for each of two subgroups.
const TOKENS: u32 = 32u * {blocks}u;
// Tokens of the narrowest tile.
const NARROW: u32 = 64u;
// Eights from one row to the next: four hold a step's columns, the fifth keeps rows in different
// banks. The same in vec4s.
const STRIDE: u32 = 5u;
const QUADS: u32 = 10u;
// Eights of sixteen rows.
const BLOCK: u32 = 80u;

alias Inputs = coop_mat16x16<f16, A>;
alias Weights = coop_mat16x16<f16, B>;
alias Outputs = coop_mat16x16<f32, C>;

// Stored and loaded 16 bytes at a time.
struct Eight { a: vec4<f16>, b: vec4<f16> }

// [token][column] and [row][column].
var<workgroup> coop_x: array<Eight, 32u * {blocks}u * 5u>;
var<workgroup> coop_w: array<Eight, 640>;
// A block of sums for each subgroup, [token][row]. Twice as much, and an H200 runs only one workgroup
// at a time on a multiprocessor.
var<workgroup> coop_out: array<f32, 1024>;

// Sixteen weights of a row.
struct Sixteen { first: Eight, second: Eight }

fn eight(v: vec4<u32>) -> Eight {
    let a = vec4<u16>(vec4<u32>(v.x, v.x >> 16u, v.y, v.y >> 16u));
    let b = vec4<u16>(vec4<u32>(v.z, v.z >> 16u, v.w, v.w >> 16u));
    return Eight(bitcast<vec4<f16>>(a), bitcast<vec4<f16>>(b));
}

fn four(word: u32, scale: f32, low: f32) -> vec4<f16> {
    return vec4<f16>(fma(vec4<f32>(unpack4xU8(word)), vec4<f32>(scale), vec4<f32>(low)));
}

// scale * q + low for sixteen unsigned bytes.
fn sixteen(q: vec4<u32>, scale: f32, low: f32) -> Sixteen {
    return Sixteen(Eight(four(q.x, scale, low), four(q.y, scale, low)),
        Eight(four(q.z, scale, low), four(q.w, scale, low)));
}

fn four_signed(word: u32, scale: f32) -> vec4<f16> {
    return vec4<f16>(vec4<f32>(unpack4xI8(word)) * scale);
}

// scale * q for sixteen signed bytes.
fn sixteen_signed(q: vec4<u32>, scale: f32) -> Sixteen {
    return Sixteen(Eight(four_signed(q.x, scale), four_signed(q.y, scale)),
        Eight(four_signed(q.z, scale), four_signed(q.w, scale)));
}

// Where this invocation puts the weights that it fetches: the row of the tile; another goes HALF
// further. The order avoids bank conflicts.
fn fetched_row(local: u32) -> u32 {
    let q = local / 2u;
    let row = (q & 56u) | ((q & 2u) << 1u) | (q & 1u) | ((q & 4u) >> 1u);
    return row + (row & 32u);
}

// The same for its first row of activations; others go 32 further each.
fn fetched_token(local: u32) -> u32 {
    let q = local / 4u;
    return (q & 24u) | ((q & 1u) << 2u) | ((q & 6u) >> 1u);
}

// Sixteen tokens from `token` on by sixteen rows from `row` on, and those HALF further.
fn finish(low: Outputs, high: Outputs, row: u32, token: u32, local: u32) {
    let at = (local / 32u) * 256u;
    coopStoreT(low, &coop_out[at], 16u);
    workgroupBarrier();
    var kept: array<f32, 8>;
    for (var i = 0u; i < 8u; i++) {
        kept[i] = coop_out[at + local % 32u + i * 32u];
    }
    workgroupBarrier();
    coopStoreT(high, &coop_out[at], 16u);
    workgroupBarrier();
    for (var i = 0u; i < 8u; i++) {
        let e = local % 32u + i * 32u;
        emit(row + e % 16u, token + e / 16u, kept[i], coop_out[at + e]);
    }
    workgroupBarrier();
}

// This invocation fetches `low_row` of `low_matrix` and `high_row` of `high_matrix`, whose bases
// are vec4s. Sums over the columns 64 * begin .. 64 * end of `units` * 32, where end > begin. Must
// be reached by the whole workgroup.
fn coop_tile(low_matrix: Matrix, low_row: u32, high_matrix: Matrix, high_row: u32, x_stride: u32,
        begin: u32, end: u32, units: u32, local: u32) {
//!repeat t in {blocks}
//!repeat r in 2
    var low{t}{r}: Outputs;
    var high{t}{r}: Outputs;
//!end
//!end
    let subgroup = local / 32u;
    let x_from = (subgroup / 2u) * (TOKENS / 2u) * STRIDE;
    let w_from = (subgroup % 2u) * 64u * STRIDE;
    let part = local % 2u;
    let w_to = fetched_row(local) * STRIDE + part * 2u;
    let x_to = fetched_token(local) * STRIDE + local % 4u;
//!repeat t in {blocks}
    let at{t} = x_row(fetched_token(local) + {t}u * 32u) * x_stride + local % 4u;
    var x{t} = x[at{t} + begin * 8u];
//!end
    var low_raw = raw_at(low_matrix, low_row, begin * 2u + part);
    var high_raw = raw_at(high_matrix, high_row, begin * 2u + part);
    for (var group = begin; group < end; group++) {
        let piece = group * 2u + part;
//!repeat step in 2
        {
            let low = half_{step}(low_raw, piece);
            coop_w[w_to] = low.first;
            coop_w[w_to + 1u] = low.second;
            let high = half_{step}(high_raw, piece);
            coop_w[w_to + HALF * STRIDE] = high.first;
            coop_w[w_to + HALF * STRIDE + 1u] = high.second;
//!repeat t in {blocks}
            coop_x[x_to + {t}u * 2u * BLOCK] = eight(x{t});
//!end
        }
        workgroupBarrier();
        {
            // Past the last columns, the last ones are fetched again and not used.
            let next = min(group * 2u + {step}u + 1u, units - 1u) * 4u;
//!repeat t in {blocks}
            x{t} = x[at{t} + next];
//!end
            // A row may end with an even step. Weights are whole blocks and go on.
            if ({step}u == 0u && group * 2u + 1u >= units) {
//!repeat t in {blocks}
                x{t} = vec4<u32>(0u);
//!end
            }
            if ({step}u == 1u) {
                let ahead = min(group + 1u, end - 1u) * 2u + part;
                low_raw = raw_at(low_matrix, low_row, ahead);
                high_raw = raw_at(high_matrix, high_row, ahead);
            }
        }
//!repeat k in 2
        {
//!repeat t in {blocks}
            let a{t} = coopLoadT<Inputs>(&coop_x[x_from + {t}u * BLOCK + {k}u * 2u].a, QUADS);
//!end
//!repeat r in 2
            let b{r} = coopLoad<Weights>(&coop_w[w_from + {r}u * BLOCK + {k}u * 2u].a, QUADS);
            let c{r} = coopLoad<Weights>(&coop_w[w_from + ({r}u + 2u) * BLOCK + {k}u * 2u].a, QUADS);
//!end
//!repeat t in {blocks}
//!repeat r in 2
            low{t}{r} = coopMultiplyAdd(a{t}, b{r}, low{t}{r});
            high{t}{r} = coopMultiplyAdd(a{t}, c{r}, high{t}{r});
//!end
//!end
        }
//!end
        workgroupBarrier();
//!end
    }
    let row = (subgroup % 2u) * 64u;
    let token = (subgroup / 2u) * (TOKENS / 2u);
//!repeat t in {blocks}
//!repeat r in 2
    finish(low{t}{r}, high{t}{r}, row + {r}u * 16u, token + {t}u * 16u, local);
//!end
//!end
}
