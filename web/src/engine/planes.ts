// Repacks stored blocks into device planes, byte for byte as src/infer/gpu/repack.rs does; the
// layouts are described there. A test holds both to the same hashes.

import type { Format, Stored } from './program.ts'

/** Weights that the kernels process at a time. */
const UNIT = 32
const HALF = 16

const BLOCKS: Record<Format, [weights: number, bytes: number]> = {
  f32: [1, 4], f16: [1, 2], bf16: [1, 2], q4_k: [256, 144], q5_k: [256, 176], q6_k: [256, 210], q8_0: [32, 34], q5_0: [32, 22]
}

export const isFormat = (name: string): name is Format => name in BLOCKS

/** Bytes of a stored row. */
export function storedRow (format: Format, cols: number): number {
  const [weights, bytes] = BLOCKS[format]
  return Math.ceil(cols / weights) * bytes
}

/** Device bytes of a row. */
function packedRow (format: Format, cols: number): number {
  const [weights, bytes] = BLOCKS[format]
  if (weights === 1) return Math.ceil(cols / UNIT) * UNIT * bytes
  return (weights === 256 ? Math.ceil(cols / 256) : Math.ceil(cols / 64) * 2) * bytes
}

/** Device bytes of a matrix, rounded up to a multiple of 16. */
export const packedBytes = ({ format, rows, cols }: Stored): number => Math.ceil(rows * packedRow(format, cols) / 16) * 16

/** Writes the planes of `stored` (whole rows) to the start of `out`, which must be zero. */
export function pack ({ format, rows, cols }: Stored, stored: Uint8Array, out: Uint8Array): void {
  const row = storedRow(format, cols)
  if (stored.length !== rows * row) throw new Error(`${stored.length} bytes for ${rows} x ${cols} ${format}`)
  const block = BLOCKS[format][1]
  const blocks = stored.length / block
  let to = 0
  const plane = (from: number, length: number): void => {
    for (let b = 0; b < blocks; b++, to += length) out.set(stored.subarray(b * block + from, b * block + from + length), to)
  }
  switch (format) {
    case 'q4_k':
      plane(16, 128)
      plane(0, 16)
      return
    case 'q5_k':
      plane(48, 128)
      for (let b = 0; b < blocks; b++, to += 32) fifthBitsK(stored.subarray(b * block + 16, b * block + 48), out.subarray(to, to + 32))
      plane(0, 16)
      return
    case 'q6_k':
      for (let b = 0; b < blocks; b++) {
        quantsQ6K(stored.subarray(b * block, (b + 1) * block), out.subarray(b * 128, (b + 1) * 128), out.subarray(blocks * 128 + b * 64, blocks * 128 + (b + 1) * 64))
      }
      to = blocks * 192
      plane(192, 16)
      plane(208, 2)
      return
    case 'q8_0':
    case 'q5_0':
      packPairs(format, stored, row, block, rows, out)
      return
    default:
      for (let r = 0; r < rows; r++) out.set(stored.subarray(r * row, (r + 1) * row), r * packedRow(format, cols))
  }
}

/** Packs rows of blocks of 32 in pairs; at a row's end the second block may be absent. */
function packPairs (format: 'q8_0' | 'q5_0', stored: Uint8Array, row: number, block: number, rows: number, out: Uint8Array): void {
  const rowBlocks = row / block
  const pairs = Math.ceil(rowBlocks / 2)
  const quantBytes = format === 'q8_0' ? 64 : 32
  const fifthAt = rows * pairs * quantBytes
  const scalesAt = format === 'q8_0' ? fifthAt : fifthAt + rows * pairs * 8
  for (let r = 0; r < rows; r++) {
    for (let p = 0; p < pairs; p++) {
      const pair = r * pairs + p
      const at = r * row + 2 * p * block
      const both = [stored.subarray(at, at + block), 2 * p + 1 < rowBlocks ? stored.subarray(at + block, at + 2 * block) : null]
      both.forEach((b, i) => { if (b !== null) out.set(b.subarray(0, 2), scalesAt + pair * 4 + 2 * i) })
      for (let half = 0; half < 2; half++) {
        if (format === 'q8_0') {
          both.forEach((b, i) => { if (b !== null) out.set(b.subarray(2 + half * HALF, 2 + half * HALF + HALF), pair * 64 + half * 32 + i * HALF) })
          continue
        }
        const [first, second] = both.map((b) => quantsQ5(b, half))
        for (let j = 0; j < HALF; j++) out[pair * 32 + half * HALF + j] = (first[j] & 15) | (second[j] << 4)
        fifthBits(first, second, out.subarray(fifthAt + pair * 8 + half * 4))
      }
    }
  }
}

/** The 16 five-bit quants of one half of a Q5_0 block; zeros if there is no block. */
function quantsQ5 (block: Uint8Array | null, half: number): Uint8Array {
  const out = new Uint8Array(HALF)
  if (block === null) return out
  for (let j = 0; j < HALF; j++) {
    const bit = HALF * half + j
    out[j] = ((block[6 + j] >> (4 * half)) & 15) | (((block[2 + (bit >> 3)] >> (bit & 7)) & 1) << 4)
  }
  return out
}

/** Collects the fifth bits of a piece from its five-bit quants; `out` must be zero. */
function fifthBits (first: Uint8Array, second: Uint8Array, out: Uint8Array): void {
  for (let j = 0; j < HALF; j++) out[j & 3] |= ((first[j] >> 4) << (j >> 2)) | ((second[j] >> 4) << ((j >> 2) + 4))
}

/** In Q5_K, bit `2 c` of byte `l` belongs to weight `64 c + l`, and bit `2 c + 1` to weight `64 c + 32 + l`. */
function fifthBitsK (stored: Uint8Array, out: Uint8Array): void {
  for (let piece = 0; piece < 8; piece++) {
    const [c, from] = [piece >> 1, (piece & 1) * HALF]
    for (let j = 0; j < HALF; j++) {
      const pair = stored[from + j] >> (2 * c)
      out[piece * 4 + (j & 3)] |= ((pair & 1) << (j >> 2)) | (((pair >> 1) & 1) << ((j >> 2) + 4))
    }
  }
}

/** Packs one Q6_K block's low nibbles and high bits into pieces. */
function quantsQ6K (block: Uint8Array, low: Uint8Array, high: Uint8Array): void {
  // Each half block: 128 weights, in four runs of 32 that share bytes.
  for (let n = 0; n < 2; n++) {
    for (let l = 0; l < 32; l++) {
      const [even, odd, pairs] = [block[n * 64 + l], block[n * 64 + 32 + l], block[128 + n * 32 + l]]
      for (let c = 0; c < 2; c++) {
        const shift = 4 * c
        const piece = n * 4 + c * 2
        low[piece * HALF + l] = ((even >> shift) & 15) | (((odd >> shift) & 15) << 4)
        const to = (piece + (l >> 4)) * 8 + (l & 3)
        const by = 2 * ((l & 15) >> 2)
        high[to] |= ((pairs >> shift) & 3) << by
        high[to + 4] |= ((pairs >> (shift + 2)) & 3) << by
      }
    }
  }
}

/** Converts a vector's stored elements to f32, exactly. */
export function floats (format: Format, stored: Uint8Array): Float32Array<ArrayBuffer> {
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
