// The page: shows the node, lets people talk to its models, and makes this tab a peer. Starts the
// parts, and keeps what they show up to date.

import { askTab } from './chat/tab.ts'
import { ChatView } from './chat/view.ts'
import { adapterOf } from './engine/device.ts'
import { Panel } from './engine/panel.ts'
import { Runner } from './engine/runner.ts'
import { Keeper } from './keeper.ts'
import { forgetKey, gatewayToken, readKey, rememberedKey, rememberKey, type SwarmKey } from './key.ts'
import { Link } from './link.ts'
import { WorkerClient } from './messages.ts'
import { type KnownModel, ModelsView } from './modelsview.ts'
import { Owner } from './owner.ts'
import { Router } from './router.ts'
import { type NodeInfo, Swarm, type Via } from './swarm.ts'
import { SwarmView } from './swarmview.ts'
import { authorise } from './token.ts'
import { View } from './view.ts'
import { isAway } from './words.ts'

const VIAS: Via[] = ['auto', 'gateway', 'websocket', 'webrtc']

/** A private swarm's key, and the gateway token derived from it, which the node has accepted. */
interface Opened { key: SwarmKey, token: string }

/** This tab as a peer. */
interface Tab { swarm: Swarm | null, keeper: Keeper, runner: Runner, panel: Panel, worker: WorkerClient, slot: number, estimate: { quota: number, usage: number, persisted: boolean } }

/** Does something as soon as the node can be reached. */
async function patiently<T> (view: View, work: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await work()
    } catch (error) {
      if (!isAway(error)) throw error
      view.wait()
      await new Promise((resolve) => setTimeout(resolve, 700))
    }
  }
}

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

/** Makes this tab a peer. Null if the browser does not let it be one. */
async function becomePeer (node: NodeInfo, opened: Opened | null, via: Via, alone: boolean, view: View, draw: () => void): Promise<Tab | null> {
  const worker = new WorkerClient(new Worker('/worker.js', { type: 'module' }))
  let started: Awaited<ReturnType<typeof worker.ask<'start'>>>
  try {
    started = await worker.ask('start', { token: opened?.token ?? null })
  } catch (error) {
    view.fail(error as Error)
    return null
  }
  let swarm: Swarm | null = null
  try {
    if (!alone) swarm = await Swarm.join(node, started.key, beginEpoch(started.slot), via, worker, opened?.key ?? null)
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
  keeper.changed = draw
  runner.listen(draw)
  if (swarm !== null) swarm.changed = draw
  view.on({
    keep: (id) => { void keeper.keep(id) },
    pause: (id) => { keeper.pause(id) },
    remove: (id) => { void keeper.remove(id) },
    forget: () => { void forgetKey(node.peer_id).then(() => { location.reload() }) }
  })
  // For scripts and the browser's console.
  Object.assign(globalThis, { doppler: { keeper, swarm, runner } })
  void adapterOf().then(() => '', (error: Error) => error.message).then((why) => {
    panel.why = why
    draw()
  })
  return { swarm, keeper, runner, panel, worker, slot: started.slot, estimate: { quota: 0, usage: 0, persisted: started.persisted } }
}

async function main (): Promise<void> {
  const asked = new URLSearchParams(location.search).get('via') as Via
  const via = VIAS.includes(asked) ? asked : 'auto'
  // First of all: it takes the key out of the address.
  const owner = new Owner()
  const router = new Router()
  const view = new View(via)
  const link = new Link(owner)
  let tab: Tab | null = null
  const chat = new ChatView((id, what, signal) => askTab(tab?.runner ?? null, id, what, signal), owner)
  const swarmView = new SwarmView()
  const modelsView = new ModelsView(owner, {
    chat: (name) => {
      location.hash = '#chat'
      chat.choose(`node:${name}`)
    },
    soon: () => { link.soon() }
  })

  const opened = await patiently(view, async () => await open(view))
  await patiently(view, async () => { await owner.check() })
  let drawing = false
  const paint = (): void => {
    drawing = false
    const { info, state, models, reachable } = link
    if (info === null) return
    const why = tab === null ? 'This browser does not let the page be a peer' : tab.panel.why ?? 'Looking for WebGPU…'
    chat.update({ models: link.chat, tab: tab === null ? [] : [...tab.keeper.models.values()], why, away: !reachable, outdated: link.outdated })
    swarmView.draw(info, state, tab?.swarm?.id ?? '')
    modelsView.draw(models as KnownModel[] | null, state, info.peer_id)
    if (tab === null) return
    const { swarm, keeper, estimate, slot, panel } = tab
    view.draw({ node: info, reachable, swarm, keeper, estimate, slot, listed: models !== null, alone: state?.alone === true })
    panel.draw(keeper.models.values())
  }
  const draw = (): void => {
    if (drawing) return
    drawing = true
    // A hidden tab gets no animation frames, but scripts still read its state.
    if (document.hidden) setTimeout(paint, 200)
    else requestAnimationFrame(paint)
  }
  router.changed = draw
  while (!await link.ask()) {
    view.wait()
    await link.rest()
  }
  draw()
  tab = await becomePeer(link.info as unknown as NodeInfo, opened, via, link.state?.alone === true, view, draw)
  for (;;) {
    const { info, models, embedded } = link
    if (tab !== null && info !== null && models !== null && embedded !== null) {
      tab.swarm?.update(info)
      // The model that comes with the node. A published model of the same id replaces it.
      const published = models.some(({ id }) => id === embedded.id)
      await tab.keeper.learn(published ? models : [{ ...embedded, embedded: true }, ...models])
      Object.assign(tab.estimate, await tab.worker.ask('estimate', {}).catch(() => ({})))
    }
    draw()
    await link.rest()
    await link.ask()
  }
}

void main()
