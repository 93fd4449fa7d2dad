// Building and changing the page's elements. Text only ever enters as text.

type Child = Node | string

/** The element of the page with this id. */
export const find = <T extends HTMLElement = HTMLElement>(id: string): T => document.getElementById(id) as T

/** Sets an element's text, only if it changed: screen readers announce each change of a live region. */
export function say (element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text
}

/** Shows an element with this text, or hides it if there is none. */
export function tell (element: HTMLElement, text: string): void {
  element.hidden = text === ''
  say(element, text)
}

/** An element with a class, attributes and children. */
export function el<K extends keyof HTMLElementTagNameMap> (tag: K, className = '', children: Child | Child[] = [], attributes: Record<string, string> = {}): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag)
  if (className !== '') element.className = className
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...Array.isArray(children) ? children : [children])
  return element
}

/** A button of text that does something. */
export function button (text: string, className: string, act: () => void, label = ''): HTMLButtonElement {
  const element = el('button', className, text, { type: 'button' })
  if (label !== '') element.setAttribute('aria-label', label)
  element.onclick = act
  return element
}

/** Replaces an element's children if what they show has changed. `made` is called only then. */
export function redraw (element: HTMLElement, shown: unknown, made: () => Node[]): boolean {
  const text = JSON.stringify(shown)
  if (element.dataset.shown === text) return false
  element.dataset.shown = text
  // The keyboard stays where it was, if what it was on is still there.
  const focused = document.activeElement
  const kept = focused instanceof HTMLElement && element.contains(focused) ? focused.dataset.focus : undefined
  element.replaceChildren(...made())
  if (kept !== undefined) element.querySelector<HTMLElement>(`[data-focus="${CSS.escape(kept)}"]`)?.focus()
  return true
}

/** Sets the options of a select, by value and text, in groups, and keeps what was chosen. */
export function choices (select: HTMLSelectElement, groups: Array<{ label: string, options: Array<{ value: string, text: string, off?: boolean }> }>): void {
  const chosen = select.value
  redraw(select, groups, () => groups.filter(({ options }) => options.length > 0).map(({ label, options }) => {
    const group = el('optgroup', '', options.map(({ value, text, off }) => {
      const option = new Option(text, value, false, value === chosen)
      option.disabled = off === true
      return option
    }))
    group.label = label
    return group
  }))
}
