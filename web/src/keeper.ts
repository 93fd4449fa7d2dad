// Which models this tab keeps, and how it fetches their objects: from the node's gateway, which
// is fastest, and from peers by the shard protocol. The worker verifies every byte.

import { type WorkerClient, Failure } from './messages.ts'
import { type Swarm, short, type Via } from './swarm.ts'
import { OBJECT_MAX, unhex } from './tree.ts'
import type { ModelHoldings } from './wire.ts'

/** Bytes of one request to a peer. Small, because a browser cannot slow a sender down. */
const PIECE = 1024 * 1024
/** Pieces in flight at once, over all peers. One WebRTC stream alone carries about 2 MB/s. */
const PIECES_AT_ONCE = 5
/** Passes over an object's providers before it is left for later. */
const ROUNDS_MAX = 4
const RETRY_MS = 500
/** Errors after which retrying the same peers is useless: they lack the object or have no direct connection. */
const UNREACHED = ['not_found', 'relayed']
/** How often an incomplete model is retried. */
const AGAIN_MS = 5000

/** How many nodes hold the rarest and the commonest object, and what is to be copied before each has enough copies. */
export interface Copies { fewest: number, most: number, lacking: number, lacking_bytes: number, left_s: number | null }

export interface Listed { id: string, name: string, bytes: number, shards: number, shards_here: number, shards_reachable: number, copies?: Copies | null, publishers: string[], manifest: boolean, embedded?: boolean }

export interface Part { id: string, size: number, bit: number, held: number, state: 'absent' | 'partial' | 'busy' | 'whole' | 'failed', from: string }

export interface Model extends Listed {
  parts: Part[] | null
  wanted: boolean
  working: boolean
  error: string
  rate: number
}

interface ManifestFile {
  hashAlgorithm?: string
  shards: Array<{ size: number, hash: string }>
  tokenizer?: { size?: number, blake3?: string }
}

export class Keeper {
  readonly models = new Map<string, Model>()
  received = { gateway: 0, peers: 0 }
  refused = 0
  private readonly aborts = new Map<string, AbortController>()
  private readonly wantedKey: string
  changed: () => void = () => {}

  constructor (private readonly worker: WorkerClient, private readonly swarm: Swarm | null, private readonly via: Via, slot: number) {
    this.wantedKey = `doppler-wanted-${slot}`
  }

  /** Takes in the node's list. Models that were being kept before a reload resume. */
  async learn (list: Listed[]): Promise<void> {
    const wanted = this.wanted()
    for (const listed of list) {
      const known = this.models.get(listed.id)
      if (known !== undefined) {
        Object.assign(known, { embedded: false, ...listed })
        continue
      }
      const model: Model = { ...listed, parts: null, wanted: wanted.includes(listed.id), working: false, error: '', rate: 0 }
      this.models.set(listed.id, model)
      const held = await this.worker.ask('held', { id: listed.id })
      if (held !== null && held.bytes === held.size) await this.read(model).catch(() => {})
      if (model.wanted) void this.work(model)
    }
    this.changed()
  }

  private wanted (): string[] {
    try {
      const list: unknown = JSON.parse(localStorage.getItem(this.wantedKey) ?? '[]')
      return Array.isArray(list) ? list.filter((id) => typeof id === 'string') : []
    } catch {
      return []
    }
  }

  private remember (): void {
    const wanted = [...this.models.values()].filter((model) => model.wanted).map((model) => model.id)
    try {
      localStorage.setItem(this.wantedKey, JSON.stringify(wanted))
    } catch {
      // No storage for the list: after a reload the user has to ask for them again.
    }
  }

  async keep (id: string): Promise<void> {
    const model = this.models.get(id)
    if (model === undefined) throw new Failure('not_found', `model ${id} is not known`)
    model.wanted = true
    this.remember()
    void navigator.storage.persist().catch(() => false)
    await this.work(model)
  }

  pause (id: string): void {
    const model = this.models.get(id)
    if (model === undefined) return
    model.wanted = false
    this.remember()
    this.aborts.get(id)?.abort()
    this.changed()
  }

  async remove (id: string): Promise<void> {
    this.pause(id)
    const model = this.models.get(id)
    const shared = new Set([...this.models.values()].filter((other) => other.id !== id && other.wanted).flatMap((other) => other.parts?.map((part) => part.id) ?? []))
    for (const part of model?.parts ?? []) {
      if (shared.has(part.id)) continue
      await this.worker.ask('remove', { id: part.id })
      Object.assign(part, { held: 0, state: 'absent', from: '' })
    }
    await this.worker.ask('remove', { id })
    this.swarm?.announceSoon()
    this.changed()
  }

  /** The holdings to announce: one bit for each object held whole. */
  holdings (): ModelHoldings[] {
    const out: ModelHoldings[] = []
    for (const model of this.models.values()) {
      if (model.parts === null) continue
      const objects = new Uint8Array(Math.ceil(model.parts.length / 8))
      for (const part of model.parts) if (part.state === 'whole') objects[part.bit >> 3] |= 1 << (part.bit & 7)
      out.push({ model: unhex(model.id), manifest: true, objects })
    }
    return out.slice(0, 64)
  }

  /** Reads a model's manifest; fetches it first if it is not stored. */
  async describe (id: string): Promise<Part[]> {
    const model = this.models.get(id)
    if (model === undefined) throw new Failure('not_found', `model ${id} is not known`)
    return await this.read(model)
  }

  private async read (model: Model): Promise<Part[]> {
    if (model.parts !== null) return model.parts
    const held = await this.worker.ask('held', { id: model.id })
    if (held === null || held.bytes < held.size) {
      const { received } = await this.worker.ask('download', { id: model.id, size: null, base: location.origin })
      this.received.gateway += received
    }
    const text = new TextDecoder().decode(await this.worker.ask('read', { id: model.id }))
    const manifest = JSON.parse(text) as ManifestFile
    if ((manifest.hashAlgorithm ?? 'sha256') !== 'blake3') throw new Failure('unsupported', 'its shards are not hashed with BLAKE3')
    // The order that every node derives: shards, then the tokenizer.
    const objects = manifest.shards.map(({ hash, size }) => ({ id: hash.replace(/^blake3:/, ''), size }))
    const { tokenizer } = manifest
    if (tokenizer?.blake3 !== undefined && tokenizer.size !== undefined) objects.push({ id: tokenizer.blake3, size: tokenizer.size })
    const parts: Part[] = []
    for (const [bit, { id, size }] of objects.entries()) {
      if (!/^[0-9a-f]{64}$/.test(id) || !Number.isSafeInteger(size) || size <= 0 || size > OBJECT_MAX) throw new Failure('bad_manifest', `shard ${bit} of its manifest is out of bounds`)
      const known = await this.worker.ask('held', { id })
      const bytes = known !== null && known.size === size ? known.bytes : 0
      parts.push({ id, size, bit, held: bytes, state: bytes === size ? 'whole' : bytes > 0 ? 'partial' : 'absent', from: '' })
    }
    model.parts = parts
    this.swarm?.announceSoon()
    this.changed()
    return parts
  }

  private async work (model: Model): Promise<void> {
    if (model.working) return
    model.working = true
    model.error = ''
    const abort = new AbortController()
    this.aborts.set(model.id, abort)
    this.changed()
    try {
      const parts = await this.read(model)
      const missing = parts.filter((part) => part.state !== 'whole')
      await this.worker.ask('room', { bytes: missing.reduce((sum, part) => sum + (part.held > 0 ? 0 : part.size), 0), objects: missing.length })
      for (const part of missing) {
        if (abort.signal.aborted) return
        try {
          await this.fetch(model, part, abort.signal)
        } catch (error) {
          if ((error as Failure).code === 'quota' || abort.signal.aborted) throw error
          // Other objects may still be available.
          model.error = (error as Error).message
        }
      }
    } catch (error) {
      if (!abort.signal.aborted) model.error = (error as Error).message
    } finally {
      model.working = false
      model.rate = 0
      this.aborts.delete(model.id)
      this.changed()
    }
    const left = model.parts?.some((part) => part.state !== 'whole') ?? true
    if (left && model.wanted) {
      setTimeout(() => { if (model.wanted) void this.work(model) }, AGAIN_MS)
    }
  }

  private async fetch (model: Model, part: Part, signal: AbortSignal): Promise<void> {
    part.state = 'busy'
    const [before, began] = [part.held, performance.now()]
    const progress = (held: number): void => {
      part.held = Math.min(part.size, held)
      model.rate = (part.held - before) / Math.max(1e-3, (performance.now() - began) / 1000)
      this.changed()
    }
    try {
      if (!await this.fromGateway(part, before, progress, signal)) {
        await this.fromPeers(model, part, progress, signal).catch(async (error: Failure) => {
          if (signal.aborted || !UNREACHED.includes(error.code)) throw error
          await this.throughNode(model, part, progress, signal, error)
        })
      }
      Object.assign(part, { held: part.size, state: 'whole' })
      this.swarm?.announceSoon()
    } catch (error) {
      const held = await this.worker.ask('held', { id: part.id }).catch(() => null)
      part.held = held?.size === part.size ? held.bytes : 0
      part.state = part.held > 0 ? 'partial' : signal.aborted ? 'absent' : 'failed'
      throw error
    }
  }

  /** Fetches the groups that a range of one of a model's objects touches, for the engine. Returns their source. */
  async bring (id: string, object: string, start: number, end: number, signal: AbortSignal): Promise<'gateway' | 'peers'> {
    const model = this.models.get(id)
    const part = model === undefined ? undefined : (await this.read(model)).find((part) => part.id === object)
    if (model === undefined || part === undefined) throw new Failure('not_found', `the model's manifest has no object ${short(object)}`)
    const within: [number, number] = [start, end]
    try {
      if (await this.fromGateway(part, part.held, () => {}, signal, within)) return 'gateway'
      await this.fromPeers(model, part, () => {}, signal, within).catch(async (error: Failure) => {
        if (signal.aborted || !UNREACHED.includes(error.code)) throw error
        await this.throughNode(model, part, () => {}, signal, error, within)
      })
      return 'peers'
    } finally {
      const held = await this.worker.ask('held', { id: part.id }).catch(() => null)
      part.held = held?.size === part.size ? held.bytes : 0
      if (part.state !== 'busy') part.state = part.held === part.size ? 'whole' : part.held > 0 ? 'partial' : 'absent'
      if (part.state === 'whole') this.swarm?.announceSoon()
      this.changed()
    }
  }

  /** Fetches from the gateway. False if it is not to be used or does not have the object. */
  private async fromGateway (part: Part, before: number, progress: (held: number) => void, signal: AbortSignal, within?: [number, number]): Promise<boolean> {
    if (this.via !== 'auto' && this.via !== 'gateway') return false
    part.from = 'gateway'
    try {
      const { received } = await this.worker.ask('download', { id: part.id, size: part.size, base: location.origin, within }, { progress: (bytes) => { progress(before + bytes) }, signal })
      this.received.gateway += received
      return true
    } catch (error) {
      if (signal.aborted) throw error
      const code = (error as Failure).code
      if (code === 'wrong_bytes') this.refused += 1
      // If this browser has no room, asking peers does not help.
      if (code === 'quota' || code === 'too_large' || this.via === 'gateway') throw error
      return false
    }
  }

  /** Fetches what only another tab holds: tabs cannot reach each other, so the node fetches it first. */
  private async throughNode (model: Model, part: Part, progress: (held: number) => void, signal: AbortSignal, error: Failure, within?: [number, number]): Promise<void> {
    if (this.swarm?.holders(model.id, part.bit).length === 0) throw error
    const brought = await fetch(`/shards/${part.id}/bring`, { method: 'POST', signal })
    if (!brought.ok) throw new Failure('not_found', (await brought.json() as { error: string }).error)
    await this.fromPeers(model, part, progress, signal, within)
  }

  private async fromPeers (model: Model, part: Part, progress: (held: number) => void, signal: AbortSignal, within?: [number, number]): Promise<void> {
    if (this.swarm === null) throw new Failure('offline', 'this tab is not in a swarm')
    const swarm = this.swarm
    let last: Error = new Failure('not_found', `no connected peer has shard ${part.bit}`)
    for (let round = 0; round < ROUNDS_MAX; round++) {
      const pieces = await this.worker.ask('missing', { id: part.id, size: part.size, longest: PIECE, within })
      if (pieces.length === 0) return
      let moved = false
      let held = part.size - pieces.reduce((sum, [start, end]) => sum + end - start, 0)
      const work = async (): Promise<void> => {
        for (let piece = pieces.shift(); piece !== undefined && !signal.aborted; piece = pieces.shift()) {
          const [start, end] = piece
          for (const peer of swarm.sources(model.id, part.bit)) {
            try {
              const { size, bytes } = await swarm.ask(peer, part.id, start, end)
              if (size !== part.size) throw new Failure('wrong_bytes', `peer ${short(peer)} reports a wrong size`)
              await this.worker.ask('piece', { id: part.id, size, start, end, bytes }, { transfer: [bytes.buffer] })
              this.received.peers += end - start
              part.from = short(peer)
              moved = true
              held += end - start
              progress(held)
              break
            } catch (error) {
              last = error as Error
              if ((error as Failure).code === 'quota') throw error
              if ((error as Failure).code === 'wrong_bytes') {
                this.refused += 1
                swarm.ban(peer)
              }
            }
          }
        }
      }
      await Promise.all(Array.from({ length: PIECES_AT_ONCE }, work))
      if (signal.aborted) throw new Failure('paused', 'paused')
      const left = await this.worker.ask('missing', { id: part.id, size: part.size, longest: PIECE, within })
      if (left.length === 0) return
      if (!moved && UNREACHED.includes((last as Failure).code)) break
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS * 2 ** round))
    }
    throw last
  }
}

