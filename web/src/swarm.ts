// The tab in the swarm: connections, gossip of holdings, and both ends of the shard protocol.
// Runs on the page's thread (workers have no WebRTC) and hands bytes to the worker.

import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { type GossipSub, gossipsub } from '@libp2p/gossipsub'
import { RPC } from '@libp2p/gossipsub/message'
import { type Identify, identify } from '@libp2p/identify'
import type { Connection, Ed25519PrivateKey, Libp2p, PeerId, Stream, StreamMuxerFactory } from '@libp2p/interface'
import { noise } from '@libp2p/noise'
import { peerIdFromPrivateKey, peerIdFromString } from '@libp2p/peer-id'
import { type Ping, ping } from '@libp2p/ping'
import { webRTCDirect } from '@libp2p/webrtc'
import { webSockets } from '@libp2p/websockets'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { Gate, KeyRefused, type SwarmKey } from './key.ts'
import { type WorkerClient, Failure } from './messages.ts'
import { Exchange } from './stream.ts'
import { hex, unhex } from './tree.ts'
import { explain } from './words.ts'
import { decodeEnvelope, decodeReply, decodeRequest, encodeGoodbye, encodeHoldings, encodeReply, encodeRequest, frameLength, isNewer, type ModelHoldings, SHARD_PROTOCOL, type Stamp, Status, STATUS_NAMES } from './wire.ts'

const ANNOUNCE_MS = 10_000
const LEASE_MS = 35_000
const SETTLE_MS = 200
const REDIAL_MS = 2000
const KEEP_ALIVE_MS = 10_000
const DIAL_MS = 15_000
/** Peers whose holdings are remembered. */
const MEMBERS_MAX = 256
const STREAMS_PER_PEER_MAX = 32
const IDLE_STREAMS_MAX = 6
const IDLE_STREAM_SERVER_MS = 60_000
/** The most replies prepared at once. */
const SERVING_MAX = 4

export interface NodeInfo {
  peer_id: string
  swarm: string
  version: string
  topic: string
  protocol_version: string
  /** Whether the swarm has a key. */
  private: boolean
  addresses: string[]
  peers: Array<{ id: string, agent: string, addresses: string[], via?: { way: 'direct' | 'relay' }, shards_held: number, score: number, bytes_in: number, bytes_out: number }>
}

export type Via = 'auto' | 'gateway' | 'websocket' | 'webrtc'

interface Member extends Stamp { addresses: string[], models: Map<string, { objects: Uint8Array, manifest: boolean, until: number }> }

/** The transport that dials an address; null if a tab cannot dial it. */
export function transportOf (address: string): 'websocket' | 'webrtc' | null {
  if (/\/wss?(\/|$)/.test(address)) return 'websocket'
  return address.includes('/webrtc-direct/certhash/') ? 'webrtc' : null
}

export class Swarm {
  private readonly members = new Map<string, Member>()
  private readonly idle = new Map<string, Exchange[]>()
  private readonly banned = new Set<string>()
  /** Peers that are connected only through a relay, which carries no shards. */
  private readonly relayed = new Set<string>()
  private announcing: ReturnType<typeof setTimeout> | undefined
  private sequence = 0
  private serving = 0
  private readonly waitingToServe: Array<() => void> = []
  /** The lease of this tab's announced holdings. */
  leaseMs = LEASE_MS
  sent = 0
  served = 0
  lastError = ''
  /** Returns what this tab holds, to announce it by gossip. */
  holdings: () => ModelHoldings[] = () => []
  changed: () => void = () => {}

  private constructor (
    private readonly libp2p: Libp2p<{ gossip: GossipSub, identify: Identify, ping: Ping }>,
    private node: NodeInfo, private readonly via: Via, private readonly worker: WorkerClient, private readonly gate: Gate | null,
    private readonly epoch: number, private readonly goodbye: Uint8Array
  ) {}

  /**
   * Joins the node's swarm. With a key, both ends of every connection must prove it. The epoch is
   * larger than in all earlier runs of this identity.
   */
  static async join (node: NodeInfo, seed: Uint8Array, epoch: number, via: Via, worker: WorkerClient, key: SwarmKey | null): Promise<Swarm> {
    const privateKey = await generateKeyPairFromSeed('Ed25519', seed)
    const own = peerIdFromPrivateKey(privateKey)
    const gate = key === null ? null : new Gate(key, own)
    const rtc = webRTCDirect({ dataChannel: { maxMessageSize: 8192, finAckTimeout: 300 } })
    const direct = gate === null ? rtc : gate.watchTransport(rtc)
    const mux = (): StreamMuxerFactory => gate === null ? yamux()() : gate.watch(yamux()())
    const transports = via === 'websocket' ? [webSockets()] : via === 'webrtc' ? [direct] : [webSockets(), direct]
    const libp2p = await createLibp2p({
      privateKey,
      nodeInfo: { name: 'doppler-web', version: node.version, userAgent: `doppler-web/${node.version}` },
      addresses: { listen: [] },
      transports,
      connectionEncrypters: [noise()],
      streamMuxers: [mux],
      // The default for browsers refuses loopback addresses and plain WebSockets, which nodes use.
      connectionGater: {
        denyDialMultiaddr: () => false,
        denyOutboundUpgradedConnection: async (peer, connection) => gate !== null && await gate.denies(peer, connection)
      },
      // The monitor would mistake a node's late answer to a close for a dead connection.
      connectionMonitor: { enabled: false },
      services: {
        identify: (components: Parameters<ReturnType<typeof identify>>[0]) => {
          const service = identify()(components)
          // Nodes disconnect peers with another protocol version, and the package has no option for it.
          ;(service as unknown as { host: { protocolVersion: string } }).host.protocolVersion = node.protocol_version
          return service
        },
        ping: ping(),
        gossip: gossipsub({ allowPublishToZeroTopicPeers: true, fallbackToFloodsub: false, emitSelf: false })
      }
    })
    const goodbye = await signGoodbye(privateKey, node.topic, epoch)
    const swarm = new Swarm(libp2p as never, node, via, worker, gate, epoch, goodbye)
    await swarm.start()
    return swarm
  }

  /**
   * Tells peers that this tab stops, so that they drop what it holds at once. Only what is written
   * before this returns leaves a page that is being closed, so the message was signed before.
   */
  part (): void {
    const { streamsOutbound } = this.libp2p.services.gossip as unknown as { streamsOutbound: Map<string, { push: (data: Uint8Array) => void }> }
    for (const stream of streamsOutbound.values()) {
      try {
        stream.push(this.goodbye)
      } catch {
        // This stream has closed already; another peer may pass it on.
      }
    }
  }

  get id (): string {
    return this.libp2p.peerId.toString()
  }

  /** The tab's connections, with their peers and transports. */
  connections (): Array<{ peer: string, transport: string, since: number }> {
    return this.libp2p.getConnections().map((connection) => ({
      peer: connection.remotePeer.toString(),
      transport: transportOf(connection.remoteAddr.toString()) ?? 'other',
      since: connection.timeline.open
    }))
  }

  update (node: NodeInfo): void {
    this.node = node
  }

  private async start (): Promise<void> {
    const { gossip } = this.libp2p.services
    gossip.addEventListener('gossipsub:message', ({ detail: { msg } }) => {
      if (msg.topic !== this.node.topic || msg.type !== 'signed') return
      try {
        this.hear(msg.from, msg.data)
      } catch (error) {
        this.lastError = `gossip: ${(error as Error).message}`
      }
    })
    gossip.subscribe(this.node.topic)
    gossip.addEventListener('subscription-change', () => { this.announceSoon() })
    this.libp2p.addEventListener('peer:connect', () => { this.changed() })
    this.libp2p.addEventListener('peer:disconnect', ({ detail }) => {
      this.idle.delete(detail.toString())
      this.relayed.delete(detail.toString())
      this.changed()
    })
    await this.libp2p.handle(SHARD_PROTOCOL, (stream, connection) => {
      void this.serve(stream, connection).catch((error: Error) => {
        this.lastError = `serving: ${error.message}`
        stream.abort(error)
      })
    }, { maxInboundStreams: STREAMS_PER_PEER_MAX * 4 })
    void this.keepConnected()
    setInterval(() => { this.announce() }, ANNOUNCE_MS)
    setInterval(() => {
      for (const connection of this.libp2p.getConnections()) {
        this.libp2p.services.ping.ping(connection.remotePeer, { signal: AbortSignal.timeout(KEEP_ALIVE_MS) }).catch(() => {})
      }
    }, KEEP_ALIVE_MS)
  }

  /** Connects to the node of this page, now and whenever the connection breaks. */
  private async keepConnected (): Promise<void> {
    for (;;) {
      const id = this.node.peer_id
      if (this.libp2p.getConnections(peerIdFromString(id)).length === 0) {
        if (this.gate !== null) this.gate.refused = null
        try {
          await this.dial(id, this.node.addresses)
          this.lastError = ''
        } catch (error) {
          this.lastError = explain(this.gate?.refused ?? error, 'the node’s swarm address')
          // Trying again would only prolong the ban.
          if (this.gate?.refused instanceof KeyRefused) return await this.leave()
        }
        this.changed()
      }
      await new Promise((resolve) => setTimeout(resolve, REDIAL_MS))
    }
  }

  /** Whether the node has refused this tab's key. */
  refused = false

  private async leave (): Promise<void> {
    this.refused = true
    this.changed()
    await this.libp2p.stop()
  }

  /** Dials WebSocket addresses first, then WebRTC-direct. WebSocket is at least as fast, and every browser allows it. */
  private async dial (peer: string, addresses: string[]): Promise<Connection> {
    let last: Error = new Error(`${peer} has no address that a browser can dial`)
    const host = location.hostname
    const near = (address: string): number => address.includes(`/${host === 'localhost' ? '127.0.0.1' : host}/`) ? 0 : 1
    for (const transport of ['websocket', 'webrtc'] as const) {
      if (this.via !== 'auto' && this.via !== 'gateway' && this.via !== transport) continue
      const fit = addresses.filter((address) => transportOf(address) === transport).sort((a, b) => near(a) - near(b))
      for (const address of fit.slice(0, 4)) {
        const full = address.includes('/p2p/') ? address : `${address}/p2p/${peer}`
        try {
          return await this.libp2p.dial(multiaddr(full), { signal: AbortSignal.timeout(DIAL_MS) })
        } catch (error) {
          last = error as Error
        }
      }
    }
    throw last
  }

  private hear (from: PeerId, data: Uint8Array): void {
    const said = decodeEnvelope(data)
    const author = from.toString()
    if (said === null) return
    const member: Member = this.members.get(author) ?? { epoch: 0, sequence: 0, addresses: [], models: new Map() }
    if (!isNewer(said, member)) return
    if (said.kind === 'goodbye') {
      // What is left of it tells earlier messages that come late from new ones.
      if (this.members.has(author)) this.members.set(author, { epoch: said.epoch, sequence: said.sequence, addresses: [], models: new Map() })
      this.changed()
      return
    }
    const holdings = said
    // Peers may only announce their own holdings.
    if (hex(holdings.peer) !== hex(from.toMultihash().bytes)) return
    member.epoch = holdings.epoch
    member.sequence = holdings.sequence
    member.addresses = holdings.addresses
    // Leases use a monotonic clock: the wall clock may jump.
    const until = performance.now() + holdings.leaseMs
    for (const { model, manifest, objects } of holdings.models) {
      member.models.set(hex(model), { manifest, objects: objects.slice(), until })
    }
    // Members are ordered by their last message; beyond the bound the oldest is dropped.
    this.members.delete(author)
    this.members.set(author, member)
    const first = this.members.keys().next().value
    if (this.members.size > MEMBERS_MAX && first !== undefined) this.members.delete(first)
    this.changed()
  }

  /** Peers whose leases say that they hold object `bit` of a model. */
  holders (model: string, bit: number): string[] {
    const now = performance.now()
    return [...this.members].filter(([, member]) => {
      const entry = member.models.get(model)
      return entry !== undefined && entry.until > now && ((entry.objects[bit >> 3] ?? 0) >> (bit & 7) & 1) === 1
    }).map(([peer]) => peer)
  }

  announceSoon (): void {
    this.announcing ??= setTimeout(() => { this.announce() }, SETTLE_MS)
  }

  private announce (): void {
    clearTimeout(this.announcing)
    this.announcing = undefined
    const models = this.holdings()
    if (models.length === 0) return
    this.sequence += 1
    const message = encodeHoldings({ kind: 'holdings', peer: this.libp2p.peerId.toMultihash().bytes, epoch: this.epoch, sequence: this.sequence, leaseMs: this.leaseMs, addresses: [], models })
    this.libp2p.services.gossip.publish(this.node.topic, message).catch((error: Error) => { this.lastError = `gossip: ${error.message}` })
  }

  /** Peers to ask for an object, the node of this page first. Other tabs are left out: nobody can dial them. */
  sources (model: string, bit: number): string[] {
    const holders = this.holders(model, bit).filter((peer) => this.members.get(peer)?.addresses.some((address) => transportOf(address) !== null))
    const peers = new Set([this.node.peer_id, ...holders])
    return [...peers].filter((peer) => !this.banned.has(peer) && !this.relayed.has(peer) && peer !== this.id)
  }

  /** Requests a range of an object from a peer. Returns its encoding, not yet verified. */
  async ask (peer: string, id: string, start: number, end: number): Promise<{ size: number, bytes: Uint8Array }> {
    const exchange = await this.exchange(peer)
    try {
      await exchange.write(encodeRequest({ root: unhex(id), start, end }))
      const reply = decodeReply(await exchange.read(frameLength(await exchange.read(2))))
      if (reply.status !== Status.OK) {
        this.keep(peer, exchange)
        if (reply.status === Status.RELAYED) this.relayed.add(peer)
        throw new Failure(STATUS_NAMES[reply.status] ?? 'unknown', `peer ${short(peer)} says: ${STATUS_NAMES[reply.status] ?? reply.status}`)
      }
      const bytes = await exchange.read(reply.length)
      this.keep(peer, exchange)
      return { size: reply.size, bytes }
    } catch (error) {
      if (!(error instanceof Failure)) exchange.abort(error as Error)
      throw error
    }
  }

  private keep (peer: string, exchange: Exchange): void {
    const idle = this.idle.get(peer) ?? []
    if (idle.length < IDLE_STREAMS_MAX) idle.push(exchange)
    else exchange.abort(new Error('enough'))
    this.idle.set(peer, idle)
  }

  private async exchange (peer: string): Promise<Exchange> {
    const idle = this.idle.get(peer) ?? []
    for (let exchange = idle.pop(); exchange !== undefined; exchange = idle.pop()) {
      if (exchange.open) return exchange
    }
    const id = peerIdFromString(peer)
    const open = this.libp2p.getConnections(id)[0]
    const connection = open ?? await this.dial(peer, peer === this.node.peer_id ? this.node.addresses : this.members.get(peer)?.addresses ?? [])
    const stream = await connection.newStream(SHARD_PROTOCOL, { signal: AbortSignal.timeout(DIAL_MS), maxOutboundStreams: STREAMS_PER_PEER_MAX })
    return new Exchange(stream)
  }

  /** Bans a peer that sent wrong bytes: it is not asked again. */
  ban (peer: string): void {
    this.banned.add(peer)
    if (peer !== this.node.peer_id) this.libp2p.hangUp(peerIdFromString(peer)).catch(() => {})
  }

  get bans (): number {
    return this.banned.size
  }

  private async serve (stream: Stream, connection: Connection): Promise<void> {
    const exchange = new Exchange(stream)
    while (exchange.open && connection.status === 'open') {
      const length = await exchange.read(2, IDLE_STREAM_SERVER_MS).catch(() => null)
      if (length === null) return
      const { root, start, end } = decodeRequest(await exchange.read(frameLength(length)))
      await this.turn(async () => {
        let reply: { size: number, bytes: Uint8Array }
        try {
          reply = await this.worker.ask('encode', { id: hex(root), start, end })
        } catch (error) {
          const status = (error as Failure).code === 'not_held' ? Status.NOT_FOUND : Status.FAILED
          await exchange.write(encodeReply({ status, size: 0, length: 0 }))
          return
        }
        if (reply.bytes.length === 0) {
          await exchange.write(encodeReply({ status: Status.OUT_OF_RANGE, size: reply.size, length: 0 }))
          return
        }
        await exchange.write(encodeReply({ status: Status.OK, size: reply.size, length: reply.bytes.length }))
        await exchange.write(reply.bytes)
        this.sent += reply.bytes.length
        this.served += 1
        this.changed()
      })
    }
  }

  /** Runs at most `SERVING_MAX` replies at once; the others wait their turn. */
  private async turn (work: () => Promise<void>): Promise<void> {
    if (this.serving >= SERVING_MAX) await new Promise<void>((resolve) => this.waitingToServe.push(resolve))
    else this.serving += 1
    try {
      await work()
    } finally {
      const next = this.waitingToServe.shift()
      if (next === undefined) this.serving -= 1
      else next()
    }
  }
}

export const short = (id: string): string => id.length > 14 ? `${id.slice(0, 6)}…${id.slice(-6)}` : id

/** A signed gossip message that ends this epoch, ready to be written. */
async function signGoodbye (key: Ed25519PrivateKey, topic: string, epoch: number): Promise<Uint8Array> {
  const seqno = new Uint8Array(8)
  new DataView(seqno.buffer).setBigUint64(0, BigInt(Date.now()) * 1_000_000n)
  const data = encodeGoodbye({ epoch, sequence: Number.MAX_SAFE_INTEGER })
  const message: RPC.Message = { from: peerIdFromPrivateKey(key).toMultihash().bytes, data, seqno, topic }
  const [prefix, body] = [new TextEncoder().encode('libp2p-pubsub:'), RPC.Message.encode(message)]
  const signed = new Uint8Array(prefix.length + body.length)
  signed.set(prefix)
  signed.set(body, prefix.length)
  message.signature = await key.sign(signed)
  return RPC.encode({ subscriptions: [], messages: [message] })
}
