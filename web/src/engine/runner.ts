// The page's end of the engine: starts and stops runs, fetches what the store lacks through the
// keeper, and holds what the panel shows.

import type { Keeper } from '../keeper.ts'
import { type WorkerClient, Failure } from '../messages.ts'
import type { FromEngine, Numbers, Request, ToEngine } from './protocol.ts'
import type { Range } from './source.ts'

export type State = 'idle' | 'loading' | 'prompt' | 'running' | 'done' | 'failed'

export class Runner {
  state: State = 'idle'
  model = ''
  adapter = ''
  software = false
  /** The expert slots that the adapter has memory for, if fewer than requested. */
  fewer: number | null = null
  loaded = 0
  total = 0
  prompt = ''
  text = ''
  ids: number[] = []
  numbers: Numbers | null = null
  reason = ''
  error: { code: string, message: string } | null = null
  private readonly listeners = new Set<() => void>()
  private port: MessagePort | null = null
  private abort = new AbortController()

  constructor (private readonly worker: WorkerClient, private readonly keeper: Keeper) {}

  /** Calls this whenever something changes, until the returned function is called. */
  listen (heard: () => void): () => void {
    this.listeners.add(heard)
    return () => { this.listeners.delete(heard) }
  }

  private changed (): void {
    for (const heard of [...this.listeners]) heard()
  }

  get busy (): boolean {
    return ['loading', 'prompt', 'running'].includes(this.state)
  }

  async run (request: Omit<Request, 'base'>): Promise<void> {
    if (this.busy) throw new Failure('busy', 'a model is already running in this tab')
    Object.assign(this, { state: 'loading', model: request.model, fewer: null, loaded: 0, total: 0, prompt: request.prompt, text: '', ids: [], numbers: null, reason: '', error: null })
    this.abort = new AbortController()
    this.changed()
    try {
      // The manifest names the objects that may be fetched.
      await this.keeper.describe(request.model)
      await this.open()
      if (this.abort.signal.aborted) throw new Failure('cancelled', 'stopped')
    } catch (error) {
      this.hear({ kind: 'error', code: (error as Failure).code ?? 'failed', message: (error as Error).message })
      return
    }
    this.say({ kind: 'run', request: { ...request, base: location.origin } })
  }

  stop (): void {
    this.abort.abort()
    this.say({ kind: 'stop' })
  }

  private async open (): Promise<void> {
    if (this.port !== null) return
    const { port1, port2 } = new MessageChannel()
    port1.onmessage = ({ data }: MessageEvent<FromEngine>) => { this.hear(data) }
    await this.worker.ask('engine', { port: port2 }, { transfer: [port2] })
    this.port = port1
  }

  private say (message: ToEngine): void {
    this.port?.postMessage(message)
  }

  private hear (message: FromEngine): void {
    switch (message.kind) {
      case 'adapter':
        Object.assign(this, { adapter: message.name, software: message.software })
        break
      case 'fewer':
        this.fewer = message.slots
        break
      case 'loading':
        Object.assign(this, { loaded: message.loaded, total: message.total })
        break
      case 'prompt':
        this.state = 'prompt'
        break
      case 'token':
        this.state = 'running'
        this.text += message.text
        this.ids.push(message.id)
        this.numbers = message.numbers
        break
      case 'end':
        Object.assign(this, { state: 'done', text: message.text, numbers: message.numbers, reason: message.reason })
        break
      case 'error':
        if (message.code === 'cancelled') Object.assign(this, { state: 'done', reason: 'cancelled' })
        else Object.assign(this, { state: 'failed', error: { code: message.code, message: message.message } })
        break
      case 'want':
        void this.bring(message.call, message.range)
        return
    }
    this.changed()
  }

  private async bring (call: number, { id, start, end }: Range): Promise<void> {
    try {
      const from = await this.keeper.bring(this.model, id, start, end, this.abort.signal)
      this.say({ kind: 'brought', call, from })
    } catch (error) {
      const code = this.abort.signal.aborted ? 'cancelled' : (error as Failure).code ?? 'failed'
      this.say({ kind: 'brought', call, from: null, error: { code, message: (error as Error).message } })
    }
  }
}
