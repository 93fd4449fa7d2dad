// Server-sent events (HTML, section 9.2.6): the data of each event, from text in pieces. Pure.

/** The longest event. A longer one is an error of the server. */
const EVENT_CHARS_MAX = 1 << 20

export class Events {
  private rest = ''
  private data: string[] = []

  /** Takes in a piece, and returns the data of the events that it ends. */
  push (piece: string): string[] {
    this.rest += piece
    const out: string[] = []
    for (;;) {
      const end = this.rest.search(/\r\n|\n|\r(?!$)/)
      if (end < 0) break
      const line = this.rest.slice(0, end)
      this.rest = this.rest.slice(end + (this.rest.startsWith('\r\n', end) ? 2 : 1))
      if (line === '') {
        if (this.data.length > 0) out.push(this.data.join('\n'))
        this.data = []
      } else if (line.startsWith('data:')) {
        this.data.push(line.slice(line[5] === ' ' ? 6 : 5))
      }
    }
    if (this.rest.length > EVENT_CHARS_MAX) throw new Error('the node sent an event that is too long')
    return out
  }
}

/** The lines of an answer of JSON, one object a line. */
export class Lines {
  private rest = ''

  push (piece: string): string[] {
    const lines = (this.rest + piece).split('\n')
    this.rest = lines.pop() ?? ''
    if (this.rest.length > EVENT_CHARS_MAX) throw new Error('the node sent a line that is too long')
    return lines.filter((line) => line.trim() !== '')
  }
}

/** Reads a response's body to its end, through one of these. */
export async function * read (response: Response, through: { push: (piece: string) => string[] }): AsyncGenerator<string> {
  const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader()
  if (reader === undefined) return
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      yield * through.push(value)
    }
  } finally {
    // Whoever stops listening tells the node so.
    reader.cancel().catch(() => {})
  }
}
