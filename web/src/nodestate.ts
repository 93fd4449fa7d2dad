// What the node says of itself, as `GET /node/state` and `GET /models/ID/copies` give it, and how fast
// its counters grow.

import type { Listed } from './keeper.ts'
import type { Progress } from './owner.ts'

export interface Tier { used: number, budget: number }

export interface Healing { budget: number, replica_bytes: number, room: number, lacking: number, lost: number, lacking_bytes: number, under_way: number, under_way_bytes: number, copied: number, copied_bytes: number, rate: number | null, left_s: number | null, is_leaving: boolean }

export interface PullState { number: number, model: string, state: 'running' | 'done' | 'failed' | 'stopped', progress: Progress | null, name: string | null, id: string | null, error: string | null }

export interface Loaded { name: string, id: string, backend: string, idle_s?: number, unload_s?: number }

export interface NodeState {
  publisher: string
  alone: boolean
  backend: string
  uptime_s: number
  vram_budget: number
  ram: Tier
  disk: Tier
  pinned_bytes: number
  reach: { state: 'unknown' | 'public' | 'mapped' | 'private', mapped: string[], relays: string[], offers_relay: boolean }
  healing: Healing
  engine: { loaded: Loaded[], running: number, waiting: number }
  received_bytes: number
  sent_bytes: number
  pulls: PullState[]
}

export interface ObjectCopies { id: string, what: string, size: number, copies: number, holders: string[], here: 'no' | 'pinned' | 'replica' | 'cached', is_copying: boolean }
export interface ModelCopies extends Listed { objects: ObjectCopies[] }

/** The seconds over which a rate is taken. */
const WINDOW_S = 6

/** How fast counters grow: bytes a second over the last seconds. */
export class Rates {
  private readonly seen = new Map<string, Array<{ at: number, bytes: number }>>()

  /** Takes in a counter's value. Returns its rate, null while only one value is known. */
  note (name: string, bytes: number, now = performance.now() / 1000): number | null {
    const list = this.seen.get(name) ?? []
    // A counter that has shrunk began anew.
    if (list.length > 0 && list[list.length - 1].bytes > bytes) list.length = 0
    list.push({ at: now, bytes })
    while (list.length > 2 && now - list[0].at > WINDOW_S) list.shift()
    this.seen.set(name, list)
    const first = list[0]
    return now > first.at ? (bytes - first.bytes) / (now - first.at) : null
  }

  /** Forgets all counters but these. */
  keep (names: Iterable<string>): void {
    const wanted = new Set(names)
    for (const name of this.seen.keys()) if (!wanted.has(name)) this.seen.delete(name)
  }
}
