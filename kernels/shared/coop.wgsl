// A tile of SIDE rows of weights by TOKENS rows of f16 activations on cooperative matrices, 32
// columns at a time: f16 products, f32 sums. There are eight subgroups; each sums two stripes of
// BLOCK rows (`low` in the tile's first half, `high` in its second) by COUNT * BLOCK tokens. While
// some columns are multiplied, the next ones are fetched. The kernel defines `units()` and
// `emit(row, token, low, high)`, which receives the sums of row `row` and of row `row + HALF`.

const SIDE: u32 = 8u * BLOCK;
const HALF: u32 = 4u * BLOCK;
const TOKENS: u32 = 2u * COUNT * BLOCK;
const THREADS: u32 = 8u * LANES;
// Invocations that fetch the 32 columns of a row together, and the quads that each fetches.
const PARTS: u32 = THREADS / SIDE;
const QUADS: u32 = 8u / PARTS;
// vec4s from one row to the next: 8 hold columns, the others keep rows in different banks.
const STRIDE: u32 = 10u;
const W_STAGE: u32 = SIDE * STRIDE;
const X_STAGE: u32 = TOKENS * STRIDE;

// Two stages, [row][column].
var<workgroup> coop_w: array<vec4<f16>, 2u * W_STAGE>;
var<workgroup> coop_x: array<vec4<f16>, 2u * X_STAGE>;
// A block of sums for each subgroup, [token][row].
var<workgroup> coop_out: array<f32, 8u * BLOCK * BLOCK>;

// The row of the tile that this invocation fetches: a row of weights, and if it is below TOKENS
// also a row of activations.
fn fetched(local: u32) -> u32 {
    return local / PARTS;
}

fn finish(low: Outputs, high: Outputs, local: u32, block: u32) {
    let subgroup = local / LANES;
    let at = subgroup * BLOCK * BLOCK;
    coopStore(low, &coop_out[at], BLOCK);
    workgroupBarrier();
    var kept: array<f32, 8>;
    for (var i = 0u; i < 8u; i++) {
        kept[i] = coop_out[at + local % LANES + i * LANES];
    }
    workgroupBarrier();
    coopStore(high, &coop_out[at], BLOCK);
    workgroupBarrier();
    for (var i = 0u; i < 8u; i++) {
        let e = local % LANES + i * LANES;
        let row = (subgroup % 4u) * BLOCK + e % BLOCK;
        let token = ((subgroup / 4u) * COUNT + block) * BLOCK + e / BLOCK;
        emit(row, token, kept[i], coop_out[at + e]);
    }
    workgroupBarrier();
}

// This invocation fetches `row` of `m` and the activations from vec4 `x_at` on. Must be reached by
// the whole workgroup.
fn coop_tile(m: Matrix, row: u32, x_at: u32, local: u32) {
    var low0: Outputs; var low1: Outputs; var low2: Outputs; var low3: Outputs;
    var high0: Outputs; var high1: Outputs; var high2: Outputs; var high3: Outputs;
    let subgroup = local / LANES;
    let w_at = (subgroup % 4u) * BLOCK * STRIDE;
    let b_at = (subgroup / 4u) * COUNT * BLOCK * STRIDE;
    let first = (local % PARTS) * QUADS;
    let to = fetched(local) * STRIDE + first;
    let feeds = fetched(local) < TOKENS;
    let count = min(units(), arrayLength(&x));

    let begin = unit_at(m, row, 0u);
    for (var i = 0u; i < QUADS; i++) {
        coop_w[to + i] = vec4<f16>(quad(begin, first + i));
        if (feeds) {
            coop_x[to + i] = x[x_at + first + i];
        }
    }
    workgroupBarrier();
    for (var unit = 0u; unit < count; unit++) {
        let w_now = (unit % 2u) * W_STAGE + w_at;
        let x_now = (unit % 2u) * X_STAGE + b_at;
        let w_next = (1u - unit % 2u) * W_STAGE + to;
        let x_next = (1u - unit % 2u) * X_STAGE + to;
        // Past the last columns, they are fetched again and not used.
        let next = min(unit + 1u, count - 1u);
        let u = unit_at(m, row, next);
        let ahead = x_at + next * 8u + first;
        let w0 = vec4<f16>(quad(u, first));
        let w1 = vec4<f16>(quad(u, first + 1u));
        let w2 = vec4<f16>(quad(u, first + 2u));
        let w3 = vec4<f16>(quad(u, first + 3u));
        let x0 = x[ahead];
        let x1 = x[ahead + 1u];
        let x2 = x[ahead + 2u];
        let x3 = x[ahead + 3u];
        for (var k = 0u; k < 8u; k += BLOCK / 4u) {
            let a = coopLoadT<Weights>(&coop_w[w_now + k], STRIDE);
            let b = coopLoadT<Weights>(&coop_w[w_now + HALF * STRIDE + k], STRIDE);
            let c0 = coopLoad<Inputs>(&coop_x[x_now + k], STRIDE);
            low0 = coopMultiplyAdd(a, c0, low0);
            high0 = coopMultiplyAdd(b, c0, high0);
            let c1 = coopLoad<Inputs>(&coop_x[x_now + BLOCK * STRIDE + k], STRIDE);
            low1 = coopMultiplyAdd(a, c1, low1);
            high1 = coopMultiplyAdd(b, c1, high1);
            if (COUNT > 2u) {
                let c2 = coopLoad<Inputs>(&coop_x[x_now + 2u * BLOCK * STRIDE + k], STRIDE);
                low2 = coopMultiplyAdd(a, c2, low2);
                high2 = coopMultiplyAdd(b, c2, high2);
                let c3 = coopLoad<Inputs>(&coop_x[x_now + 3u * BLOCK * STRIDE + k], STRIDE);
                low3 = coopMultiplyAdd(a, c3, low3);
                high3 = coopMultiplyAdd(b, c3, high3);
            }
        }
        coop_w[w_next] = w0;
        coop_w[w_next + 1u] = w1;
        coop_w[w_next + 2u] = w2;
        coop_w[w_next + 3u] = w3;
        if (feeds) {
            coop_x[x_next] = x0;
            coop_x[x_next + 1u] = x1;
            coop_x[x_next + 2u] = x2;
            coop_x[x_next + 3u] = x3;
        }
        for (var i = 4u; i < QUADS; i++) {
            coop_w[w_next + i] = vec4<f16>(quad(u, first + i));
            if (feeds) {
                coop_x[x_next + i] = x[ahead + i];
            }
        }
        workgroupBarrier();
    }
    finish(low0, high0, local, 0u);
    finish(low1, high1, local, 1u);
    if (COUNT > 2u) {
        finish(low2, high2, local, 2u);
        finish(low3, high3, local, 3u);
    }
}
