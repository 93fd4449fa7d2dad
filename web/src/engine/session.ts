// One sequence of a model in this tab: its program and kernels fetched and checked, its trunk
// loaded, then prompt and token after token, as src/infer/session.rs goes about it.
//
// Refuses a kernel whose text is not its hash's, a format that this tab does not know, tokens
// beyond the context. A step that fails leaves the position where it was.

import type { Blake3 } from '../blake3.ts'
import { Failure } from '../messages.ts'
import { hashObject, hex } from '../tree.ts'
import type { Device } from './device.ts'
import { Machine } from './machine.ts'
import { noStats, Pager } from './pager.ts'
import { floats, pack, packedBytes, storedRow } from './planes.ts'
import { type Kept, type Program, type Run, runBytes } from './program.ts'
import { Reach } from './reach.ts'
import { type From, type Proved, type Range, Source } from './source.ts'

/** What the device reports instead of a token if a logit is not finite (src/infer/odds.rs). */
const REFUSED = 0xffffffff

export interface Choices { slots: number | null, context: number | null, kv: 'f16' | 'f32' }

export interface Opening { model: string, base: string, blake3: Blake3, store: Proved, bring: (range: Range) => Promise<From>, progress: (loaded: number, total: number) => void }

/** The adapter has no memory for a model with that many expert slots. */
export class NoMemory extends Failure {
  constructor (readonly slots: number, bytes: number) {
    const gib = (bytes / 2 ** 30).toPrecision(2)
    super('out_of_memory', slots === 0
      ? `the adapter has no memory for this model (${gib} GiB): close other tabs that use it, or choose a smaller model`
      : `the adapter has no memory for this model, even with ${slots} expert slots (${gib} GiB): close other tabs that use it, or choose a smaller model`)
  }
}

async function get (url: string): Promise<Response> {
  const response = await fetch(url)
  if (response.ok) return response
  const { error, code } = await response.json().catch(() => ({ error: `${url}: ${response.statusText}`, code: 'failed' }))
  throw new Failure(code, code === 'unsupported' ? `this model cannot run in a tab: ${error}` : error)
}

export class Session {
  position = 0

  private readonly reach: Reach

  private constructor (readonly program: Program, readonly machine: Machine, readonly pager: Pager, readonly source: Source) {
    this.reach = new Reach(program.moe.length)
  }

  static async open (device: Device, { model, base, blake3, store, bring, progress }: Opening, choices: Choices): Promise<Session> {
    const query = new URLSearchParams({ reduce: device.software ? 'lane' : 'group', team: device.subgroups ? 'subgroup' : 'group', kv: choices.kv, binding: String(device.bindingMax) })
    if (choices.slots !== null) query.set('slots', String(choices.slots))
    if (choices.context !== null) query.set('context', String(choices.context))
    const program = await (await get(`${base}/models/${model}/program?${query}`)).json() as Program
    const text = async (kernel: number): Promise<string> => {
      const { name, hash } = program.kernels[kernel]
      const bytes = new Uint8Array(await (await get(`${base}/kernels/${hash}`)).arrayBuffer())
      if (hex(hashObject(blake3, bytes).root) !== hash) throw new Failure('wrong_bytes', `the node gives another kernel than ${name}`)
      return new TextDecoder().decode(bytes)
    }
    const source = new Source(program, store, bring)
    try {
      const machine = new Machine(device, program, text)
      // Whether there is memory for it, before anything is fetched.
      await device.settle()
      machine.write(program.blocks, 4, Uint32Array.from({ length: program.buffers[program.blocks] / 4 - 1 }, (_, block) => block))
      for (const { buffer, inv_freq: frequencies, factor } of program.ropes) machine.write(buffer, 0, ropeTable(program.context, frequencies, factor))
      await loadTrunk(program, machine, source, progress)
      await device.settle()
      return new Session(program, machine, new Pager(machine, source), source)
    } catch (error) {
      if ((error as Failure).code !== 'out_of_memory') throw error
      throw new NoMemory(program.classes.reduce((sum, { count }) => sum + count, 0), program.buffers.reduce((sum, bytes) => sum + bytes, 0))
    }
  }

  /** Runs 1 to `batch` tokens at the present position; the last one's logits, if wanted. */
  async step (tokens: number[], logits: boolean): Promise<Float32Array | null> {
    const { machine, pager, program } = this
    if (this.position + tokens.length > program.context) {
      throw new Failure('full', `the context is full: ${this.position} of ${program.context} positions used, ${tokens.length} more asked for`)
    }
    machine.begin({ tokens: tokens.length, position: this.position, logitStart: tokens.length - 1, logitRows: logits ? 1 : 0 }, tokens)
    for (const stretch of program.steps) {
      if ('run' in stretch) {
        machine.queue(stretch.run)
        continue
      }
      const { moe, waves, sum } = stretch.experts
      const { ids, top_k: topK, experts } = program.moe[moe]
      const chosen = new Uint32Array(await machine.readAfter(ids, tokens.length * topK * 4))
      if (chosen.some((expert) => expert >= experts.length)) throw new Failure('device', 'the adapter chose an expert that is not there')
      await pager.run(moe, chosen, waves, sum)
    }
    const out = logits ? new Float32Array(await machine.readAfter(program.logits, program.vocab * 4)) : null
    if (!logits) await machine.submit()
    this.position += tokens.length
    return out
  }

  /**
   * Runs a token at the present position; the likeliest one after it. One submission, and one more for each layer
   * that lacks an expert. A software adapter gets no more of it at a time than is likely to run.
   */
  async next (token: number): Promise<number> {
    const { machine, pager, program, reach, program: { token: list } } = this
    if (list === null) return greedy(await this.step([token], true) as Float32Array)
    if (this.position === program.context) throw new Failure('full', `the context is full: all ${program.context} positions are used`)
    machine.begin({ tokens: 1, position: this.position, logitStart: 0, logitRows: 1 }, [token])
    pager.tell()
    const layers = list.layers.length
    let from = 0
    let kept: Kept[] = []
    for (let layer = 0; ;) {
      const stop = machine.device.software ? reach.stop(layer) : layers
      const until = stop < layers ? list.layers[stop].routed : list.dispatches.length
      const report = await machine.token(list, from, until, kept)
      const halted = report[0] === 0 ? null : report[0] - 1
      const reached = halted ?? Math.min(stop + 1, layers)
      for (let passed = layer; passed < reached; passed++) pager.found(passed, this.chosen(report, passed))
      reach.passed(reached - layer)
      if (halted !== null) {
        reach.halted()
        await pager.bring(halted, this.chosen(report, halted))
        from = list.layers[halted].resume
        kept = list.layers[halted].kept
        layer = halted + 1
      } else if (stop < layers) {
        from = until
        kept = []
        layer = stop + 1
      } else return this.took(report[1])
    }
  }

  private took (token: number): number {
    if (token === REFUSED) throw new Failure('not_finite', 'a logit is infinite or not a number: the model does not compute in this precision, or its weights are damaged')
    if (token >= this.program.vocab) throw new Failure('device', 'the adapter chose a token that is not there')
    this.position += 1
    return token
  }

  /** A layer's experts, as a token's report has them. */
  private chosen (report: Uint32Array, layer: number): number[] {
    const { moe, token } = this.program
    if (token === null || layer >= moe.length) throw new Failure('device', 'the adapter halted at a layer that is not there')
    const { top_k: topK, experts } = moe[layer]
    const at = token.layers[layer].ids_at
    const chosen = [...report.subarray(at, at + topK)]
    if (chosen.some((expert) => expert >= experts.length)) throw new Failure('device', 'the adapter chose an expert that is not there')
    return chosen
  }

  /** Forgets the sequence and what was counted; experts stay where they are. */
  begin (): void {
    this.position = 0
    this.pager.stats = noStats()
    this.source.bytes = { kept: 0, gateway: 0, peers: 0 }
  }

  /** Runs a prompt, batch by batch, until it is `stopped`; the last token's logits. */
  async prefill (tokens: number[], stopped: () => boolean): Promise<Float32Array> {
    const { batch, context } = this.program
    if (tokens.length > context) throw new Failure('full', `the prompt has ${tokens.length} tokens, the context ${context}`)
    let logits: Float32Array | null = null
    for (let at = 0; at < tokens.length; at += batch) {
      if (stopped()) throw new Failure('cancelled', 'stopped')
      logits = await this.step(tokens.slice(at, at + batch), at + batch >= tokens.length)
    }
    if (logits === null) throw new Failure('empty', 'the prompt has no tokens')
    return logits
  }
}

/** The likeliest token, the first of equals; what is no number is never it (src/infer/odds.rs). */
export function greedy (logits: Float32Array): number {
  let [best, most] = [0, -Infinity]
  for (let i = 0; i < logits.length; i++) if (logits[i] > most) [best, most] = [i, logits[i]]
  return best
}

/** (cos, sin) by position and frequency: angles in f32, as the node's. */
function ropeTable (context: number, frequencies: number[], factor: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(context * frequencies.length * 2)
  const [scale, inverse] = [Math.fround(factor), Float32Array.from(frequencies)]
  for (let position = 0, at = 0; position < context; position++) {
    for (const frequency of inverse) {
      const angle = Math.fround(position * frequency)
      out[at++] = Math.fround(Math.cos(angle)) * scale
      out[at++] = Math.fround(Math.sin(angle)) * scale
    }
  }
  return out
}

async function loadTrunk (program: Program, machine: Machine, source: Source, progress: (loaded: number, total: number) => void): Promise<void> {
  const runs: Run[] = program.weights.flatMap((weight) => weight.runs)
  let [loaded, total] = [0, runBytes(runs)]
  progress(0, total)
  await source.gather(runs, (bytes) => {
    loaded += bytes
    progress(Math.min(loaded, total), total)
  })
  for (const weight of program.weights) {
    if (weight.vectors.length > 0) {
      const elements = floats(weight.format, (await source.read(weight.runs)).bytes)
      for (const [buffer, at] of weight.vectors) machine.write(buffer, at, elements)
      continue
    }
    const format = program.formats[weight.format]
    const row = storedRow(format, weight.cols)
    for (const [buffer, at, first, rows] of weight.pieces) {
      const piece = { rows, cols: weight.cols }
      const planes = new Uint8Array(packedBytes(format, piece))
      pack(format, piece, (await source.read(within(weight.runs, first * row, (first + rows) * row))).bytes, planes)
      machine.write(buffer, at, planes)
    }
  }
  progress(total, total)
}

/** Bytes `start..end` of runs that follow one another. */
function within (runs: Run[], start: number, end: number): Run[] {
  const out: Run[] = []
  let at = 0
  for (const [shard, from, to] of runs) {
    const [low, high] = [Math.max(start - at, 0), Math.min(end - at, to - from)]
    if (low < high) out.push([shard, from + low, from + high])
    at += to - from
  }
  return out
}
