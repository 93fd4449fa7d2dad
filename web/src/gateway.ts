// The worker's end of the prover: takes verified parcels one after another, and returns their
// buffers for reuse.

import { Failure } from './messages.ts'
import type { FromProver, ToProver, Wanted } from './prover.ts'
import type { Proved } from './tree.ts'

interface Taker {
  size: (size: number) => Promise<void>
  parcel: (proved: Proved) => Promise<void>
}

interface Fetch extends Taker {
  /** Settles when the previous message has been handled: messages are handled in order. */
  turn: Promise<void>
  failed: boolean
  resolve: () => void
  reject: (error: Error) => void
}

export class Gateway {
  private readonly prover: Worker
  private readonly fetches = new Map<number, Fetch>()
  private calls = 0

  constructor (token: string | null) {
    this.prover = new Worker('/prover.js', { type: 'module' })
    this.prover.onmessage = ({ data }: MessageEvent<FromProver>) => { this.hear(data) }
    this.prover.onerror = (event) => {
      for (const { reject } of this.fetches.values()) reject(new Failure('worker', event.message))
      this.fetches.clear()
    }
    if (token !== null) this.say({ kind: 'start', token })
  }

  private say (message: ToProver, transfer: Transferable[] = []): void {
    this.prover.postMessage(message, { transfer })
  }

  private hear (message: FromProver): void {
    const { call } = message
    const fetch = this.fetches.get(call)
    if (fetch === undefined) return
    const take = async (): Promise<void> => {
      try {
        if (fetch.failed) return
        if (message.kind === 'size') await fetch.size(message.size)
        else if (message.kind === 'parcel') await fetch.parcel(message.proved)
        else if (message.error === null) fetch.resolve()
        else fetch.reject(new Failure(message.error.code, message.error.message))
      } catch (error) {
        // Without this parcel stored, the rest cannot be stored either.
        this.fail(call, fetch, error as Error)
      } finally {
        if (message.kind === 'parcel') this.say({ kind: 'taken', buffer: message.proved.bytes.buffer }, [message.proved.bytes.buffer])
        if (message.kind === 'end') this.fetches.delete(call)
      }
    }
    fetch.turn = fetch.turn.then(take)
  }

  /** Fails a fetch. Parcels that are still in flight are ignored. */
  private fail (call: number, fetch: Fetch, error: Error): void {
    fetch.failed = true
    this.say({ kind: 'stop', call })
    fetch.reject(error)
  }

  /** Fetches a range. `taker` gets the object's size first, then its verified parcels. */
  async fetch (wanted: Wanted, taker: Taker, signal: AbortSignal): Promise<void> {
    const call = ++this.calls
    let stop = (): void => {}
    try {
      await new Promise<void>((resolve, reject) => {
        const fetch: Fetch = { ...taker, turn: Promise.resolve(), failed: false, resolve, reject }
        stop = () => { this.fail(call, fetch, new Failure('cancelled', 'stopped')) }
        this.fetches.set(call, fetch)
        this.say({ kind: 'fetch', call, wanted })
        signal.addEventListener('abort', stop, { once: true })
        if (signal.aborted) stop()
      })
    } finally {
      signal.removeEventListener('abort', stop)
    }
  }
}
