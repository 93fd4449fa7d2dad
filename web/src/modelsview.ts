// The models that the node knows: what of each is here, which copies lie where, and what the owner
// can do with it. Also what is being pulled. Plain DOM, redrawn from state.

import { complaint } from './chat/ask.ts'
import { copier } from './chat/render.ts'
import { confirm } from './confirm.ts'
import { button, el, find, redraw, say, tell } from './dom.ts'
import type { Listed } from './keeper.ts'
import type { Failure } from './messages.ts'
import type { ModelCopies, NodeState, PullState } from './nodestate.ts'
import type { Owner, Progress, TargetReply } from './owner.ts'
import { amount } from './swarmview.ts'
import { brief, count, left, size } from './words.ts'

/** Objects drawn one by one; more are summed up. */
const OBJECTS_MAX = 512
/** How often the copies of an open model are asked for. */
const COPIES_MS = 2000

interface Signer { name: string, publisher: string, trust: 'own' | 'trusted' | 'stranger' | 'refused' }
export interface KnownModel extends Listed { pinned?: boolean, trust?: string, signers?: Signer[], replicas?: { min: number, max: number } | string, base?: string }

const TRUST: Record<string, string> = { own: 'signed by this node', trusted: 'a publisher you trust', stranger: 'a publisher nobody here has trusted yet', refused: 'a publisher you refused' }

export interface ModelActions { chat: (name: string) => void, soon: () => void }

export class ModelsView {
  private readonly rows = new Map<string, ModelRow>()
  private self = ''

  constructor (private readonly owner: Owner, private readonly actions: ModelActions) {
    this.form('pull-form', async () => {
      const field = find<HTMLInputElement>('pull-name')
      const text = field.value.trim()
      const name = text.startsWith('hf:') ? text : `hf:${text}`
      await owner.ask('pull', { model: name })
      field.value = ''
      return `Pulling ${name}`
    })
    this.form('publish-form', async () => {
      const dir = find<HTMLInputElement>('publish-dir').value.trim()
      if (dir === '') throw new Error('Name a directory of this machine first.')
      const bar = find('add-state')
      const { name } = await owner.work<{ name: string }>('publish', { dir }, (progress) => { say(bar, `Publishing ${dir}: ${amount(progress)}`) }, new AbortController().signal)
      return `${name} is published.`
    })
    find<HTMLFormElement>('owner-form').onsubmit = (event) => {
      event.preventDefault()
      const field = find<HTMLInputElement>('owner-key')
      const taken = owner.take(field.value)
      tell(find('owner-wrong'), taken ? '' : 'This is no such link: it ends in 32 hexadecimal digits.')
      if (!taken) return
      field.value = ''
      void owner.check().then(() => {
        if (!owner.may) tell(find('owner-wrong'), 'The node does not know this key.')
        actions.soon()
      }, (error: unknown) => { tell(find('owner-wrong'), complaint(error)) })
    }
    find<HTMLInputElement>('owner-remember').onchange = () => { owner.remember(find<HTMLInputElement>('owner-remember').checked) }
  }

  /** A form that has the node do something. `act` returns what to say when it is done. */
  private form (id: string, act: () => Promise<string>): void {
    const form = find<HTMLFormElement>(id)
    form.onsubmit = (event) => {
      event.preventDefault()
      const [submit, state, error] = [form.querySelector('button') as HTMLButtonElement, find('add-state'), find('add-error')]
      tell(error, '')
      tell(state, 'Asking the node…')
      submit.disabled = true
      void act().then((said) => { tell(state, said) }, (failed: unknown) => {
        tell(state, '')
        tell(error, complaint(failed))
      }).finally(() => {
        submit.disabled = false
        this.actions.soon()
      })
    }
  }

  /** `models` is null until the node has listed them. */
  draw (models: KnownModel[] | null, state: NodeState | null, node: string): void {
    this.self = node
    const { may } = this.owner
    find('owner-form').hidden = may
    find('add').hidden = !may
    find('owner-has').hidden = !may
    find<HTMLInputElement>('owner-remember').checked = this.owner.remembered
    this.pulls(state?.pulls ?? [])
    const none = find('no-known')
    none.hidden = models !== null && models.length > 0
    say(none, models === null ? 'Asking the node for its models…' : 'The node knows no model yet.')
    for (const [id, row] of this.rows) {
      if (models?.some((model) => model.id === id) === true) continue
      row.end()
      this.rows.delete(id)
    }
    for (const model of models ?? []) {
      let row = this.rows.get(model.id)
      if (row === undefined) {
        row = new ModelRow(model.id, this.owner, this.actions)
        this.rows.set(model.id, row)
        find('known').append(row.root)
      }
      row.draw(model, this.self)
    }
  }

  private pulls (pulls: PullState[]): void {
    redraw(find('pulls'), pulls, () => [...pulls].reverse().map(({ number, model, state, progress, name, error }) => {
      const whole = state === 'running' && progress !== null && progress.total > 0
      const said = state === 'done' ? `here as ${name ?? ''}` : state === 'failed' ? error ?? 'failed' : state === 'stopped' ? 'stopped; the next pull goes on from here' : progress === null ? 'asking the Hub what it has' : progress.done === progress.total && progress.total > 0 ? `${size(progress.total)} are here; converting` : amount(progress)
      const bar = state !== 'running' ? [] : [el('progress', '', [], { 'aria-label': `Pulling ${model}`, ...whole ? { max: String(progress.total), value: String(progress.done) } : {} })]
      const stop = state !== 'running' || !this.owner.may ? [] : [button('Stop', 'quiet', () => { void this.owner.ask('pull/stop', { number }).then(this.actions.soon, (problem: unknown) => { tell(find('add-error'), complaint(problem)) }) }, `Stop pulling ${model}`)]
      for (const one of stop) one.dataset.focus = `stop ${number}`
      return el('li', state === 'failed' ? 'failed' : '', [el('span', 'what', model), el('span', state === 'failed' ? 'error' : 'soft', said), ...bar, ...stop])
    }))
  }
}

/** One model. */
class ModelRow {
  readonly root = el('section', 'card known')
  private readonly name = el('h3')
  private readonly facts = el('p', 'facts')
  private readonly error = el('p', 'error', [], { role: 'alert' })
  private readonly state = el('p', 'state')
  private readonly bar = el('progress')
  private readonly buttons = el('div', 'buttons')
  private readonly where: HTMLDetailsElement
  private readonly copies = el('div', 'copies')
  private readonly keys = el('ul', 'keys')
  private model: KnownModel | null = null
  private self = ''
  private work: AbortController | null = null
  private timer: ReturnType<typeof setInterval> | undefined

  constructor (private readonly id: string, private readonly owner: Owner, private readonly actions: ModelActions) {
    this.root.dataset.known = id
    const title = el('div', '', [this.name, this.facts])
    this.error.hidden = this.bar.hidden = this.state.hidden = true
    this.where = el('details', 'where', [el('summary', '', 'Copies and publishers'), this.copies, this.keys])
    this.where.ontoggle = () => {
      clearInterval(this.timer)
      if (!this.where.open) return
      void this.look()
      this.timer = setInterval(() => { void this.look() }, COPIES_MS)
    }
    this.root.append(el('div', 'head', [title, this.buttons]), this.bar, this.state, this.error, this.where)
  }

  end (): void {
    clearInterval(this.timer)
    this.work?.abort()
    this.root.remove()
  }

  draw (model: KnownModel, self: string): void {
    this.model = model
    this.self = self
    say(this.name, model.name)
    this.root.setAttribute('aria-label', model.name)
    const { copies, shards, shards_here: here, shards_reachable: reach } = model
    const parts = model.manifest
      ? [size(model.bytes), here === shards ? 'all of it here' : `${here} of ${count(shards, 'shard')} here, ${reach} in reach`]
      : ['its manifest has not come yet']
    if (model.pinned === true) parts.push('pinned')
    if (copies !== null && copies !== undefined) {
      const { fewest, most } = copies
      parts.push(fewest === most ? `on ${count(fewest, 'node')}` : `each part on ${fewest} to ${most} nodes`)
    }
    if (model.base !== undefined) parts.push('an adapter')
    parts.push(TRUST[model.trust ?? ''] ?? '')
    say(this.facts, parts.filter((part) => part !== '').join(' · '))
    this.heal(copies)
    const isWhole = here === shards && model.manifest
    redraw(this.buttons, [this.owner.may, this.work !== null, isWhole, model.pinned, model.name, model.base, here], () => this.tools(model, isWhole, here))
    redraw(this.keys, [model.signers, this.owner.may], () => (model.signers ?? []).map((signer) => this.signer(signer)))
  }

  private heal (copies: KnownModel['copies']): void {
    if (this.work !== null) return
    const lacking = copies?.lacking ?? 0
    const seconds = copies?.left_s ?? null
    tell(this.state, lacking === 0 ? '' : `Healing: ${count(lacking, 'object')} ${lacking === 1 ? 'has' : 'have'} too few copies, ${size(copies?.lacking_bytes ?? 0)} to be copied${seconds === null ? '' : `, ${left(seconds)}`}`)
  }

  private tools (model: KnownModel, isWhole: boolean, here: number): HTMLElement[] {
    const out: HTMLElement[] = []
    const add = (text: string, className: string, act: () => void): void => {
      const made = button(text, className, act, `${text} ${model.name}`)
      made.dataset.focus = text
      out.push(made)
    }
    if (this.work !== null) {
      add('Cancel', '', () => { this.work?.abort() })
      return out
    }
    if (model.base === undefined && model.manifest) add('Chat', 'primary', () => { this.actions.chat(model.name) })
    if (!this.owner.may) return out
    if (!isWhole) add('Fetch all', '', () => { void this.pin(true) })
    else if (model.pinned !== true) add('Pin', '', () => { void this.pin(false) })
    if (model.pinned === true) add('Unpin', '', () => { void this.act(async () => { await this.owner.ask('store/unpin', { target: this.id }) }) })
    if (here > 0 || model.pinned === true) add('Remove', 'quiet', () => { void this.remove() })
    return out
  }

  private async act (work: () => Promise<void>): Promise<void> {
    tell(this.error, '')
    try {
      await work()
    } catch (error) {
      // The keys that are to be compared stand below.
      if ((error as Failure).code === 'untrusted') this.where.open = true
      tell(this.error, (error as Failure).code === 'untrusted' ? 'Nobody here has trusted its publisher yet. Compare the key below with the publisher’s own, and trust it.' : complaint(error))
    }
    this.actions.soon()
  }

  private async pin (fetch: boolean): Promise<void> {
    const abort = new AbortController()
    this.work = abort
    if (this.model !== null) this.draw(this.model, this.self)
    tell(this.state, 'Asking the node…')
    const hear = (progress: Progress): void => {
      this.bar.hidden = progress.total === 0
      this.bar.max = Math.max(1, progress.total)
      this.bar.value = progress.done
      this.bar.setAttribute('aria-label', `Fetching ${this.model?.name ?? ''}`)
      tell(this.state, `${amount(progress)}${progress.slow == null ? '' : ` · waiting for ${brief(progress.slow)}, which is slow`}`)
    }
    // A person asks: strangers are refused with their keys instead of being trusted silently.
    await this.act(async () => {
      await this.owner.work<TargetReply>('store/pin', { target: this.id, fetch, can_ask: true }, hear, abort.signal).catch((error: unknown) => {
        if (!abort.signal.aborted) throw error
      })
    })
    this.work = null
    this.bar.hidden = true
    tell(this.state, '')
    if (this.model !== null) this.draw(this.model, this.self)
  }

  private async remove (): Promise<void> {
    const name = this.model?.name ?? ''
    if (!await confirm(`Remove ${name} from this node?`, 'Its objects are deleted from the disk. Others keep their copies.', 'Remove')) return
    const ask = async (last: boolean): Promise<void> => { await this.owner.ask<TargetReply>('store/rm', { target: this.id, force: true, last_copy: last }) }
    await this.act(async () => {
      try {
        await ask(false)
      } catch (error) {
        if ((error as Failure).code !== 'last_copy') throw error
        const said = (error as Error).message.replace(/; give --last-copy.*$/, '').replace(/^[^:]*: /, '')
        if (await confirm(`Remove the last copy of ${name}?`, `${said[0].toUpperCase()}${said.slice(1)}. Once removed, nobody in reach has it any more.`, 'Remove the last copy')) await ask(true)
      }
    })
  }

  private signer ({ name, publisher, trust }: Signer): HTMLElement {
    const key = el('code', 'key', publisher)
    const tools: HTMLElement[] = [copier(() => publisher, `the key of the publisher of ${name}`)]
    const change = async (to: boolean): Promise<void> => {
      await this.act(async () => { await this.owner.ask('trust', { publisher, trust: to, note: to ? `for ${name}`.slice(0, 100) : '' }) })
    }
    if (this.owner.may && trust !== 'own') {
      if (trust === 'trusted') tools.push(button('Refuse', 'quiet small', () => { void change(false) }, `Refuse the publisher ${brief(publisher)}`))
      else {
        tools.push(button('Trust', 'small', () => {
          void confirm('Trust this publisher?', `${publisher}. Compare the key with the one that the publisher told you. Its models may then be used here without a question.`, 'Trust').then(async (yes) => { if (yes) await change(true) })
        }, `Trust the publisher ${brief(publisher)}`))
      }
    }
    return el('li', '', [el('span', 'soft', `“${name}”, ${TRUST[trust] ?? trust}`), key, el('span', 'buttons', tools)])
  }

  /** Asks who holds what. */
  private async look (): Promise<void> {
    try {
      const reply = await fetch(`/models/${this.id}/copies`, { signal: AbortSignal.timeout(10_000) })
      if (!reply.ok) {
        const said = await reply.json().catch(() => null) as { error?: string } | null
        throw new Error(said?.error ?? `status ${reply.status}`)
      }
      this.spread(await reply.json() as ModelCopies)
    } catch (error) {
      redraw(this.copies, complaint(error), () => [el('p', 'soft', complaint(error))])
    }
  }

  private spread ({ objects }: ModelCopies): void {
    const shown = objects.slice(0, OBJECTS_MAX)
    const holders = [...new Set(objects.flatMap(({ holders }) => holders))].sort((a, b) => Number(b === this.self) - Number(a === this.self) || a.localeCompare(b))
    redraw(this.copies, [shown.map(({ id, copies, here, is_copying: copying, holders }) => [id, copies, here, copying, holders]), this.self], () => {
      const rows = holders.map((peer) => {
        const has = objects.filter((object) => object.holders.includes(peer))
        const cells = el('span', 'cells', shown.map((object) => {
          const held = object.holders.includes(peer)
          const how = peer === this.self && held ? `, ${object.here}` : ''
          return el('i', held ? 'whole' : '', [], { title: `${object.what} · ${size(object.size)} · ${held ? `held${how}` : 'not held'}` })
        }), { role: 'img', 'aria-label': `holds ${has.length} of ${count(objects.length, 'object')}` })
        const name = peer === this.self ? 'this node' : brief(peer)
        return el('tr', '', [el('th', 'mono', name, { scope: 'row', title: peer }), el('td', 'wide', cells), el('td', '', `${has.length} of ${objects.length}`)])
      })
      const few = objects.reduce((least, { copies }) => Math.min(least, copies), Infinity)
      const copying = objects.filter(({ is_copying: is }) => is).length
      const sum = objects.length === 0 ? 'It has no objects.' : `${count(objects.length, 'object')}, each with at least ${count(few, 'copy', 'copies')}${copying > 0 ? `; ${count(copying, 'object')} being copied to this node` : ''}.`
      const head = el('thead', '', el('tr', '', ['Node', 'Objects, in the order of the file', 'Holds'].map((text) => el('th', '', text, { scope: 'col' }))))
      return [el('p', 'soft', sum), el('div', 'scroll', el('table', 'spread', [head, el('tbody', '', rows)]), { tabindex: '0', role: 'region', 'aria-label': 'Copies by node' })]
    })
  }
}
