// The page's link to its node: asks it for what it knows, again and again, and says whether it answers.

import type { NodeModel } from './chat/models.ts'
import type { Listed } from './keeper.ts'
import type { NodeState } from './nodestate.ts'
import type { Owner } from './owner.ts'
import type { NodeInfo } from './swarm.ts'

/** How often the node is asked, and how often once it did not answer. */
export const POLL_MS = 2000
const AGAIN_MS = 700
/** How long it may take to answer. */
const ANSWER_MS = 10_000

export class Link {
  info: NodeInfo | null = null
  state: NodeState | null = null
  /** Null until the node has listed them. */
  models: Listed[] | null = null
  /** Those that can be asked; null likewise, or if the page may not ask. */
  chat: NodeModel[] | null = null
  embedded: Listed | null = null
  reachable = true
  /** The node has been updated since this page was loaded. */
  outdated = false
  private version = ''
  private wake: () => void = () => {}

  constructor (private readonly owner: Owner) {}

  private async get<T> (path: string): Promise<T> {
    const response = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS) })
    if (!response.ok) throw new Error(`${path}: ${response.status}`)
    return await response.json() as T
  }

  /** Asks once. Returns whether the node answered. */
  async ask (): Promise<boolean> {
    try {
      const info = await this.get<NodeInfo>('/node')
      this.outdated ||= this.version !== '' && this.version !== info.version
      if (this.version === '') this.version = info.version
      this.info = info
      this.reachable = true
    } catch {
      this.reachable = false
      return false
    }
    // What one of these does not say now stays as it was.
    await Promise.allSettled([
      this.get<NodeState>('/node/state').then((state) => { this.state = state }),
      this.get<Listed[]>('/models').then((models) => { this.models = models }),
      this.asked().then((chat) => { this.chat = chat ?? this.chat }),
      this.embedded === null ? this.get<Listed>('/models/embedded').then((model) => { this.embedded = model }) : null
    ])
    return true
  }

  /** The models that can be asked; an empty list if the page may not ask. */
  private async asked (): Promise<NodeModel[] | null> {
    const reply = await this.owner.fetch('/v1/models', { signal: AbortSignal.timeout(ANSWER_MS) })
    if (reply.status === 401) return []
    return reply.ok ? (await reply.json() as { data: NodeModel[] }).data : null
  }

  /** Waits until it is time to ask again, or [`soon`] is called. */
  async rest (): Promise<void> {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, this.reachable ? POLL_MS : AGAIN_MS)
      this.wake = () => {
        clearTimeout(timer)
        resolve()
      }
    })
  }

  soon (): void {
    this.wake()
  }
}
