// The parts of the engine that need no browser: repacking, tokenizing, slots, grids.

import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { MIB, modules } from './harness.mjs'

const { Blake3, decodeReply, floats, greedy, hashObject, hex, pack, packedBytes, Reach, Slots, Status, STATUS_NAMES, storedRow, Tokenizer, workgroups } =
  await modules('blake3', 'tree', 'engine/planes', 'engine/reach', 'engine/slots', 'engine/tokenizer', 'engine/program', 'engine/session', 'wire')
const root = new URL('../../', import.meta.url).pathname
const data = (name) => JSON.parse(readFileSync(`${root}tests/data/tab/${name}.json`))

test('planes equal those of the node', () => {
  const blake3 = new Blake3(MIB)
  // The node's formats as a program describes them, and planes of each that it made just now.
  const { formats, made } = JSON.parse(readFileSync(process.env.DOPPLER_FORMATS))
  const planes = (name, rows, cols, seed) => {
    let state = seed | 0
    const stored = Uint8Array.from({ length: rows * storedRow(formats[name], cols) }, () => {
      state ^= state << 13
      state ^= state >>> 17
      state ^= state << 5
      return state & 255
    })
    const out = new Uint8Array(packedBytes(formats[name], { rows, cols }))
    pack(formats[name], { rows, cols }, stored, out)
    assert.throws(() => pack(formats[name], { rows, cols }, stored.subarray(1), out), /bytes for/)
    return out
  }
  // src/infer/gpu/repack.rs reads the same list.
  for (const [name, rows, cols, seed, hash] of data('planes')) {
    assert.equal(hex(hashObject(blake3, planes(name, rows, cols, seed)).root), hash, `${name} ${rows}x${cols}`)
  }
  assert.deepEqual([...new Set(made.map(([name]) => name))].sort(), Object.keys(formats).sort())
  for (const [name, rows, cols, seed, bytes] of made) assert.equal(hex(planes(name, rows, cols, seed)), bytes, `${name} ${rows}x${cols}`)
})

test('a token is submitted as far as tokens have run of late', () => {
  const reach = new Reach(8)
  assert.deepEqual([reach.stop(0), reach.stop(5)], [8, 8])
  // Tokens that halt after two layers each: soon submissions end there.
  for (let i = 0; i < 20; i++) {
    reach.passed(2)
    reach.halted()
  }
  assert.deepEqual([reach.stop(0), reach.stop(3), reach.stop(7)], [2, 5, 8])
  // Halts at once: no farther than the routing.
  for (let i = 0; i < 20; i++) reach.halted()
  assert.deepEqual([reach.stop(0), reach.stop(7)], [0, 7])
  // Two tokens without a halt: whole tokens again.
  for (let i = 0; i < 15; i++) reach.passed(1)
  assert.equal(reach.stop(0), 0)
  reach.passed(1)
  assert.equal(reach.stop(0), 8)
})

test('vectors become f32 exactly', () => {
  const f16 = Uint8Array.of(0x00, 0x3c, 0x00, 0xc0, 0x01, 0x00, 0xff, 0x7b)
  assert.deepEqual([...floats('f16', f16)], [1, -2, 2 ** -24, 65504])
  assert.deepEqual([...floats('bf16', Uint8Array.of(0x80, 0x3f, 0x20, 0xc1))], [1, -10])
  assert.throws(() => floats('q4_k', new Uint8Array(144)), /q4_k/)
})

test('token ids equal those of the node, and the text round-trips', () => {
  const tokenizer = new Tokenizer(readFileSync(`${root}models/tiny-mixtral-q4_k_m/tokenizer.json`))
  // src/infer/tokenizer.rs reads the same list.
  for (const [text, ids] of data('ids')) {
    assert.deepEqual(tokenizer.encode(text), ids, JSON.stringify(text))
    const plain = text.replaceAll('<|endoftext|>', '')
    assert.equal(tokenizer.decode(ids), plain)
    const cut = randomInt(0, ids.length + 1)
    const stream = tokenizer.stream(ids.slice(0, cut))
    const rest = [...ids.slice(cut), null].map(stream).join('')
    if (!tokenizer.decode(ids.slice(0, cut)).includes('\ufffd')) assert.equal(tokenizer.decode(ids.slice(0, cut)) + rest, plain)
  }
})

test('unknown tokenizers are refused by name', () => {
  const file = (change) => new TextEncoder().encode(JSON.stringify({ model: { type: 'BPE', vocab: { a: 0 }, merges: [] }, ...change }))
  for (const [change, name] of [
    [{ model: { type: 'Unigram' } }, /Unigram/],
    [{ pre_tokenizer: { type: 'Metaspace' } }, /Metaspace/],
    [{ normalizer: { type: 'Sequence', normalizers: [{ type: 'Lowercase' }] } }, /Lowercase/],
    [{ decoder: { type: 'WordPiece' } }, /WordPiece/],
    [{ post_processor: { type: 'RobertaProcessing' } }, /RobertaProcessing/],
    [{ model: { type: 'BPE', dropout: 0.1, vocab: {}, merges: [] } }, /dropout/]
  ]) assert.throws(() => new Tokenizer(file(change)), (error) => error.code === 'unsupported' && name.test(error.message))
})

test('each status of the shard protocol is known by its name', () => {
  const [, listed] = /enum Status \{([^}]*)\}/.exec(readFileSync(`${root}proto/shard.proto`, 'utf8'))
  const statuses = [...listed.matchAll(/^\s*(\w+) = (\d+);/gm)].map(([, name, number]) => [name, Number(number)])
  assert.ok(statuses.length > 6)
  for (const [name, number] of statuses) {
    assert.equal(STATUS_NAMES[number], name.toLowerCase())
    if (number > 0) assert.equal(Status[name], number)
  }
  assert.deepEqual(decodeReply(Uint8Array.of(8, Status.RELAYED)), { status: Status.RELAYED, size: 0, length: 0 })
})

test('SentencePiece\u2019s form: bytes that fall back, a space in front', () => {
  const vocab = Object.fromEntries(Array.from({ length: 256 }, (_, byte) => [`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`, byte + 3]))
  for (const [i, token] of ['\u2581', 'a', 'b', '\u2581a', '\u2581ab', '<s>'].entries()) vocab[token] = 300 + i
  const tokenizer = new Tokenizer(new TextEncoder().encode(JSON.stringify({
    added_tokens: [{ id: 305, content: '<s>', special: true }],
    normalizer: { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '\u2581' }, { type: 'Replace', pattern: { String: ' ' }, content: '\u2581' }] },
    post_processor: { type: 'TemplateProcessing', single: [{ SpecialToken: { id: '<s>' } }, { Sequence: {} }], special_tokens: { '<s>': { ids: [305] } } },
    decoder: { type: 'Sequence', decoders: [{ type: 'Replace', pattern: { String: '\u2581' }, content: ' ' }, { type: 'ByteFallback' }, { type: 'Fuse' }, { type: 'Strip', content: ' ', start: 1, stop: 0 }] },
    model: { type: 'BPE', byte_fallback: true, vocab, merges: ['\u2581 a', '\u2581a b'] }
  })))
  const ids = tokenizer.encode('ab \u20ac')
  assert.deepEqual(ids, [305, 304, 300, 0xe2 + 3, 0x82 + 3, 0xac + 3])
  assert.equal(tokenizer.decode(ids), 'ab \u20ac')
  const stream = tokenizer.stream([])
  assert.deepEqual(ids.slice(1).map(stream), ['ab', ' ', '', '', '\u20ac'])
})

test('slots: nobody needed is evicted, each expert is served once, the oldest goes', () => {
  const [layers, experts] = [3, 8]
  for (const count of [4, 5, 11, 24]) {
    const slots = new Slots([count], Array(layers).fill(0))
    const held = new Map()
    let order = []
    for (let step = 0; step < 400; step++) {
      const moe = randomInt(layers)
      let waiting = Array.from({ length: experts }, (_, i) => i).filter(() => randomInt(3) === 0)
      const asked = [...waiting]
      const served = []
      while (waiting.length > 0) {
        const wave = slots.wave(moe, waiting)
        const now = [...wave.hits, ...wave.fills].map(([expert]) => expert)
        assert.ok(now.length > 0 && wave.evicted <= wave.fills.length)
        assert.deepEqual(wave.gone.map(([moe, expert]) => `${moe}:${expert}`).sort(), [...held].filter(([, its]) => wave.fills.some(([, slot]) => slot === its)).map(([name]) => name).sort())
        for (const [expert, slot] of wave.fills) {
          const before = [...held].find(([, its]) => its === slot)?.[0]
          if (before !== undefined) {
            assert.ok(!(before[0] === String(moe) && waiting.includes(Number(before.slice(2)))), 'needed, and evicted')
            held.delete(before)
            // All experts older than the evicted one are needed now.
            for (const older of order.slice(0, order.indexOf(before))) assert.ok(older[0] === String(moe) && waiting.includes(Number(older.slice(2))))
            order = order.filter((name) => name !== before)
          }
          held.set(`${moe}:${expert}`, slot)
        }
        for (const expert of now) order = [...order.filter((name) => name !== `${moe}:${expert}`), `${moe}:${expert}`]
        assert.equal(new Set(held.values()).size, held.size)
        served.push(...now)
        waiting = wave.waiting
      }
      assert.deepEqual(served.sort((a, b) => a - b), asked)
      assert.equal(slots.resident, held.size)
    }
  }
  const slots = new Slots([1], [0])
  slots.wave(0, [5])
  slots.forget(0, 5)
  assert.deepEqual([slots.resident, slots.wave(0, [6]).evicted], [0, 0])
})

test('grids are those of src/infer/gpu/dispatch.rs, and choices its sampler\u2019s', () => {
  const items = (items, each) => ({ items: { items, per_workgroup: each } })
  assert.deepEqual(workgroups(items(65, 64), 1, 65535), [2, 1])
  assert.deepEqual(workgroups(items(65536, 1), 1, 65535), [65535, 2])
  assert.deepEqual(workgroups(items(151936, 1), 5, 65535), [65535, 12])
  assert.throws(() => workgroups(items(0xffffffff, 1), 2, 65535), /grid/)
  assert.deepEqual(workgroups({ tiles: { per_row: 8, tile: 64, spare: 5, y: 2 } }, 9, 65535), [7, 2])
  assert.equal(workgroups('one', 0, 65535), null)
  const splits = (position, window, most) => workgroups({ splits: { each: 2, window, most } }, 1, 65535, position)
  assert.deepEqual([0, 31, 32, 640].map((position) => splits(position, 0, 64)), [[2, 1], [2, 1], [4, 1], [42, 1]])
  assert.deepEqual([splits(1000000, 128, 64), splits(5, 128, 64), splits(100000, 0, 64)], [[8, 1], [2, 1], [128, 1]])
  assert.equal(greedy(Float32Array.of(NaN, -1, 3, -0, 3, NaN)), 2)
  assert.equal(greedy(Float32Array.of(NaN, -Infinity)), 0)
})
