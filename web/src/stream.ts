// One stream of the shard protocol: reads of known length, writes that wait for room, and
// time-outs. Messages carry their lengths, so closing a stream has no meaning.

import type { Stream } from '@libp2p/interface'

/** A read fails when no data arrives for this long. */
const IDLE_MS = 8000
/** The most bytes waiting in the stream; more would exceed what a remote accepts at once. */
const WAITING_MAX = 64 * 1024
/** The most bytes that a remote may send before they are read. */
const UNREAD_MAX = 8 * 1024 * 1024

export class Exchange {
  private readonly chunks: Uint8Array[] = []
  private unread = 0
  private ended: Error | null = null
  private wake: () => void = () => {}

  constructor (readonly stream: Stream) {
    stream.addEventListener('message', ({ data }) => {
      this.chunks.push(data.subarray())
      this.unread += data.byteLength
      if (this.unread > UNREAD_MAX) this.abort(new Error('the peer sent more than was requested'))
      this.wake()
    })
    const end = (error?: Error): void => {
      this.ended ??= error ?? new Error('the stream ended')
      this.wake()
    }
    stream.addEventListener('close', ({ error }) => { end(error) })
    stream.addEventListener('remoteCloseWrite', () => { end() })
  }

  get open (): boolean {
    return this.ended === null
  }

  abort (error: Error): void {
    this.ended ??= error
    this.stream.abort(error)
    this.wake()
  }

  /** Reads exactly `length` bytes. The first may take `patience` milliseconds. */
  async read (length: number, patience = IDLE_MS): Promise<Uint8Array> {
    const out = new Uint8Array(length)
    let have = 0
    while (have < length) {
      const chunk = this.chunks[0]
      if (chunk === undefined) {
        if (this.ended !== null) throw this.ended
        await this.arrival(have === 0 ? patience : IDLE_MS)
        continue
      }
      const part = chunk.subarray(0, length - have)
      out.set(part, have)
      have += part.length
      this.unread -= part.length
      if (part.length === chunk.length) this.chunks.shift()
      else this.chunks[0] = chunk.subarray(part.length)
    }
    return out
  }

  private async arrival (patience: number): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const timer = setTimeout(() => {
        const error = Object.assign(new Error(`no data for ${patience / 1000} s`), { code: 'stalled' })
        this.abort(error)
        reject(error)
      }, patience)
      this.wake = () => {
        clearTimeout(timer)
        resolve()
      }
    })
  }

  async write (bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length; at += WAITING_MAX) {
      if (this.ended !== null) throw this.ended
      this.stream.send(bytes.subarray(at, at + WAITING_MAX))
      const since = performance.now()
      while (this.stream.writeBufferLength > WAITING_MAX && this.open) {
        if (performance.now() - since > IDLE_MS) {
          this.abort(Object.assign(new Error('the peer does not read what is sent'), { code: 'stalled' }))
        }
        // The drain event is not always sent, so check again soon in any case.
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, 20)
          this.stream.addEventListener('drain', () => {
            clearTimeout(timer)
            resolve()
          }, { once: true })
        })
      }
    }
  }
}
