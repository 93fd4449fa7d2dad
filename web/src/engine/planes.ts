// Repacks stored blocks into device planes as the program's formats say: which bits of a group of
// blocks go where (src/infer/quant/planes.rs). Knows no block format. A test compares it with the node.

import type { Format, Shape } from './program.ts'

/** Groups whose stored bytes and planes stay in a cache while all moves are made. */
const TILE = 64

/** Bytes of a stored row. */
export const storedRow = (format: Format, cols: number): number => Math.ceil(cols / format.block_len) * format.block_bytes

const groups = (format: Format, cols: number): number => Math.ceil(cols / (format.together * format.block_len))

/** Device bytes of a matrix, rounded up to a multiple of 16. */
export function packedBytes (format: Format, { rows, cols }: Shape): number {
  const group = format.planes.reduce((sum, { bytes }) => sum + bytes, 0)
  return Math.ceil(rows * groups(format, cols) * group / 16) * 16
}

/** Writes the planes of `stored` (whole rows) to the start of `out`, which must be zero. */
export function pack (format: Format, { rows, cols }: Shape, stored: Uint8Array, out: Uint8Array): void {
  const row = storedRow(format, cols)
  if (stored.length !== rows * row) throw new Error(`${stored.length} bytes for ${rows} rows of ${row}`)
  const whole = format.together * format.block_bytes
  const perRow = groups(format, cols)
  // Rows that end within a group go on with blocks of zeros.
  const from = perRow * whole === row ? stored : padded(stored, rows, row, perRow * whole)
  // A plain format's only plane is its rows.
  const [only, ...others] = format.planes.flatMap(({ moves }) => moves)
  if (others.length === 0 && only[2] === whole) return out.set(from)
  const [source, target] = [view(from), view(out)]
  for (let first = 0; first < rows * perRow; first += TILE) {
    const count = Math.min(TILE, rows * perRow - first)
    let plane = 0
    for (const { bytes, moves } of format.planes) {
      const run = { source, target, at: first * whole, to: plane + first * bytes, count, whole, bytes }
      for (const [to, from, length, mask, shift] of moves) {
        let i = 0
        for (; i + 4 <= length; i += 4) (shift < 0 ? right : left)(run, from + i, to + i, Math.imul(mask, 0x01010101), Math.abs(shift))
        for (; i < length; i++) byte(run, from + i, to + i, mask, shift)
      }
      plane += rows * perRow * bytes
    }
  }
}

const view = ({ buffer, byteOffset, length }: Uint8Array): DataView => new DataView(buffer, byteOffset, length)

function padded (stored: Uint8Array, rows: number, row: number, wide: number): Uint8Array {
  const out = new Uint8Array(rows * wide)
  for (let r = 0; r < rows; r++) out.set(stored.subarray(r * row, (r + 1) * row), r * wide)
  return out
}

/** Groups that follow one another: where they begin, how many there are, and the bytes of one. */
interface Run { source: DataView, target: DataView, at: number, to: number, count: number, whole: number, bytes: number }

/** Four bytes of every group, of each byte what the mask keeps, to the left. */
function left ({ source, target, at, to, count, whole, bytes }: Run, from: number, into: number, mask: number, shift: number): void {
  for (let n = 0, s = at + from, t = to + into; n < count; n++, s += whole, t += bytes) {
    target.setInt32(t, target.getInt32(t, true) | ((source.getInt32(s, true) & mask) << shift), true)
  }
}

/** To the right. */
function right ({ source, target, at, to, count, whole, bytes }: Run, from: number, into: number, mask: number, shift: number): void {
  for (let n = 0, s = at + from, t = to + into; n < count; n++, s += whole, t += bytes) {
    target.setInt32(t, target.getInt32(t, true) | ((source.getInt32(s, true) & mask) >>> shift), true)
  }
}

function byte ({ source, target, at, to, count, whole, bytes }: Run, from: number, into: number, mask: number, shift: number): void {
  for (let n = 0, s = at + from, t = to + into; n < count; n++, s += whole, t += bytes) {
    const bits = source.getUint8(s) & mask
    target.setUint8(t, target.getUint8(t) | (shift < 0 ? bits >> -shift : bits << shift))
  }
}

/** Converts a vector's stored elements to f32, exactly. */
export function floats (format: string, stored: Uint8Array): Float32Array<ArrayBuffer> {
  const view = new DataView(stored.buffer, stored.byteOffset, stored.length)
  switch (format) {
    case 'f32': return Float32Array.from({ length: stored.length / 4 }, (_, i) => view.getFloat32(4 * i, true))
    case 'f16': return Float32Array.from({ length: stored.length / 2 }, (_, i) => half(view.getUint16(2 * i, true)))
    case 'bf16': {
      const bits = Uint32Array.from({ length: stored.length / 2 }, (_, i) => view.getUint16(2 * i, true) << 16)
      return new Float32Array(bits.buffer)
    }
    default: throw new Error(`a vector stored as ${format}`)
  }
}

function half (bits: number): number {
  const [sign, exponent, fraction] = [bits >> 15 === 0 ? 1 : -1, (bits >> 10) & 31, bits & 1023]
  if (exponent === 0) return sign * fraction * 2 ** -24
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15)
}
