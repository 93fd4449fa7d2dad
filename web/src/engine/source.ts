// Where the engine's bytes come from: this tab's store, which verifies them as it reads. The page
// first fetches what is missing there, from the gateway or from peers.
//
// Invariant: every byte returned was verified against its shard's hash in this call.

import { Failure } from '../messages.ts'
import { type Program, type Run, runBytes } from './program.ts'

/** The most bytes read or fetched at once. */
const READ_MAX = 4 * 1024 * 1024
/** The most experts or ranges of weights in flight at once. */
export const READS_AT_ONCE = 4
/** Ranges with a smaller gap than this, in bytes, are fetched together. */
const GAP = 64 * 1024
/** How often a range is fetched again because it was damaged or gone when it was read. */
const TRIES = 3

/** Where bytes were when they were needed, the slowest last. */
export type From = 'kept' | 'gateway' | 'peers'
const SLOWER: From[] = ['kept', 'gateway', 'peers']

export const slowest = (a: From, b: From): From => SLOWER.indexOf(a) > SLOWER.indexOf(b) ? a : b

export interface Range { id: string, size: number, start: number, end: number }

/** Reads verified bytes: the store. */
export interface Proved { range: (id: string, start: number, end: number) => Promise<Uint8Array> }

export class Source {
  bytes = { kept: 0, gateway: 0, peers: 0 }

  /** `bring` asks the page to fetch a range into the store. */
  constructor (private readonly program: Program, private readonly store: Proved, private readonly bring: (range: Range) => Promise<From>) {}

  /** The bytes of all runs, concatenated, and the slowest place that any came from. */
  async read (runs: Run[]): Promise<{ bytes: Uint8Array, from: From }> {
    const bytes = new Uint8Array(runBytes(runs))
    let [to, from]: [number, From] = [0, 'kept']
    for (const [shard, start, end] of runs) {
      for (let at = start; at < end; at += READ_MAX) {
        const part = await this.range(shard, at, Math.min(end, at + READ_MAX))
        bytes.set(part.bytes, to)
        to += part.bytes.length
        from = slowest(from, part.from)
      }
    }
    return { bytes, from }
  }

  /** A whole object, such as a tokenizer. */
  async object (object: { id: string, size: number }): Promise<{ bytes: Uint8Array, from: From }> {
    return await this.proved(object, 0, object.size)
  }

  private async range (shard: number, start: number, end: number): Promise<{ bytes: Uint8Array, from: From }> {
    return await this.proved(this.program.shards[shard], start, end)
  }

  private async proved ({ id, size }: { id: string, size: number }, start: number, end: number): Promise<{ bytes: Uint8Array, from: From }> {
    let from: From = 'kept'
    for (let tries = 0; ; tries++) {
      try {
        const bytes = await this.store.range(id, start, end)
        this.bytes[from] += bytes.length
        return { bytes, from }
      } catch (error) {
        // Missing here, or damaged and no longer held: fetch it.
        if ((error as Failure).code !== 'not_held' || tries === TRIES) throw error
        from = slowest(from, await this.bring({ id, size, start, end }))
      }
    }
  }

  /** Fetches all runs into the store. Calls `each` with the bytes of every finished read. */
  async gather (runs: Run[], each: (bytes: number) => void): Promise<void> {
    const sorted = runs.map(([shard, start, end]): Run => [shard, start, end]).sort((a, b) => a[0] - b[0] || a[1] - b[1])
    const joined: Run[] = []
    for (const run of sorted) {
      const last = joined[joined.length - 1]
      if (last !== undefined && last[0] === run[0] && run[1] - last[2] <= GAP) last[2] = Math.max(last[2], run[2])
      else joined.push(run)
    }
    const pieces = joined.flatMap(([shard, start, end]) =>
      Array.from({ length: Math.ceil((end - start) / READ_MAX) }, (_, i): Run => [shard, start + i * READ_MAX, Math.min(end, start + (i + 1) * READ_MAX)]))
    await several(pieces, async ([shard, start, end]) => {
      await this.range(shard, start, end)
      each(end - start)
    })
  }
}

/** Works on all items, `READS_AT_ONCE` at a time. Stops at the first error. */
export async function several<T> (items: T[], work: (item: T) => Promise<void>): Promise<void> {
  const left = items.values()
  let failed = false
  const one = async (): Promise<void> => {
    for (const item of left) {
      if (failed) return
      try {
        await work(item)
      } catch (error) {
        failed = true
        throw error
      }
    }
  }
  await Promise.all(Array.from({ length: READS_AT_ONCE }, one))
}
