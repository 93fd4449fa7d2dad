// The worker: storage and hashing, off the page's thread. Downloads from the gateway are verified
// in a worker of their own (prover.ts). Each request gets one answer; downloads also report progress.

import { Blake3, GROUP } from './blake3.ts'
import { serveEngine } from './engine/serve.ts'
import { Gateway } from './gateway.ts'
import { Store, StoreError } from './store.ts'
import { Decoder, encodedLength, OBJECT_MAX, Parcel, type Proved, REQUEST_MAX, unhex, WrongBytes } from './tree.ts'
import type { Answer, Ask } from './messages.ts'
import { authorise } from './token.ts'

/** How often a download reports progress. */
const PROGRESS_MS = 100
/** The most tabs of one page, each with a store of its own. */
const SLOTS = 8
/** How long the previous tab may take to release its slot after a reload. */
const HANDOVER_MS = 3000

const blake3 = new Blake3(REQUEST_MAX)
const downloads = new Map<number, AbortController>()
let store: Store
let gateway: Gateway

/** Takes the first slot that no other tab holds: a store and an identity. */
async function takeSlot (): Promise<number> {
  for (let slot = 0; slot < SLOTS; slot++) {
    const signal = AbortSignal.timeout(slot === 0 ? HANDOVER_MS : 200)
    const taken = await new Promise<boolean>((resolve) => {
      // The lock is held until this worker ends, and its file handles end with it.
      navigator.locks.request(`doppler-${slot}`, { signal }, async () => {
        resolve(true)
        await new Promise(() => {})
      }).catch(() => { resolve(false) })
    })
    if (taken) return slot
  }
  throw new StoreError('busy', `${SLOTS} tabs of this page are open already: close one`)
}

async function start ({ token }: Ask['start']): Promise<Answer['start']> {
  if (token !== null) authorise(token)
  if (navigator.storage?.getDirectory === undefined || navigator.locks === undefined) {
    throw new Error('this browser gives the page no storage (a private window, or an address that is not localhost or https)')
  }
  gateway = new Gateway(token)
  const slot = await takeSlot()
  store = await Store.start(blake3, `peer-${slot}`)
  const key = await store.note('identity.key', () => crypto.getRandomValues(new Uint8Array(32)))
  return { slot, key, held: await store.list(), persisted: await navigator.storage.persisted() }
}

/** Fetches the missing ranges of an object from the gateway, and stores what the prover has verified. */
async function download (ask: Ask['download'], call: number): Promise<Answer['download']> {
  const abort = new AbortController()
  downloads.set(call, abort)
  const began = performance.now()
  let { size } = ask
  let [received, reported] = [0, 0]
  try {
    const taker = {
      size: async (its: number) => {
        size = its
        await store.reserve(ask.id, size)
      },
      parcel: async (proved: Proved) => {
        await store.keep(ask.id, size as number, proved)
        received += proved.length
        if (performance.now() - reported < PROGRESS_MS) return
        reported = performance.now()
        postMessage({ call, progress: received })
      }
    }
    // An object of unknown size, which is a manifest, is fetched whole.
    const missing = size === null ? [[0, 0]] : await store.missing(ask.id, size, OBJECT_MAX, ask.within)
    for (const [start, end] of missing) {
      await gateway.fetch({ id: ask.id, size, start, end, base: ask.base }, taker, abort.signal)
    }
    await store.settle(ask.id)
    return { size: size as number, received, seconds: (performance.now() - began) / 1000 }
  } catch (error) {
    // Report the first error.
    await store.settle(ask.id).catch(() => {})
    throw error
  } finally {
    downloads.delete(call)
  }
}

/** Verifies and stores a piece that a peer sent, or refuses it. */
async function piece (ask: Ask['piece']): Promise<void> {
  if (ask.bytes.length !== encodedLength(ask.size, ask.start, ask.end)) throw new WrongBytes('an encoding of the wrong length for its range')
  const proved: Proved[] = []
  const parcel = new Parcel(() => new Uint8Array(Math.ceil((ask.end - ask.start) / GROUP + 1) * GROUP), (part) => { proved.push(part) })
  try {
    new Decoder(blake3, unhex(ask.id), ask.size, ask.start, ask.end, parcel).push(ask.bytes)
  } finally {
    parcel.end()
    for (const part of proved) await store.keep(ask.id, ask.size, part)
  }
}

const handlers: { [K in keyof Ask]: (ask: Ask[K], call: number) => Promise<Answer[K]> } = {
  start,
  download,
  piece,
  cancel: async ({ call }) => { downloads.get(call)?.abort() },
  held: async ({ id }) => await store.held(id),
  missing: async ({ id, size, longest, within }) => await store.missing(id, size, longest, within),
  encode: async ({ id, start, end }) => await store.encode(id, start, end),
  read: async ({ id }) => await store.read(id),
  room: async ({ bytes, objects }) => { await store.room(bytes, objects) },
  remove: async ({ id }) => { await store.remove(id) },
  estimate: async () => {
    const { quota = 0, usage = 0 } = await navigator.storage.estimate()
    return { quota, usage, persisted: await navigator.storage.persisted() }
  },
  engine: async ({ port }) => { serveEngine(port, blake3, store) }
}

onmessage = async ({ data: { call, kind, ask } }: MessageEvent<{ call: number, kind: keyof Ask, ask: never }>) => {
  try {
    const answer = await (handlers[kind] as (ask: never, call: number) => Promise<unknown>)(ask, call)
    const transfer: Transferable[] = kind === 'encode' ? [(answer as Answer['encode']).bytes.buffer] : []
    postMessage({ call, answer }, { transfer })
  } catch (error) {
    const code = (error as { code?: unknown }).code
    postMessage({ call, error: { message: (error as Error).message ?? String(error), code: typeof code === 'string' ? code : (error as Error).name } })
  }
}
