// Markdown as models write it: CommonMark's usual part, with tables, as plain data. Pure.
//
// It knows no HTML and no images: tags stay text, and an image is a link, so that showing an answer
// asks nobody for anything. Every list of blocks, nesting included, is bounded.

export type Inline =
  | { kind: 'text' | 'code', text: string }
  | { kind: 'strong' | 'em' | 'del', inside: Inline[] }
  | { kind: 'link', href: string, inside: Inline[] }
  | { kind: 'break' }

export type Block =
  | { kind: 'paragraph', inside: Inline[] }
  | { kind: 'heading', level: number, inside: Inline[] }
  /** `open`: its end has not come yet. */
  | { kind: 'code', language: string, text: string, open: boolean }
  | { kind: 'quote', blocks: Block[] }
  | { kind: 'list', start: number | null, items: Block[][] }
  | { kind: 'table', aligns: string[], head: Inline[][], rows: Inline[][][] }
  | { kind: 'rule' }

/** Quotes and lists within each other, and emphasis within emphasis; what is deeper stays text. */
const DEPTH_MAX = 8
/** Characters of a link's text and address. */
const LINK_MAX = 2000

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$/
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*)|)$/
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/
const BLANK = /^[ \t]*$/

export function parse (text: string): Block[] {
  return blocks(text.replaceAll('\r\n', '\n').replaceAll('\t', '    ').split('\n'), 0)
}

function blocks (lines: string[], depth: number): Block[] {
  const out: Block[] = []
  for (let at = 0; at < lines.length;) {
    if (BLANK.test(lines[at])) {
      at += 1
      continue
    }
    const [block, next] = one(lines, at, depth)
    out.push(block)
    at = next
  }
  return out
}

/** The block that begins at a line, and the line after it. */
function one (lines: string[], at: number, depth: number): [Block, number] {
  const line = lines[at]
  const fence = FENCE.exec(line)
  if (fence !== null) return code(lines, at, fence[1], fence[2].trim())
  const heading = HEADING.exec(line)
  if (heading !== null) return [{ kind: 'heading', level: heading[1].length, inside: inline(heading[2]) }, at + 1]
  if (RULE.test(line)) return [{ kind: 'rule' }, at + 1]
  if (depth < DEPTH_MAX && /^ {0,3}>/.test(line)) return quote(lines, at, depth)
  if (depth < DEPTH_MAX && isItem(line)) return list(lines, at, depth)
  if (line.includes('|') && at + 1 < lines.length && lines[at + 1].includes('-') && DELIMITERS.test(lines[at + 1])) {
    const found = table(lines, at)
    if (found !== null) return found
  }
  let end = at + 1
  while (end < lines.length && !BLANK.test(lines[end]) && !begins(lines[end], depth)) end += 1
  const text = lines.slice(at, end).map((text) => text.replace(/^ +/, '')).join('\n')
  return [{ kind: 'paragraph', inside: inline(text.replace(/\s+$/, '')) }, end]
}

const isItem = (line: string): boolean => ITEM.test(line) && !RULE.test(line)

/** Whether a line ends a paragraph before it. */
function begins (line: string, depth: number): boolean {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true
  if (depth >= DEPTH_MAX) return false
  const item = ITEM.exec(line)
  // An empty item and a year at a line's begin are text.
  return /^ {0,3}>/.test(line) || (item?.[4] !== undefined && item[4] !== '' && (/^\D|^1[.)]/.test(item[2])))
}

function code (lines: string[], at: number, fence: string, info: string): [Block, number] {
  const indent = /^ */.exec(lines[at])?.[0].length ?? 0
  const closing = new RegExp(`^ {0,3}${fence[0] === '`' ? '`' : '~'}{${fence.length},}[ \\t]*$`)
  let end = at + 1
  while (end < lines.length && !closing.test(lines[end])) end += 1
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join('\n')
  return [{ kind: 'code', language: info.split(/\s/)[0], text, open: end >= lines.length }, Math.min(lines.length, end + 1)]
}

function dedent (line: string, by: number): string {
  let spaces = 0
  while (spaces < by && line[spaces] === ' ') spaces += 1
  return line.slice(spaces)
}

function quote (lines: string[], at: number, depth: number): [Block, number] {
  const inner: string[] = []
  let end = at
  for (; end < lines.length && !BLANK.test(lines[end]); end++) {
    if (/^ {0,3}>/.test(lines[end])) inner.push(lines[end].replace(/^ {0,3}> ?/, ''))
    else if (begins(lines[end], depth)) break
    else inner.push(lines[end])
  }
  return [{ kind: 'quote', blocks: blocks(inner, depth + 1) }, end]
}

function list (lines: string[], at: number, depth: number): [Block, number] {
  const first = (ITEM.exec(lines[at]) as RegExpExecArray)[2]
  const ordered = /\d/.test(first)
  const kin = (line: string): RegExpExecArray | null => {
    const item = isItem(line) ? ITEM.exec(line) : null
    return item !== null && item[2].at(-1) === first.at(-1) && /\d/.test(item[2]) === ordered ? item : null
  }
  const items: Block[][] = []
  let end = at
  while (end < lines.length) {
    const item = kin(lines[end])
    if (item === null) break
    const indent = item[1].length + item[2].length + Math.min(item[3]?.length ?? 1, 4)
    const inner = [item[4] ?? '']
    for (end += 1; end < lines.length; end++) {
      const line = lines[end]
      const spaces = /^ */.exec(line)?.[0].length ?? 0
      if (BLANK.test(line)) {
        // A blank line belongs to the item if more of it follows.
        const more = lines.slice(end + 1).find((line) => !BLANK.test(line)) ?? ''
        if ((/^ */.exec(more)?.[0].length ?? 0) < 2) break
        inner.push('')
      } else if (spaces >= Math.min(indent, 2) && (spaces >= 2 || !isItem(line))) {
        // Models indent by two spaces, whatever the marker's width.
        inner.push(dedent(line, indent))
      } else if (isItem(line) || begins(line, depth) || lines[end - 1] === '') {
        break
      } else {
        inner.push(line)
      }
    }
    items.push(blocks(inner, depth + 1))
    let next = end
    while (next < lines.length && BLANK.test(lines[next])) next += 1
    if (next < lines.length && kin(lines[next]) !== null) end = next
  }
  return [{ kind: 'list', start: ordered ? Number.parseInt(first, 10) : null, items }, end]
}

function cells (line: string): string[] {
  const out: string[] = ['']
  for (let i = 0; i < line.length; i++) {
    if (line[i] === '\\' && line[i + 1] === '|') {
      out[out.length - 1] += '|'
      i += 1
    } else if (line[i] === '|') {
      out.push('')
    } else {
      out[out.length - 1] += line[i]
    }
  }
  const trimmed = out.map((cell) => cell.trim())
  if (trimmed[0] === '') trimmed.shift()
  if (trimmed.at(-1) === '') trimmed.pop()
  return trimmed
}

function table (lines: string[], at: number): [Block, number] | null {
  const head = cells(lines[at])
  const aligns = cells(lines[at + 1]).map((cell) => cell.endsWith(':') ? (cell.startsWith(':') ? 'center' : 'end') : 'start')
  if (head.length !== aligns.length || head.length === 0) return null
  const rows: Inline[][][] = []
  let end = at + 2
  for (; end < lines.length && lines[end].includes('|'); end++) {
    const row = cells(lines[end])
    rows.push(head.map((_, column) => inline(row[column] ?? '')))
  }
  return [{ kind: 'table', aligns, head: head.map((cell) => inline(cell)), rows }, end]
}

/** An address that a link may lead to. */
export function isSafe (href: string): boolean {
  return /^(?:https?:\/\/|mailto:)[^\s<>]+$/i.test(href)
}

const MARKS = [['**', 'strong'], ['__', 'strong'], ['~~', 'del'], ['*', 'em'], ['_', 'em']] as const
const PUNCTUATION = /[!-/:-@[-`{-~]/
const BARE = /https?:\/\/[^\s<>"'`|]+/y

export function inline (text: string, depth = 0): Inline[] {
  const out: Inline[] = []
  /** Marks of which no end follows any more, so that each is looked for once. */
  const endless = new Set<string>()
  let plain = ''
  const flush = (): void => {
    if (plain !== '') out.push({ kind: 'text', text: plain })
    plain = ''
  }
  for (let at = 0; at < text.length;) {
    const found = text[at] === '\\' && PUNCTUATION.test(text[at + 1] ?? '') ? null : special(text, at, depth, endless)
    if (found === null) {
      const escaped = text[at] === '\\' && PUNCTUATION.test(text[at + 1] ?? '')
      plain += escaped ? text[at + 1] : text[at]
      at += escaped ? 2 : 1
      continue
    }
    flush()
    out.push(found[0])
    at = found[1]
  }
  flush()
  return out
}

/** What begins at a place, if it is not text, and where it ends. */
function special (text: string, at: number, depth: number, endless: Set<string>): [Inline, number] | null {
  switch (text[at]) {
    case '\n': return [{ kind: 'break' }, at + 1]
    case '`': return span(text, at, endless)
    case '<': {
      const tag = /<br ?\/?>/y
      tag.lastIndex = at
      return tag.test(text) ? [{ kind: 'break' }, tag.lastIndex] : null
    }
    case '!': return text[at + 1] === '[' ? link(text, at + 1, depth) : null
    case '[': return link(text, at, depth)
    case 'h': return bare(text, at)
    case '*': case '_': case '~': return emphasis(text, at, depth, endless)
    default: return null
  }
}

function span (text: string, at: number, endless: Set<string>): [Inline, number] | null {
  let start = at
  while (text[start] === '`') start += 1
  const ticks = text.slice(at, start)
  if (endless.has(ticks) || text[at - 1] === '`') return null
  for (let end = text.indexOf(ticks, start); end >= 0; end = text.indexOf(ticks, end)) {
    let after = end
    while (text[after] === '`') after += 1
    if (after - end === ticks.length) {
      const inner = text.slice(start, end).replaceAll('\n', ' ')
      const padded = inner.length > 2 && inner.startsWith(' ') && inner.endsWith(' ') && inner.trim() !== ''
      return [{ kind: 'code', text: padded ? inner.slice(1, -1) : inner }, after]
    }
    end = after
  }
  endless.add(ticks)
  return null
}

function emphasis (text: string, at: number, depth: number, endless: Set<string>): [Inline, number] | null {
  if (depth >= DEPTH_MAX) return null
  for (const [mark, kind] of MARKS) {
    if (!text.startsWith(mark, at) || endless.has(mark)) continue
    const start = at + mark.length
    // A mark before a space opens nothing, nor does an underscore within a word.
    if (/^\s?$/.test(text[start] ?? '') || (mark[0] === '_' && /\w/.test(text[at - 1] ?? ''))) continue
    for (let end = text.indexOf(mark, start + 1); ; end = text.indexOf(mark, end + 1)) {
      if (end < 0) {
        endless.add(mark)
        break
      }
      if (/\s/.test(text[end - 1])) continue
      if (mark[0] === '_' && /\w/.test(text[end + mark.length] ?? '')) continue
      if (mark.length === 1 && (text[end - 1] === mark || text[end + 1] === mark)) {
        // It belongs to a longer mark.
        while (text[end + 1] === mark) end += 1
        continue
      }
      while (mark.length === 2 && text[end + 2] === mark[0]) end += 1
      return [{ kind, inside: inline(text.slice(start, end), depth + 1) }, end + mark.length]
    }
  }
  return null
}

function link (text: string, at: number, depth: number): [Inline, number] | null {
  if (depth >= DEPTH_MAX) return null
  const limit = Math.min(text.length, at + LINK_MAX)
  let [end, open] = [at + 1, 1]
  for (; end < limit; end++) {
    if (text[end] === '\\') end += 1
    else if (text[end] === '[') open += 1
    else if (text[end] === ']' && --open === 0) break
  }
  if (end >= limit || text[end + 1] !== '(') return null
  const close = text.indexOf(')', end + 2)
  if (close < 0 || close - end > LINK_MAX) return null
  const href = text.slice(end + 2, close).trim().split(/\s/)[0].replace(/^<(.*)>$/, '$1')
  if (!isSafe(href)) return null
  const label = text.slice(at + 1, end)
  return [{ kind: 'link', href, inside: label === '' ? [{ kind: 'text', text: href }] : inline(label, DEPTH_MAX) }, close + 1]
}

function bare (text: string, at: number): [Inline, number] | null {
  if (/\w/.test(text[at - 1] ?? '')) return null
  BARE.lastIndex = at
  const found = BARE.exec(text)?.[0].slice(0, LINK_MAX).replace(/[.,;:!?*_~]+$/, '')
  if (found === undefined) return null
  // A bracket that was opened before the address closes after it.
  const href = found.endsWith(')') && !found.includes('(') ? found.slice(0, -1) : found
  return isSafe(href) ? [{ kind: 'link', href, inside: [{ kind: 'text', text: href }] }, at + href.length] : null
}
