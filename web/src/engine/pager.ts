// Brings the experts that a layer needs into slots, wave by wave: `slots` decides, `source` reads
// and verifies, and the machine is written to. Invariants: `demands` equals the sum of the hits; the
// table of places names a slot only if it holds the expert.

import { Failure } from '../messages.ts'
import type { Machine } from './machine.ts'
import { pack, packedBytes, storedRow } from './planes.ts'
import { type From, several, type Source } from './source.ts'
import { Slots, type Wave } from './slots.ts'

/** The table entry of an expert without a slot. */
const EMPTY = 0xffffffff

export interface PagerStats {
  /** Experts asked for: each distinct expert of each layer of each step. */
  demands: number
  /** Demands by where the expert was: in a slot, kept in this tab, at the node's gateway, at peers. */
  hits: { slot: number } & Record<From, number>
  evictions: number
}

export const noStats = (): PagerStats => ({ demands: 0, hits: { slot: 0, kept: 0, gateway: 0, peers: 0 }, evictions: 0 })

export class Pager {
  stats = noStats()
  private readonly slots: Slots
  /** Each layer's table as it is on the device. */
  private readonly tables: Uint32Array<ArrayBuffer>[]
  /** The table in which a token looks its experts up, and whether the device has this version. */
  private readonly places: Uint32Array<ArrayBuffer>
  private told = false

  constructor (private readonly machine: Machine, private readonly source: Source) {
    const { classes, moe } = machine.program
    this.slots = new Slots(classes.map(({ count }) => count), moe.map((layer) => layer.class))
    const chunks = classes.reduce((sum, { buffers }) => sum + buffers.length, 0)
    this.tables = moe.map(({ experts }) => new Uint32Array(chunks * experts.length).fill(EMPTY))
    moe.forEach(({ table }, layer) => { machine.write(table, 0, this.tables[layer]) })
    const { token, buffers } = machine.program
    this.places = new Uint32Array(token === null ? 0 : buffers[token.places] / 4)
    if (token !== null) this.places.fill(EMPTY, 0, 2 * token.entries)
  }

  get resident (): number {
    return this.slots.resident
  }

  /** Runs all experts in `chosen` (the router's choice for each pair) of a layer, and their sum. */
  async run (moe: number, chosen: Uint32Array, waves: number[][], sum: number[]): Promise<void> {
    let waiting = [...new Set(chosen)].sort((a, b) => a - b)
    for (let wave = 0; waiting.length > 0; wave++) {
      // Queued dispatches read the present slots and table, so submit them before either changes.
      if (wave > 0) await this.machine.submit()
      waiting = await this.wave(moe, waiting, waves)
    }
    this.machine.queue(sum)
  }

  /** Writes the table of places, if it changed, for all that is submitted from now on. */
  tell (): void {
    const { token } = this.machine.program
    if (token === null || this.told) return
    this.machine.write(token.places, 0, this.places)
    this.told = true
  }

  /** Counts the experts of a layer that a token found in their slots. */
  found (moe: number, chosen: number[]): void {
    const { hits, fills } = this.slots.wave(moe, chosen)
    if (fills.length > 0) throw new Failure('device', 'the adapter ran an expert that is in no slot')
    this.stats.hits.slot += hits.length
    this.stats.demands += hits.length
  }

  /** Brings all experts of a layer that one token chose. */
  async bring (moe: number, chosen: number[]): Promise<void> {
    const { waiting } = await this.fit(moe, [...chosen].sort((a, b) => a - b))
    if (waiting.length > 0) throw new Failure('failed', `${waiting.length} experts of one token without a slot`)
    this.tell()
  }

  private place (moe: number, expert: number, slot: number): void {
    const { token } = this.machine.program
    if (token === null) return
    this.places[token.layers[moe].row + expert] = slot
    this.told = false
  }

  /** Fills slots for as many of `wanted` as fit at once. */
  private async fit (moe: number, wanted: number[]): Promise<Wave> {
    const wave = this.slots.wave(moe, wanted)
    const { hits, fills, evicted, gone } = wave
    for (const [layer, expert] of gone) this.place(layer, expert, EMPTY)
    const sources: From[] = []
    try {
      await several(fills, async ([expert, slot]) => { sources.push(await this.fill(moe, expert, slot)) })
    } catch (error) {
      for (const [expert] of fills) this.slots.forget(moe, expert)
      throw error
    }
    this.stats.evictions += evicted
    this.stats.hits.slot += hits.length
    for (const from of sources) this.stats.hits[from] += 1
    this.stats.demands += hits.length + fills.length
    for (const [expert, slot] of fills) this.place(moe, expert, slot)
    return wave
  }

  /** Runs one wave. Returns the experts left for the next one. */
  private async wave (moe: number, wanted: number[], waves: number[][]): Promise<number[]> {
    const { classes, moe: layers } = this.machine.program
    const layer = layers[moe]
    const size = classes[layer.class]
    const { hits, fills, waiting } = await this.fit(moe, wanted)
    const table = this.tables[moe].fill(EMPTY)
    const chunks = new Set<number>()
    for (const [expert, slot] of [...hits, ...fills]) {
      const chunk = Math.floor(slot / size.slots_per_chunk)
      chunks.add(chunk)
      table[(size.first_chunk + chunk) * layer.experts.length + expert] = slot % size.slots_per_chunk
    }
    this.machine.write(layer.table, 0, table)
    for (const chunk of chunks) this.machine.queue(waves[chunk])
    return waiting
  }

  private async fill (moe: number, expert: number, slot: number): Promise<From> {
    const { classes, formats, moe: layers } = this.machine.program
    const size = classes[layers[moe].class]
    const { bytes, from } = await this.source.read(layers[moe].experts[expert])
    const planes = new Uint8Array(size.stride)
    for (const part of size.parts) {
      const format = formats[part.format]
      const stored = bytes.subarray(part.from, part.from + part.rows * storedRow(format, part.cols))
      pack(format, part, stored, planes.subarray(part.to, part.to + packedBytes(format, part)))
    }
    const chunk = Math.floor(slot / size.slots_per_chunk)
    this.machine.write(size.buffers[chunk], size.stride * (slot % size.slots_per_chunk), planes)
    return from
  }
}
