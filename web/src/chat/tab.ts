// Asks a model that runs in this tab. The engine goes on from a text, which the node makes of the
// conversation by the model's chat template, and always takes the likeliest token.

import type { Runner } from '../engine/runner.ts'
import { AskError, type Asked, messages, Meter, type Said, text } from './ask.ts'
import type { End } from './conversations.ts'

/** Tokens of an answer that has no limit of its own. */
const TOKENS = 256
/** The most tokens of one run (engine/serve.ts). */
const TOKENS_MAX = 4096

const REASONS: Record<string, End['reason']> = { stop_token: 'stop', max_tokens: 'limit', context_full: 'context', cancelled: 'stopped' }

/** The conversation as the model's prompt; null if the model has no chat template. */
async function prompt (id: string, asked: Asked, signal: AbortSignal): Promise<string | null> {
  const reply = await fetch(`/models/${id}/prompt`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ messages: messages(asked) }), signal })
  const said = await reply.json() as { prompt?: string, error?: string, code?: string }
  if (reply.ok) return said.prompt ?? ''
  if (said.code === 'no_template') return null
  throw new AskError(said.code ?? '', said.error ?? `the node answered with status ${reply.status}`, reply.status)
}

export async function * askTab (runner: Runner | null, id: string, asked: Asked, signal: AbortSignal): AsyncGenerator<Said> {
  if (runner === null) throw new AskError('no_tab', 'this tab cannot run models')
  const meter = new Meter(performance.now())
  const made = await prompt(id, asked, signal)
  if (made === null) yield { kind: 'plain' }
  let wake = (): void => {}
  const ended = runner.listen(() => { wake() })
  const stop = (): void => { runner.stop() }
  signal.addEventListener('abort', stop, { once: true })
  try {
    const tokens = Math.min(asked.settings.limit ?? TOKENS, TOKENS_MAX)
    await runner.run({ model: id, prompt: made ?? text(asked), bare: made !== null, tokens, slots: null, context: null, kv: 'f16' })
    let seen = 0
    for (;;) {
      if (runner.text.length > seen) {
        meter.note()
        const piece = runner.text.slice(seen)
        seen = runner.text.length
        yield { kind: 'text', text: piece }
        continue
      }
      if (!runner.busy) break
      await new Promise<void>((resolve) => { wake = resolve })
    }
    if (runner.error !== null) throw new AskError(runner.error.code, runner.error.message)
    const { numbers, reason } = runner
    yield { kind: 'end', end: meter.end(REASONS[reason] ?? 'stop', { completion_tokens: numbers?.tokens ?? 0 }) }
  } finally {
    ended()
    signal.removeEventListener('abort', stop)
  }
}
