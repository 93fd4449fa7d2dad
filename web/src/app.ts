// The page: starts the worker, joins the swarm, and keeps the view up to date.

import { Panel } from './engine/panel.ts'
import { Runner } from './engine/runner.ts'
import { Keeper, type Listed } from './keeper.ts'
import { forgetKey, gatewayToken, readKey, rememberedKey, rememberKey, type SwarmKey } from './key.ts'
import { WorkerClient } from './messages.ts'
import { type NodeInfo, Swarm, type Via } from './swarm.ts'
import { authorise } from './token.ts'
import { View } from './view.ts'

const POLL_MS = 2000
const VIAS: Via[] = ['auto', 'gateway', 'websocket', 'webrtc']

async function get<T> (path: string): Promise<T> {
  const response = await fetch(path, { signal: AbortSignal.timeout(10_000) })
  if (!response.ok) throw new Error(`${path}: ${response.status}`)
  return await response.json()
}

/** A private swarm's key, and the gateway token derived from it, which the node has accepted. */
interface Opened { key: SwarmKey, token: string }

/**
 * Gets the key of a private swarm from this browser's storage or from the user, never from the
 * node. Null if the swarm is open.
 */
async function open (view: View): Promise<Opened | null> {
  const locked = await fetch('/node', { signal: AbortSignal.timeout(10_000) })
  if (locked.status !== 401) return null
  const { peer_id: node } = await locked.json()
  let key = await rememberedKey(node)
  for (let remember = false, asked = ''; ; asked = 'The node’s swarm has another key.') {
    if (key === null) ({ key, remember } = await view.askKey(readKey, asked))
    const token = gatewayToken(key, node)
    const reply = await fetch('/node', { headers: { authorization: `Bearer ${token}` }, signal: AbortSignal.timeout(10_000) })
    if (reply.status !== 401) {
      if (remember) await rememberKey(node, key)
      authorise(token)
      return { key, token }
    }
    key = null
  }
}

/** The number of this run of a tab's identity: larger than those of all earlier ones, whatever the clock says. */
function beginEpoch (slot: number): number {
  const name = `doppler-epoch-${slot}`
  try {
    const last = Number(localStorage.getItem(name))
    const epoch = Math.max(Date.now(), Number.isSafeInteger(last) ? last + 1 : 0)
    localStorage.setItem(name, String(epoch))
    return epoch
  } catch {
    return Date.now()
  }
}

async function main (): Promise<void> {
  const asked = new URLSearchParams(location.search).get('via') as Via
  const via = VIAS.includes(asked) ? asked : 'auto'
  const view = new View(via)
  const worker = new WorkerClient(new Worker('/worker.js', { type: 'module' }))
  let node: NodeInfo
  let opened: Opened | null
  let started: Awaited<ReturnType<typeof worker.ask<'start'>>>
  try {
    opened = await open(view)
    node = await get<NodeInfo>('/node')
    started = await worker.ask('start', { token: opened?.token ?? null })
  } catch (error) {
    view.fail(error as Error)
    return
  }
  let swarm: Swarm | null = null
  try {
    swarm = await Swarm.join(node, started.key, beginEpoch(started.slot), via, worker, opened?.key ?? null)
  } catch (error) {
    view.fail(error as Error)
  }
  addEventListener('pagehide', () => { swarm?.part() })
  // A page that is shown again has taken leave: it joins anew.
  addEventListener('pageshow', (event) => { if ((event as PageTransitionEvent).persisted) location.reload() })
  const keeper = new Keeper(worker, swarm, via, started.slot)
  if (swarm !== null) swarm.holdings = () => keeper.holdings()
  const runner = new Runner(worker, keeper)
  const panel = new Panel(runner)

  let drawing = false
  let reachable = true
  const estimate = { quota: 0, usage: 0, persisted: started.persisted }
  const draw = (): void => {
    if (drawing) return
    drawing = true
    const paint = (): void => {
      drawing = false
      view.draw({ node, reachable, swarm, keeper, estimate, slot: started.slot })
      panel.draw(keeper.models.values())
    }
    // A hidden tab gets no animation frames, but scripts still read its state.
    if (document.hidden) setTimeout(paint, 200)
    else requestAnimationFrame(paint)
  }
  keeper.changed = draw
  runner.changed = draw
  if (swarm !== null) swarm.changed = draw
  view.on({
    keep: (id) => { void keeper.keep(id) },
    pause: (id) => { keeper.pause(id) },
    remove: (id) => { void keeper.remove(id) },
    forget: () => { void forgetKey(node.peer_id).then(() => { location.reload() }) }
  })
  // For scripts and the browser's console.
  Object.assign(globalThis, { doppler: { keeper, swarm, runner } })

  // The model that comes with the node. A published model of the same id replaces it.
  let embedded: Listed | null = null
  for (;;) {
    try {
      node = await get<NodeInfo>('/node')
      swarm?.update(node)
      embedded ??= await get<Listed>('/models/embedded')
      const models = await get<Listed[]>('/models')
      const published = models.some(({ id }) => id === embedded?.id)
      await keeper.learn(published ? models : [{ ...embedded, embedded: true }, ...models])
      reachable = true
    } catch {
      reachable = false
    }
    Object.assign(estimate, await worker.ask('estimate', {}).catch(() => ({})))
    draw()
    await new Promise((resolve) => setTimeout(resolve, POLL_MS))
  }
}

void main()
