// Asks the node for an answer: /v1/chat/completions as a stream, or /v1/completions for a model
// without a chat template, which goes on from the text.

import type { Owner } from '../owner.ts'
import { explain } from '../words.ts'
import type { End, Turn } from './conversations.ts'
import { Events, read } from './sse.ts'

export interface Settings {
  temperature: number | null
  /** The most tokens of an answer; null for as many as fit. */
  limit: number | null
  seed: number | null
}

export interface Asked { model: string, system: string, turns: Turn[], settings: Settings }

export type Said =
  | { kind: 'text', text: string }
  /** The model has no chat template: it goes on from the text. */
  | { kind: 'plain' }
  | { kind: 'end', end: End }

/** A refusal of the node, or an answer that broke off. */
export class AskError extends Error {
  constructor (readonly code: string, message: string, readonly status = 0) {
    super(message)
  }
}

interface Chunk {
  choices?: Array<{ delta?: { content?: string | null, reasoning_content?: string | null }, text?: string, finish_reason?: string | null }>
  usage?: { completion_tokens: number, prompt_tokens_details?: { cached_tokens?: number } } | null
  error?: { message: string, code?: string }
}

/** Models of which it is known that they have no chat template. */
const plain = new Set<string>()

/** The text from which a model without a chat template goes on. */
export function text ({ system, turns }: Pick<Asked, 'system' | 'turns'>): string {
  let out = system === '' ? '' : `${system}\n\n`
  for (const [at, turn] of turns.entries()) {
    out += turn.role === 'user' && at > 0 ? `\n\n${turn.text}` : turn.text
  }
  return out
}

export async function * ask (owner: Owner, asked: Asked, signal: AbortSignal): AsyncGenerator<Said> {
  if (!plain.has(asked.model)) {
    try {
      yield * stream(owner, '/v1/chat/completions', { messages: messages(asked) }, asked, signal)
      return
    } catch (error) {
      if ((error as AskError).code !== 'no_template') throw error
      plain.add(asked.model)
    }
  }
  yield { kind: 'plain' }
  yield * stream(owner, '/v1/completions', { prompt: text(asked) }, asked, signal)
}

/** The conversation as APIs take it. */
export function messages ({ system, turns }: Asked): Array<{ role: string, content: string }> {
  const said = turns.map(({ role, text }) => ({ role, content: text }))
  return system === '' ? said : [{ role: 'system', content: system }, ...said]
}

/** The text limit of a completion that has none of its own. */
const PLAIN_TOKENS = 256

async function * stream (owner: Owner, path: string, what: object, { model, settings }: Asked, signal: AbortSignal): AsyncGenerator<Said> {
  const limit = settings.limit ?? (path === '/v1/completions' ? PLAIN_TOKENS : undefined)
  const began = performance.now()
  const body = {
    model, ...what, stream: true, stream_options: { include_usage: true },
    max_tokens: limit, temperature: settings.temperature ?? undefined, seed: settings.seed ?? undefined
  }
  // Without a time limit: a model may first have to come from slow peers.
  const response = await owner.fetch(path, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal
  })
  if (!response.ok) throw await refusal(response)
  const meter = new Meter(began)
  let [reason, usage]: [string | null, Chunk['usage']] = [null, null]
  let thinking = false
  for await (const data of read(response, new Events())) {
    if (data === '[DONE]') {
      yield { kind: 'end', end: meter.end(why(reason, usage?.completion_tokens, limit), usage ?? undefined) }
      return
    }
    const chunk = JSON.parse(data) as Chunk
    if (chunk.error !== undefined) throw new AskError(chunk.error.code ?? 'failed', chunk.error.message)
    const choice = chunk.choices?.[0]
    usage = chunk.usage ?? usage
    reason = choice?.finish_reason ?? reason
    const [reasoning, content] = [choice?.delta?.reasoning_content ?? '', choice?.delta?.content ?? choice?.text ?? '']
    if (reasoning === '' && content === '') continue
    meter.note()
    // Reasoning that comes by itself is written as models write it.
    const open = reasoning !== '' && !thinking ? '<think>' : ''
    const close = content !== '' && thinking ? '</think>' : ''
    thinking = reasoning !== '' || (thinking && content === '')
    yield { kind: 'text', text: open + reasoning + close + content }
  }
  throw new AskError('broken', 'the connection to the node broke off before the answer was complete')
}

function why (reason: string | null, tokens: number | undefined, limit: number | undefined): End['reason'] {
  if (reason !== 'length') return 'stop'
  return limit !== undefined && tokens !== undefined && tokens >= limit ? 'limit' : 'context'
}

async function refusal (response: Response): Promise<AskError> {
  const said = await response.json().catch(() => null) as { error?: { message?: string, code?: string } | string } | null
  const error = said?.error
  const [message, code] = typeof error === 'string' ? [error, ''] : [error?.message ?? '', error?.code ?? '']
  const after = response.headers.get('retry-after')
  const again = (response.status === 429 || response.status === 503) && after !== null ? `; try again in ${after} s` : ''
  return new AskError(code, (message === '' ? `the node answered with status ${response.status}` : message) + again, response.status)
}

/** Seconds below which a rate says nothing. */
const MEASURED_S = 0.1

/** Measures an answer while it comes. */
export class Meter {
  private first: number | null = null
  private last = 0
  private pieces = 0

  constructor (private readonly began: number) {}

  note (): void {
    this.last = performance.now()
    this.first ??= this.last
    this.pieces += 1
  }

  end (reason: End['reason'], usage?: { completion_tokens: number, prompt_tokens_details?: { cached_tokens?: number } }): End {
    const tokens = usage?.completion_tokens ?? this.pieces
    const seconds = this.first === null ? 0 : (this.last - this.first) / 1000
    return {
      reason, tokens,
      speed: tokens > 1 && seconds >= MEASURED_S ? (tokens - 1) / seconds : null,
      first: this.first === null ? null : (this.first - this.began) / 1000,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? 0
    }
  }
}

/** What went wrong, for the user. */
export function complaint (error: unknown): string {
  if (error instanceof AskError && error.status === 401) return 'The node asks for its API key. Open the page by the link that “doppler-node page” prints.'
  if ((error as { code?: string }).code === 'untrusted') return 'Nobody here has trusted the publisher of this model yet. Compare its key under Models, and trust it there.'
  const said = explain(error)
  return `${said[0].toUpperCase()}${said.slice(1)}${/[.!?]$/.test(said) ? '' : '.'}`
}
