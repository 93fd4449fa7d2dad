// "Run in this tab": a prompt, the text as it is generated, and where its experts came from. Plain
// DOM, redrawn from the runner's state.

import { find, say, tell } from '../dom.ts'
import type { Model } from '../keeper.ts'
import { count, explain, number, size } from '../words.ts'
import type { Numbers } from './protocol.ts'
import type { Runner } from './runner.ts'

const TOKENS_MAX = 4096

const SLOTS_MAX = 65_536

export class Panel {
  private readonly model = find<HTMLSelectElement>('run-model')
  private readonly prompt = find<HTMLTextAreaElement>('run-prompt')
  private readonly tokens = find<HTMLInputElement>('run-tokens')
  private readonly slots = find<HTMLInputElement>('run-slots')
  private readonly start = find<HTMLButtonElement>('run-start')
  private readonly stop = find<HTMLButtonElement>('run-stop')
  private readonly bar = find<HTMLProgressElement>('run-bar')
  /** What is wrong with what was typed. */
  private wrong = ''
  /** What keeps this tab from running models; null while that is not known. */
  why: string | null = null

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
    const tokens = number(this.tokens.value, 'The number of tokens', { min: 1, max: TOKENS_MAX }) ?? { wrong: 'Say how many tokens the text may have' }
    const slots = number(this.slots.value, 'The number of expert slots', { min: 1, max: SLOTS_MAX })
    const bad = [[this.tokens, tokens], [this.slots, slots]] as const
    this.wrong = ''
    for (const [field, value] of bad) {
      const wrong = typeof value === 'object' && value !== null ? `${value.wrong}.` : ''
      field.toggleAttribute('aria-invalid', wrong !== '')
      if (this.wrong === '') this.wrong = wrong
    }
    this.fault()
    if (typeof tokens !== 'number' || typeof slots === 'object' && slots !== null) {
      bad.find(([field]) => field.hasAttribute('aria-invalid'))?.[0].focus()
      return
    }
    await this.runner.run({ model: this.model.value, prompt: this.prompt.value, bare: false, tokens, slots, context: null, kv: 'f16' })
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
    this.start.disabled = known.length === 0 || this.why !== ''
    tell(find('run-why'), this.why ?? '')
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
    this.fault()
  }

  private fault (): void {
    const { error } = this.runner
    const box = find('run-error')
    tell(box, this.wrong !== '' ? this.wrong : error === null ? '' : explain(error.message))
    box.dataset.code = error?.code ?? ''
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
