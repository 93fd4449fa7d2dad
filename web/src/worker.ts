// The worker: storage, hashing and the gateway's downloads, off the page's thread.
// Answers one message with one message; while it downloads it also says how far it is.

import { Blake3 } from './blake3.ts'
import { serveEngine } from './engine/serve.ts'
import { Store, StoreError } from './store.ts'
import { Decoder, encodedLength, OBJECT_MAX, REQUEST_MAX, unhex, WrongBytes } from './tree.ts'
import type { Answer, Ask } from './messages.ts'
import { authorise } from './token.ts'

/** The gateway cuts an encoding at every MiB of the object. */
const PIECE = 1024 * 1024
/** How often a download says how far it is. */
const PROGRESS_MS = 50
/** Tabs of one page that keep a store each. */
const SLOTS = 8
/** How long the tab that was here before a reload may take to let go. */
const HANDOVER_MS = 3000

const blake3 = new Blake3(REQUEST_MAX)
const downloads = new Map<number, AbortController>()
let store: Store

/** The first place that no other tab holds: its store and its identity. */
async function takeSlot (): Promise<number> {
  for (let slot = 0; slot < SLOTS; slot++) {
    const signal = AbortSignal.timeout(slot === 0 ? HANDOVER_MS : 200)
    const taken = await new Promise<boolean>((resolve) => {
      // Held until this worker ends: its file handles end with it.
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
  const slot = await takeSlot()
  store = await Store.start(blake3, `peer-${slot}`)
  const key = await store.note('identity.key', () => crypto.getRandomValues(new Uint8Array(32)))
  return { slot, key, held: await store.list(), persisted: await navigator.storage.persisted() }
}

/** Fetches stretches of an object from the gateway, proving and keeping each group. */
async function download (ask: Ask['download'], call: number): Promise<Answer['download']> {
  const abort = new AbortController()
  downloads.set(call, abort)
  try {
    let { size } = ask
    let received = 0
    const began = performance.now()
    const root = unhex(ask.id)
    const get = async (query: string): Promise<Response> => {
      const response = await fetch(`${ask.base}/shards/${ask.id}?format=bao${query}`, { signal: abort.signal })
      if (!response.ok) {
        const { error, code } = await response.json().catch(() => ({ error: response.statusText, code: 'failed' }))
        throw Object.assign(new Error(error), { code })
      }
      return response
    }
    let response: Response | null = null
    if (size === null) {
      response = await get('')
      size = Number(response.headers.get('x-doppler-size'))
      if (!(size >= 0 && size <= OBJECT_MAX)) throw new StoreError('too_large', 'the gateway names an impossible size')
    }
    await store.reserve(ask.id, size)
    const missing = await store.missing(ask.id, size, OBJECT_MAX, ask.within)
    for (const [start, end] of missing) {
      response ??= await get(`&bytes=${start}-${end - 1}`)
      const sink = await store.sink(ask.id, size)
      let told = 0
      const reader = (response.body as ReadableStream<Uint8Array>).getReader()
      let at = start
      const piece = (): Decoder => new Decoder(blake3, root, size as number, at, Math.min(end, (Math.floor(at / PIECE) + 1) * PIECE), sink)
      let decoder = piece()
      try {
        while (at < end) {
          const { done, value } = await reader.read()
          if (done) throw Object.assign(new Error('the gateway broke off'), { code: 'truncated' })
          for (let taken = 0; taken < value.length;) {
            taken += decoder.push(value.subarray(taken))
            if (!decoder.done) continue
            at = Math.min(end, (Math.floor(at / PIECE) + 1) * PIECE)
            if (at >= end || performance.now() - told > PROGRESS_MS) {
              told = performance.now()
              postMessage({ call, progress: at - start + received })
            }
            if (at < end) decoder = piece()
            else break
          }
        }
      } finally {
        sink.end()
        await reader.cancel().catch(() => {})
      }
      received += end - start
      response = null
    }
    await response?.body?.cancel()
    return { size, received, seconds: (performance.now() - began) / 1000 }
  } finally {
    downloads.delete(call)
  }
}

/** A piece that a peer sent: proved and kept, or refused. */
async function piece (ask: Ask['piece']): Promise<void> {
  if (ask.bytes.length !== encodedLength(ask.size, ask.start, ask.end)) throw new WrongBytes('an encoding of another length than its range has')
  const sink = await store.sink(ask.id, ask.size)
  try {
    new Decoder(blake3, unhex(ask.id), ask.size, ask.start, ask.end, sink).push(ask.bytes)
  } finally {
    sink.end()
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
