// BLAKE3 (specification of 2020, sections 2.1 to 2.5) with chunk offsets, which a hash tree needs
// and existing packages do not offer. It hashes four lanes at a time in WebAssembly SIMD. The
// module is assembled here when the worker starts, so nothing has to be compiled or shipped.
// An incomplete last chunk goes through plain TypeScript.

const IV = [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19]
const PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
const MIXES = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14]]
const CHUNK_START = 1
const CHUNK_END = 2
const PARENT = 4
const ROOT = 8
const KEYED_HASH = 16
const DERIVE_KEY_CONTEXT = 32
const DERIVE_KEY_MATERIAL = 64

export const CHUNK = 1024
export const GROUP = 16 * CHUNK

/** Memory offsets: of chaining values, and of the area for callers' data. */
const VALUES = 1024
export const SCRATCH = 64 * 1024

type Hash4 = (input: number, stride: number, blocks: number, counter: number, step: number, flags: number, first: number, last: number, out: number) => void

export class Blake3 {
  readonly memory: WebAssembly.Memory
  private readonly hash4: Hash4

  /** `room` is the number of bytes for callers, from `SCRATCH` on. */
  constructor (room: number) {
    const pages = Math.ceil((SCRATCH + room + 4 * CHUNK) / 65536)
    this.memory = new WebAssembly.Memory({ initial: pages, maximum: pages })
    const instance = new WebAssembly.Instance(new WebAssembly.Module(assemble(pages)), { m: { m: this.memory } })
    this.hash4 = instance.exports.h as Hash4
  }

  bytes (at: number, length: number): Uint8Array {
    return new Uint8Array(this.memory.buffer, at, length)
  }

  /** The chaining value of the `length` bytes (at most a group) at `at`, or the root hash if `root`. */
  group (at: number, length: number, firstChunk: number, root: boolean): Uint8Array {
    const whole = Math.floor(length / CHUNK)
    const tail = length % CHUNK
    const count = Math.max(1, whole + (tail > 0 ? 1 : 0))
    const last = CHUNK_END | (root && count === 1 ? ROOT : 0)
    for (let chunk = 0; chunk < whole; chunk += 4) {
      this.hash4(at + chunk * CHUNK, CHUNK, 16, firstChunk + chunk, 1, 0, CHUNK_START, last, VALUES + 32 * chunk)
    }
    if (tail > 0 || length === 0) {
      const bytes = this.bytes(at + whole * CHUNK, tail)
      this.bytes(VALUES + 32 * whole, 32).set(lastChunk(bytes, firstChunk + whole, last))
    }
    let left = count
    while (left > 1) {
      const pairs = left >> 1
      const odd = left % 2 === 1 ? this.bytes(VALUES + 64 * pairs, 32).slice() : null
      const flags = PARENT | (root && left === 2 ? ROOT : 0)
      for (let pair = 0; pair < pairs; pair += 4) {
        this.hash4(VALUES + 64 * pair, 64, 1, 0, 0, flags, 0, 0, VALUES + 32 * pair)
      }
      if (odd != null) this.bytes(VALUES + 32 * pairs, 32).set(odd)
      left = pairs + (odd != null ? 1 : 0)
    }
    return this.bytes(VALUES, 32).slice()
  }

  /** The chaining value of an inner node; `pair` is the hashes of its two children. */
  parent (pair: Uint8Array, root: boolean): Uint8Array {
    this.bytes(VALUES, 64).set(pair)
    this.hash4(VALUES, 64, 1, 0, 0, PARENT | (root ? ROOT : 0), 0, 0, VALUES)
    return this.bytes(VALUES, 32).slice()
  }
}

function rotate (word: number, by: number): number {
  return (word >>> by) | (word << (32 - by))
}

/** One compression; `value` becomes the next chaining value. */
function compress (value: Int32Array, block: Int32Array, counter: number, length: number, flags: number): void {
  const v = new Int32Array(16)
  v.set(value)
  for (let i = 0; i < 4; i++) v[8 + i] = IV[i]
  v[12] = counter
  v[14] = length
  v[15] = flags
  let m = Array.from(block)
  for (let round = 0; round < 7; round++) {
    MIXES.forEach(([a, b, c, d], i) => {
      v[a] = v[a] + v[b] + m[2 * i]
      v[d] = rotate(v[d] ^ v[a], 16)
      v[c] = v[c] + v[d]
      v[b] = rotate(v[b] ^ v[c], 12)
      v[a] = v[a] + v[b] + m[2 * i + 1]
      v[d] = rotate(v[d] ^ v[a], 8)
      v[c] = v[c] + v[d]
      v[b] = rotate(v[b] ^ v[c], 7)
    })
    m = PERMUTATION.map((from) => m[from])
  }
  for (let i = 0; i < 8; i++) value[i] = v[i] ^ v[i + 8]
}

/** The keyed hash of a message of fewer than 1,024 bytes; the key has 32 bytes. */
export function keyedHash (key: Uint8Array, message: Uint8Array): Uint8Array {
  return lastChunk(message, 0, CHUNK_END | ROOT, KEYED_HASH, new Int32Array(key.slice().buffer))
}

/** Derives a key of 32 bytes from another, for the purpose that `context` names. */
export function deriveKey (context: string, key: Uint8Array): Uint8Array {
  const named = lastChunk(new TextEncoder().encode(context), 0, CHUNK_END | ROOT, DERIVE_KEY_CONTEXT)
  return lastChunk(key, 0, CHUNK_END | ROOT, DERIVE_KEY_MATERIAL, new Int32Array(named.buffer))
}

/** The chaining value of a chunk of fewer than 1,024 bytes; `last` are the flags of its last block. */
function lastChunk (bytes: Uint8Array, counter: number, last: number, mode = 0, key: ArrayLike<number> = IV): Uint8Array {
  const value = Int32Array.from(key)
  const blocks = Math.max(1, Math.ceil(bytes.length / 64))
  for (let i = 0; i < blocks; i++) {
    const part = bytes.subarray(64 * i, 64 * i + 64)
    const block = new Uint8Array(64)
    block.set(part)
    const flags = mode | (i === 0 ? CHUNK_START : 0) | (i === blocks - 1 ? last : 0)
    compress(value, new Int32Array(block.buffer), counter, part.length, flags)
  }
  return new Uint8Array(value.buffer)
}

// The module has one function of nine i32 parameters. See the WebAssembly specification's binary format.

function leb (value: number): number[] {
  const out: number[] = []
  do {
    const low = value & 0x7f
    value >>>= 7
    out.push(value === 0 ? low : low | 0x80)
  } while (value !== 0)
  return out
}

/** Pushes a signed constant. */
function i32 (value: number): number[] {
  const out = [0x41]
  for (;;) {
    const low = value & 0x7f
    value >>= 7
    const done = (value === 0 && (low & 0x40) === 0) || (value === -1 && (low & 0x40) !== 0)
    out.push(done ? low : low | 0x80)
    if (done) return out
  }
}

function assemble (pages: number): Uint8Array<ArrayBuffer> {
  const [INPUT, STRIDE, BLOCKS, COUNTER, STEP, FLAGS, FIRST, LAST, OUT, BLOCK, NOW] = Array.from({ length: 11 }, (_, i) => i)
  const ROW = 11 // four addresses
  const H = 15
  const V = H + 8
  const M = V + 16
  const T = M + 16
  const COUNTERS = T + 4
  const get = (local: number): number[] => [0x20, ...leb(local)]
  const set = (local: number): number[] => [0x21, ...leb(local)]
  const simd = (op: number, ...rest: number[]): number[] => [0xfd, ...leb(op), ...rest]
  const load = (offset: number): number[] => simd(0x00, 0, ...leb(offset))
  const store = (offset: number): number[] => simd(0x0b, 0, ...leb(offset))
  const shuffle = (lanes: number[]): number[] => simd(0x0d, ...lanes)
  const words = (order: number[]): number[] => shuffle(order.flatMap((word) => [0, 1, 2, 3].map((byte) => 4 * word + byte)))
  const splat = simd(0x11)
  const xor = simd(0x51)
  const or = simd(0x50)
  const add = simd(0xae)
  /** Rotates every word of the value on the stack to the right. */
  const turn = (by: number): number[] => {
    if (by % 8 === 0) {
      const lanes = Array.from({ length: 16 }, (_, i) => (i & ~3) + ((i + by / 8) & 3))
      return [...set(T), ...get(T), ...get(T), ...shuffle(lanes)]
    }
    return [...set(T), ...get(T), ...i32(by), ...simd(0xad), ...get(T), ...i32(32 - by), ...simd(0xab), ...or]
  }
  /** Transposes four vectors of four words; `to` may equal `from`. */
  const transpose = (from: number, to: number): number[] => [
    ...get(from), ...get(from + 1), ...words([0, 4, 1, 5]), ...set(T),
    ...get(from + 2), ...get(from + 3), ...words([0, 4, 1, 5]), ...set(T + 1),
    ...get(from), ...get(from + 1), ...words([2, 6, 3, 7]), ...set(T + 2),
    ...get(from + 2), ...get(from + 3), ...words([2, 6, 3, 7]), ...set(T + 3),
    ...get(T), ...get(T + 1), ...words([0, 1, 4, 5]), ...set(to),
    ...get(T), ...get(T + 1), ...words([2, 3, 6, 7]), ...set(to + 1),
    ...get(T + 2), ...get(T + 3), ...words([0, 1, 4, 5]), ...set(to + 2),
    ...get(T + 2), ...get(T + 3), ...words([2, 3, 6, 7]), ...set(to + 3)
  ]
  const code: number[] = []
  const emit = (...parts: number[][]): void => { for (const part of parts) code.push(...part) }

  for (let lane = 0; lane < 4; lane++) {
    emit(get(INPUT), get(STRIDE), i32(lane), [0x6c, 0x6a], set(ROW + lane))
    emit(lane === 0 ? [...get(COUNTER), ...splat] : [...get(COUNTERS), ...get(COUNTER), ...get(STEP), ...i32(lane), 0x6c, 0x6a, ...simd(0x1c, lane)], set(COUNTERS))
  }
  for (let i = 0; i < 8; i++) emit(i32(IV[i] | 0), splat, set(H + i))
  emit(i32(0), set(BLOCK))
  emit([0x03, 0x40]) // loop
  const flagIf = (flag: number, condition: number[]): number[] => [...get(flag), ...i32(0), ...condition, 0x1b, 0x72]
  emit(get(FLAGS), flagIf(FIRST, [...get(BLOCK), 0x45]), flagIf(LAST, [...get(BLOCK), ...i32(1), 0x6a, ...get(BLOCKS), 0x46]), set(NOW))
  for (let four = 0; four < 4; four++) {
    for (let lane = 0; lane < 4; lane++) emit(get(ROW + lane), load(16 * four), set(M + 4 * four + lane))
    emit(transpose(M + 4 * four, M + 4 * four))
  }
  for (let i = 0; i < 8; i++) emit(get(H + i), set(V + i))
  for (let i = 0; i < 4; i++) emit(i32(IV[i] | 0), splat, set(V + 8 + i))
  emit(get(COUNTERS), set(V + 12), i32(0), splat, set(V + 13), i32(64), splat, set(V + 14), get(NOW), splat, set(V + 15))
  let order = Array.from({ length: 16 }, (_, i) => i)
  for (let round = 0; round < 7; round++) {
    MIXES.forEach(([a, b, c, d], i) => {
      const half = (word: number, right: number, left: number): void => {
        emit(get(V + a), get(V + b), add, get(M + order[word]), add, set(V + a))
        emit(get(V + d), get(V + a), xor, turn(right), set(V + d))
        emit(get(V + c), get(V + d), add, set(V + c))
        emit(get(V + b), get(V + c), xor, turn(left), set(V + b))
      }
      half(2 * i, 16, 12)
      half(2 * i + 1, 8, 7)
    })
    order = PERMUTATION.map((from) => order[from])
  }
  for (let i = 0; i < 8; i++) emit(get(V + i), get(V + 8 + i), xor, set(H + i))
  for (let lane = 0; lane < 4; lane++) emit(get(ROW + lane), i32(64), [0x6a], set(ROW + lane))
  emit(get(BLOCK), i32(1), [0x6a, 0x22, ...leb(BLOCK)], get(BLOCKS), [0x48, 0x0d, 0x00], [0x0b]) // repeat while BLOCK < BLOCKS
  for (let half = 0; half < 2; half++) {
    emit(transpose(H + 4 * half, H + 4 * half))
    for (let lane = 0; lane < 4; lane++) emit(get(OUT), get(H + 4 * half + lane), store(32 * lane + 16 * half))
  }
  emit([0x0b])

  const section = (id: number, body: number[]): number[] => [id, ...leb(body.length), ...body]
  const locals = [2, ...leb(ROW + 4 - 9), 0x7f, ...leb(COUNTERS + 1 - H), 0x7b]
  const body = [...locals, ...code]
  return new Uint8Array([
    0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
    ...section(1, [1, 0x60, 9, ...Array<number>(9).fill(0x7f), 0]),
    ...section(2, [1, 1, 0x6d, 1, 0x6d, 2, 1, ...leb(pages), ...leb(pages)]),
    ...section(3, [1, 0]),
    ...section(7, [1, 1, 0x68, 0, 0]),
    ...section(10, [1, ...leb(body.length), ...body])
  ])
}
