// The engine's end of its port. Runs one request at a time and keeps the model for the next.

import type { Blake3 } from '../blake3.ts'
import { Failure } from '../messages.ts'
import { Device } from './device.ts'
import type { FromEngine, Numbers, Request, ToEngine } from './protocol.ts'
import { greedy, NoMemory, Session } from './session.ts'
import { fewer } from './slots.ts'
import type { From, Proved, Range } from './source.ts'
import { Tokenizer } from './tokenizer.ts'

/** The most tokens of one run. */
const TOKENS_MAX = 4096

/** `fewer` is the number of expert slots if the adapter had no memory for those requested. */
interface Loaded { key: string, device: Device, session: Session, tokenizer: Tokenizer, fewer: number | null }

export function serveEngine (port: MessagePort, blake3: Blake3, store: Proved): void {
  const wants = new Map<number, { resolve: (from: From) => void, reject: (error: Error) => void }>()
  let [calls, running, stopping]: [number, boolean, boolean] = [0, false, false]
  let loaded: Loaded | null = null
  const say = (message: FromEngine): void => { port.postMessage(message) }
  const bring = async (range: Range): Promise<From> => {
    if (stopping) throw new Failure('cancelled', 'stopped')
    const call = ++calls
    const brought = new Promise<From>((resolve, reject) => { wants.set(call, { resolve, reject }) })
    say({ kind: 'want', call, range })
    return await brought
  }

  const load = async (request: Request): Promise<Loaded> => {
    const { model, base, slots, context, kv } = request
    const key = JSON.stringify([model, slots, context, kv])
    if (loaded !== null && loaded.key === key) {
      loaded.device.check()
      loaded.session.begin()
      if (loaded.fewer !== null) say({ kind: 'fewer', slots: loaded.fewer })
      return loaded
    }
    unload()
    let [chosen, none]: [number | null, NoMemory | null] = [slots, null]
    for (;;) {
      const device = await Device.open()
      try {
        say({ kind: 'adapter', name: device.name, software: device.software })
        const progress = (loaded: number, total: number): void => { say({ kind: 'loading', loaded, total }) }
        const session = await Session.open(device, { model, base, blake3, store, bring, progress }, { slots: chosen, context, kv })
        const { tokenizer } = session.program
        if (tokenizer === null) throw new Failure('unsupported', 'this model comes without a tokenizer')
        const { bytes } = await session.source.object(tokenizer)
        loaded = { key, device, session, tokenizer: new Tokenizer(bytes), fewer: none === null ? null : chosen }
        return loaded
      } catch (error) {
        device.close()
        // Fewer slots than the model needs: report the last count that was enough for it.
        if (none !== null && (error as Failure).code === 'bad_request') throw none
        if (!(error instanceof NoMemory)) throw error
        none = error
        chosen = fewer(error.slots)
        if (chosen === null || stopping) throw error
        say({ kind: 'fewer', slots: chosen })
      }
    }
  }

  const unload = (): void => {
    loaded?.device.close()
    loaded = null
  }

  const run = async (request: Request): Promise<void> => {
    if (running) throw new Failure('busy', 'a model is already running in this tab')
    running = true
    stopping = false
    try {
      const { device, session, tokenizer } = await load(request)
      const { machine, program, pager, source } = session
      say({ kind: 'adapter', name: device.name, software: device.software })
      const prompt = tokenizer.encode(request.prompt, request.bare)
      say({ kind: 'prompt', tokens: prompt.length })
      if (prompt.length === 0) throw new Failure('empty', 'enter a prompt first')
      const stream = tokenizer.stream(prompt)
      const [ids, most]: [number[], number] = [[], Math.min(request.tokens, TOKENS_MAX)]
      let [began, text, reason]: [number, string, 'max_tokens' | 'stop_token' | 'context_full' | 'cancelled'] = [0, '', 'max_tokens']
      let before = { dispatched: 0, submitted: 0 }
      const slots = program.classes.reduce((sum, { count }) => sum + count, 0)
      const experts = program.moe.reduce((sum, layer) => sum + layer.experts.length, 0)
      const numbers = (): Numbers => ({
        pager: structuredClone(pager.stats), slots, experts, resident: pager.resident, bytes: { ...source.bytes }, seconds: (performance.now() - began) / 1000, tokens: ids.length,
        dispatches: machine.dispatched - before.dispatched, submissions: machine.submitted - before.submitted
      })
      let next = greedy(await session.prefill(prompt, () => stopping))
      began = performance.now()
      before = { dispatched: machine.dispatched, submitted: machine.submitted }
      for (;;) {
        if (program.eos.includes(next)) {
          reason = 'stop_token'
          break
        }
        ids.push(next)
        const piece = stream(next)
        text += piece
        say({ kind: 'token', id: next, text: piece, numbers: numbers() })
        if (stopping) reason = 'cancelled'
        else if (session.position === program.context) reason = 'context_full'
        if (ids.length === most || reason !== 'max_tokens') break
        next = await session.next(next)
      }
      text += stream(null)
      say({ kind: 'end', reason, text, ids, numbers: numbers() })
    } catch (error) {
      // Do not trust the device after a failure. After a stop the model can be used again: the
      // next run starts from the first token.
      if ((error as Failure).code !== 'cancelled') unload()
      throw error
    } finally {
      running = false
    }
  }

  port.onmessage = ({ data }: MessageEvent<ToEngine>) => {
    if (data.kind === 'run') {
      run(data.request).catch((error: Error & { code?: unknown }) => {
        say({ kind: 'error', code: typeof error.code === 'string' ? error.code : error.name, message: error.message ?? String(error) })
      })
    } else if (data.kind === 'stop') {
      stopping = true
      for (const { reject } of wants.values()) reject(new Failure('cancelled', 'stopped'))
      wants.clear()
    } else {
      const want = wants.get(data.call)
      wants.delete(data.call)
      if (data.from !== null) want?.resolve(data.from)
      else want?.reject(new Failure(data.error?.code ?? 'failed', data.error?.message ?? 'not fetched'))
    }
  }
}
