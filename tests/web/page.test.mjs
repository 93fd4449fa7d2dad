// The page as a peer, in Chromium against nodes that run as processes. Speeds are printed, not
// asserted.

import assert from 'node:assert/strict'
import { after, afterEach, before, test } from 'node:test'
import { card, chromiumVersion, cleanUp, closeBrowser, counts, joined, keep, later, MIB, Node, openBrowser, openTab, PATIENCE, proxy, randomModel } from './harness.mjs'

let big
let small
before(async () => {
  console.log(chromiumVersion())
  big = await randomModel('big', [64 * MIB])
  small = await randomModel('small', [3 * MIB + 12_345, 5 * MIB, 70_001])
})
afterEach(async () => { await cleanUp() })
after(async () => { await closeBrowser() })

const options = { timeout: 2 * PATIENCE }
const rate = (bytes, seconds) => `${(bytes / seconds / 1e6).toFixed(1)} MB/s`

async function holder (model, swarm) {
  const node = await Node.start(swarm)
  await node.ask('publish', model.dir)
  return node
}

for (const via of ['gateway', 'websocket', 'webrtc']) {
  test(`64 MiB over ${via}, proved, into the tab's storage, and again there after a reload`, options, async () => {
    const node = await holder(big, `over-${via}`)
    const page = await openTab(node.url, { via })
    if (via !== 'gateway') {
      await joined(page)
      assert.equal(await page.getAttribute('body', 'data-transport'), via)
    }
    const seconds = await keep(page, 'big')
    console.log(`${via}: 64 MiB kept in ${seconds.toFixed(1)} s, ${rate(big.bytes, seconds)}`)
    const got = await counts(page)
    assert.equal(via === 'gateway' ? got.gateway >= big.bytes : got.peers, via === 'gateway' ? true : big.bytes)
    assert.equal(got.refused, 0)

    await page.reload()
    await card(page, 'big', 'kept')
    assert.deepEqual([(await counts(page)).gateway, (await counts(page)).peers], [0, 0])
  })
}

test('without WebSocket the tab joins over WebRTC by itself', options, async () => {
  const node = await Node.start('direct', { listen: ['/ip4/127.0.0.1/udp/0/webrtc-direct'] })
  const page = await openTab(node.url)
  await joined(page)
  assert.equal(await page.getAttribute('body', 'data-transport'), 'webrtc')
})

test('where the browser forbids what WebRTC-direct does, WebSocket carries the tab', options, async () => {
  const node = await holder(small, 'strict')
  for (const [trial, transport] of [['Enabled', null], ['Disabled', 'webrtc']]) {
    const browser = await openBrowser([`--force-fieldtrials=WebRTC-NoSdpMangleUfrag/${trial}/`])
    later(async () => { await browser.close() })
    // Only WebRTC: whether it works depends on the trial.
    const direct = await openTab(node.url, { within: browser, via: 'webrtc' })
    if (transport === null) {
      await direct.locator('#failure').filter({ hasText: /./ }).waitFor()
      assert.equal(await direct.getAttribute('body', 'data-state'), 'joining')
    } else {
      await joined(direct)
      assert.equal(await direct.getAttribute('body', 'data-transport'), transport)
    }
    const page = await openTab(node.url, { within: browser })
    await joined(page)
    assert.equal(await page.getAttribute('body', 'data-transport'), 'websocket')
    await keep(page, 'small')
  }
})

test('a wrong byte from the gateway is refused, and the shard comes from peers', options, async () => {
  const node = await holder(small, 'tampered')
  const [target] = small.shards
  const damaged = await proxy(node, (path, offset, chunk) => {
    const at = 2 * MIB - offset
    if (path.includes(target.hash) && at >= 0 && at < chunk.length) chunk[at] ^= 1
    return chunk
  })
  const page = await openTab(damaged, { via: 'auto' })
  await joined(page)
  await keep(page, 'small')
  const got = await counts(page)
  assert.equal(got.refused, 1)
  // What was verified before the wrong byte is kept; only the rest came from the node.
  assert.ok(got.peers > MIB && got.peers < target.size, `${got.peers} bytes from peers`)
})

test('a peer that sends wrong bytes is banned, and nothing of them is kept', options, async () => {
  const node = await holder(small, 'liar')
  const page = await openTab(node.url, { via: 'websocket' })
  await joined(page)
  await page.evaluate(() => {
    const { swarm } = globalThis.doppler
    const ask = swarm.ask.bind(swarm)
    swarm.ask = async (...args) => {
      const reply = await ask(...args)
      reply.bytes[reply.bytes.length >> 1] ^= 4
      return reply
    }
  })
  await (await card(page, 'small')).getByRole('button', { name: 'Keep in this tab' }).click()
  await page.waitForFunction(() => globalThis.doppler.swarm.bans === 1)
  const kept = await card(page, 'small', 'failed')
  assert.ok(Number(await kept.getAttribute('data-held')) < small.shards[0].size)
})

test('a download that breaks off resumes after a reload where it stopped', options, async () => {
  const node = await holder(big, 'resumed')
  let whole = false
  const cutting = await proxy(node, (path, offset, chunk) => path.includes(big.shards[0].hash) && !whole && offset > 20 * MIB ? null : chunk)
  const page = await openTab(cutting, { via: 'gateway' })
  await (await card(page, 'big')).getByRole('button', { name: 'Keep in this tab' }).click()
  const held = Number(await (await card(page, 'big', 'failed')).getAttribute('data-held'))
  assert.ok(held >= MIB && held < 64 * MIB, `${held} bytes held`)
  whole = true
  await page.reload()
  await card(page, 'big', 'kept')
  const { gateway } = await counts(page)
  assert.ok(gateway <= big.bytes - held, `${gateway} bytes fetched, ${held} were there`)
})

test('a native node fetches what only tabs hold, and continues when one of them is killed', options, async () => {
  const first = await holder(big, 'back')
  const tcp = first.addresses.find((address) => /\/tcp\/\d+\/p2p/.test(address))
  const empty = await Node.start('back', { bootstrap: [tcp] })
  await empty.event('model')
  const pages = [await openTab(empty.url), await openTab(empty.url)]
  for (const page of pages) {
    await joined(page)
    await keep(page, 'big')
    assert.equal((await counts(page)).peers, big.bytes, 'the page node has nothing: all from the peer behind it')
  }
  await first.kill()
  // The tabs' leases have reached the node.
  for (;;) {
    const peers = await empty.json('peers')
    if (peers.filter(({ shards_held: held, agent }) => held > 0 && agent.startsWith('doppler-web')).length === 2) break
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  const began = performance.now()
  const fetching = empty.json('pin', 'big', '--fetch')
  // One of them dies while it sends; the rest comes from the other.
  const sent = async (page) => (await counts(page)).sent
  while (await sent(pages[0]) === 0) await new Promise((resolve) => setTimeout(resolve, 20))
  const devtools = await pages[0].context().newCDPSession(pages[0])
  const crashed = pages[0].waitForEvent('crash')
  devtools.send('Page.crash').catch(() => {})
  await crashed
  assert.ok(await sent(pages[1]) < big.bytes, 'not everything had come')
  const { missing } = await fetching
  const seconds = (performance.now() - began) / 1000
  assert.equal(missing, 0)
  console.log(`back from a tab: 64 MiB in ${seconds.toFixed(1)} s, ${rate(big.bytes, seconds)}`)
  assert.ok((await counts(pages[1])).sent >= big.bytes / 2)
  assert.match(await empty.ask('fsck'), /./)
})

test('a tab gets what only another tab holds, through the node between them', options, async () => {
  const node = await holder(small, 'between')
  const holding = await openTab(node.url)
  await joined(holding)
  await keep(holding, 'small')
  for (const { hash } of small.shards) await node.ask('rm', hash, '--force', '--last-copy')
  const page = await openTab(node.url, { via: 'websocket' })
  await joined(page)
  await keep(page, 'small')
  assert.equal((await counts(page)).peers, small.bytes)
  assert.ok((await counts(holding)).sent >= small.bytes)
})

test('a tab that is closed says goodbye, and the node drops it at once', options, async () => {
  const node = await holder(small, 'goodbye')
  const leases = async () => (await node.json('status')).load.leases
  const until = async (count, limit = PATIENCE) => {
    const end = performance.now() + limit
    while (await leases() !== count) {
      assert.ok(performance.now() < end, `still ${await leases()} leases`)
      await new Promise((resolve) => setTimeout(resolve, 50))
    }
  }
  for (const via of ['websocket', 'webrtc']) {
    const page = await openTab(node.url, { via })
    await joined(page)
    await keep(page, 'small')
    await until(1)
    await page.goto('about:blank')
    // Its lease would run for half a minute more.
    await until(0, 10_000)
  }
})

test('a quota that is too small is reported before anything is fetched', options, async () => {
  const node = await holder(big, 'quota')
  const page = await openTab(node.url, {
    before: async (context, page) => {
      const devtools = await context.newCDPSession(page)
      await devtools.send('Storage.overrideQuotaForOrigin', { origin: node.url, quotaSize: 20 * MIB })
    }
  })
  await (await card(page, 'big')).getByRole('button', { name: 'Keep in this tab' }).click()
  const failed = await card(page, 'big', 'failed')
  const said = await failed.getByRole('alert').textContent()
  assert.match(said, /no room for a shard of 64 MiB: free disk space/)
  assert.equal(await failed.getAttribute('data-held'), '0')
})

test('two tabs of one browser are two peers', options, async () => {
  const node = await holder(small, 'twins')
  const page = await openTab(node.url)
  await joined(page)
  const other = await page.context().newPage()
  await other.goto(`${node.url}/#tab`)
  await joined(other)
  const ids = await Promise.all([page, other].map(async (tab) => await tab.getAttribute('#own', 'title')))
  assert.notEqual(ids[0], ids[1])
  await keep(other, 'small')
  await keep(page, 'small')
})

test('the page can be used by keyboard and names what it shows', options, async () => {
  const node = await holder(small, 'keys')
  const page = await openTab(node.url)
  await joined(page)
  await card(page, 'small')
  const button = page.getByRole('button', { name: 'Keep in this tab' })
  await button.focus()
  await page.keyboard.press('Enter')
  await card(page, 'small', 'kept')
  await page.getByRole('progressbar', { name: 'small: kept in this tab' }).waitFor()
  await page.getByRole('img', { name: '3 of 3 objects kept' }).waitFor()
  assert.match(await page.getByRole('status').textContent(), /keys/)
  if (process.env.DOPPLER_SCREENSHOT !== undefined) await page.screenshot({ path: process.env.DOPPLER_SCREENSHOT, fullPage: true })
})
