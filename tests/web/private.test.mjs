// A tab and a private swarm: it proves the key like a native peer, or it gets nothing.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, afterEach, before, test } from 'node:test'
import { card, cleanUp, closeBrowser, counts, joined, keep, Node, openTab, PATIENCE, randomModel, swarmKey, tree } from './harness.mjs'

let small
before(async () => { small = await randomModel('small', [700_001]) })
afterEach(async () => { await cleanUp() })
after(async () => { await closeBrowser() })

const options = { timeout: 2 * PATIENCE }

async function holder (key) {
  const node = await Node.start('closed', { key })
  await node.ask('publish', small.dir)
  return node
}

const locked = async (page) => { await page.waitForSelector('body[data-state=locked]') }

async function give (page, key, { remember = false } = {}) {
  await locked(page)
  await page.getByLabel('Key', { exact: true }).fill(readFileSync(key, 'utf8'))
  if (remember) await page.getByLabel('keep it in this browser').check()
  await page.getByRole('button', { name: 'Join' }).click()
}

/** Everything that scripts of this page can read from its storage. */
const stored = async (page) => await page.evaluate(async () => {
  const text = (value) => {
    if (value instanceof ArrayBuffer) value = new Uint8Array(value)
    if (value instanceof Uint8Array) return Array.from(value, (byte) => byte.toString(16).padStart(2, '0')).join('')
    if (value !== null && typeof value === 'object' && !(value instanceof CryptoKey)) return Object.values(value).map(text).join(' ')
    return String(value)
  }
  const found = [JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]
  const keys = []
  for (const { name } of await indexedDB.databases()) {
    const open = await new Promise((resolve) => { const ask = indexedDB.open(name); ask.onsuccess = () => resolve(ask.result) })
    for (const store of open.objectStoreNames) {
      const all = await new Promise((resolve) => { const ask = open.transaction(store).objectStore(store).getAll(); ask.onsuccess = () => resolve(ask.result) })
      found.push(text(all))
      for (const entry of all) if (entry.sealer !== undefined) keys.push(entry.sealer.extractable)
    }
    open.close()
  }
  return { found: found.join(' '), keys }
})

test('keys are derived, and messages hashed under them, as nodes do', async () => {
  const { deriveKey, hex, keyedHash } = await tree()
  // BLAKE3's test_vectors.json: the input is 0, 1, ..., 250, 0, 1, ...
  const key = new TextEncoder().encode('whats the Elvish word for friend')
  const context = 'BLAKE3 2019-12-27 16:29:52 test vectors context'
  const input = (length) => Uint8Array.from({ length }, (_, i) => i % 251)
  assert.equal(hex(keyedHash(key, input(0))), '92b2b75604ed3c761f9d6f62392c8a9227ad0ea3f09573e783f1498a4ed60d26')
  assert.equal(hex(keyedHash(key, input(1023))), 'c951ecdf03288d0fcc96ee3413563d8a6d3589547f2c2fb36d9786470f1b9d6e')
  assert.equal(hex(deriveKey(context, input(0))), '2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d')
  assert.equal(hex(deriveKey(context, input(1))), 'b3e2e340a117a499c6cf2398a19ee0d29cca2bb7404c73063382693bf66cb06c')
})

for (const via of ['websocket', 'webrtc']) {
  test(`a tab with the key is admitted over ${via}, fetches, and serves`, options, async () => {
    const key = swarmKey()
    const node = await holder(key)
    const page = await openTab(node.url, { via })
    await give(page, key)
    await joined(page)
    assert.equal(await page.getAttribute('body', 'data-transport'), via)
    await keep(page, 'small')
    assert.equal((await counts(page)).peers, small.bytes)
    await node.ask('rm', small.shards[0].hash, '--force', '--last-copy')
    const { missing } = await node.json('pin', 'small', '--fetch')
    assert.equal(missing, 0)
    assert.ok((await counts(page)).sent >= small.bytes, 'the tab served it back')

    // The key was not stored, so a reload asks again.
    const { found, keys } = await stored(page)
    assert.ok(!found.includes(readFileSync(key, 'utf8').trim()) && keys.length === 0)
    await page.reload()
    await locked(page)
  })
}

test('without the key the page, the gateway and the swarm give nothing, and the page says so', options, async () => {
  const key = swarmKey()
  const node = await holder(key)
  const page = await openTab(node.url, { via: 'websocket' })
  await locked(page)
  assert.match(await page.getByRole('status').textContent(), /private/)
  assert.equal(await page.evaluate(() => globalThis.doppler), undefined, 'it has not even begun')
  await page.getByLabel('Key', { exact: true }).fill('abcd')
  await page.getByRole('button', { name: 'Join' }).click()
  await page.getByText('A swarm key is 64 hexadecimal digits').waitFor()
  await give(page, swarmKey())
  await page.getByText('swarm has another key').waitFor()
  assert.equal(await page.getAttribute('body', 'data-state'), 'locked')
  // The right key is accepted, also from its file.
  await page.getByLabel('key file').setInputFiles(key)
  await page.getByRole('button', { name: 'Join' }).click()
  await joined(page)

  // Requests to the gateway from other programs of this machine.
  const [model] = await node.json('ls')
  const { gateway_token: token } = await node.json('status')
  for (const path of ['/node', '/models', `/models/${model.id}/manifest`, `/shards/${small.shards[0].hash}`]) {
    for (const headers of [{}, { authorization: `Bearer ${'0'.repeat(64)}` }]) {
      const reply = await fetch(node.url + path, { headers })
      assert.equal(reply.status, 401, path)
      assert.deepEqual(Object.keys(await reply.json()), ['error', 'code', 'peer_id'])
    }
    assert.equal((await fetch(node.url + path, { headers: { authorization: `Bearer ${token}` } })).status, 200, path)
  }
})

for (const via of ['websocket', 'webrtc']) {
  test(`a tab with another key is refused over ${via}, learns nothing and says so`, options, async () => {
    // A page that knows how to reach the node and takes its wrong key for accepted.
    const node = await holder(swarmKey())
    const { gateway_token: token } = await node.json('status')
    const info = await (await fetch(`${node.url}/node`, { headers: { authorization: `Bearer ${token}` } })).json()
    const wrong = swarmKey()
    const page = await openTab(node.url, { via, before: async (_, page) => {
      await page.route('**/node', async (route) => {
        await (route.request().headers().authorization === undefined ? route.continue() : route.fulfill({ json: info }))
      })
    } })
    await give(page, wrong)
    await page.waitForSelector('body[data-state=refused]')
    await page.getByText('the node refuses this swarm key').waitFor()
    const knows = await page.evaluate(() => {
      const { swarm, keeper } = globalThis.doppler
      return [swarm.connections().length, swarm.members.size, keeper.models.size]
    })
    assert.deepEqual(knows, [0, 0, 0])
    assert.deepEqual(await node.json('peers'), [])
    // The node records it once the tab has hung up.
    while ((await node.json('status')).refused_peers === 0) await new Promise((resolve) => setTimeout(resolve, 50))
  })
}

test('a remembered key is encrypted, survives a reload, and can be forgotten', options, async () => {
  const key = swarmKey()
  const node = await holder(key)
  const page = await openTab(node.url, { via: 'websocket' })
  await give(page, key, { remember: true })
  await joined(page)
  await page.reload()
  await joined(page)
  const secret = readFileSync(key, 'utf8').trim()
  const { deriveKey, hex, unhex } = await tree()
  const { found, keys } = await stored(page)
  assert.deepEqual(keys, [false], 'sealed by a key that no script can read')
  for (const clear of [secret, ...['dialer', 'listener'].map((side) => hex(deriveKey(`doppler-node 2026 swarm key v1 ${side}`, unhex(secret))))]) {
    assert.ok(!found.includes(clear))
  }
  await page.getByRole('button', { name: 'Use another swarm key' }).click()
  await locked(page)
})

test('a tab with a key refuses a node that does not prove it', options, async () => {
  const key = swarmKey()
  const node = await Node.start('closed')
  const info = await (await fetch(`${node.url}/node`)).json()
  const page = await openTab(node.url, { via: 'websocket', before: async (_, page) => {
    await page.route('**/node', async (route) => {
      const shown = route.request().headers().authorization !== undefined
      await route.fulfill(shown ? { json: info } : { status: 401, json: { error: '', code: 'locked', peer_id: info.peer_id } })
    })
  } })
  await give(page, key)
  await page.getByText('the peer did not prove the swarm key').waitFor()
  assert.equal(await page.evaluate(() => globalThis.doppler.swarm.connections().length), 0)
  // The node would admit the tab; it is the tab that hangs up.
  while ((await node.json('peers')).length > 0) await new Promise((resolve) => setTimeout(resolve, 50))
})
