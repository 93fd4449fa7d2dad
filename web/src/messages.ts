// The requests that the page sends to its worker, and their answers.

import type { Held } from './store.ts'

export interface Ask {
  /** `token` is null in an open swarm. */
  start: { token: string | null }
  /** `size` is null if only the id is known, as for a manifest. With `within`, fetches only the groups that it touches. */
  download: { id: string, size: number | null, base: string, within?: [number, number] }
  piece: { id: string, size: number, start: number, end: number, bytes: Uint8Array }
  cancel: { call: number }
  held: { id: string }
  missing: { id: string, size: number, longest: number, within?: [number, number] }
  encode: { id: string, start: number, end: number }
  read: { id: string }
  room: { bytes: number, objects: number }
  remove: { id: string }
  estimate: Record<string, never>
  /** The engine answers on this port (engine/protocol.ts). */
  engine: { port: MessagePort }
}

export interface Answer {
  start: { slot: number, key: Uint8Array, held: Held[], persisted: boolean }
  download: { size: number, received: number, seconds: number }
  piece: void
  cancel: void
  held: Held | null
  missing: Array<[number, number]>
  encode: { size: number, bytes: Uint8Array<ArrayBuffer> }
  read: Uint8Array<ArrayBuffer>
  room: void
  remove: void
  estimate: { quota: number, usage: number, persisted: boolean }
  engine: void
}

/** An error with a code for programs beside its message. */
export class Failure extends Error {
  constructor (readonly code: string, message: string) {
    super(message)
  }
}

interface Waiting {
  resolve: (answer: never) => void
  reject: (error: Failure) => void
  progress?: (bytes: number) => void
}

/** The page's end: sends requests to the worker and matches the answers. */
export class WorkerClient {
  private readonly waiting = new Map<number, Waiting>()
  private calls = 0

  constructor (private readonly worker: Worker) {
    worker.onmessage = ({ data }) => {
      const waiting = this.waiting.get(data.call)
      if (data.progress !== undefined) {
        waiting?.progress?.(data.progress)
        return
      }
      this.waiting.delete(data.call)
      if (data.error !== undefined) waiting?.reject(new Failure(data.error.code, data.error.message))
      else waiting?.resolve(data.answer as never)
    }
    worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Failure('worker', event.message))
      this.waiting.clear()
    }
  }

  async ask<K extends keyof Ask> (kind: K, ask: Ask[K], options: { transfer?: Transferable[], progress?: (bytes: number) => void, signal?: AbortSignal } = {}): Promise<Answer[K]> {
    const call = ++this.calls
    const answer = new Promise<Answer[K]>((resolve, reject) => {
      this.waiting.set(call, { resolve, reject, progress: options.progress })
    })
    options.signal?.addEventListener('abort', () => { void this.ask('cancel', { call }) }, { once: true })
    this.worker.postMessage({ call, kind, ask }, options.transfer ?? [])
    return await answer
  }
}
