// The page's pure parts: numbers and failures in words, Markdown, reasoning, events, what is stored of
// conversations, and rates.

import assert from 'node:assert/strict'
import { test } from 'node:test'
import { modules } from './harness.mjs'

const { amount, brief, count, decode, encode, Events, explain, groups, inline, isAway, isSafe, left, Lines, number, parse, Rates, size, split, TURNS_MAX } =
  await modules('words', 'chat/markdown', 'chat/think', 'chat/sse', 'chat/conversations', 'chat/models', 'nodestate', 'swarmview')

test('numbers carry units, and nouns their number', () => {
  assert.deepEqual([0, 1023, 1024, 5 * 1024 ** 2, 1024 ** 5].map(size), ['0 B', '1023 B', '1.0 KiB', '5.0 MiB', '1024 TiB'])
  assert.deepEqual([0, 1, 2, 1500].map((n) => count(n, 'object')), ['0 objects', '1 object', '2 objects', '1,500 objects'])
  assert.equal(count(2, 'copy', 'copies'), '2 copies')
  assert.deepEqual([0, 59.2, 61, 7260].map(left), ['0 s left', '1 min left', '2 min left', '2 h 1 min left'])
  assert.equal(amount({ done: 1024, total: 2048, rate: 512, left_s: 2 }), '1.0 KiB of 2.0 KiB · 512 B/s · 2 s left')
  assert.equal(brief('12D3KooWabcdefghij'), '12D3Ko…efghij')
})

test('failures are told in words, never in a browser\u2019s own', () => {
  const timeout = Object.assign(new Error('signal timed out'), { name: 'TimeoutError' })
  assert.equal(explain(timeout), 'the node did not answer in time')
  assert.equal(explain(new Error('The operation was aborted due to timeout'), 'the peer'), 'the peer did not answer in time')
  for (const message of ['Failed to fetch', 'NetworkError when attempting to fetch resource.', 'Load failed', 'net::ERR_CONNECTION_REFUSED']) {
    assert.equal(explain(new TypeError(message)), 'the node cannot be reached')
    assert.ok(isAway(new TypeError(message)))
  }
  assert.equal(explain(new Error('no room')), 'no room')
  assert.ok(!isAway(new Error('no room')))
})

test('what is typed into a number field is checked, not corrected', () => {
  const bounds = { min: 1, max: 4096 }
  assert.deepEqual(['', ' ', '1', '4096'].map((text) => number(text, 'It', bounds)), [null, null, 1, 4096])
  for (const text of ['0', '4097', '1.5', 'x', '-1', '1e9']) assert.match(number(text, 'The limit', bounds).wrong, /^The limit must be a whole number from 1 to 4,096$/, text)
  assert.equal(number('1.5', 'It', { min: 0, max: 2, whole: false }), 1.5)
})

const text = (parts) => parts.map((part) => part.text ?? (part.kind === 'break' ? '\n' : text(part.inside))).join('')

test('Markdown: blocks', () => {
  const kinds = (markdown) => parse(markdown).map(({ kind }) => kind)
  assert.deepEqual(kinds('# A\n\ntext\nmore\n\n- a\n- b\n\n> q\n\n---\n\n```js\nx\n```\n| a | b |\n|---|--:|\n| 1 | 2 |'), ['heading', 'paragraph', 'list', 'quote', 'rule', 'code', 'table'])
  const [fence] = parse('```py\nif x:\n    y\n')
  assert.deepEqual([fence.language, fence.text, fence.open], ['py', 'if x:\n    y\n', true])
  assert.deepEqual(parse('~~~\n```\n~~~'), [{ kind: 'code', language: '', text: '```', open: false }])
  const [list] = parse('1. one\n   - inner\n     deeper\n2. two\n\n   more of two\n3. three')
  assert.deepEqual([list.start, list.items.length], [1, 3])
  assert.deepEqual(list.items.map((blocks) => blocks.map(({ kind }) => kind)), [['paragraph', 'list'], ['paragraph', 'paragraph'], ['paragraph']])
  assert.equal(parse('- a\n\n- b\n\ntext').length, 2)
  assert.equal(parse('4. four')[0].start, 4)
  // A code block within a list, as models write it.
  const [steps] = parse('1. Run:\n   ```sh\n   ls\n   ```\n2. Done')
  assert.deepEqual([steps.items.length, steps.items[0][1].text], [2, 'ls'])
  const [table] = parse('| a | b |\n|:-:|---:|\n| `x\\|y` | **2** |\n| only |')
  assert.deepEqual([table.aligns, table.rows.length, text(table.rows[0][0]), table.rows[1][1]], [['center', 'end'], 2, 'x|y', []])
  assert.equal(parse('a | b\nc')[0].kind, 'paragraph')
  assert.equal(parse('it was\n1984. A year').length, 1, 'a number at a line’s begin is no list')
})

test('Markdown: within a line', () => {
  const kinds = (line) => inline(line).map(({ kind }) => kind)
  assert.deepEqual(kinds('a **b *c* d** `e` ~~f~~ _g_'), ['text', 'strong', 'text', 'code', 'text', 'del', 'text', 'em'])
  assert.deepEqual(kinds('2 * 3 * 4 and snake_case_name and **open'), ['text'])
  assert.deepEqual(kinds('***both***'), ['strong'])
  assert.equal(text(inline('\\*no\\* `a``b` ``c`d``')), '*no* a``b c`d')
  assert.deepEqual(inline('[x](https://a.example/b "t")'), [{ kind: 'link', href: 'https://a.example/b', inside: [{ kind: 'text', text: 'x' }] }])
  assert.deepEqual(inline('see https://a.example/b).').map((part) => part.href ?? part.text), ['see ', 'https://a.example/b', ').'])
  assert.equal(inline('![alt](https://a.example/x.png)')[0].kind, 'link', 'a picture is a link: nothing is fetched')
  assert.deepEqual(kinds('a\nb<br>c'), ['text', 'break', 'text', 'break', 'text'])
})

test('Markdown: nothing leads anywhere but to the web, and tags are text', () => {
  for (const href of ['javascript:alert(1)', 'JAVASCRIPT:alert(1)', 'data:text/html,x', 'vbscript:x', ' javascript:x', '//a.example', '/control/v1/leave', '#key=0', 'file:///etc/passwd', 'blob:x', 'java\nscript:x', 'https://']) {
    assert.ok(!isSafe(href), href)
    assert.ok(inline(`[x](${href})`).every(({ kind }) => kind !== 'link'), href)
  }
  for (const href of ['https://a.example', 'http://127.0.0.1:1/x', 'mailto:a@b.example']) assert.ok(isSafe(href), href)
  assert.equal(text(inline('<img src=x onerror=alert(1)>')), '<img src=x onerror=alert(1)>')
})

test('Markdown of any length and shape takes time in proportion', () => {
  const long = 40_000
  for (const piece of ['*', '_', '**a ', '`', '``` ', '[', '[a](', '![', '> ', '- ', '  - ', '1. ', '|', '|-', '~~', '\\', 'http://', '<br', '*a_b`', '# ', '\n']) {
    const began = performance.now()
    parse(piece.repeat(long / piece.length))
    parse(`${piece}\n`.repeat(long / 8))
    const took = performance.now() - began
    assert.ok(took < 4000, `${JSON.stringify(piece)} took ${took} ms`)
  }
})

test('reasoning is told from the answer, also while it comes', () => {
  assert.deepEqual(split('Hi'), { reasoning: '', answer: 'Hi', thinking: false })
  assert.deepEqual(split('<thi'), { reasoning: '', answer: '', thinking: true })
  assert.deepEqual(split('<think>a'), { reasoning: 'a', answer: '', thinking: true })
  assert.deepEqual(split('<think>a</think>\n\nb'), { reasoning: 'a', answer: 'b', thinking: false })
  assert.deepEqual(split('a</think>b'), { reasoning: 'a', answer: 'b', thinking: false }, 'opened in the prompt')
  assert.equal(split('<b>x').answer, '<b>x')
})

test('events arrive whatever the pieces are', () => {
  const stream = 'data: {"a":1}\r\n\r\n: comment\ndata: x\ndata: y\n\nevent: z\ndata:[DONE]\n\n'
  for (let size = 1; size < stream.length; size++) {
    const events = new Events()
    const got = []
    for (let at = 0; at < stream.length; at += size) got.push(...events.push(stream.slice(at, at + size)))
    assert.deepEqual(got, ['{"a":1}', 'x\ny', '[DONE]'], `pieces of ${size}`)
  }
  const lines = new Lines()
  assert.deepEqual([lines.push('{"a"'), lines.push(':1}\n{}\n\n{')], [[], ['{"a":1}', '{}']])
  assert.throws(() => new Lines().push('x'.repeat(2 << 20)), /too long/)
  assert.throws(() => new Events().push('x'.repeat(2 << 20)), /too long/)
})

test('conversations are stored within bounds, and damage costs only what is damaged', () => {
  const one = (id, touched, length = 10) => ({ id, title: id, model: 'node:m', system: '', touched, turns: [{ role: 'user', text: 'x'.repeat(length) }] })
  assert.deepEqual(decode(encode([one('a', 1), one('b', 2)])).map(({ id }) => id), ['b', 'a'])
  const many = Array.from({ length: 80 }, (_, at) => one(String(at), at))
  assert.equal(decode(encode(many)).length, 50)
  const large = Array.from({ length: 20 }, (_, at) => one(String(at), at, 400_000))
  assert.ok(encode(large).length <= 3_000_000)
  assert.equal(decode(encode(large))[0].id, '19', 'the latest stay')
  assert.deepEqual(decode(encode([{ ...one('e', 1), turns: [] }])), [], 'an empty one is not stored')
  for (const damaged of [null, '', '{', '[]', '{"version":9,"list":[]}', '{"version":1,"list":{}}']) assert.deepEqual(decode(damaged), [])
  const mixed = JSON.stringify({ version: 1, list: [null, 3, { id: 1 }, { id: 'x', turns: [{ role: 'system', text: 'no' }, { role: 'user' }, { role: 'user', text: 'yes' }] }] })
  assert.deepEqual(decode(mixed).map(({ id, turns }) => [id, turns.length]), [['x', 1]])
  const endless = JSON.stringify({ version: 1, list: [{ id: 'x', turns: Array.from({ length: 1000 }, () => ({ role: 'user', text: 'a' })) }] })
  assert.equal(decode(endless)[0].turns.length, TURNS_MAX)
})

test('models that this tab cannot run now are listed, but cannot be chosen', () => {
  const tab = [{ id: 'i', name: 'tiny', embedded: true, manifest: true }, { id: 'j', name: 'unknown', manifest: false }]
  const [node, own] = groups([{ id: 'm', hash: 'h' }], tab, 'no WebGPU')
  assert.deepEqual(node.options, [{ value: 'node:m', text: 'm' }])
  assert.deepEqual(own.options, [{ value: 'tab:i', text: 'tiny (comes with the node)', off: true }])
})

test('a rate is that of the last seconds', () => {
  const rates = new Rates()
  assert.equal(rates.note('a', 100, 0), null)
  assert.equal(rates.note('a', 300, 2), 100)
  for (let at = 4; at <= 20; at += 2) rates.note('a', 300, at)
  assert.equal(rates.note('a', 300, 22), 0)
  assert.equal(rates.note('a', 50, 24), null, 'the node has started again')
  rates.keep([])
  assert.equal(rates.note('a', 900, 26), null)
})
