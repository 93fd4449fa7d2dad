// What a tab does when the browser fails: no room in the middle of a download, a full disk, an
// adapter without memory; and peers that are reachable only through a relay.

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { after, afterEach, before, test } from 'node:test'
import { card, cleanUp, closeBrowser, counts, joined, keep, MIB, Node, openBrowser, openTab, PATIENCE, randomModel, worker } from './harness.mjs'

const embedded = new URL('../../models/tiny-mixtral-q4_k_m', import.meta.url).pathname
const options = { timeout: 2 * PATIENCE }

let model
before(async () => { model = await randomModel('some', [3 * MIB + 12_345, 4 * MIB, 70_001]) })
afterEach(async () => { await cleanUp() })
after(async () => { await closeBrowser() })

async function holder (swarm) {
  const node = await Node.start(swarm)
  await node.ask('publish', model.dir)
  return node
}

const button = async (page, name) => (await card(page, model.name)).getByRole('button', { name })
const said = async (page) => await (await card(page, model.name, 'failed')).getByRole('alert').textContent()
const held = async (page) => Number(await (await card(page, model.name)).getAttribute('data-held'))

/** Retries now instead of after some seconds. */
async function again (page) {
  await (await button(page, 'Pause')).click()
  await keep(page, model.name)
}

/** Asserts that after a reload the whole model is stored and valid. */
async function whole (page) {
  await page.reload()
  await card(page, model.name, 'kept')
  const sizes = await page.evaluate(async (ids) => {
    const { worker } = globalThis.doppler.keeper
    return await Promise.all(ids.map(async (id) => (await worker.ask('read', { id })).length))
  }, model.shards.map(({ hash }) => hash))
  assert.deepEqual(sizes, model.shards.map(({ size }) => size))
}

test('a quota that runs out between two shards is reported, and the download continues when there is room', options, async () => {
  const node = await holder('quota-later')
  const page = await openTab(node.url)
  const devtools = await page.context().newCDPSession(page)
  const quota = async (quotaSize) => { await devtools.send('Storage.overrideQuotaForOrigin', { origin: node.url, quotaSize }) }
  await joined(page)
  await card(page, model.name)
  await page.exposeFunction('runOut', async () => { await quota(5 * MIB) })
  await page.evaluate((second) => {
    const { worker } = globalThis.doppler.keeper
    const ask = worker.ask.bind(worker)
    let out = false
    worker.ask = async (kind, what, ...rest) => {
      if (kind === 'download' && what.id === second && !out) {
        out = true
        await globalThis.runOut()
      }
      return await ask(kind, what, ...rest)
    }
  }, model.shards[1].hash)
  await (await button(page, 'Keep in this tab')).click()
  assert.match(await said(page), /MiB are free, but the shard needs 4\.0 MiB: free disk space|no room for a shard of 4\.0 MiB: free disk space/)
  assert.equal(await held(page), model.shards[0].size)
  await quota(undefined)
  await again(page)
  assert.equal((await counts(page)).refused, 0)
  await whole(page)
})

// A parcel is written in three parts: bytes, nodes, and one byte per group. Each write of the second parcel fails in turn.
for (const [what, fault] of [
  ['bytes', { write: 5, how: 'throw' }],
  ['bytes, half of which are written', { write: 5, how: 'half' }],
  ['nodes', { write: 6, how: 'throw' }],
  ['marks', { write: 7, how: 'half' }],
  ['flush', { write: Infinity, how: 'throw' }]
]) {
  test(`a full disk (${what}) is reported, and nothing that is held gets lost`, options, async () => {
    const node = await holder('full')
    const page = await openTab(node.url, { via: 'gateway' })
    await card(page, model.name)
    await page.evaluate(async (id) => { await globalThis.doppler.keeper.describe(id) }, (await node.json('ls'))[0].id)
    await (await worker(page)).evaluate(({ write: nth, how }) => {
      const handles = FileSystemSyncAccessHandle.prototype
      const { write, flush } = handles
      const full = () => new DOMException('no space is left', 'QuotaExceededError')
      let writes = 0
      handles.write = function (bytes, at) {
        writes += 1
        if (globalThis.repaired === true || writes < nth) return write.call(this, bytes, at)
        if (how === 'throw') throw full()
        return write.call(this, bytes.subarray(0, bytes.length >> 1), at)
      }
      handles.flush = function () {
        if (globalThis.repaired !== true && nth === Infinity) throw full()
        flush.call(this)
      }
    }, fault)
    await (await button(page, 'Keep in this tab')).click()
    assert.match(await said(page), /the browser could not write any more \(.*\): free disk space or remove another model here/)
    const before = await held(page)
    if (fault.write !== Infinity) assert.ok(before >= MIB && before < 2 * MIB, `the first parcel, and no more than half of the marks of the second: ${before}`)
    await (await worker(page)).evaluate(() => { globalThis.repaired = true })
    await again(page)
    await whole(page)
  })
}

test('an incompletely written key is replaced, and the tab joins', options, async () => {
  const node = await holder('half-a-key')
  const page = await openTab(node.url)
  await joined(page)
  await page.goto(`${node.url}/licences.txt`)
  await page.evaluate(async () => {
    const dir = await (await navigator.storage.getDirectory()).getDirectoryHandle('peer-0')
    // And the file of a shard that never got its space.
    await dir.getFileHandle(`${'ab'.repeat(32)}-${40 * 1024 * 1024}`, { create: true })
    for (;;) {
      try {
        const file = await dir.getFileHandle('identity.key')
        const writable = await file.createWritable()
        await writable.write(new Uint8Array(7))
        await writable.close()
        return
      } catch (error) {
        // The worker that is ending still has the file open.
        if (error.name !== 'NoModificationAllowedError') throw error
      }
    }
  })
  const devtools = await page.context().newCDPSession(page)
  await devtools.send('Storage.overrideQuotaForOrigin', { origin: node.url, quotaSize: 20 * MIB })
  await page.goto(`${node.url}/#tab`)
  await joined(page)
  await keep(page, model.name)
})

test('a peer that answers "relayed" is not asked again until it reconnects', options, async () => {
  const node = await holder('relayed')
  const page = await openTab(node.url, { via: 'websocket' })
  await joined(page)
  await card(page, model.name)
  await page.evaluate(() => {
    const { swarm } = globalThis.doppler
    const exchange = swarm.exchange.bind(swarm)
    globalThis.asked = 0
    swarm.exchange = async (peer) => {
      if (globalThis.direct === true) return await exchange(peer)
      globalThis.asked += 1
      const frame = [0, 2, 8, 7]
      return { open: false, abort () {}, async write () {}, async read (length) { return Uint8Array.from(frame.splice(0, length)) } }
    }
  })
  await (await button(page, 'Keep in this tab')).click()
  await card(page, model.name, 'failed')
  const { asked, bans } = await page.evaluate(() => ({ asked: globalThis.asked, bans: globalThis.doppler.swarm.bans }))
  // No more than were in flight when it first answered so.
  assert.ok(asked > 0 && asked <= 5, `asked ${asked} times`)
  assert.equal(bans, 0)
  await page.evaluate(async () => {
    globalThis.direct = true
    const { libp2p } = globalThis.doppler.swarm
    for (const connection of libp2p.getConnections()) await connection.close()
  })
  await page.waitForFunction(() => globalThis.doppler.swarm.connections().length > 0 && globalThis.doppler.swarm.relayed.size === 0)
  await again(page)
  assert.equal((await counts(page)).peers, model.bytes)
})

/** Limits the adapter's memory to `bytes` of buffers for this tab's next runs. */
async function memory (page, bytes) {
  await (await worker(page)).evaluate((bytes) => {
    globalThis.room = bytes
    if (globalThis.taken !== undefined) return
    globalThis.taken = new WeakMap()
    const devices = GPUDevice.prototype
    const { createBuffer } = devices
    devices.createBuffer = function (descriptor) {
      const sum = (globalThis.taken.get(this) ?? 0) + descriptor.size
      globalThis.taken.set(this, sum)
      if (sum <= globalThis.room) return createBuffer.call(this, descriptor)
      // Cause the device's own error by a texture of 256 GiB, then return a buffer that is invalid too.
      this.createTexture({ size: [8192, 8192, 256], format: 'rgba32float', usage: GPUTextureUsage.COPY_DST })
      this.pushErrorScope('validation')
      const invalid = createBuffer.call(this, { size: descriptor.size, usage: 0 })
      this.popErrorScope()
      return invalid
    }
  }, bytes)
}

async function run (page, slots) {
  await page.locator('#run-model option').first().waitFor({ state: 'attached' })
  await page.fill('#run-prompt', 'Once upon a time')
  await page.fill('#run-tokens', '12')
  await page.fill('#run-slots', String(slots))
  await page.getByRole('button', { name: 'Run in this tab' }).click()
  await page.waitForFunction(() => ['done', 'failed'].includes(globalThis.doppler.runner.state))
  await page.waitForFunction(() => document.getElementById('run').dataset.state === globalThis.doppler.runner.state)
  return await page.evaluate(() => {
    const { state, text, ids, error, numbers, fewer } = globalThis.doppler.runner
    return { state, text, ids: [...ids], error, fewer, slots: numbers?.slots }
  })
}

test('an adapter with little memory gets fewer slots and the same text; too little is reported', options, async () => {
  const browser = await openBrowser(['--enable-unsafe-webgpu'])
  try {
    const node = await Node.start('no-memory')
    const page = await openTab(node.url, { within: browser })
    await joined(page)
    const wanted = spawnSync(process.env.DOPPLER_NODE_BIN, ['run', embedded, '-p', 'Once upon a time', '-n', '12', '--backend', 'cpu', '--json'])
    assert.equal(wanted.status, 0, wanted.stderr.toString())
    const { tokens, text } = JSON.parse(wanted.stdout)
    // The size of its buffers, as the node computes it.
    const { id } = await (await fetch(`${node.url}/models/embedded`)).json()
    const bytes = async (slots) => {
      const program = await (await fetch(`${node.url}/models/${id}/program?reduce=lane&kv=f16&slots=${slots}`)).json()
      return program.buffers.reduce((sum, size) => sum + size, 0)
    }
    const [few, all] = [await bytes(12), await bytes(32)]
    assert.ok(few < all)
    await memory(page, few + Math.floor((all - few) / 2))
    const fits = await run(page, 32)
    assert.deepEqual([fits.error, fits.ids, fits.text], [null, tokens, text])
    assert.ok(fits.fewer !== null && fits.fewer >= 8 && fits.fewer < 32 && fits.slots === fits.fewer, JSON.stringify(fits))
    assert.match(await page.textContent('#run-state'), new RegExp(`memory for ${fits.fewer} expert slots`))
    // The loaded model is reused, with the same result.
    assert.equal((await run(page, 32)).fewer, fits.fewer)

    await memory(page, await bytes(8) - MIB)
    const none = await run(page, 31)
    assert.deepEqual([none.state, none.error.code], ['failed', 'out_of_memory'])
    assert.deepEqual(none.ids, [])
    assert.match(await page.locator('#run').getByRole('alert').textContent(), /no memory for this model, even with (8|9|10) expert slots/)

    // In the middle of a run.
    await memory(page, Infinity)
    assert.deepEqual((await run(page, 16)).ids, tokens)
    await (await worker(page)).evaluate(() => {
      const queues = GPUQueue.prototype
      const { writeBuffer } = queues
      let writes = 0
      const { requestDevice } = GPUAdapter.prototype
      GPUAdapter.prototype.requestDevice = async function (...args) {
        globalThis.captured = await requestDevice.apply(this, args)
        return globalThis.captured
      }
      queues.writeBuffer = function (...args) {
        if (++writes === globalThis.failAt) {
          globalThis.captured.createTexture({ size: [8192, 8192, 256], format: 'rgba32float', usage: GPUTextureUsage.COPY_DST })
          return
        }
        writeBuffer.apply(this, args)
      }
      globalThis.written = () => writes
    })
    assert.deepEqual((await run(page, 15)).ids, tokens)
    const before = await (await worker(page)).evaluate(() => globalThis.written())
    await (await worker(page)).evaluate(() => { globalThis.failAt = globalThis.written() + 40 })
    const lost = await run(page, 15)
    assert.ok(await (await worker(page)).evaluate(() => globalThis.written()) >= before + 40)
    assert.deepEqual([lost.state, lost.error.code], ['failed', 'out_of_memory'])
    assert.deepEqual(lost.ids, tokens.slice(0, lost.ids.length), 'no token that is wrong')
    assert.deepEqual((await run(page, 15)).ids, tokens)
  } finally {
    await browser.close()
  }
})
