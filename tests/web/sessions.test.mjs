// Tabs that join, fetch and leave: the node keeps nothing of them after their leases end. With `DOPPLER_SESSIONS`
// (200, say) that many join after a longer warm-up, and the node's resident memory must stay flat. `DOPPLER_VIA`
// sets the transport of all tabs; without it WebSocket and WebRTC alternate.

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { after, afterEach, test } from 'node:test'
import { cleanUp, closeBrowser, joined, keep, Node, openTab, PATIENCE, randomModel } from './harness.mjs'

const MEASURED = process.env.DOPPLER_SESSIONS !== undefined
const SESSIONS = Number(process.env.DOPPLER_SESSIONS ?? 6)
const VIA = process.env.DOPPLER_VIA
/** Sessions before memory is measured: by then one-time allocations are made and rare code has run. */
const WARM_UP = MEASURED ? 60 : 8
/** Tabs open at once. */
const AT_ONCE = 3
const LEASE_MS = 3000

afterEach(async () => { await cleanUp() })
after(async () => { await closeBrowser() })

/** MiB. */
const resident = (node) => Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${node.child.pid}/status`, 'utf8'))[1]) / 1024

/** Waits until the node has no peers, serves nothing and has no leases of others. */
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
  // A closed tab is forgotten when its lease ends. Use a short one, because this test waits for that twice.
  await page.evaluate((lease) => { globalThis.doppler.swarm.leaseMs = lease }, LEASE_MS)
  await keep(page, model.name)
  await page.context().close()
}

test(`after ${WARM_UP} and ${SESSIONS} more sessions nothing of the tabs is left`, { timeout: (WARM_UP + SESSIONS) * 20_000 + 2 * PATIENCE }, async () => {
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
