// The chat: a conversation with a model of the node or of this tab. Draws what changed, keeps what
// is said in this browser, and never asks for two answers at once.

import { confirm } from '../confirm.ts'
import { button, choices, el, find, redraw, say, tell } from '../dom.ts'
import { count, isAway, number } from '../words.ts'
import { ask, type Asked, AskError, complaint, Meter, type Said, type Settings } from './ask.ts'
import { type Conversation, Conversations, fresh, MESSAGE_CHARS_MAX, title, type Turn, TURNS_MAX } from './conversations.ts'
import { type Choice, chosen, groups, type NodeModel, type TabModel } from './models.ts'
import type { Owner } from '../owner.ts'
import { split } from './think.ts'
import { TurnView } from './turn.ts'

/** How often a growing answer is drawn. */
const DRAW_MS = 60
/** How often a screen reader is told what has come. */
const READ_MS = 2500
/** How near to its end the page must be to follow an answer. */
const FOLLOW_PX = 120

const TOKENS_MAX = 131_072
const SEED_MAX = 2 ** 53 - 1

/** Answers from this tab's own engine. */
export type AskTab = (id: string, asked: Asked, signal: AbortSignal) => AsyncGenerator<Said>

export interface ChatState {
  /** Null until the node has said it. */
  models: NodeModel[] | null
  tab: TabModel[]
  /** What keeps this tab from running models; empty if nothing does. */
  why: string
  away: boolean
  /** The node has been updated since this page was loaded. */
  outdated: boolean
}

export class ChatView {
  private readonly kept = new Conversations()
  private now: Conversation
  private turns: TurnView[] = []
  private abort: AbortController | null = null
  private state: ChatState = { models: null, tab: [], why: '', away: false, outdated: false }
  private readonly list = find<HTMLOListElement>('turns')
  private readonly field = find<HTMLTextAreaElement>('chat-text')
  private readonly model = find<HTMLSelectElement>('chat-model')
  private readonly system = find<HTMLTextAreaElement>('chat-system')

  constructor (private readonly askTab: AskTab, private readonly owner: Owner) {
    this.now = this.kept.all()[0] ?? fresh('')
    this.kept.changed = () => {
      if (this.abort === null) this.open(this.kept.get(this.now.id) ?? this.now)
    }
    find<HTMLFormElement>('composer').onsubmit = (event) => {
      event.preventDefault()
      this.send()
    }
    this.field.onkeydown = (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return
      // On a touch screen the key begins a line, as there is no Shift to hold.
      if (matchMedia('(pointer: coarse)').matches) return
      event.preventDefault()
      this.send()
    }
    find('chat-stop').onclick = () => { this.stop() }
    document.addEventListener('keydown', ({ key }) => {
      if (key === 'Escape' && this.abort !== null && !find<HTMLDialogElement>('confirm').open) this.stop()
    })
    find('chat-new').onclick = () => {
      if (this.abort !== null) this.stop()
      this.open(fresh(this.model.value, this.now.system))
      this.field.focus()
    }
    this.model.onchange = () => {
      this.now.model = this.model.value
      this.draw()
    }
    this.system.oninput = () => {
      this.now.system = this.system.value
      if (this.now.turns.length > 0) this.keep()
    }
    find<HTMLDetailsElement>('history').open = matchMedia('(min-width: 56.01rem)').matches
    this.open(this.now)
  }

  get busy (): boolean {
    return this.abort !== null
  }

  /** Chooses a model, for the other views. */
  choose (value: string): void {
    if (![...this.model.options].some((option) => option.value === value)) return
    this.now.model = this.model.value = value
    this.draw()
    this.field.focus()
  }

  private open (conversation: Conversation): void {
    this.now = conversation
    this.system.value = conversation.system
    this.turns = conversation.turns.map((turn) => this.view(turn))
    this.list.replaceChildren(...this.turns.map(({ root }) => root))
    this.draw()
  }

  private view (turn: Turn): TurnView {
    const view: TurnView = new TurnView(turn, {
      edit: (text) => { void this.answer(this.turns.indexOf(view), text) },
      again: () => {
        const at = this.turns.indexOf(view) - 1
        if (at >= 0) void this.answer(at, this.turns[at].turn.text)
      }
    })
    return view
  }

  /** Shows what the node and this tab can do now. */
  update (state: ChatState): void {
    this.state = state
    this.draw()
  }

  private draw (): void {
    const { models, tab, why, away, outdated } = this.state
    const options = groups(models ?? [], tab, why)
    choices(this.model, options)
    const all = options.flatMap(({ options }) => options).filter(({ off }) => off !== true)
    if (this.now.model !== '' && this.model.value !== this.now.model && all.some(({ value }) => value === this.now.model)) this.model.value = this.now.model
    const isKnown = all.some(({ value }) => value === this.model.value)
    if (!isKnown) this.model.value = all[0]?.value ?? ''
    this.empty(models, all, away)
    const send = find<HTMLButtonElement>('chat-send')
    send.disabled = this.model.value === '' || (away && chosen(this.model.value)?.where === 'node')
    send.hidden = this.busy
    find('chat-stop').hidden = !this.busy
    document.body.dataset.answering = String(this.busy)
    for (const view of this.turns) for (const one of view.root.querySelectorAll<HTMLButtonElement>('.tools button')) one.disabled = this.busy
    say(find('chat-hint'), away ? 'The node is away. What you write stays here until it is back.' : outdated ? 'The node has been updated: reload this page to go on with its new version.' : '')
    this.history()
  }

  /** What stands in place of a conversation that has not begun. */
  private empty (models: NodeModel[] | null, all: Choice[], away: boolean): void {
    const box = find('chat-empty')
    box.hidden = this.now.turns.length > 0
    if (box.hidden) return
    const text = all.length > 0 ? '' : models === null ? (away ? 'The node does not answer yet. This page asks again by itself.' : 'Asking the node for its models…') : 'No model can be asked yet.'
    redraw(box, [text, models === null], () => {
      if (text === '') return [el('p', 'big', 'What would you like to ask?'), el('p', 'soft', 'The model runs on this node, or in this tab. What you say stays in this browser and on the node.')]
      const next = models === null ? [] : [el('p', 'soft', ['Pull one from the Hugging Face Hub, or publish a directory, under ', el('a', '', 'Models', { href: '#models' }), '.'])]
      return [el('p', 'big', text), ...next]
    })
  }

  private history (): void {
    const list = this.kept.all()
    find('history').hidden = list.length === 0
    say(find('history-title'), count(list.length, 'conversation'))
    redraw(find('history-list'), list.map(({ id, title }) => [id, title, id === this.now.id, this.busy]), () => list.map((one) => {
      const open = button(one.title, 'open', () => { this.open(one) })
      open.disabled = this.busy
      if (one.id === this.now.id) open.setAttribute('aria-current', 'true')
      open.dataset.focus = one.id
      const drop = button('×', 'quiet drop', () => { void this.drop(one) }, `Delete the conversation “${one.title}”`)
      drop.disabled = this.busy
      return el('li', '', [open, drop])
    }))
  }

  private async drop (one: Conversation): Promise<void> {
    if (!await confirm(`Delete “${one.title}”?`, `${count(one.turns.length, 'message')} will be gone from this browser.`, 'Delete')) return
    this.kept.remove(one.id)
    if (one.id === this.now.id) this.open(this.kept.all()[0] ?? fresh(this.model.value))
    else this.draw()
    find('chat-new').focus()
  }

  private keep (): void {
    this.now.touched = Date.now()
    const kept = this.kept.put(this.now)
    if (!kept) tell(find('chat-error'), 'This browser keeps no conversations: they are gone when the page is closed.')
  }

  private send (): void {
    const text = this.field.value
    if (text.trim() === '' || this.busy || find<HTMLButtonElement>('chat-send').disabled) return
    void this.answer(this.turns.length, text).then((began) => {
      if (began && this.field.value === text) this.field.value = ''
    })
    // The field is emptied at once if nothing was wrong with it.
    if (this.busy) this.field.value = ''
  }

  stop (): void {
    this.abort?.abort()
  }

  private settings (): Settings | string {
    const read = (id: string, what: string, bounds: { min: number, max: number, whole?: boolean }): number | null | { wrong: string } => number(find<HTMLInputElement>(id).value, what, bounds)
    const temperature = read('chat-temperature', 'The temperature', { min: 0, max: 2, whole: false })
    const limit = read('chat-limit', 'The limit of tokens', { min: 1, max: TOKENS_MAX })
    const seed = read('chat-seed', 'The seed', { min: 0, max: SEED_MAX })
    for (const [id, value] of [['chat-temperature', temperature], ['chat-limit', limit], ['chat-seed', seed]] as const) {
      const wrong = typeof value === 'object' && value !== null ? value.wrong : ''
      find(id).toggleAttribute('aria-invalid', wrong !== '')
      if (wrong === '') continue
      find<HTMLDetailsElement>('chat-options').open = true
      find(id).focus()
      return wrong
    }
    return { temperature, limit, seed } as Settings
  }

  /** Puts `text` at a place of the conversation, drops what came after it, and asks for an answer. False if it cannot. */
  private async answer (at: number, text: string): Promise<boolean> {
    const target = chosen(this.model.value)
    const settings = this.settings()
    const wrong = text.length > MESSAGE_CHARS_MAX
      ? `A message has at most ${MESSAGE_CHARS_MAX.toLocaleString('en')} characters; this one has ${text.length.toLocaleString('en')}.`
      : at + 2 > TURNS_MAX ? `A conversation has at most ${TURNS_MAX} messages: begin a new one.`
        : typeof settings === 'string' ? `${settings}.` : target === null ? 'Choose a model first.' : ''
    tell(find('chat-error'), wrong)
    if (wrong !== '' || target === null || typeof settings === 'string' || this.busy) return false
    const { now } = this
    now.turns = now.turns.slice(0, at)
    for (const view of this.turns.splice(at)) view.root.remove()
    if (at === 0) now.title = title(text)
    now.model = this.model.value
    const name = this.model.selectedOptions[0]?.text ?? ''
    const asked: Turn = { role: 'user', text }
    const turn: Turn = { role: 'assistant', text: '', model: target.where === 'tab' ? `${name.replace(/ \(.*\)$/, '')}, in this tab` : name }
    now.turns.push(asked, turn)
    this.turns.push(this.view(asked), this.view(turn))
    this.list.append(...this.turns.slice(-2).map(({ root }) => root))
    const abort = new AbortController()
    this.abort = abort
    this.draw()
    const view = this.turns[this.turns.length - 1]
    view.root.scrollIntoView({ block: 'end' })
    const request: Asked = { model: target.where === 'node' ? target.name : target.id, system: now.system, turns: now.turns.slice(0, -1), settings }
    const stream = target.where === 'node' ? ask(this.owner, request, abort.signal) : this.askTab(target.id, request, abort.signal)
    await this.hear(stream, turn, view, abort.signal)
    this.abort = null
    if (this.now === now) view.draw(false)
    this.keep()
    this.draw()
    return true
  }

  /** Takes an answer in as it comes. */
  private async hear (stream: AsyncGenerator<Said>, turn: Turn, view: TurnView, signal: AbortSignal): Promise<void> {
    const meter = new Meter(performance.now())
    const reader = new Reader(find('chat-said'))
    let drawing: ReturnType<typeof setTimeout> | null = null
    const draw = (): void => {
      drawing = null
      const { scrollHeight, scrollTop, clientHeight } = document.documentElement
      const follows = scrollHeight - scrollTop - clientHeight < FOLLOW_PX
      view.draw(true)
      if (follows) scrollTo({ top: document.documentElement.scrollHeight })
      reader.read(split(turn.text).answer)
    }
    view.draw(true)
    reader.begin()
    try {
      for await (const said of stream) {
        if (said.kind === 'plain') turn.model = `${turn.model ?? ''} (goes on from your text)`
        if (said.kind === 'end') turn.end = said.end
        if (said.kind !== 'text') continue
        meter.note()
        turn.text += said.text
        drawing ??= setTimeout(draw, DRAW_MS)
      }
    } catch (error) {
      turn.end = turn.text === '' && !signal.aborted ? undefined : meter.end(signal.aborted ? 'stopped' : 'broken')
      const broke = (error instanceof AskError && error.code === 'broken') || (turn.text !== '' && isAway(error))
      if (!signal.aborted) turn.error = broke ? 'The connection to the node broke off. What had come is kept; try again when the node is back.' : complaint(error)
    }
    if (drawing !== null) clearTimeout(drawing)
    reader.end(turn.error ?? split(turn.text).answer)
  }
}

/** Reads an answer to a screen reader: whole sentences, now and then, not each token. */
class Reader {
  private told = 0
  private last = 0

  constructor (private readonly region: HTMLElement) {}

  begin (): void {
    this.last = performance.now()
    say(this.region, 'The model is writing.')
  }

  read (text: string): void {
    if (performance.now() - this.last < READ_MS) return
    const end = Math.max(...['. ', '! ', '? ', '\n'].map((mark) => text.lastIndexOf(mark)))
    if (end < this.told) return
    this.last = performance.now()
    say(this.region, text.slice(this.told, end + 1))
    this.told = end + 1
  }

  end (text: string): void {
    say(this.region, `${text.slice(this.told)} The answer ends here.`)
  }
}
