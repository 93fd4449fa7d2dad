// A model's step as the node lowers it (src/infer/gpu/program.rs): data that this engine
// executes without knowing any op. Buffers, kernels, dispatches and shards are indices.

/** Bytes `start..end` of a shard. */
export type Run = [shard: number, start: number, end: number]

export type Format = 'f32' | 'f16' | 'bf16' | 'q4_k' | 'q5_k' | 'q6_k' | 'q8_0' | 'q5_0'

/** A matrix as it is stored: whole rows of whole blocks. */
export interface Stored { format: Format, rows: number, cols: number }

export interface Weight extends Stored {
  tensor: string
  runs: Run[]
  /** The buffer that takes it as f32 elements. */
  vector: number | null
  /** Or its rows as planes. */
  pieces: Array<[buffer: number, first: number, rows: number]>
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

export interface Program {
  vocab: number
  context: number
  batch: number
  eos: number[]
  tokenizer: { id: string, size: number } | null
  shards: Array<{ id: string, size: number }>
  buffers: number[]
  tokens: number
  logits: number
  /** The table of cache blocks: its words from the second on are 0, 1, 2, ... */
  blocks: number
  kernels: Array<{ name: string, hash: string, write: boolean[] }>
  ropes: Array<{ buffer: number, inv_freq: number[], factor: number }>
  weights: Weight[]
  classes: SlotClass[]
  moe: Moe[]
  dispatches: Dispatch[]
  steps: Stretch[]
}

export const runBytes = (runs: Run[]): number => runs.reduce((sum, [, start, end]) => sum + end - start, 0)

/** Workgroups in x and y for so many rows (src/infer/gpu/dispatch.rs); null where there are none. */
export function workgroups (grid: Grid, rows: number, most: number): [number, number] | null {
  if (rows === 0) return null
  if (grid === 'one') return [1, 1]
  if ('tiles' in grid) {
    const { per_row: perRow, tile, spare, y } = grid.tiles
    const x = Math.ceil(rows * perRow / tile) + spare
    if (x > most || y > most) throw new Error(`a grid of ${x} x ${y} workgroups`)
    return [x, y]
  }
  const { items, per_workgroup: each } = grid.items
  const groups = Math.ceil(items * rows / each)
  const x = Math.min(groups, most)
  const y = x === 0 ? 0 : Math.ceil(groups / x)
  if (y > most || x * y * each > 0xffffffff) throw new Error(`a grid of ${x} x ${y} workgroups`)
  return x === 0 ? null : [x, y]
}
