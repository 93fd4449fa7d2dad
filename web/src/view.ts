// What this tab does as a peer, the page's status, and the question for a private swarm's key: plain
// DOM, redrawn from state.

import { find, say } from './dom.ts'
import type { Copies, Keeper, Model } from './keeper.ts'
import type { SwarmKey } from './key.ts'
import { type NodeInfo, short, type Swarm, type Via } from './swarm.ts'
import { count, explain, left, rate, size } from './words.ts'

export interface Shown {
  node: NodeInfo
  reachable: boolean
  swarm: Swarm | null
  keeper: Keeper
  estimate: { quota: number, usage: number, persisted: boolean }
  slot: number
  /** Whether the node has listed its models. */
  listed: boolean
  /** The node serves without a swarm. */
  alone: boolean
}

interface Actions { keep: (id: string) => void, pause: (id: string) => void, remove: (id: string) => void, forget: () => void }

const TRANSPORTS: Record<string, string> = { websocket: 'WebSocket', webrtc: 'WebRTC', other: 'other' }
/** The most cells drawn for one model. */
const CELLS_MAX = 512

/** How many nodes hold each object of a model, and what is being healed. */
function spread (copies: Copies | null | undefined): string {
  if (copies === null || copies === undefined) return ''
  const { fewest, most, lacking } = copies
  const held = ` · on ${fewest === most ? count(fewest, 'node') : `${fewest} to ${most} nodes`}`
  if (lacking === 0) return held
  const seconds = copies.left_s === null ? '' : `, ${left(copies.left_s)}`
  return `${held}; too few hold ${count(lacking, 'object')} (${size(copies.lacking_bytes)} to be copied${seconds})`
}

function make (tag: string, className: string, text = ''): HTMLElement {
  const element = document.createElement(tag)
  element.className = className
  element.textContent = text
  return element
}

class Card {
  readonly root = make('article', 'card')
  private readonly name = make('h3', '')
  private readonly facts = make('p', 'facts')
  private readonly bar = document.createElement('progress')
  private readonly state = make('p', 'state')
  private readonly cells = make('div', 'cells')
  private readonly error = make('p', 'error')
  private readonly keep = make('button', 'primary', 'Keep in this tab') as HTMLButtonElement
  private readonly pause = make('button', '', 'Pause') as HTMLButtonElement
  private readonly drop = make('button', 'quiet', 'Remove') as HTMLButtonElement

  constructor (id: string, actions: Actions) {
    this.root.dataset.model = id
    const buttons = make('div', 'buttons')
    buttons.append(this.keep, this.pause, this.drop)
    const head = make('div', 'head')
    const title = make('div', '')
    title.append(this.name, this.facts)
    head.append(title, buttons)
    this.cells.setAttribute('role', 'img')
    this.error.setAttribute('role', 'alert')
    this.root.append(head, this.bar, this.state, this.cells, this.error)
    this.keep.onclick = () => { actions.keep(id) }
    this.pause.onclick = () => { actions.pause(id) }
    this.drop.onclick = () => { actions.remove(id) }
  }

  draw (model: Model): void {
    const parts = model.parts ?? []
    const held = parts.reduce((sum, part) => sum + part.held, 0)
    const whole = parts.filter((part) => part.state === 'whole').length
    const total = parts.reduce((sum, part) => sum + part.size, 0)
    const complete = parts.length > 0 && whole === parts.length
    const state = complete ? 'kept' : model.working ? 'fetching' : model.error !== '' ? 'failed' : held > 0 ? 'partial' : 'absent'
    say(this.name, model.name)
    say(this.facts, `${size(model.bytes)} · ${count(model.shards, 'shard')} · ${model.shards_here} on the node, ${model.shards_reachable} within reach${spread(model.copies)} · ${short(model.id)}`)
    this.root.dataset.state = state
    this.root.dataset.held = String(held)
    this.bar.max = Math.max(1, total)
    this.bar.value = held
    this.bar.setAttribute('aria-label', `${model.name}: kept in this tab`)
    const percent = total > 0 ? Math.floor(held / total * 100) : 0
    const from = parts.find((part) => part.state === 'busy')?.from ?? ''
    say(this.state, {
      kept: `Kept in this tab, verified and served to others (${size(held)})`,
      fetching: `${percent} % · ${rate(model.rate)}${from === '' ? '' : ` · from ${from === 'gateway' ? 'the node’s gateway' : `peer ${from}`}`}`,
      partial: `${percent} % kept`,
      failed: held > 0 ? `${percent} % kept; retrying` : 'Retrying',
      absent: 'Not in this tab'
    }[state])
    say(this.error, model.error === '' ? '' : explain(model.error))
    this.error.hidden = model.error === ''
    this.bar.hidden = held === 0 && !model.working
    this.keep.hidden = complete || model.wanted
    this.pause.hidden = complete || !model.wanted
    this.drop.hidden = held === 0
    this.cells.hidden = parts.length === 0
    this.cells.setAttribute('aria-label', `${whole} of ${count(parts.length, 'object')} kept`)
    while (this.cells.childElementCount < Math.min(parts.length, CELLS_MAX)) this.cells.append(document.createElement('i'))
    for (let i = 0; i < this.cells.childElementCount; i++) {
      const [cell, part] = [this.cells.children[i] as HTMLElement, parts[i]]
      cell.className = part.state
      cell.style.setProperty('--held', String(part.held / part.size))
      cell.title = `${short(part.id)} · ${size(part.held)} of ${size(part.size)}`
    }
  }
}

export class View {
  private readonly cards = new Map<string, Card>()
  private actions: Actions = { keep () {}, pause () {}, remove () {}, forget () {} }

  constructor (via: Via) {
    const select = find('via') as HTMLSelectElement
    select.value = via
    select.onchange = () => {
      const query = new URLSearchParams(location.search)
      query.set('via', select.value)
      location.search = query.toString()
    }
  }

  on (actions: Actions): void {
    this.actions = actions
    find('forget').onclick = () => { actions.forget() }
  }

  /** Asks for a private swarm's key until `read` accepts one. `wrong` says what was wrong with the last one. */
  async askKey (read: (text: string) => SwarmKey | null, wrong: string): Promise<{ key: SwarmKey, remember: boolean }> {
    document.body.dataset.state = 'locked'
    say(find('status'), 'This node’s swarm is private')
    const form = find('key') as HTMLFormElement
    const [text, file, remember] = ['key-text', 'key-file', 'key-remember'].map((id) => find(id) as HTMLInputElement)
    form.hidden = false
    const complain = (what: string): void => {
      find('key-wrong').hidden = what === ''
      say(find('key-wrong'), what)
    }
    complain(wrong)
    return await new Promise((resolve) => {
      form.onsubmit = (event) => {
        event.preventDefault()
        void (async () => {
          const key = read(text.value !== '' ? text.value : await file.files?.[0]?.text() ?? '')
          complain(key === null ? 'A swarm key is 64 hexadecimal digits.' : '')
          if (key === null) return
          resolve({ key, remember: remember.checked })
          form.reset()
          form.hidden = true
        })()
      }
    })
  }

  /** The node does not answer, and has not yet since the page was opened. */
  wait (): void {
    document.body.dataset.state = 'lost'
    say(find('status'), 'Reconnecting to the node…')
  }

  fail (error: Error): void {
    document.body.dataset.state = 'failed'
    say(find('status'), 'This tab cannot be a peer')
    const box = find('failure')
    box.hidden = false
    say(box, explain(error))
  }

  draw ({ node, reachable, swarm, keeper, estimate, slot, listed, alone }: Shown): void {
    const connections = swarm?.connections() ?? []
    const state = swarm?.refused === true ? 'refused' : !reachable ? 'lost' : connections.length > 0 ? 'joined' : alone ? 'alone' : 'joining'
    document.body.dataset.state = state
    document.body.dataset.transport = connections[0]?.transport ?? ''
    say(find('status'), {
      lost: 'Reconnecting to the node…',
      alone: 'The node serves without a swarm',
      joined: `In swarm ${node.swarm} over ${[...new Set(connections.map(({ transport }) => TRANSPORTS[transport]))].join(' and ')}`,
      joining: `Joining swarm ${node.swarm}…`,
      refused: `Refused by swarm ${node.swarm}`
    }[state])
    const trouble = find('failure')
    // While the node is away, its swarm cannot be reached either: one message is enough.
    trouble.hidden = ['joined', 'alone', 'lost'].includes(state) || (swarm?.lastError ?? '') === ''
    if (!trouble.hidden) say(trouble, swarm?.lastError ?? '')
    find('forget').hidden = !node.private
    const own = find('own')
    say(own, short(swarm?.id ?? '—'))
    own.title = swarm?.id ?? ''
    say(find('tab'), slot === 0 ? 'This tab' : `This tab, number ${slot + 1} of this browser`)
    say(find('received'), size(keeper.received.gateway + keeper.received.peers))
    say(find('received-from'), `${size(keeper.received.gateway)} gateway, ${size(keeper.received.peers)} peers`)
    say(find('served'), size(swarm?.sent ?? 0))
    say(find('served-count'), count(swarm?.served ?? 0, 'range'))
    say(find('refused'), String(keeper.refused))
    say(find('storage'), size(estimate.usage))
    say(find('storage-of'), `of ${size(estimate.quota)}${estimate.persisted ? ', persistent' : ''}`)

    // The model that comes with the node gets a card once some of it is stored here.
    const models = [...keeper.models.values()].filter((model) => model.embedded !== true || model.wanted || (model.parts?.some((part) => part.held > 0) ?? false))
    find('no-models').hidden = models.length > 0
    say(find('no-models'), listed ? 'The node knows no model that this tab could keep. Publish one on any node of the swarm: doppler-node publish DIR' : 'Asking the node for its models…')
    for (const [id, card] of this.cards) {
      if (models.some((model) => model.id === id)) continue
      card.root.remove()
      this.cards.delete(id)
    }
    for (const model of models) {
      let card = this.cards.get(model.id)
      if (card === undefined) {
        card = new Card(model.id, this.actions)
        this.cards.set(model.id, card)
        find('models').append(card.root)
      }
      card.draw(model)
    }
    this.peers(node, swarm, connections)
  }

  private peers (node: NodeInfo, swarm: Swarm | null, connections: Array<{ peer: string, transport: string }>): void {
    const transports = new Map(connections.map(({ peer, transport }) => [peer, transport]))
    const rows = [
      { id: node.peer_id, agent: `doppler-node/${node.version}`, link: transports.get(node.peer_id), note: 'serves this page' },
      ...node.peers.map((peer) => ({
        id: peer.id,
        agent: peer.agent,
        link: transports.get(peer.id),
        note: peer.id === swarm?.id ? 'this tab' : count(peer.shards_held, 'object')
      }))
    ]
    const body = find('peers')
    const text = JSON.stringify(rows)
    if (body.dataset.rows === text) return
    body.dataset.rows = text
    body.replaceChildren(...rows.map((row) => {
      const line = document.createElement('tr')
      const id = make('td', 'mono', short(row.id))
      id.title = row.id
      const link = row.note === 'this tab' ? '—' : row.link === undefined ? 'through the node' : TRANSPORTS[row.link]
      const cell = (label: string, text: string): HTMLElement => {
        const made = make('td', '', text)
        made.dataset.label = label
        return made
      }
      line.append(id, cell('Agent', row.agent || '—'), cell('Link from this tab', link), cell('Holds', row.note))
      return line
    }))
  }
}
