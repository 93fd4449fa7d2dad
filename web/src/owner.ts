// What only the node's owner may do from the page: it shows the page's key, which comes with the link
// that the node's commands print, in the part of the address that no browser sends.
//
// The key stays in this tab (sessionStorage), or in this browser if the user says so.

import { Failure } from './messages.ts'
import { Lines, read } from './chat/sse.ts'

const KEY = 'doppler-page-key'
const FORM = /^[0-9a-f]{32}$/
/** How long the node may take to answer what needs no work. */
const ANSWER_MS = 15_000

export interface Progress { done: number, total: number, rate: number | null, left_s: number | null, slow?: string | null }

export interface TargetReply { target: string, objects: number, bytes: number, missing: number, shared: number, last_copies: number }
export interface Trusted { publisher: string, how: 'added' | 'first_use', note: string }
export interface TrustList { trusted: Trusted[], refused: string[] }

type Event<R> = ({ event: 'progress' } & Progress) | { event: 'done', reply: R } | { event: 'failed', error: string, label: string }

export class Owner {
  /** Null if this page may only look. */
  private key: string | null = null
  remembered = false

  constructor () {
    const given = /^#key=([0-9a-f]{32})$/.exec(location.hash)?.[1]
    if (given !== undefined) {
      this.key = given
      try {
        sessionStorage.setItem(KEY, given)
      } catch {
        // It lasts as long as the page.
      }
      // It must not stay in the address, nor in the history.
      history.replaceState(null, '', `${location.pathname}${location.search}`)
      return
    }
    try {
      this.remembered = localStorage.getItem(KEY) !== null
      const kept = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY)
      this.key = kept !== null && FORM.test(kept) ? kept : null
    } catch {
      this.key = null
    }
  }

  get may (): boolean {
    return this.key !== null
  }

  /** Asks whether the node accepts the key, and forgets it if it does not. */
  async check (): Promise<void> {
    if (this.key === null) return
    const reply = await this.fetch('/control/v1/ps', { signal: AbortSignal.timeout(ANSWER_MS) })
    if (reply.status === 401) this.forget()
  }

  /** Takes a key or the whole link. False if it is neither. */
  take (text: string): boolean {
    const key = /([0-9a-f]{32})\s*$/.exec(text)?.[1]
    if (key === undefined) return false
    this.key = key
    try {
      sessionStorage.setItem(KEY, key)
    } catch {
      // As above.
    }
    return true
  }

  remember (keep: boolean): void {
    try {
      if (keep && this.key !== null) localStorage.setItem(KEY, this.key)
      else localStorage.removeItem(KEY)
      this.remembered = keep
    } catch {
      this.remembered = false
    }
  }

  private forget (): void {
    this.key = null
    this.remember(false)
    try {
      sessionStorage.removeItem(KEY)
    } catch {
      // Nothing was stored.
    }
  }

  /** As `fetch`, of this node, with the key if there is one. */
  async fetch (path: string, init: RequestInit = {}): Promise<Response> {
    const headers = new Headers(init.headers)
    if (this.key !== null) headers.set('authorization', `Bearer ${this.key}`)
    return await fetch(path, { ...init, headers })
  }

  /** What the node answers to a command that needs no long work. */
  async ask<R> (path: string, body?: object): Promise<R> {
    const init: RequestInit = body === undefined ? {} : { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) }
    const reply = await this.fetch(`/control/v1/${path}`, { ...init, signal: AbortSignal.timeout(ANSWER_MS) })
    if (!reply.ok) throw await this.refusal(reply)
    return await reply.json() as R
  }

  /** Long work: `progress` hears how far it is. The node gives it up when `signal` does. */
  async work<R> (path: string, body: object, progress: (progress: Progress) => void, signal: AbortSignal): Promise<R> {
    const reply = await this.fetch(`/control/v1/${path}`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ ...body, progress: true }), signal })
    if (!reply.ok) throw await this.refusal(reply)
    for await (const line of read(reply, new Lines())) {
      const event = JSON.parse(line) as Event<R>
      if (event.event === 'done') return event.reply
      if (event.event === 'failed') throw new Failure(event.label, event.error)
      progress(event)
    }
    throw new Failure('broken', 'the connection to the node broke off before it was done')
  }

  private async refusal (reply: Response): Promise<Failure> {
    const said = await reply.json().catch(() => null) as { error?: string, label?: string } | null
    if (reply.status === 401) {
      this.forget()
      return new Failure('unauthorized', 'the node does not know this page’s key any more: open the link that “doppler-node page” prints')
    }
    return new Failure(said?.label ?? 'failed', said?.error ?? `the node answered with status ${reply.status}`)
  }
}
