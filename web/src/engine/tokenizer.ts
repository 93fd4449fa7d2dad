// Converts text to token ids and back, with the parts of a Hugging Face tokenizer.json that
// byte-pair models use (src/infer/tokenizer.rs reads the same file with the tokenizers crate).
//
// Refuses unknown parts by name: wrong ids would be worse than none.

/** The longest prompt, in characters. */
const PROMPT_MAX = 64 * 1024
/** The most tokens that one character may be spread over; beyond it the text so far is emitted. */
const HELD_MAX = 16

export class TokenizerError extends Error {
  readonly code = 'unsupported'
}

interface Json { type?: string, [key: string]: unknown }
type Change = (text: string) => string
type Cut = (parts: string[]) => string[]

/** GPT-2's pattern for splitting text into words, in the syntax of the `regex` crate. */
const WORDS = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/** GPT-2's mapping of bytes to characters. */
const SPELLED: string[] = []
const BYTES = new Map<string, number>()
for (let byte = 0, next = 256; byte < 256; byte++) {
  const itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
  SPELLED[byte] = String.fromCodePoint(itself ? byte : next++)
  BYTES.set(SPELLED[byte], byte)
}

const refuse = (what: string): never => { throw new TokenizerError(`this tab cannot read the model's tokenizer.json: ${what}`) }
const list = (part: Json | null | undefined, of: string): Json[] => part == null ? [] : part.type === 'Sequence' ? part[of] as Json[] : [part]

/** Compiles a pattern with the white space of Rust's `regex` crate. */
function pattern (text: string): RegExp {
  try {
    return new RegExp(text.replaceAll('\\s', '\\p{White_Space}').replaceAll('\\S', '\\P{White_Space}'), 'gu')
  } catch {
    return refuse(`the pattern ${text}`)
  }
}

const literal = (part: Json, key: string): string => {
  const found = (part[key] as { String?: string } | undefined)?.String
  return found ?? refuse(`a ${part.type} by pattern`)
}

/** Splits text into the matches and the parts between them. */
function isolate (text: string, expression: RegExp): string[] {
  const parts: string[] = []
  let at = 0
  for (const match of text.matchAll(expression)) {
    if (match.index > at) parts.push(text.slice(at, match.index))
    if (match[0] !== '') parts.push(match[0])
    at = match.index + match[0].length
  }
  if (at < text.length) parts.push(text.slice(at))
  return parts
}

const spell = (text: string): string => Array.from(new TextEncoder().encode(text), (byte) => SPELLED[byte]).join('')

export class Tokenizer {
  private readonly vocab: Map<string, number>
  private readonly tokens = new Map<number, string>()
  private readonly ranks = new Map<string, number>()
  private readonly added = new Map<string, number>()
  private readonly special = new Set<number>()
  private readonly addedPattern: RegExp | null
  private readonly normalize: Change[] = []
  private readonly cuts: Cut[] = []
  private readonly before: number[] = []
  private readonly after: number[] = []
  private readonly decoders: Json[]
  private readonly ignoreMerges: boolean
  private readonly byteFallback: boolean
  private readonly unknown: number | null

  constructor (bytes: Uint8Array) {
    const file = JSON.parse(new TextDecoder().decode(bytes)) as Record<string, Json | null> & { added_tokens?: Array<Record<string, unknown>> }
    const model = file.model as unknown as { type?: string, vocab: Record<string, number>, merges: Array<string | [string, string]>, [key: string]: unknown }
    if (model?.type !== 'BPE') refuse(`a model of type ${String(model?.type)}`)
    for (const key of ['dropout', 'continuing_subword_prefix', 'end_of_word_suffix']) {
      if (model[key] != null && model[key] !== '' && model[key] !== 0) refuse(`the model's ${key}`)
    }
    this.vocab = new Map(Object.entries(model.vocab))
    for (const [token, id] of this.vocab) this.tokens.set(id, token)
    model.merges.forEach((merge, rank) => {
      const [left, right] = typeof merge === 'string' ? merge.split(' ') : merge
      this.ranks.set(`${left} ${right}`, rank)
    })
    this.ignoreMerges = model.ignore_merges === true
    this.byteFallback = model.byte_fallback === true
    this.unknown = this.vocab.get(String(model.unk_token)) ?? null
    for (const token of file.added_tokens ?? []) {
      const [content, id] = [token.content as string, token.id as number]
      if (token.lstrip === true || token.rstrip === true || token.single_word === true) refuse(`the added token ${content}`)
      this.added.set(content, id)
      this.tokens.set(id, content)
      if (token.special === true) this.special.add(id)
    }
    const contents = [...this.added.keys()].sort((a, b) => b.length - a.length).map((text) => text.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&'))
    this.addedPattern = contents.length === 0 ? null : new RegExp(contents.join('|'), 'gu')
    for (const part of list(file.normalizer, 'normalizers')) this.normalize.push(normalizer(part))
    for (const part of list(file.pre_tokenizer, 'pretokenizers')) this.cuts.push(preTokenizer(part))
    for (const part of list(file.post_processor, 'processors')) this.postProcessor(part)
    this.decoders = list(file.decoder, 'decoders')
    for (const { type } of this.decoders) {
      if (!['ByteLevel', 'Replace', 'ByteFallback', 'Fuse', 'Strip'].includes(type ?? '')) refuse(`a decoder of type ${type}`)
    }
  }

  private postProcessor (part: Json): void {
    if (part.type === 'ByteLevel') return
    if (part.type !== 'TemplateProcessing') refuse(`a post-processor of type ${part.type}`)
    let side = this.before
    for (const piece of part.single as Array<{ Sequence?: unknown, SpecialToken?: { id: string } }>) {
      if (piece.SpecialToken === undefined) {
        side = this.after
        continue
      }
      const { ids } = (part.special_tokens as Record<string, { ids: number[] }>)[piece.SpecialToken.id]
      side.push(...ids)
    }
  }

  /** The ids of a text, with the special tokens that belong around it, unless it has them in it (`bare`). */
  encode (text: string, bare = false): number[] {
    if (text.length > PROMPT_MAX) throw new TokenizerError(`the prompt is ${text.length} characters long, more than ${PROMPT_MAX}`)
    const ids = bare ? [] : [...this.before]
    for (const part of this.addedPattern === null ? [text] : isolate(text, this.addedPattern)) {
      const added = this.added.get(part)
      if (added !== undefined) {
        ids.push(added)
        continue
      }
      const normal = this.normalize.reduce((text, change) => change(text), part)
      for (const word of this.cuts.reduce((parts, cut) => cut(parts), [normal])) ids.push(...this.word(word))
    }
    if (!bare) ids.push(...this.after)
    return ids
  }

  /** Merges byte pairs, lowest rank first, from the left. */
  private word (word: string): number[] {
    const whole = this.vocab.get(word)
    if (this.ignoreMerges && whole !== undefined) return [whole]
    const parts: string[] = []
    for (const letter of word) {
      if (this.vocab.has(letter)) parts.push(letter)
      else if (this.byteFallback) for (const byte of new TextEncoder().encode(letter)) parts.push(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`)
      else if (this.unknown !== null) parts.push(letter)
    }
    for (;;) {
      let [best, at] = [Infinity, -1]
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`)
        if (rank !== undefined && rank < best) [best, at] = [rank, i]
      }
      if (at < 0) break
      parts.splice(at, 2, parts[at] + parts[at + 1])
    }
    const ids: number[] = []
    for (const part of parts) {
      const id = this.vocab.get(part) ?? this.unknown
      if (id !== null) ids.push(id)
    }
    return ids
  }

  /** The text of ids, without special tokens. Unknown ids give no text. */
  decode (ids: number[]): string {
    let parts: string[] = []
    for (const id of ids) {
      const token = this.tokens.get(id)
      if (token !== undefined && !this.special.has(id)) parts.push(token)
    }
    if (this.decoders.length === 0) return parts.join(' ')
    for (const decoder of this.decoders) parts = decode(decoder, parts)
    return parts.join('')
  }

  /** A decoder of ids that follow `context`. It does not repeat the text of `context`. */
  stream (context: number[]): (id: number | null) => string {
    let window = context.slice(-HELD_MAX)
    let given = window.length
    return (id) => {
      if (id !== null) window.push(id)
      const before = this.decode(window.slice(0, given))
      const after = this.decode(window)
      if (after.endsWith('\ufffd') && id !== null && window.length - given < HELD_MAX) return ''
      const text = after.startsWith(before) ? after.slice(before.length) : Array.from(after).slice(Array.from(before).length).join('')
      window = window.slice(-HELD_MAX)
      given = window.length
      return text
    }
  }
}

function normalizer (part: Json): Change {
  switch (part.type) {
    case 'NFC': return (text) => text.normalize('NFC')
    case 'Prepend': return (text) => text === '' ? '' : String(part.prepend) + text
    case 'Replace': {
      const [from, to] = [literal(part, 'pattern'), String(part.content)]
      return (text) => text.replaceAll(from, () => to)
    }
    default: return refuse(`a normalizer of type ${part.type}`)
  }
}

function preTokenizer (part: Json): Cut {
  if (part.type === 'ByteLevel') {
    const expression = pattern(WORDS)
    return (parts) => parts.flatMap((text) => {
      const led = part.add_prefix_space === true && !/^\p{White_Space}/u.test(text) && text !== '' ? ` ${text}` : text
      return (part.use_regex === false ? [led] : isolate(led, expression)).map(spell)
    })
  }
  if (part.type === 'Split' && part.behavior === 'Isolated' && part.invert !== true) {
    const { Regex, String: text } = part.pattern as { Regex?: string, String?: string }
    const expression = pattern(Regex ?? (text ?? '').replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&'))
    return (parts) => parts.flatMap((text) => isolate(text, expression))
  }
  return refuse(`a pre-tokenizer of type ${part.type}`)
}

function decode (decoder: Json, parts: string[]): string[] {
  const utf8 = (bytes: number[]): string => new TextDecoder('utf-8', { ignoreBOM: true }).decode(Uint8Array.from(bytes))
  switch (decoder.type) {
    case 'ByteLevel': {
      const bytes: number[] = []
      for (const part of parts) {
        const spelled = Array.from(part, (letter) => BYTES.get(letter))
        if (spelled.every((byte) => byte !== undefined)) bytes.push(...spelled as number[])
        else bytes.push(...new TextEncoder().encode(part))
      }
      return [utf8(bytes)]
    }
    case 'Replace': {
      const [from, to] = [literal(decoder, 'pattern'), String(decoder.content)]
      return parts.map((part) => part.replaceAll(from, () => to))
    }
    case 'ByteFallback': {
      const out: string[] = []
      let bytes: number[] = []
      const flush = (): void => {
        if (bytes.length === 0) return
        const text = utf8(bytes)
        // Bytes that do not form a character become one replacement character each.
        if (text.includes('\ufffd')) out.push(...bytes.map(() => '\ufffd'))
        else out.push(text)
        bytes = []
      }
      for (const part of parts) {
        const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(part)
        if (byte !== null) {
          bytes.push(parseInt(byte[1], 16))
          continue
        }
        flush()
        out.push(part)
      }
      flush()
      return out
    }
    case 'Fuse': return [parts.join('')]
    case 'Strip': {
      const [content, start, stop] = [String(decoder.content), Number(decoder.start), Number(decoder.stop)]
      return parts.map((part) => {
        for (let i = 0; i < start && part.startsWith(content); i++) part = part.slice(content.length)
        for (let i = 0; i < stop && part.endsWith(content); i++) part = part.slice(0, -content.length)
        return part
      })
    }
    default: return parts
  }
}
