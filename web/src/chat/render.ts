// Markdown's blocks as elements. What has not changed since the last text stays as it is, so a
// selection and the keyboard's place survive while an answer grows.

import { button, el } from '../dom.ts'
import { type Block, type Inline, parse } from './markdown.ts'

const COPIED_MS = 1500

/** Copies a text, and says on the button that it did. `what` names the text. */
export function copier (text: () => string, what: string): HTMLButtonElement {
  const copy = button('Copy', 'quiet small', () => {
    void navigator.clipboard.writeText(text()).then(() => 'Copied', () => 'Not allowed:').then((said) => {
      name(said)
      setTimeout(() => { name('Copy') }, COPIED_MS)
    })
  })
  const name = (said: string): void => {
    copy.textContent = said
    copy.setAttribute('aria-label', `${said} ${what}`)
  }
  name('Copy')
  return copy
}

export class Rendered {
  private shown: string[] = []

  constructor (readonly root: HTMLElement) {}

  update (text: string): void {
    const blocks = parse(text)
    const now = blocks.map((block) => JSON.stringify(block))
    for (const [at, block] of blocks.entries()) {
      if (this.shown[at] === now[at]) continue
      const old = this.root.children[at] as HTMLElement | undefined
      const made = draw(block)
      if (old === undefined) this.root.append(made)
      else if (!grow(old, made)) old.replaceWith(made)
    }
    while (this.root.childElementCount > blocks.length) this.root.lastElementChild?.remove()
    this.shown = now
  }
}

/** A code block that grows keeps its elements. */
function grow (old: HTMLElement, made: HTMLElement): boolean {
  const [from, to] = [made, old].map((figure) => figure.matches('figure.code') ? figure.querySelector('code') : null)
  if (from === null || to === null || old.dataset.language !== made.dataset.language) return false
  to.textContent = from.textContent
  return true
}

function draw (block: Block): HTMLElement {
  switch (block.kind) {
    case 'paragraph': return el('p', '', inline(block.inside))
    // All of one level, below who wrote them: models skip levels.
    case 'heading': return el('h4', `as-h${block.level}`, inline(block.inside))
    case 'rule': return el('hr')
    case 'quote': return el('blockquote', '', block.blocks.map(draw))
    case 'code': return code(block.language, block.text)
    case 'list': {
      const items = block.items.map((blocks) => el('li', '', blocks.length === 1 && blocks[0].kind === 'paragraph' ? inline(blocks[0].inside) : blocks.map(draw)))
      if (block.start === null) return el('ul', '', items)
      return el('ol', '', items, block.start === 1 ? {} : { start: String(block.start) })
    }
    case 'table': {
      const cell = (tag: 'th' | 'td', inside: Inline[], column: number): HTMLElement => el(tag, `to-${block.aligns[column]}`, inline(inside), tag === 'th' ? { scope: 'col' } : {})
      const head = el('tr', '', block.head.map((inside, column) => cell('th', inside, column)))
      const rows = block.rows.map((row) => el('tr', '', row.map((inside, column) => cell('td', inside, column))))
      return el('div', 'scroll', el('table', '', [el('thead', '', head), el('tbody', '', rows)]), { tabindex: '0', role: 'region', 'aria-label': 'Table' })
    }
  }
}

function code (language: string, text: string): HTMLElement {
  const inner = el('code', '', text)
  const name = language === '' ? 'Code' : language
  const head = el('figcaption', '', [el('span', '', name), copier(() => inner.textContent ?? '', `the code (${name})`)])
  const pre = el('pre', '', inner, { tabindex: '0', 'aria-label': `${name}, scrollable` , role: 'region' })
  const figure = el('figure', 'code', [head, pre])
  figure.dataset.language = language
  return figure
}

function inline (parts: Inline[]): Node[] {
  return parts.map((part) => {
    switch (part.kind) {
      case 'text': return document.createTextNode(part.text)
      case 'code': return el('code', '', part.text)
      case 'break': return el('br')
      case 'link': return el('a', '', inline(part.inside), { href: part.href, target: '_blank', rel: 'noopener noreferrer nofollow' })
      default: return el(part.kind, '', inline(part.inside))
    }
  })
}
