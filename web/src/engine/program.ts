// A model's step as the node lowers it (src/infer/gpu/program.rs): data that this engine
// executes without knowing any op. Buffers, kernels, dispatches and shards are indices.

/** Bytes `start..end` of a shard. */
export type Run = [shard: number, start: number, end: number]

/** A weight format: how its blocks become planes (src/infer/quant/planes.rs). */
export interface Format {
  /** Weights and stored bytes of a block. */
  block_len: number
  block_bytes: number
  /** Blocks of a group. */
  together: number
  /** Bytes a group, and its moves: (to, from, bytes, mask, shift), as `planes` makes them. */
  planes: Array<{ bytes: number, moves: number[][] }>
}

export interface Shape { rows: number, cols: number }

/** A matrix as it is stored, in one of the program's formats: whole rows of whole blocks. */
export interface Stored extends Shape { format: string }

export interface Weight extends Stored {
  tensor: string
  runs: Run[]
  /** The buffers that take it as f32 elements. */
  vectors: Array<[buffer: number, byte: number]>
  /** Or its rows as planes. */
  pieces: Array<[buffer: number, byte: number, first: number, rows: number]>
}

export interface SlotClass {
  count: number
  /** Device bytes of a slot, and stored bytes of an expert. */
  stride: number
  bytes: number
  parts: Array<Stored & { from: number, to: number }>
  slots_per_chunk: number
  /** By chunk. */
  buffers: number[]
  first_chunk: number
}

export interface Moe { layer: number, class: number, top_k: number, ids: number, table: number, experts: Run[][] }

export type Grid =
  | { items: { items: number, per_workgroup: number } }
  | { tiles: { per_row: number, tile: number, spare: number, y: number } }
  | { splits: { each: number, window: number, most: number } }
  | 'one'

export interface Dispatch {
  kernel: number
  params: number[]
  storage: number[]
  rows: 'tokens' | 'logits'
  grid: Grid
  when: [number, number]
}

export type Stretch = { run: number[] } | { experts: { moe: number, waves: number[][], sum: number[] } }

/** Bytes of what was set aside, for the start of a buffer. */
export interface Kept { buffer: number, at: number, bytes: number }

/** A step of one token as one submission (src/infer/gpu/program/token.rs). */
export interface Token {
  /** Those of the layers, the logits, and the choice of the next token. */
  dispatches: number[]
  /** Its report, and the chosen token that goes to word 1 of it. */
  state: number
  chosen: number
  /** Where experts are looked up: `entries` slots, as many words of ones, zeros. */
  places: number
  entries: number
  aside: number
  layers: Array<{ resume: number, routed: number, kept: Kept[], row: number, ids_at: number }>
}

export interface Program {
  vocab: number
  context: number
  batch: number
  eos: number[]
  tokenizer: { id: string, size: number } | null
  shards: Array<{ id: string, size: number }>
  /** Of the weights, by name. */
  formats: Record<string, Format>
  buffers: number[]
  tokens: number
  logits: number
  /** The table of cache blocks: its words from the second on are 0, 1, 2, ... */
  blocks: number
  kernels: Array<{ name: string, hash: string, subgroups: boolean, write: boolean[] }>
  ropes: Array<{ buffer: number, inv_freq: number[], factor: number }>
  weights: Weight[]
  classes: SlotClass[]
  moe: Moe[]
  dispatches: Dispatch[]
  steps: Stretch[]
  token: Token | null
}

export const runBytes = (runs: Run[]): number => runs.reduce((sum, [, start, end]) => sum + end - start, 0)

/** Positions of one tile of a split (kernels/shared/splits.wgsl). */
const TILE = 32

/** Workgroups in x and y for so many rows from a position on (src/infer/gpu/dispatch.rs); null where there are none. */
export function workgroups (grid: Grid, rows: number, most: number, position = 0): [number, number] | null {
  if (rows === 0) return null
  if (grid === 'one') return [1, 1]
  if ('tiles' in grid) {
    const { per_row: perRow, tile, spare, y } = grid.tiles
    const x = Math.ceil(rows * perRow / tile) + spare
    if (x > most || y > most) throw new Error(`a grid of ${x} x ${y} workgroups`)
    return [x, y]
  }
  if ('splits' in grid) {
    const { each, window, most: splits } = grid.splits
    const seen = window > 0 ? Math.min(window, position + 1) : position + 1
    const tiles = Math.ceil(seen / TILE)
    return [each * Math.ceil(tiles / Math.ceil(tiles / splits)), 1]
  }
  const { items, per_workgroup: each } = grid.items
  const groups = Math.ceil(items * rows / each)
  const x = Math.min(groups, most)
  const y = x === 0 ? 0 : Math.ceil(groups / x)
  if (y > most || x * y * each > 0xffffffff) throw new Error(`a grid of ${x} x ${y} workgroups`)
  return x === 0 ? null : [x, y]
}
