// Tabs that come, fetch and go: nothing of them is left in the node once their leases are over.
// With `DOPPLER_SESSIONS` (200, say) that many come after a longer warm-up, and its resident memory is to stay
// flat. `DOPPLER_VIA` says how all of them come; without it they come by WebSocket and WebRTC in turn.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, afterEach, test } from 'node:test'
import { cleanUp, closeBrowser, joined, keep, Node, openTab, PATIENCE, randomModel } from './harness.mjs'

const MEASURED = process.env.DOPPLER_SESSIONS !== undefined
const SESSIONS = Number(process.env.DOPPLER_SESSIONS ?? 10)
const VIA = process.env.DOPPLER_VIA
/** Sessions before memory is looked at: by then what is made once has been made, and code that runs at times has run. */
const WARM_UP = MEASURED ? 60 : 20
/** Tabs open at once. */
const AT_ONCE = 3
const LEASE_MS = 3000

afterEach(async () => { await cleanUp() })
after(async () => { await closeBrowser() })

/** MiB. */
const resident = (node) => Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${node.child.pid}/status`, 'utf8'))[1]) / 1024

/** Waits until nobody is there, nothing is served and no word is believed. */
async function quiet (node) {
  for (;;) {
    const { peers, load, tasks } = await node.json('status')
    if (peers === 0 && load.streams === 0 && load.leases === 0 && load.reads === 0) return tasks
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}

async function session (node, model, index) {
  const page = await openTab(node.url, { via: VIA ?? ['websocket', 'webrtc'][index % 2] })
  await joined(page)
  // A tab that is closed is forgotten by its lease: a short one, as this test waits for its end twice.
  await page.evaluate((lease) => { globalThis.doppler.swarm.leaseMs = lease }, LEASE_MS)
  await keep(page, model.name)
  await page.context().close()
}

test(`after ${WARM_UP} and ${SESSIONS} more sessions of tabs nothing of them is left`, { timeout: (WARM_UP + SESSIONS) * 20_000 + 2 * PATIENCE }, async () => {
  const model = await randomModel('small', [200_001, 70_001])
  const node = await Node.start('sessions')
  await node.ask('publish', model.dir)
  let begun = 0
  const run = async (until) => {
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      while (begun < until) await session(node, model, begun++)
    }))
    return { tasks: await quiet(node), megabytes: resident(node) }
  }
  const fresh = await quiet(node)
  const before = await run(WARM_UP)
  const after = await run(WARM_UP + SESSIONS)
  const grown = after.megabytes / before.megabytes - 1
  console.log(`sessions over ${VIA ?? 'both transports'}: ${before.megabytes.toFixed(1)} MiB resident after the first ${WARM_UP}, ${after.megabytes.toFixed(1)} after ${SESSIONS} more (${(100 * grown).toFixed(1)} %); tasks ${fresh}, ${before.tasks}, ${after.tasks}`)
  assert.equal(begun, WARM_UP + SESSIONS)
  // A connection has several tasks; some that wait for nothing more may end a little later.
  assert.ok(after.tasks <= before.tasks + 2 && after.tasks < fresh + SESSIONS, `${fresh}, then ${before.tasks}, then ${after.tasks} tasks`)
  if (MEASURED) assert.ok(grown < 0.05, `memory grew by ${(100 * grown).toFixed(1)} %`)
})
