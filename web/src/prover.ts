// The worker's own worker: fetches from the gateway and verifies what arrives, so that the next
// piece is fetched and hashed while the last one is written. Hands its results over in parcels.
//
// Invariants: the bytes in a parcel were verified against the object's root; at most `PARCELS_MAX`
// parcels are in flight, over all fetches. Stores nothing.

import { Blake3, GROUP } from './blake3.ts'
import { Failure } from './messages.ts'
import { authorise } from './token.ts'
import { Decoder, OBJECT_MAX, Parcel, type Proved, unhex } from './tree.ts'

/** The gateway cuts an encoding at every MiB of the object. */
const PIECE = 1024 * 1024
/** The most parcels that are being filled, or were sent and not returned. */
const PARCELS_MAX = 6

/** A range of an object; the whole object if `size` is null. */
export interface Wanted { id: string, size: number | null, start: number, end: number, base: string }

export type ToProver =
  | { kind: 'start', token: string }
  | { kind: 'fetch', call: number, wanted: Wanted }
  | { kind: 'taken', buffer: ArrayBuffer }
  | { kind: 'stop', call: number }

/** For each fetch, in this order: the size, parcels, the end. */
export type FromProver =
  | { kind: 'size', call: number, size: number }
  | { kind: 'parcel', call: number, proved: Proved }
  | { kind: 'end', call: number, error: { code: string, message: string } | null }

const blake3 = new Blake3(GROUP)
const fetches = new Map<number, AbortController>()
const idle: ArrayBuffer[] = []
const waiting: Array<(buffer: ArrayBuffer) => void> = []
let parcels = 0

const say = (message: FromProver, transfer: Transferable[] = []): void => { postMessage(message, { transfer }) }

async function room (): Promise<ArrayBuffer> {
  const buffer = idle.pop()
  if (buffer !== undefined) return buffer
  if (parcels < PARCELS_MAX) {
    parcels += 1
    return new ArrayBuffer(PIECE)
  }
  return await new Promise((resolve) => { waiting.push(resolve) })
}

function give (buffer: ArrayBuffer): void {
  const next = waiting.shift()
  if (next === undefined) idle.push(buffer)
  else next(buffer)
}

/** Reads a body chunk by chunk, into one reused buffer if the browser supports that. */
function chunks (body: ReadableStream<Uint8Array<ArrayBuffer>>, most: number): { read: () => Promise<Uint8Array<ArrayBuffer> | null>, cancel: () => Promise<void> } {
  let reader: ReadableStreamBYOBReader
  try {
    reader = body.getReader({ mode: 'byob' })
  } catch {
    const plain = body.getReader()
    return { read: async () => (await plain.read()).value ?? null, cancel: async () => { await plain.cancel() } }
  }
  let buffer = new ArrayBuffer(Math.max(GROUP, most))
  return {
    read: async () => {
      const { done, value } = await reader.read(new Uint8Array(buffer))
      if (done || value === undefined) return null
      buffer = value.buffer as ArrayBuffer
      return value as Uint8Array<ArrayBuffer>
    },
    cancel: async () => { await reader.cancel() }
  }
}

async function prove (call: number, { id, size: known, start, end: last, base }: Wanted, signal: AbortSignal): Promise<void> {
  const query = known === null ? '' : `&bytes=${start}-${last - 1}`
  // The store is this page's cache. The browser's cache would hold everything twice.
  const response = await fetch(`${base}/shards/${id}?format=bao${query}`, { signal, cache: 'no-store' })
  if (!response.ok) {
    const { error, code } = await response.json().catch(() => ({ error: response.statusText, code: 'failed' }))
    throw new Failure(code, error)
  }
  const size = known ?? Number(response.headers.get('x-doppler-size'))
  if (!(size >= 0 && size <= OBJECT_MAX)) throw new Failure('too_large', 'the gateway reports an impossible size')
  say({ kind: 'size', call, size })
  const end = known === null ? Math.max(1, size) : last
  const root = unhex(id)
  const { read, cancel } = chunks(response.body as ReadableStream<Uint8Array<ArrayBuffer>>, Math.min(PIECE, end - start))
  let spare: ArrayBuffer | null = null
  const parcel = new Parcel(() => {
    const bytes = new Uint8Array(spare as ArrayBuffer)
    spare = null
    return bytes
  }, (proved) => { say({ kind: 'parcel', call, proved }, [proved.bytes.buffer]) })
  try {
    let chunk = new Uint8Array(0)
    for (let at = start; at < end;) {
      const next = Math.min(end, (Math.floor(at / PIECE) + 1) * PIECE)
      const decoder = new Decoder(blake3, root, size, at, next, parcel)
      // A piece fits one parcel: its groups are contiguous and have at most `PIECE` bytes.
      spare ??= await room()
      while (!decoder.done) {
        if (chunk.length === 0) {
          const arrived = await read()
          if (arrived === null) throw new Failure('truncated', 'the gateway ended its reply early')
          chunk = arrived
        }
        chunk = chunk.subarray(decoder.push(chunk))
      }
      parcel.end()
      at = next
    }
  } finally {
    // Keep the verified part of a piece that was interrupted.
    parcel.end()
    if (spare !== null) give(spare)
    await cancel().catch(() => {})
  }
}

onmessage = async ({ data }: MessageEvent<ToProver>) => {
  switch (data.kind) {
    case 'start': return authorise(data.token)
    case 'taken': return give(data.buffer)
    case 'stop': return fetches.get(data.call)?.abort()
    case 'fetch': {
      const abort = new AbortController()
      const { call, wanted } = data
      fetches.set(call, abort)
      try {
        await prove(call, wanted, abort.signal)
        say({ kind: 'end', call, error: null })
      } catch (error) {
        const { code, name, message } = error as Error & { code?: unknown }
        say({ kind: 'end', call, error: { code: typeof code === 'string' ? code : name, message } })
      } finally {
        fetches.delete(call)
      }
    }
  }
}
