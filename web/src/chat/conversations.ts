// The conversations of this browser: in localStorage, and nowhere else. Bounded: the ones that were
// left alone for longest go first.

export interface End {
  /** Why the answer ended, for programs: stop, limit, context, stopped, broken. */
  reason: 'stop' | 'limit' | 'context' | 'stopped' | 'broken'
  tokens: number
  /** Tokens a second, if more than one came. */
  speed: number | null
  /** From the request to the first token. */
  first: number | null
  /** Of the prompt's tokens, those that were known from before. */
  cached: number
}

export interface Turn {
  role: 'user' | 'assistant'
  text: string
  /** Of an answer: the model's name as it is shown. */
  model?: string
  end?: End
  error?: string
}

export interface Conversation {
  id: string
  title: string
  /** The chosen model, as the select's value. */
  model: string
  system: string
  turns: Turn[]
  /** When it was last changed, since 1970 in ms. Only orders the list. */
  touched: number
}

export const CONVERSATIONS_MAX = 50
export const TURNS_MAX = 400
/** Characters of one message. */
export const MESSAGE_CHARS_MAX = 200_000
/** Characters of all conversations as they are stored. Browsers keep about five million. */
const STORED_CHARS_MAX = 3_000_000
const TITLE_CHARS_MAX = 60
const KEY = 'doppler-conversations'
const VERSION = 1

/** A conversation's name: the begin of its first message. */
export function title (text: string): string {
  const line = text.trim().split('\n', 1)[0].replace(/\s+/g, ' ')
  return line.length <= TITLE_CHARS_MAX ? line : `${line.slice(0, TITLE_CHARS_MAX - 1).trimEnd()}…`
}

function isTurn (turn: unknown): turn is Turn {
  const { role, text } = (turn ?? {}) as Partial<Turn>
  return (role === 'user' || role === 'assistant') && typeof text === 'string'
}

/** What is stored, without what is damaged. */
export function decode (text: string | null): Conversation[] {
  let stored: { version?: unknown, list?: unknown } | null = null
  try {
    stored = JSON.parse(text ?? 'null')
  } catch {
    return []
  }
  if (stored?.version !== VERSION || !Array.isArray(stored.list)) return []
  const out: Conversation[] = []
  for (const one of stored.list.slice(0, CONVERSATIONS_MAX) as Array<Partial<Conversation> | null>) {
    if (typeof one?.id !== 'string' || !Array.isArray(one.turns)) continue
    const { id, title, model, system, touched } = one
    const turns = one.turns.filter(isTurn).slice(-TURNS_MAX)
    out.push({ id, title: String(title ?? ''), model: String(model ?? ''), system: String(system ?? ''), turns, touched: Number(touched) || 0 })
  }
  return out
}

/** What is to be stored: the latest conversations that fit. */
export function encode (list: Conversation[]): string {
  const latest = list.filter(({ turns }) => turns.length > 0).sort((a, b) => b.touched - a.touched).slice(0, CONVERSATIONS_MAX)
  for (;;) {
    const text = JSON.stringify({ version: VERSION, list: latest })
    if (text.length <= STORED_CHARS_MAX || latest.length === 0) return text
    latest.pop()
  }
}

export class Conversations {
  private list: Conversation[] = []
  /** Another tab of this browser has changed them. */
  changed: () => void = () => {}

  constructor () {
    this.load()
    window.addEventListener('storage', ({ key }) => {
      if (key !== KEY && key !== null) return
      this.load()
      this.changed()
    })
  }

  private load (): void {
    try {
      this.list = decode(localStorage.getItem(KEY))
    } catch {
      // Without storage, conversations last as long as the page.
    }
  }

  /** The latest first. */
  all (): Conversation[] {
    return this.list.sort((a, b) => b.touched - a.touched)
  }

  get (id: string): Conversation | undefined {
    return this.list.find((one) => one.id === id)
  }

  /** Stores a conversation. False if the browser does not keep it. */
  put (conversation: Conversation): boolean {
    this.list = [conversation, ...this.list.filter(({ id }) => id !== conversation.id)].slice(0, CONVERSATIONS_MAX)
    return this.store()
  }

  remove (id: string): void {
    this.list = this.list.filter((one) => one.id !== id)
    this.store()
  }

  private store (): boolean {
    try {
      localStorage.setItem(KEY, encode(this.list))
      return true
    } catch {
      return false
    }
  }
}

export function fresh (model: string, system = ''): Conversation {
  return { id: crypto.randomUUID(), title: '', model, system, turns: [], touched: Date.now() }
}
