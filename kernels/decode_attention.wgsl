// Each token's attention, from its queries, keys and values. Queries and the new key are normalised
// (if asked) and rotated by the position; the new key and value are written to the cache as f16.
// Then follows, over one split of the positions and for up to four query heads of one key head, a
// running softmax (flash decoding: Dao et al., 2023). Its result is, for each head, the weighted
// values, the highest score and the sum of weights; decode_combine combines the splits.
//
// A part of the workgroup is 16 lanes, or 32 for heads of more than 128. It takes four positions at
// a time. A lane holds eight dimensions of the four heads and of their sums, so a key is read once
// for all four. The 16 scores are summed over the part so that each lane has one of them, and the
// weights go back to all lanes. The parts meet only at the end.
// Grid: in x, a workgroup for each (key head, split, four of its query heads); in y, tokens.
// head_dim is a multiple of 8, at most 256.
//!for step in -alone together
//!for team in subgroup group
//!include shared/{step}.wgsl
//!include shared/splits.wgsl
//!include shared/blocks.wgsl
//!include shared/softcap.wgsl
//!include shared/team_{team}.wgsl
//!include shared/attend_{team}.wgsl

struct Params {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    // Pairs that are rotated: (i, i + pairs).
    pairs: u32,
    // Positions that the token sees, including its own; 0 for all.
    window: u32,
    splits_max: u32,
    // 1 to use the norm weights.
    normed: u32,
    eps: f32,
    scale: f32,
    // Scores are capped to it; 0 for no cap.
    softcap: f32,
}

@group(0) @binding(1) var<uniform> params: Params;
// By token: queries, keys and values one after the other.
@group(1) @binding(0) var<storage, read> qkv: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read> q_norm: array<f32>;
@group(1) @binding(2) var<storage, read> k_norm: array<f32>;
// (cos, sin) by position and pair.
@group(1) @binding(3) var<storage, read> rope_table: array<vec2<f32>>;
@group(1) @binding(4) var<storage, read_write> keys: array<vec4<u32>>;
@group(1) @binding(5) var<storage, read_write> values: array<vec4<u32>>;
// By token, head and split: head_dim values, the highest score, the sum of weights, two unused.
@group(1) @binding(6) var<storage, read_write> partial: array<vec2<f32>>;

// The number of elements clamped in the cache, then the sequences' blocks.
struct Blocks { clamped: atomic<u32>, at: array<u32> }

@group(1) @binding(7) var<storage, read_write> cache_blocks: Blocks;

// Where the token's queries begin in `qkv`, in elements.
var<private> qkv_at: u32;

const LEAST: f32 = -3.0e38;
const HALF_MAX: f32 = 65504.0;

// The four heads, and the new key: normalised but for the factors in `factors`, and rotated.
var<workgroup> query: array<vec4<f32>, 256>;
var<workgroup> fresh: array<vec4<f32>, 64>;
// What the heads are multiplied with, and the key.
var<workgroup> factors: array<f32, 5>;
// What the parts give each other: 128 times four vec4s.
var<workgroup> scratch: array<vec4<f32>, 512>;
// By part and head, the highest score and the sum of weights.
var<workgroup> marks: array<vec2<f32>, 32>;

// Eight dimensions (a, b) of four heads.
struct Heads {
    a0: vec4<f32>, b0: vec4<f32>, a1: vec4<f32>, b1: vec4<f32>,
    a2: vec4<f32>, b2: vec4<f32>, a3: vec4<f32>, b3: vec4<f32>,
}

// Eight dimensions of the keys and values at four positions.
struct Rows {
    k0: vec4<u32>, k1: vec4<u32>, k2: vec4<u32>, k3: vec4<u32>,
    v0: vec4<u32>, v1: vec4<u32>, v2: vec4<u32>, v3: vec4<u32>,
}

// Where a lane's column is in the caches: `at` in a row of `stride` vec4s.
struct Column { at: u32, stride: u32 }

fn half_pair(v: vec2<f32>) -> u32 {
    return pack2x16float(clamp(v, vec2<f32>(-HALF_MAX), vec2<f32>(HALF_MAX)));
}

fn halves(a: vec4<f32>, b: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(half_pair(a.xy), half_pair(a.zw), half_pair(b.xy), half_pair(b.zw));
}

// Eight dimensions of the new key and value, in the cache's format.
fn new_key(column: u32) -> vec4<u32> {
    return halves(fresh[2u * column] * factors[4], fresh[2u * column + 1u] * factors[4]);
}

fn new_value(kv_head: u32, column: u32) -> vec4<u32> {
    let i = qkv_at / 4u + (params.heads + params.kv_heads + kv_head) * (params.head_dim / 4u) + 2u * column;
    return halves(qkv[i], qkv[i + 1u]);
}

// Whether one of eight f16s has the greatest magnitude, as a clamped value has.
fn brimful(v: vec4<u32>) -> bool {
    let low = (v & vec4<u32>(0x7fffu)) == vec4<u32>(0x7bffu);
    let high = (v & vec4<u32>(0x7fff0000u)) == vec4<u32>(0x7bff0000u);
    return any(low | high);
}

fn large(v: vec4<f32>) -> u32 {
    let over = select(vec4<u32>(0u), vec4<u32>(1u), abs(v) > vec4<f32>(HALF_MAX));
    return over.x + over.y + over.z + over.w;
}

// How many of eight dimensions of the new key and value must be clamped for the cache.
fn beyond(kv_head: u32, column: u32) -> u32 {
    let v = qkv_at / 4u + (params.heads + params.kv_heads + kv_head) * (params.head_dim / 4u) + 2u * column;
    return large(fresh[2u * column] * factors[4]) + large(fresh[2u * column + 1u] * factors[4])
        + large(qkv[v]) + large(qkv[v + 1u]);
}

// The blocks of the positions of a turn from `start`. Without a window, turns begin at multiples of
// their length, and no turn lies in two blocks.
fn blocks_of(start: u32) -> Span {
    if (params.window == 0u) {
        return span_within(start);
    }
    return span_at(start);
}

// The rows of four positions from `first` on. What is behind the last position is not used.
fn rows_at(span: Span, first: u32, column: Column) -> Rows {
    let r0 = row_of(span, first) * column.stride + column.at;
    let r1 = row_of(span, first + 1u) * column.stride + column.at;
    let r2 = row_of(span, first + 2u) * column.stride + column.at;
    let r3 = row_of(span, first + 3u) * column.stride + column.at;
    return Rows(keys[r0], keys[r1], keys[r2], keys[r3], values[r0], values[r1], values[r2], values[r3]);
}

// A row as it is from the token's own position on: its own, then zeros.
fn own_row(before: vec4<u32>, own: vec4<u32>, position: u32) -> vec4<u32> {
    let later = select(vec4<u32>(0u), own, position == now.position);
    return select(later, before, position < now.position);
}

fn with_own(rows: Rows, first: u32, key: vec4<u32>, value: vec4<u32>) -> Rows {
    return Rows(own_row(rows.k0, key, first), own_row(rows.k1, key, first + 1u),
        own_row(rows.k2, key, first + 2u), own_row(rows.k3, key, first + 3u),
        own_row(rows.v0, value, first), own_row(rows.v1, value, first + 1u),
        own_row(rows.v2, value, first + 2u), own_row(rows.v3, value, first + 3u));
}

// A lane's part of the scores of four heads with a key.
fn products(key: vec4<u32>, q: Heads) -> vec4<f32> {
    let a = vec4<f32>(unpack2x16float(key.x), unpack2x16float(key.y));
    let b = vec4<f32>(unpack2x16float(key.z), unpack2x16float(key.w));
    return vec4<f32>(dot(a, q.a0) + dot(b, q.b0), dot(a, q.a1) + dot(b, q.b1),
        dot(a, q.a2) + dot(b, q.b2), dot(a, q.a3) + dot(b, q.b3));
}

fn scaled(s: Heads, by: vec4<f32>) -> Heads {
    return Heads(s.a0 * by.x, s.b0 * by.x, s.a1 * by.y, s.b1 * by.y,
        s.a2 * by.z, s.b2 * by.z, s.a3 * by.w, s.b3 * by.w);
}

fn added(s: Heads, value: vec4<u32>, w: vec4<f32>) -> Heads {
    let a = vec4<f32>(unpack2x16float(value.x), unpack2x16float(value.y));
    let b = vec4<f32>(unpack2x16float(value.z), unpack2x16float(value.w));
    return Heads(s.a0 + a * w.x, s.b0 + b * w.x, s.a1 + a * w.y, s.b1 + b * w.y,
        s.a2 + a * w.z, s.b2 + b * w.z, s.a3 + a * w.w, s.b3 + b * w.w);
}

// How four elements of a head are rotated: which other ones are added, and the factors of both.
struct Turned { other: vec4<u32>, cos: vec4<f32>, sin: vec4<f32> }

fn turned(at: vec4<u32>) -> Turned {
    let pairs = vec4<u32>(params.pairs);
    let low = at < pairs;
    let inside = at < 2u * pairs;
    let pair = select(vec4<u32>(0u), select(at - pairs, at, low), inside)
        + vec4<u32>(now.position * params.pairs);
    let r0 = rope_table[pair.x];
    let r1 = rope_table[pair.y];
    let r2 = rope_table[pair.z];
    let r3 = rope_table[pair.w];
    let sin = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
    return Turned(select(at, select(at - pairs, at + pairs, low), inside),
        select(vec4<f32>(1.0), vec4<f32>(r0.x, r1.x, r2.x, r3.x), inside),
        select(vec4<f32>(0.0), select(sin, -sin, low), inside));
}

fn elements(base: u32, at: vec4<u32>) -> vec4<f32> {
    let i = vec4<u32>(base) + at;
    return vec4<f32>(qkv[i.x / 4u][i.x % 4u], qkv[i.y / 4u][i.y % 4u], qkv[i.z / 4u][i.z % 4u], qkv[i.w / 4u][i.w % 4u]);
}

fn q_weights(at: vec4<u32>) -> vec4<f32> {
    if (params.normed == 0u) {
        return vec4<f32>(1.0);
    }
    return vec4<f32>(q_norm[at.x], q_norm[at.y], q_norm[at.z], q_norm[at.w]);
}

fn k_weights(at: vec4<u32>) -> vec4<f32> {
    if (params.normed == 0u) {
        return vec4<f32>(1.0);
    }
    return vec4<f32>(k_norm[at.x], k_norm[at.y], k_norm[at.z], k_norm[at.w]);
}

// The sum of squares of a head becomes what it is multiplied with.
fn inverse_of(square: f32) -> f32 {
    return select(1.0, inverseSqrt(square / f32(params.head_dim) + params.eps), params.normed == 1u);
}

// The highest scores of a part, by head.
fn scores_of(part: u32) -> vec4<f32> {
    return vec4<f32>(marks[part * 4u].x, marks[part * 4u + 1u].x, marks[part * 4u + 2u].x, marks[part * 4u + 3u].x);
}

// `own` is the invocation's number in its subgroup.
fn attend(group: vec3<u32>, local: u32, own: u32) {
    take_row(group.y);
    list = list_of(group.y);
    qkv_at = group.y * (params.heads + 2u * params.kv_heads) * params.head_dim;
    let splits = splits_of(position_of(group.y), params.window, params.splits_max);
    let shared_by = params.heads / params.kv_heads;
    let fours = (shared_by + 3u) / 4u;
    // Another token has more splits than this one.
    if (group.x >= splits.count * fours * params.kv_heads) {
        return;
    }
    let four = group.x % fours;
    let split = group.x / fours % splits.count;
    let kv_head = group.x / fours / splits.count;
    let dim = min(params.head_dim, 256u);
    let words = dim / 8u;
    let begin = splits.first + split * splits.tiles_each * TILE;
    let end = min(splits.end, begin + splits.tiles_each * TILE);
    let owner = split + 1u == splits.count;

    // Lanes of a part, this one's column of eight dimensions, and the positions of a turn.
    let lanes = select(16u, 32u, words > 16u);
    let column = local & (lanes - 1u);
    let part = local / lanes;
    let turn = 512u / lanes;
    // A lane beyond the head reads the last column, and multiplies it with zeros.
    let place = Column(kv_head * words + min(column, words - 1u), params.kv_heads * words);

    let cached = row_of(span_within(now.position), now.position);
    var span = blocks_of(begin);

    // A team of 32 prepares a head. One past the last of this key head counts as zeros.
    let team = local / 32u;
    let lane = local & 31u;
    let real = 4u * four + team < shared_by;
    let head_at = qkv_at + (kv_head * shared_by + min(4u * four + team, shared_by - 1u)) * dim;
    let key_at = qkv_at + (params.heads + kv_head) * dim;
    var square = 0.0;
    var key_square = 0.0;
    for (var quad = lane; quad < dim / 4u; quad += 32u) {
        let at = vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u);
        let way = turned(at);
        let x = qkv[head_at / 4u + quad];
        let other = elements(head_at, way.other) * q_weights(way.other);
        var key = vec4<f32>(0.0);
        if (owner) {
            let x = qkv[key_at / 4u + quad];
            let other = elements(key_at, way.other) * k_weights(way.other);
            key_square += dot(x, x);
            key = x * k_weights(at) * way.cos + other * way.sin;
        }
        square += dot(x, x);
        query[team * 64u + quad] = x * q_weights(at) * way.cos + other * way.sin;
        if (owner && team == 0u) {
            fresh[quad] = key;
        }
    }
    if (params.normed == 1u) {
        square = sum32(square, local);
        key_square = sum32(key_square, local);
    }
    if (lane == 0u) {
        factors[team] = inverse_of(square) * select(0.0, params.scale, real);
        if (team == 0u) {
            factors[4] = inverse_of(key_square);
        }
    }
    workgroupBarrier();
    if (owner && four == 0u && local < words) {
        let to = (cached * params.kv_heads + kv_head) * words + local;
        let key = new_key(local);
        let value = new_value(kv_head, local);
        keys[to] = key;
        values[to] = value;
        if (brimful(key) || brimful(value)) {
            atomicAdd(&cache_blocks.clamped, beyond(kv_head, local));
        }
    }

    // What is beyond a head is multiplied with zeros.
    let inside = select(vec4<f32>(0.0), vec4<f32>(factors[0], factors[1], factors[2], factors[3]), column < words);
    let pair = 2u * min(column, words - 1u);
    let q = scaled(Heads(query[pair], query[pair + 1u], query[64u + pair], query[65u + pair],
        query[128u + pair], query[129u + pair], query[192u + pair], query[193u + pair]), inside);
    var most = LEAST;
    var total = 0.0;
    var sums: Heads;
    for (var start = begin; start < end; start += turn) {
        let first = start + 4u * part;
        var rows = rows_at(span, first, place);
        span = blocks_of(min(start + turn, now.position));
        // Positions from the token's own on are only in the last turn of the last split.
        if (start + turn > now.position) {
            let own_column = min(column, words - 1u);
            rows = with_own(rows, first, new_key(own_column), new_value(kv_head, own_column));
        }
        // The lane's own score is of one head, at one of the four positions.
        let sum = one_of_16(products(rows.k0, q), products(rows.k1, q), products(rows.k2, q),
            products(rows.k3, q), lanes, local);
        let score = softcapped(sum, params.softcap);
        let there = first + (column / 4u) % 4u < end;
        let highest = max(most, most_of_4(select(LEAST, score, there), local));
        let weight = select(0.0, exp(score - highest), there);
        let less = exp(most - highest);
        total = total * less + weight;
        most = highest;
        let given = to_all(weight, less, local, own);
        sums = scaled(sums, given.less);
        sums = added(sums, rows.v0, given.w0);
        sums = added(sums, rows.v1, given.w1);
        sums = added(sums, rows.v2, given.w2);
        sums = added(sums, rows.v3, given.w3);
    }

    // All parts relative to the highest score of all.
    total = sum_of_4(total, local);
    if (column < 4u) {
        marks[part * 4u + column] = vec2<f32>(most, total);
    }
    workgroupBarrier();
    let parts = 128u / lanes;
    var highest = vec4<f32>(LEAST);
    for (var i = 0u; i < parts; i++) {
        highest = max(highest, scores_of(i));
    }
    sums = scaled(sums, exp(scores_of(part) - highest));
    let stride = dim / 2u + 2u;
    let partial_at = group.y * params.heads * params.splits_max * stride;
    // Of two heads at a time, a vec4 for each invocation and half of the lanes.
    for (var two = 0u; two < 4u; two += 2u) {
        let to = part * 4u * lanes + 2u * column;
        scratch[to] = select(sums.a2, sums.a0, two == 0u);
        scratch[to + 1u] = select(sums.b2, sums.b0, two == 0u);
        scratch[to + 2u * lanes] = select(sums.a3, sums.a1, two == 0u);
        scratch[to + 2u * lanes + 1u] = select(sums.b3, sums.b1, two == 0u);
        workgroupBarrier();
        let h = 4u * four + two + local / (2u * lanes);
        let quad = local & (2u * lanes - 1u);
        if (local < 4u * lanes && quad < dim / 4u && h < shared_by) {
            var sum = vec4<f32>(0.0);
            for (var i = 0u; i < parts; i++) {
                sum += scratch[i * 4u * lanes + local];
            }
            let at = partial_at + ((kv_head * shared_by + h) * splits.count + split) * stride + 2u * quad;
            partial[at] = sum.xy;
            partial[at + 1u] = sum.zw;
        }
        workgroupBarrier();
    }
    if (local < 4u && 4u * four + local < shared_by) {
        var sum = 0.0;
        for (var i = 0u; i < parts; i++) {
            let mark = marks[i * 4u + local];
            sum += mark.y * exp(mark.x - highest[local]);
        }
        let head = kv_head * shared_by + 4u * four + local;
        partial[partial_at + (head * splits.count + split) * stride + dim / 2u] = vec2<f32>(highest[local], sum);
    }
}
