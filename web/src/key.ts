// A private swarm's key in a tab: how it is entered, stored and proved (`docs/swarm-key.md`).
// A tab only dials, so it is always the dialer. Before both sides have proved the key, nothing but
// the proof is sent on a connection, and its other streams are not read.
//
// The key itself is discarded as soon as it is entered. Only keys derived from it are used. If the
// user wants, they are stored, encrypted under a browser key that no script can read.

import type { MultiaddrConnection, PeerId, Stream, StreamMuxer, StreamMuxerFactory, Transport, Upgrader } from '@libp2p/interface'
import { handle } from '@libp2p/multistream-select'
import { peerIdFromString } from '@libp2p/peer-id'
import { deriveKey, keyedHash } from './blake3.ts'
import { Exchange } from './stream.ts'
import { hex, unhex } from './tree.ts'

const KEY_PROTOCOL = '/doppler/swarm-key/1'
const CONTEXT = 'doppler-node 2026 swarm key v1 '
const NONCE = 32
const PROOF_MS = 10_000
/** How long a refused connection may take to close before it is aborted. */
const HANG_UP_MS = 1_000
const DATABASE = 'doppler-swarm-keys'
const KEYS = 'keys'

/** The keys derived from a swarm's key: one for each side of a proof, and one for gateways. */
export interface SwarmKey { dialer: Uint8Array, listener: Uint8Array, gateway: Uint8Array }

/** Parses a key file that `doppler-node swarm-key` made. Null if it is not one. */
export function readKey (text: string): SwarmKey | null {
  const digits = text.trim()
  if (!/^[0-9a-fA-F]{64}$/.test(digits)) return null
  const secret = unhex(digits)
  const [dialer, listener, gateway] = ['dialer', 'listener', 'gateway'].map((use) => deriveKey(CONTEXT + use, secret))
  secret.fill(0)
  return { dialer, listener, gateway }
}

/** The token that proves the key to the gateway of one node. */
export function gatewayToken (key: SwarmKey, node: string): string {
  return hex(keyedHash(key.gateway, peerIdFromString(node).toMultihash().bytes))
}

/** The other side has a different key. */
export class KeyRefused extends Error {}

function proof (key: Uint8Array, dialer: Uint8Array, listener: Uint8Array, dialerNonce: Uint8Array, listenerNonce: Uint8Array): Uint8Array {
  const message = new Uint8Array([dialer.length, ...dialer, listener.length, ...listener, ...dialerNonce, ...listenerNonce])
  return keyedHash(key, message)
}

function equal (a: Uint8Array, b: Uint8Array): boolean {
  // In constant time: the duration must not reveal where the proofs differ.
  return a.length === b.length && a.reduce((differ, byte, i) => differ | (byte ^ b[i]), 0) === 0
}

/** Proves the key as the dialer, on the stream that the listener opened. */
export async function prove (key: SwarmKey, own: PeerId, remote: PeerId, stream: Stream): Promise<void> {
  await handle(stream, KEY_PROTOCOL, { signal: AbortSignal.timeout(PROOF_MS) })
  const exchange = new Exchange(stream)
  const theirs = await exchange.read(NONCE, PROOF_MS)
  const nonce = crypto.getRandomValues(new Uint8Array(NONCE))
  const [dialer, listener] = [own.toMultihash().bytes, remote.toMultihash().bytes]
  await exchange.write(new Uint8Array([1, ...nonce, ...proof(key.dialer, dialer, listener, nonce, theirs)]))
  const [verdict] = await exchange.read(1, PROOF_MS)
  if (verdict !== 1) throw new KeyRefused('the node refuses this swarm key')
  const proved = await exchange.read(NONCE, PROOF_MS)
  if (!equal(proved, proof(key.listener, dialer, listener, nonce, theirs))) {
    throw new KeyRefused('the peer does not have this swarm key')
  }
  void stream.close().catch(() => {})
}

/**
 * The gate of a private swarm, between a connection's multiplexer and its first protocol. It runs the
 * proof when libp2p asks whether the connection may be used; until then nothing else uses it.
 */
export class Gate {
  /** The multiplexer created last. libp2p asks about its connection before it does anything else. */
  private made: StreamMuxer | undefined
  /** Why the last connection was refused; null if it was not. */
  refused: Error | null = null

  constructor (private readonly key: SwarmKey, private readonly own: PeerId) {}

  /** A factory that records its multiplexers for this gate. */
  watch (factory: StreamMuxerFactory): StreamMuxerFactory {
    return {
      protocol: factory.protocol,
      createStreamMuxer: (connection) => {
        this.made = factory.createStreamMuxer(connection)
        return this.made
      }
    }
  }

  /** As [`watch`], for a transport that creates its own multiplexers. */
  watchTransport<C> (make: (components: C) => Transport): (components: C) => Transport {
    return (components) => {
      const transport = make(components)
      const dial = transport.dial.bind(transport)
      transport.dial = async (address, options) => {
        const upgradeOutbound: Upgrader['upgradeOutbound'] = async (connection, init) => {
          const factory = init.muxerFactory
          return await options.upgrader.upgradeOutbound(connection, factory === undefined ? init : { ...init, muxerFactory: this.watch(factory) })
        }
        return await dial(address, { ...options, upgrader: substitute(options.upgrader, { upgradeOutbound }) })
      }
      return transport
    }
  }

  /** Runs the proof on a connection, and closes the connection if it fails. True if it was refused. */
  async denies (peer: PeerId, connection: MultiaddrConnection): Promise<boolean> {
    const muxer = this.made
    this.made = undefined
    try {
      if (muxer === undefined) throw new Error('a connection without streams')
      await prove(this.key, this.own, peer, await first(muxer))
      this.refused = null
      return false
    } catch (error) {
      const { message } = error as Error
      this.refused = error instanceof KeyRefused ? error : new Error(`the peer did not prove the swarm key: ${message}`)
      // An abort would leave a WebSocket open: it closes it with a code that browsers reject.
      await connection.close({ signal: AbortSignal.timeout(HANG_UP_MS) }).catch(() => {})
      connection.abort(this.refused)
      return true
    }
  }
}

/** A proxy for an object with some of its members replaced. */
function substitute<T extends object> (object: T, members: Partial<T>): T {
  return new Proxy(object, { get: (target, name) => Reflect.get(name in members ? members : target, name) })
}

/** The first stream that the other side opens. Later ones wait in the multiplexer. */
async function first (muxer: StreamMuxer): Promise<Stream> {
  return await new Promise((resolve, reject) => {
    const timer = setTimeout(() => { end(); reject(new Error('it did not ask for the key')) }, PROOF_MS)
    const take = ({ detail }: CustomEvent<Stream>): void => { end(); resolve(detail) }
    const end = (): void => {
      clearTimeout(timer)
      muxer.removeEventListener('stream', take)
    }
    muxer.addEventListener('stream', take)
  })
}

// Storage. The encrypting key never leaves the browser's own store: scripts can use it but not read it.

interface Sealed { sealer: CryptoKey, iv: Uint8Array<ArrayBuffer>, sealed: ArrayBuffer }

async function database<T> (mode: IDBTransactionMode, use: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const done = async <T>(request: IDBRequest<T>): Promise<T> => await new Promise((resolve, reject) => {
    request.onsuccess = () => { resolve(request.result) }
    request.onerror = () => { reject(request.error ?? new Error('the browser stores no data')) }
  })
  const opening = indexedDB.open(DATABASE, 1)
  opening.onupgradeneeded = () => { opening.result.createObjectStore(KEYS) }
  const open = await done(opening)
  try {
    return await done(use(open.transaction(KEYS, mode).objectStore(KEYS)))
  } finally {
    open.close()
  }
}

/** Stores the key of a node's swarm in this browser, for pages of this origin. */
export async function rememberKey (node: string, key: SwarmKey): Promise<void> {
  const sealer = await crypto.subtle.generateKey({ name: 'AES-GCM', length: 256 }, false, ['encrypt', 'decrypt'])
  const iv = crypto.getRandomValues(new Uint8Array(12))
  const sealed = await crypto.subtle.encrypt({ name: 'AES-GCM', iv }, sealer, new Uint8Array([...key.dialer, ...key.listener, ...key.gateway]))
  await database('readwrite', (store) => store.put({ sealer, iv, sealed } satisfies Sealed, node))
}

export async function forgetKey (node: string): Promise<void> {
  await database('readwrite', (store) => store.delete(node))
}

/** The key stored for a node's swarm, or null. */
export async function rememberedKey (node: string): Promise<SwarmKey | null> {
  try {
    const found = await database<Sealed | undefined>('readonly', (store) => store.get(node))
    if (found === undefined) return null
    const bytes = new Uint8Array(await crypto.subtle.decrypt({ name: 'AES-GCM', iv: found.iv }, found.sealer, found.sealed))
    return { dialer: bytes.slice(0, 32), listener: bytes.slice(32, 64), gateway: bytes.slice(64) }
  } catch {
    return null
  }
}
