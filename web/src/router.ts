// The page's views, one at a time, by the address's fragment.

import { find } from './dom.ts'

export const VIEWS = ['chat', 'swarm', 'models', 'tab'] as const
export type ViewName = typeof VIEWS[number]

const NAMES: Record<ViewName, string> = { chat: 'Chat', swarm: 'Swarm', models: 'Models', tab: 'This tab' }

export class Router {
  now: ViewName = 'chat'
  changed: () => void = () => {}

  constructor () {
    addEventListener('hashchange', () => {
      this.show()
      // The keyboard goes on from the new view.
      find(`${this.now}-title`).focus({ preventScroll: true })
      scrollTo({ top: this.now === 'chat' ? document.documentElement.scrollHeight : 0 })
      this.changed()
    })
    this.show()
  }

  private show (): void {
    const asked = location.hash.slice(1) as ViewName
    this.now = VIEWS.includes(asked) ? asked : 'chat'
    document.body.dataset.view = this.now
    document.title = `${NAMES[this.now]} · doppler-node`
    for (const view of VIEWS) {
      find(`view-${view}`).hidden = view !== this.now
      const link = find(`to-${view}`)
      if (view === this.now) link.setAttribute('aria-current', 'page')
      else link.removeAttribute('aria-current')
    }
  }
}
