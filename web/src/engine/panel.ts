// "Run in this tab": a prompt, the text as it is generated, and where its experts came from. Plain
// DOM, redrawn from the runner's state; text is only ever inserted as text.

import type { Model } from '../keeper.ts'
import { size } from '../view.ts'
import type { Numbers } from './protocol.ts'
import type { Runner } from './runner.ts'

const TOKENS_MAX = 4096

const find = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T

function say (element: HTMLElement, text: string): void {
  if (element.textContent !== text) element.textContent = text
}

const count = (n: number, what: string): string => `${n} ${what}${n === 1 ? '' : 's'}`

export class Panel {
  private readonly model = find<HTMLSelectElement>('run-model')
  private readonly prompt = find<HTMLTextAreaElement>('run-prompt')
  private readonly tokens = find<HTMLInputElement>('run-tokens')
  private readonly slots = find<HTMLInputElement>('run-slots')
  private readonly start = find<HTMLButtonElement>('run-start')
  private readonly stop = find<HTMLButtonElement>('run-stop')
  private readonly bar = find<HTMLProgressElement>('run-bar')

  constructor (private readonly runner: Runner) {
    find<HTMLFormElement>('run-form').onsubmit = (event) => {
      event.preventDefault()
      void this.run()
    }
    this.stop.onclick = () => { runner.stop() }
    // Enter runs the prompt; Shift and Enter inserts a new line.
    this.prompt.onkeydown = (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      event.preventDefault()
      if (!this.start.hidden && !this.start.disabled) void this.run()
    }
  }

  private async run (): Promise<void> {
    const wanted = Number.parseInt(this.slots.value, 10)
    await this.runner.run({
      model: this.model.value,
      prompt: this.prompt.value,
      tokens: Math.min(TOKENS_MAX, Math.max(1, Number.parseInt(this.tokens.value, 10) || 1)),
      slots: Number.isNaN(wanted) ? null : wanted,
      context: null,
      kv: 'f16'
    })
  }

  draw (models: Iterable<Model>): void {
    const { runner } = this
    const known = [...models].filter(({ manifest }) => manifest)
    const options = known.map(({ id, name, embedded }) => [id, embedded === true ? `${name} (comes with the node)` : name])
    const text = JSON.stringify(options)
    if (this.model.dataset.options !== text) {
      const chosen = this.model.value
      this.model.dataset.options = text
      this.model.replaceChildren(...options.map(([id, name]) => new Option(name, id, false, id === chosen)))
    }
    this.start.disabled = known.length === 0
    this.start.hidden = runner.busy
    this.stop.hidden = !runner.busy
    find('run').dataset.state = runner.state
    this.bar.hidden = runner.state !== 'loading'
    if (runner.total > 0) {
      this.bar.max = runner.total
      this.bar.value = runner.loaded
    } else {
      this.bar.removeAttribute('value')
    }
    say(find('run-state'), this.state())
    const out = find('run-out')
    out.hidden = runner.text === ''
    say(find('run-asked'), runner.prompt)
    say(find('run-text'), runner.text)
    const { numbers } = runner
    find('run-numbers').hidden = numbers === null
    if (numbers !== null) this.numbers(numbers)
    const error = find('run-error')
    error.hidden = runner.error === null
    say(error, runner.error?.message ?? '')
    error.dataset.code = runner.error?.code ?? ''
  }

  private state (): string {
    const { runner } = this
    const adapter = runner.adapter === '' ? '' : ` on ${runner.adapter}${runner.software ? ' (a software adapter: slow)' : ''}`
    const on = runner.fewer === null ? adapter : `${adapter}, which has memory for ${runner.fewer} expert slots`
    switch (runner.state) {
      case 'idle': return 'The node’s own WGSL kernels, on WebGPU in this tab. About half of the experts have a slot; the others are paged.'
      case 'loading': return runner.total === 0 ? 'Opening…' : `Loading what every token needs: ${size(runner.loaded)} of ${size(runner.total)}`
      case 'prompt': return `Reading the prompt${on}…`
      case 'running': return `Running${on}`
      case 'failed': return 'The run failed'
      case 'done': return `${{ stop_token: 'The model ended the text', max_tokens: 'Done', context_full: 'The context is full', cancelled: 'Stopped' }[runner.reason] ?? 'Done'}${on}`
    }
  }

  private numbers ({ pager, slots, experts, tokens, seconds, bytes }: Numbers): void {
    const speed = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : '—'
    say(find('run-speed'), speed)
    say(find('run-count'), count(tokens, 'token'))
    say(find('run-slot'), String(pager.hits.slot))
    say(find('run-slots-of'), experts === 0 ? 'a dense model' : `${slots} slots for ${experts} experts`)
    say(find('run-kept'), String(pager.hits.kept))
    say(find('run-kept-of'), `${size(bytes.kept)} read and verified`)
    say(find('run-gateway'), String(pager.hits.gateway))
    say(find('run-peers'), `${pager.hits.peers} from peers`)
    say(find('run-evicted'), String(pager.evictions))
  }
}
