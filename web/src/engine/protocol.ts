// The messages between the page and the engine in its worker, over a port of their own.

import type { PagerStats } from './pager.ts'
import type { From, Range } from './source.ts'

export interface Request {
  model: string
  base: string
  prompt: string
  /** The prompt has its special tokens in it. */
  bare: boolean
  /** The most tokens generated. */
  tokens: number
  slots: number | null
  context: number | null
  kv: 'f16' | 'f32'
}

export interface Numbers { pager: PagerStats, slots: number, experts: number, resident: number, bytes: Record<From, number>, seconds: number, tokens: number, dispatches: number, submissions: number }

export type ToEngine =
  | { kind: 'run', request: Request }
  | { kind: 'stop' }
  | { kind: 'brought', call: number, from: From | null, error?: { code: string, message: string } }

export type FromEngine =
  | { kind: 'adapter', name: string, software: boolean }
  /** The adapter has memory for only so many expert slots. */
  | { kind: 'fewer', slots: number }
  | { kind: 'loading', loaded: number, total: number }
  | { kind: 'prompt', tokens: number }
  | { kind: 'token', id: number, text: string, numbers: Numbers }
  | { kind: 'end', reason: 'stop_token' | 'max_tokens' | 'context_full' | 'cancelled', text: string, ids: number[], numbers: Numbers }
  | { kind: 'error', code: string, message: string }
  /** Asks the page to fetch bytes that the store does not have. */
  | { kind: 'want', call: number, range: Range }
