// Which expert is in which slot: pure decisions, as in src/infer/residency.rs with LRU eviction.
//
// Invariants: a slot holds at most one expert; an expert that the present wave needs is never
// evicted for another one of that wave; every request is served after finitely many waves.

export interface Wave {
  /** Experts that have a slot already, with it. */
  hits: Array<[expert: number, slot: number]>
  /** Experts to load now, with their slots. */
  fills: Array<[expert: number, slot: number]>
  evicted: number
  /** The evicted experts. */
  gone: Array<[moe: number, expert: number]>
  /** Experts for a later wave, because no slot was left. */
  waiting: number[]
}

interface Class {
  free: number[]
  /** Slots by expert, the least recently used first. */
  held: Map<string, number>
}

/** How many slots to try if there is no memory for `slots`; null if there is nothing left to try. */
export function fewer (slots: number): number | null {
  const next = Math.floor(slots * 3 / 4)
  return next > 0 ? next : null
}

const key = (moe: number, expert: number): string => `${moe}:${expert}`

export class Slots {
  private readonly classes: Class[]

  constructor (counts: number[], private readonly classOf: number[]) {
    this.classes = counts.map((count) => ({ free: Array.from({ length: count }, (_, i) => count - 1 - i), held: new Map() }))
  }

  get resident (): number {
    return this.classes.reduce((sum, { held }) => sum + held.size, 0)
  }

  /** Plans slots for as many of `wanted` (distinct experts of one layer) as fit at once. */
  wave (moe: number, wanted: number[]): Wave {
    const { free, held } = this.classes[this.classOf[moe]]
    const wave: Wave = { hits: [], fills: [], evicted: 0, gone: [], waiting: [] }
    const needed = new Set(wanted.map((expert) => key(moe, expert)))
    const missing: number[] = []
    for (const expert of wanted) {
      const name = key(moe, expert)
      const slot = held.get(name)
      if (slot === undefined) {
        missing.push(expert)
        continue
      }
      held.delete(name)
      held.set(name, slot)
      wave.hits.push([expert, slot])
    }
    for (const [i, expert] of missing.entries()) {
      let slot = free.pop()
      if (slot === undefined) {
        for (const [name, its] of held) {
          if (needed.has(name)) continue
          held.delete(name)
          slot = its
          wave.evicted += 1
          wave.gone.push(name.split(':').map(Number) as [number, number])
          break
        }
      }
      if (slot === undefined) {
        wave.waiting = missing.slice(i)
        break
      }
      held.set(key(moe, expert), slot)
      wave.fills.push([expert, slot])
    }
    return wave
  }

  /** Frees a slot after its fill failed. */
  forget (moe: number, expert: number): void {
    const { free, held } = this.classes[this.classOf[moe]]
    const slot = held.get(key(moe, expert))
    if (slot === undefined) return
    held.delete(key(moe, expert))
    free.push(slot)
  }
}
