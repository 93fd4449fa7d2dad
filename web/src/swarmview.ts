// The swarm as the node sees it: the node itself with its memory, its peers, what moves, and what is
// being healed. Plain DOM, redrawn from state.

import { el, find, redraw, say } from './dom.ts'
import { type NodeState, Rates, type Tier } from './nodestate.ts'
import type { NodeInfo } from './swarm.ts'
import { brief, count, left, rate, size } from './words.ts'

const REACH = { unknown: 'no peer from outside has tried yet', public: 'public: peers dial it', mapped: 'public, through the router', private: 'behind a NAT: peers cannot dial it' }
/** A rate below which nothing counts as moving, in bytes a second. */
const STILL = 256

interface Row { id: string, name: string, kind: string, path: string, incoming: number | null, outgoing: number | null, received: number, sent: number, holds: number, score: number }

export class SwarmView {
  private readonly rates = new Rates()

  /** `tab`: the id of this tab in the swarm. */
  draw (node: NodeInfo, state: NodeState | null, tab: string): void {
    this.own(node, state)
    const rows = node.peers.map((peer): Row => {
      const isTab = peer.agent.startsWith('doppler-web')
      return {
        id: peer.id,
        name: peer.id === tab ? 'this tab' : brief(peer.id),
        kind: isTab ? 'browser tab' : peer.agent === '' ? 'not known yet' : `node ${peer.agent.split('/')[1] ?? ''}`.trim(),
        path: path(peer),
        incoming: this.rates.note(`in ${peer.id}`, peer.bytes_in),
        outgoing: this.rates.note(`out ${peer.id}`, peer.bytes_out),
        received: peer.bytes_in,
        sent: peer.bytes_out,
        holds: peer.shards_held,
        score: peer.score
      }
    })
    this.rates.keep([...rows.flatMap(({ id }) => [`in ${id}`, `out ${id}`]), 'in', 'out'])
    this.peers(rows, state)
    this.moving(rows, state)
  }

  private own (node: NodeInfo, state: NodeState | null): void {
    say(find('node-name'), brief(node.peer_id))
    find('node-name').title = node.peer_id
    const incoming = state === null ? null : this.rates.note('in', state.received_bytes)
    const outgoing = state === null ? null : this.rates.note('out', state.sent_bytes)
    if (state === null) {
      say(find('node-facts'), 'Asking the node…')
      return
    }
    const loaded = state.engine.loaded.map(({ name }) => name).join(', ')
    say(find('node-facts'), [
      `doppler-node ${node.version}`,
      state.alone ? 'without a swarm' : `swarm ${node.swarm}`,
      `runs models on ${state.backend}`,
      loaded === '' ? 'no model loaded' : `${loaded} loaded`,
      `up ${uptime(state.uptime_s)}`,
      ...state.alone ? [] : [REACH[state.reach.state]]
    ].join(' · '))
    redraw(find('tiers'), [state.vram_budget, state.ram, state.disk, state.pinned_bytes], () => [
      el('div', '', [el('dt', '', 'Device memory'), el('dd', '', size(state.vram_budget)), el('dd', 'small', 'at most, for models that run')]),
      tier('RAM', state.ram, 'objects in memory'),
      tier('Disk', state.disk, `${size(state.pinned_bytes)} pinned`)
    ])
    say(find('node-in'), incoming === null ? '—' : rate(incoming))
    say(find('node-in-all'), `${size(state.received_bytes)} since it started`)
    say(find('node-out'), outgoing === null ? '—' : rate(outgoing))
    say(find('node-out-all'), `${size(state.sent_bytes)} since it started`)
    const { running, waiting } = state.engine
    say(find('node-answers'), String(running))
    say(find('node-waiting'), waiting === 0 ? 'none waiting' : `${waiting} waiting`)
  }

  private peers (rows: Row[], state: NodeState | null): void {
    const none = find('no-peers')
    none.hidden = rows.length > 0
    say(none, state?.alone === true ? 'This node serves without a swarm. “doppler-node join --swarm NAME” starts one that meets others.' : 'Nobody else is here yet. “doppler-node invite” prints a string with which another machine joins.')
    find('people-table').hidden = rows.length === 0
    const shown = rows.map((row) => ({ ...row, incoming: moved(row.incoming), outgoing: moved(row.outgoing) }))
    redraw(find('people'), shown, () => shown.map((row) => {
      const name = el('th', 'mono', row.name, { scope: 'row', title: row.id })
      const cell = (label: string, text: string): HTMLElement => el('td', '', text, { 'data-label': label })
      return el('tr', '', [name, cell('Kind', row.kind), cell('Path', row.path), cell('To the node', traffic(row.incoming, row.received)), cell('From the node', traffic(row.outgoing, row.sent)), cell('Holds', count(row.holds, 'object'))])
    }))
  }

  private moving (rows: Row[], state: NodeState | null): void {
    const lines: Array<{ what: string, detail: string, done: number | null }> = []
    for (const pull of state?.pulls ?? []) {
      if (pull.state !== 'running') continue
      lines.push({ what: `Pulling ${pull.model}`, detail: pull.progress === null ? 'asking the Hub' : amount(pull.progress), done: pull.progress === null || pull.progress.total === 0 ? null : pull.progress.done / pull.progress.total })
    }
    for (const { name, incoming, outgoing } of rows) {
      if ((incoming ?? 0) > STILL) lines.push({ what: `From ${name}`, detail: rate(incoming ?? 0), done: null })
      if ((outgoing ?? 0) > STILL) lines.push({ what: `To ${name}`, detail: rate(outgoing ?? 0), done: null })
    }
    const heal = state?.healing
    if (heal !== undefined && heal.under_way > 0) lines.push({ what: `Copying ${count(heal.under_way, 'object')} that the swarm lacks`, detail: size(heal.under_way_bytes), done: null })
    say(find('still'), lines.length === 0 ? 'Nothing moves at the moment.' : '')
    find('still').hidden = lines.length > 0
    redraw(find('transfers'), lines, () => lines.map(({ what, detail, done }) => {
      const bar = done === null ? [] : [el('progress', '', [], { value: String(done), max: '1', 'aria-label': what })]
      return el('li', '', [el('span', 'what', what), el('span', 'soft', detail), ...bar])
    }))
    say(find('heal'), heal === undefined ? '' : healing(heal))
  }
}

function tier (name: string, { used, budget }: Tier, what: string): HTMLElement {
  const share = budget > 0 ? Math.min(1, used / budget) : 0
  return el('div', '', [el('dt', '', name), el('dd', '', size(used)), el('dd', 'small', budget > 0 ? `of ${size(budget)} · ${what}` : what), el('dd', 'bar', el('meter', '', [], { min: '0', max: '1', value: share.toFixed(3), 'aria-label': `${name} in use` }))])
}

/** How the node is connected to a peer. */
function path ({ addresses, via }: NodeInfo['peers'][number]): string {
  if (via?.way === 'relay') return 'through a relay'
  const at = addresses[0] ?? ''
  if (at.includes('/webrtc')) return 'WebRTC'
  if (/\/wss?(\/|$)/.test(at)) return 'WebSocket'
  return at.includes('/quic') ? 'QUIC' : at.includes('/tcp/') ? 'TCP' : 'direct'
}

/** A rate, and all that has come so far. */
const traffic = (speed: string, bytes: number): string => bytes === 0 ? '—' : `${speed} · ${size(bytes)} so far`

const moved = (bytes: number | null): string => bytes === null || bytes <= STILL ? 'quiet' : rate(bytes)

/** Bytes of a whole, rate and time left. */
export function amount ({ done, total, rate: speed, left_s: seconds }: { done: number, total: number, rate: number | null, left_s: number | null }): string {
  const parts = [total > 0 ? `${size(done)} of ${size(total)}` : size(done)]
  if (speed !== null) parts.push(rate(speed))
  if (seconds !== null) parts.push(left(seconds))
  return parts.join(' · ')
}

export function healing ({ budget, replica_bytes: replicas, lacking, lost, lacking_bytes: bytes, left_s: seconds, copied, copied_bytes: made, is_leaving: leaving }: NodeState['healing']): string {
  const parts: string[] = []
  if (leaving) parts.push('This node is about to leave; others copy what it holds.')
  if (lacking === 0) parts.push('Every object that this node looks after has enough copies.')
  else parts.push(`${count(lacking, 'object')} ${lacking === 1 ? 'has' : 'have'} too few copies: ${size(bytes)} to be copied${seconds === null ? '' : `, ${left(seconds)}`}.`)
  if (lost > 0) parts.push(`Nobody in reach holds ${count(lost, 'object')}.`)
  parts.push(budget === 0 ? 'This node keeps no copies for others.' : `It keeps ${size(replicas)} of ${size(budget)} for others${copied > 0 ? `, and has made ${count(copied, 'copy', 'copies')} (${size(made)}) since it started` : ''}.`)
  return parts.join(' ')
}

function uptime (seconds: number): string {
  const minutes = Math.floor(seconds / 60)
  return minutes < 1 ? 'less than a minute' : minutes < 60 ? `${minutes} min` : minutes < 48 * 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : count(Math.floor(minutes / 1440), 'day')
}
