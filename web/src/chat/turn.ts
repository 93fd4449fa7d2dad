// One message of a conversation as elements: plain text of the user, Markdown of a model, with what
// can be done with it.

import { button, el, say } from '../dom.ts'
import { count } from '../words.ts'
import type { End, Turn } from './conversations.ts'
import { copier, Rendered } from './render.ts'
import { split } from './think.ts'

export interface TurnActions { edit: (text: string) => void, again: () => void }

const REASONS: Record<End['reason'], string> = {
  stop: 'the model ended it', limit: 'it reached the limit of tokens', context: 'the context is full',
  stopped: 'you stopped it', broken: 'it broke off'
}

/** Tokens, speed, and why it stopped. */
export function describe ({ reason, tokens, speed, first, cached }: End): string {
  const parts = [count(tokens, 'token')]
  if (speed !== null) parts.push(`${speed.toFixed(1)} tokens/s`)
  if (first !== null) parts.push(`first after ${first.toFixed(first < 10 ? 2 : 0)} s`)
  if (cached > 0) parts.push(`${count(cached, 'token')} of the prompt known from before`)
  return `${parts.join(' · ')} · ${REASONS[reason]}`
}

export class TurnView {
  readonly root: HTMLLIElement
  private readonly body = el('div', 'body')
  private readonly note = el('p', 'note')
  private readonly tools = el('div', 'tools')
  private readonly who: HTMLElement
  private readonly rendered: Rendered | null
  private thoughts: { root: HTMLDetailsElement, title: HTMLElement, text: HTMLElement } | null = null

  constructor (public turn: Turn, private readonly actions: TurnActions) {
    this.who = el('h3', 'who')
    this.root = el('li', `turn ${turn.role}`, [this.who, this.body, this.note, this.tools])
    const inner = el('div', turn.role === 'user' ? 'plain' : 'markdown')
    this.body.append(inner)
    this.rendered = turn.role === 'user' ? null : new Rendered(inner)
    if (turn.role === 'user') {
      say(inner, turn.text)
      this.tools.append(button('Edit', 'quiet small', () => { this.edit() }, 'Edit this message'))
    } else {
      this.tools.append(copier(() => split(this.turn.text).answer, 'the answer'))
      this.tools.append(button('Try again', 'quiet small', () => { actions.again() }, 'Try again: ask for another answer'))
    }
    this.draw(false)
  }

  /** Shows the turn as it is now. `growing`: more of it comes. */
  draw (growing: boolean): void {
    const { turn } = this
    say(this.who, turn.role === 'user' ? 'You' : turn.model ?? 'Model')
    if (this.rendered !== null) {
      const { reasoning, answer, thinking } = split(turn.text)
      this.reason(reasoning, thinking && growing)
      this.rendered.update(answer)
    }
    this.root.dataset.growing = String(growing)
    this.tools.hidden = growing
    const error = turn.error ?? ''
    this.note.className = error === '' ? 'note' : 'note error'
    const end = turn.end === undefined ? '' : describe(turn.end)
    const waits = growing && turn.text === '' ? 'Waiting for the model…' : ''
    say(this.note, error === '' ? waits || end : `${error}${end === '' ? '' : ` (${end})`}`)
    this.note.hidden = this.note.textContent === ''
  }

  private reason (text: string, thinking: boolean): void {
    if (text === '' && !thinking) {
      this.thoughts?.root.remove()
      this.thoughts = null
      return
    }
    if (this.thoughts === null) {
      const [title, inner] = [el('summary'), el('div', 'plain')]
      this.thoughts = { root: el('details', 'thoughts', [title, inner]), title, text: inner }
      this.body.prepend(this.thoughts.root)
    }
    say(this.thoughts.title, thinking ? 'Reasoning…' : 'Reasoning')
    say(this.thoughts.text, text)
  }

  /** Turns the message into a field. */
  private edit (): void {
    const field = el('textarea', 'edit', [], { 'aria-label': 'Your message', rows: '3' })
    field.value = this.turn.text
    const done = (): void => {
      form.remove()
      this.body.hidden = this.tools.hidden = false
    }
    const form = el('form', 'editing', [field, el('div', 'row', [
      el('button', 'primary', 'Send again', { type: 'submit' }),
      button('Cancel', '', () => {
        done()
        this.tools.querySelector('button')?.focus()
      })
    ])])
    form.onsubmit = (event) => {
      event.preventDefault()
      if (field.value.trim() === '') return
      done()
      this.actions.edit(field.value)
    }
    field.onkeydown = (event) => {
      if (event.key === 'Escape') form.querySelector<HTMLButtonElement>('button[type=button]')?.click()
      if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit()
    }
    this.body.hidden = this.tools.hidden = true
    this.body.after(form)
    field.focus()
  }
}
