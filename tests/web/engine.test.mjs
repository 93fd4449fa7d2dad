// Models that run in a tab, in Chromium on WebGPU (a software adapter will do), compared with the
// text that the binary writes on the CPU. Durations are not asserted.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { cpSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, afterEach, before, test } from 'node:test'
import { byteTokenizer, card, cleanUp, folder, joined, keep, Node, openBrowser, openTab, PATIENCE, proxy, worker } from './harness.mjs'

const root = new URL('../../', import.meta.url).pathname
const embedded = join(root, 'models/tiny-mixtral-q4_k_m')
const manifest = JSON.parse(readFileSync(join(embedded, 'manifest.json')))
const NAME = manifest.modelId
const PROMPT = 'Once upon a time'
/** Tokens of runs that test the text itself, and of runs that test something else. */
const TOKENS = 44
const FEW = 16
const binary = process.env.DOPPLER_NODE_BIN

let browser
before(async () => { browser = await openBrowser(['--enable-unsafe-webgpu']) })
afterEach(async () => { await cleanUp() })
after(async () => { await browser.close() })

const options = { timeout: 4 * PATIENCE }

function command (...args) {
  const { status, stdout, stderr } = spawnSync(binary, args, { maxBuffer: 1 << 26 })
  assert.equal(status, 0, stderr.toString())
  return stdout.toString()
}

/** What the binary generates greedily. */
const natives = new Map()
function native (dir, prompt, tokens) {
  const key = JSON.stringify([dir, prompt, tokens])
  if (!natives.has(key)) natives.set(key, JSON.parse(command('run', dir, '-p', prompt, '-n', String(tokens), '--backend', 'cpu', '--json')))
  return natives.get(key)
}

/** Fills in the panel and presses the button. */
async function press (page, { name = NAME, prompt = PROMPT, tokens = FEW, slots = '' } = {}) {
  const option = page.locator('#run-model option', { hasText: name })
  await option.first().waitFor({ state: 'attached' })
  await page.selectOption('#run-model', await option.first().getAttribute('value'))
  await page.fill('#run-prompt', prompt)
  await page.fill('#run-tokens', String(tokens))
  await page.fill('#run-slots', String(slots))
  await page.getByRole('button', { name: 'Run in this tab' }).click()
}

async function ended (page) {
  await page.waitForFunction(() => ['done', 'failed'].includes(globalThis.doppler.runner.state))
  // The page is redrawn after the state has changed.
  await page.waitForFunction(() => document.getElementById('run').dataset.state === globalThis.doppler.runner.state)
  return await page.evaluate(() => {
    const { state, text, ids, error, numbers, adapter, reason } = globalThis.doppler.runner
    return { state, text, ids: [...ids], error, numbers, adapter, reason }
  })
}

async function run (page, asked) {
  await press(page, asked)
  return await ended(page)
}

/** Asserts that the tab wrote what the binary writes, and that every demand counts as a hit. */
function same (got, want) {
  assert.deepEqual(got.error, null)
  assert.deepEqual([got.ids, got.text], [want.tokens, want.text])
  const { demands, hits } = got.numbers.pager
  assert.equal(hits.slot + hits.kept + hits.gateway + hits.peers, demands)
  return hits
}

const tabAt = async (url, via) => await openTab(url, { within: browser, via })

/** A gateway that refuses these objects. */
async function without (node, ids, when = () => true) {
  return await proxy(node, (path, offset, chunk) => when() && ids.some((id) => path.startsWith(`/shards/${id}`)) ? null : chunk)
}

test('a tab at an empty node writes what the binary writes, its experts paged', options, async () => {
  const node = await Node.start('run')
  const page = await tabAt(node.url)
  await joined(page)
  const got = await run(page, { tokens: TOKENS })
  const want = native(embedded, PROMPT, TOKENS)
  const hits = same(got, want)
  assert.equal(got.ids.length, TOKENS)
  const { slots, experts, pager: { demands, evictions } } = got.numbers
  assert.deepEqual([slots, experts], [16, 32])
  assert.ok(evictions > 0 && hits.slot > 0 && hits.kept > 0 && hits.gateway > 0 && hits.gateway <= experts, JSON.stringify(got.numbers))
  // The tab demanded as many experts as the node.
  assert.equal(demands, Object.values(want.hits).reduce((sum, n) => sum + n))
  assert.equal(await page.textContent('#run-text'), want.text)
  assert.match(await page.textContent('#run-state'), /^Done on ./)
  // Nothing of it entered the node's store or its list.
  assert.deepEqual(await node.json('ls'), [])

  // Fewer slots than the prompt needs per layer: more waves, the same text. The second prompt runs
  // the tiled kernels and unusual cases of the tokenizer.
  const odd = 'The King\u2019s 3 sons said: \u201cWe\u2019ll ride\u201d \u2014 and\n\n  then\u2026 na\u00efve caf\u00e9 1,234 times. It was the best of times, it was the worst of times, and nobody told the queen about it.'
  same(await run(page, { slots: 8, tokens: 24, prompt: odd }), native(embedded, odd, 24))
})

test('after a reload the experts come from the tab, though the gateway gives none of them', options, async () => {
  const node = await Node.start('again')
  let blocked = false
  const url = await without(node, manifest.shards.map(({ hash }) => hash), () => blocked)
  const page = await tabAt(url)
  same(await run(page), native(embedded, PROMPT, FEW))
  await keep(page, NAME)
  blocked = true
  await page.reload()
  const hits = same(await run(page), native(embedded, PROMPT, FEW))
  assert.ok(hits.kept > 0 && hits.gateway === 0 && hits.peers === 0, JSON.stringify(hits))
})

test('what the gateway does not give comes from peers, proved', options, async () => {
  const node = await Node.start('peers')
  await node.ask('publish', embedded)
  const page = await tabAt(await without(node, manifest.shards.map(({ hash }) => hash)))
  await joined(page)
  const hits = same(await run(page), native(embedded, PROMPT, FEW))
  assert.ok(hits.peers > 0 && hits.gateway === 0, JSON.stringify(hits))
})

test('damage in the tab\u2019s storage is noticed and fetched again', options, async () => {
  const node = await Node.start('damaged')
  const page = await tabAt(node.url)
  same(await run(page, { tokens: 8 }), native(embedded, PROMPT, 8))
  await keep(page, NAME)
  // Another document of the same origin: the tab that had the files open has closed them.
  await page.goto(`${node.url}/licences.txt`)
  const changed = await page.evaluate(async (ids) => {
    const dir = await (await navigator.storage.getDirectory()).getDirectoryHandle('peer-0')
    let changed = 0
    for await (const name of dir.keys()) {
      if (!ids.includes(name.split('-')[0])) continue
      const file = await dir.getFileHandle(name)
      for (;;) {
        try {
          const bytes = new Uint8Array(await (await file.getFile()).arrayBuffer())
          for (let at = 4096; at < bytes.length * 0.9; at += 65536) bytes[at] ^= 1
          const writable = await file.createWritable()
          await writable.write(bytes)
          await writable.close()
          break
        } catch (error) {
          // The worker that is ending still has the file open.
          if (error.name !== 'NoModificationAllowedError') throw error
        }
      }
      changed += 1
    }
    return changed
  }, manifest.shards.map(({ hash }) => hash))
  assert.equal(changed, manifest.shards.length)
  await page.goto(`${node.url}/#tab`)
  const hits = same(await run(page), native(embedded, PROMPT, FEW))
  assert.ok(hits.gateway > 0 && hits.kept > 0, JSON.stringify(hits))
})

test('a model removed from the tab in the middle of a run is fetched again', options, async () => {
  const node = await Node.start('removed')
  const page = await tabAt(node.url)
  await press(page)
  await page.waitForFunction(() => globalThis.doppler.runner.ids.length >= 3)
  const before = await page.evaluate(() => globalThis.doppler.keeper.received.gateway)
  await (await card(page, NAME)).getByRole('button', { name: 'Remove' }).click()
  same(await ended(page), native(embedded, PROMPT, FEW))
  assert.ok(await page.evaluate(() => globalThis.doppler.keeper.received.gateway) > before)
})

test('the browser’s compiler takes every portable kernel, and those for hardware adapters write the same', options, async () => {
  const node = await Node.start('kernels')
  const page = await tabAt(node.url)
  await joined(page)
  const wrong = await page.evaluate(async () => {
    const adapter = await navigator.gpu.requestAdapter()
    const has = adapter.features.has('subgroups')
    const device = await adapter.requestDevice({ requiredFeatures: has ? ['subgroups'] : [] })
    const wrong = []
    const kernels = await (await fetch('/kernels')).json()
    for (const { name, hash, subgroups } of kernels) {
      if (subgroups && !has) continue
      const text = await (await fetch(`/kernels/${hash}`)).text()
      const code = subgroups ? `enable subgroups;\n${text}` : text
      const { messages } = await device.createShaderModule({ code }).getCompilationInfo()
      for (const { type, message, lineNum } of messages) if (type === 'error') wrong.push(`${name}:${lineNum}: ${message}`)
    }
    device.destroy()
    return { wrong, kernels: kernels.length }
  })
  assert.deepEqual(wrong.wrong, [])
  assert.ok(wrong.kernels > 50, `${wrong.kernels} kernels`)
  // Make the engine treat this adapter as hardware.
  const itsWorker = await worker(page)
  await itsWorker.evaluate(() => {
    for (const [name, value] of [['architecture', 'unknown'], ['description', ''], ['isFallbackAdapter', false]]) {
      Object.defineProperty(GPUAdapterInfo.prototype, name, { get: () => value })
    }
  })
  const asked = page.waitForRequest((request) => request.url().includes('/program?'))
  await press(page, { tokens: 3 })
  assert.match((await asked).url(), /reduce=group/)
  same(await ended(page), native(embedded, PROMPT, 3))
  // When every expert has a slot, a token is one submission. The prompt gives the first token.
  same(await run(page, { tokens: 3, slots: 32 }), native(embedded, PROMPT, 3))
  const { numbers } = await run(page, { tokens: 3, slots: 32 })
  assert.deepEqual([numbers.submissions, numbers.dispatches, numbers.pager.hits.slot], [2, 2 * 45, numbers.pager.demands])
})

for (const [golden, quantize] of [['qwen3-moe', 'q8_0'], ['qwen3-moe-mixed', 'bf16'], ['llama3', 'bf16'], ['qwen3-window', 'q8_0']]) {
  test(`a published checkpoint of another family runs as well: ${golden} in ${quantize}`, options, async () => {
    const [source, dir] = [folder(), join(folder(), 'rdrr')]
    cpSync(join(root, 'tests/data/goldens', golden), source, { recursive: true })
    writeFileSync(join(source, 'tokenizer.json'), byteTokenizer())
    command('convert', source, '--out', dir, '--quantize', quantize)
    const { modelId } = JSON.parse(readFileSync(join(dir, 'manifest.json')))
    const node = await Node.start(golden)
    await node.ask('publish', dir)
    const page = await tabAt(node.url)
    const prompt = 'A prompt of more bytes than a few, and fewer than a batch.'
    const got = await run(page, { name: modelId, prompt, tokens: 20 })
    same(got, native(dir, prompt, 20))
    const dense = !golden.includes('moe')
    assert.equal(got.numbers.experts === 0, dense)
    if (!dense) assert.ok(got.numbers.pager.evictions > 0, JSON.stringify(got.numbers))
  })
}

test('without an adapter the page says what to do', options, async () => {
  const plain = await openBrowser()
  try {
    const node = await Node.start('plain')
    const page = await openTab(node.url, { within: plain })
    await page.locator('#run-why').filter({ hasText: /WebGPU.*(localhost|hardware acceleration)/ }).waitFor()
    assert.ok(await page.getByRole('button', { name: 'Run in this tab' }).isDisabled())
    // Nor can it be chosen in the chat.
    assert.equal(await page.locator('#chat-model option', { hasText: NAME }).isDisabled(), true)
    // The engine would say the same.
    const code = await page.evaluate(async () => {
      const { runner, keeper } = globalThis.doppler
      const [model] = keeper.models.keys()
      await new Promise((resolve) => {
        runner.listen(() => { if (!runner.busy) resolve() })
        void runner.run({ model, prompt: 'a', bare: false, tokens: 1, slots: null, context: null, kv: 'f16' })
      })
      return runner.error.code
    })
    assert.ok(['no_webgpu', 'no_adapter'].includes(code), code)
  } finally {
    await plain.close()
  }
})

test('an adapter that is lost in the middle is reported, and the next run loads the model again', options, async () => {
  const node = await Node.start('lost')
  const page = await tabAt(node.url)
  await joined(page)
  const itsWorker = await worker(page)
  await itsWorker.evaluate(() => {
    const request = GPUAdapter.prototype.requestDevice
    GPUAdapter.prototype.requestDevice = async function (...args) {
      globalThis.captured = await request.apply(this, args)
      return globalThis.captured
    }
  })
  await press(page)
  await page.waitForFunction(() => globalThis.doppler.runner.ids.length >= 2)
  await itsWorker.evaluate(() => { globalThis.captured.destroy() })
  const got = await ended(page)
  assert.deepEqual([got.state, got.error.code], ['failed', 'device_lost'])
  assert.match(await page.locator('#run').getByRole('alert').textContent(), /adapter was lost.*run it again/)
  same(await run(page, { tokens: 8 }), native(embedded, PROMPT, 8))
})

test('a family that no tab can run, and too few slots, are refused by name', options, async () => {
  const dir = folder()
  for (const file of readdirSync(embedded)) cpSync(join(embedded, file), join(dir, file))
  const other = { ...manifest, modelId: 'other-family', config: { ...manifest.config, architectures: ['UnheardOfForCausalLM'] } }
  writeFileSync(join(dir, 'manifest.json'), JSON.stringify(other))
  const node = await Node.start('refused')
  await node.ask('publish', dir)
  const page = await tabAt(node.url)
  const refused = await run(page, { name: 'other-family' })
  assert.equal(refused.error.code, 'unsupported')
  assert.match(refused.error.message, /cannot run in a tab: .*UnheardOfForCausalLM/)
  const few = await run(page, { slots: 7 })
  assert.match(few.error.message, /8 slots/)
})

test('a run stops when asked, and an expert that nobody has is reported', options, async () => {
  const node = await Node.start('stopped')
  const shards = manifest.shards.map(({ hash }) => hash)
  let blocked = []
  const page = await tabAt(await proxy(node, (path, offset, chunk) => blocked.some((id) => path.startsWith(`/shards/${id}`)) ? null : chunk))
  await press(page, { tokens: 400 })
  await page.waitForFunction(() => globalThis.doppler.runner.ids.length >= 3)
  await page.getByRole('button', { name: 'Stop' }).click()
  const got = await ended(page)
  assert.deepEqual([got.state, got.reason], ['done', 'cancelled'])
  assert.ok(got.ids.length < 400)
  const want = native(embedded, PROMPT, TOKENS).tokens
  assert.deepEqual(got.ids.slice(0, TOKENS), want.slice(0, got.ids.length))

  // The experts' shards are gone from the tab and from the gateway, and no peer has them.
  await (await card(page, NAME)).getByRole('button', { name: 'Remove' }).click()
  // The node's own model has a card only while some of it is stored.
  await page.waitForFunction(() => document.querySelectorAll('article').length === 0)
  blocked = shards.slice(3)
  const failed = await run(page, { tokens: 30 })
  assert.equal(failed.state, 'failed')
  assert.match(failed.error.message, /not_found|no connected peer has shard/)
})
