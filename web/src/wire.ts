// The messages of proto/gossip.proto and proto/shard.proto that a tab sends and receives. Refuses
// messages beyond the bounds of src/mesh/wire.rs.

import { OBJECT_MAX, REQUEST_MAX } from './tree.ts'

export const SHARD_PROTOCOL = '/doppler/shard/1'
const FRAME_MAX = 256
const MODELS_MAX = 64
const ADDRESSES_MAX = 16
const BITMAP_MAX = 8 * 1024
const LEASE_MAX_MS = 7_200_000
/** The longest reply body: a request's bytes, the rest of two cut groups, and the nodes that prove them. */
export const BODY_MAX = REQUEST_MAX + 2 * 16384 + (258 + 24) * 64

export class BadMessage extends Error {
  readonly code = 'bad_message'
}

class Writer {
  private readonly out: number[] = []

  varint (field: number, value: number): this {
    if (value !== 0) this.raw(field << 3).raw(value)
    return this
  }

  bytes (field: number, value: Uint8Array): this {
    if (value.length > 0) {
      this.raw((field << 3) | 2).raw(value.length)
      for (const byte of value) this.out.push(byte)
    }
    return this
  }

  /** Writes a varint; numbers stay below 2^53. */
  private raw (value: number): this {
    while (value > 127) {
      this.out.push((value % 128) | 128)
      value = Math.floor(value / 128)
    }
    this.out.push(value)
    return this
  }

  finish (): Uint8Array<ArrayBuffer> {
    return Uint8Array.from(this.out)
  }
}

/** The fields of a message: numbers and byte strings. */
function fields (bytes: Uint8Array): Array<[number, number | Uint8Array]> {
  const out: Array<[number, number | Uint8Array]> = []
  let at = 0
  const varint = (): number => {
    let value = 0
    for (let shift = 1; ; shift *= 128) {
      if (at >= bytes.length || shift > 2 ** 63) throw new BadMessage('a number that does not end')
      const byte = bytes[at++]
      value += (byte & 127) * shift
      if (byte < 128) return value
    }
  }
  while (at < bytes.length) {
    const tag = varint()
    const [field, kind] = [Math.floor(tag / 8), tag % 8]
    if (kind === 0) {
      out.push([field, varint()])
    } else if (kind === 2 || kind === 1 || kind === 5) {
      const length = kind === 2 ? varint() : kind === 1 ? 8 : 4
      if (length > bytes.length - at) throw new BadMessage('a field longer than its message')
      if (kind === 2) out.push([field, bytes.subarray(at, at + length)])
      at += length
    } else {
      throw new BadMessage(`wire type ${kind}`)
    }
  }
  return out
}

const number = (value: number | Uint8Array): number => {
  if (typeof value !== 'number') throw new BadMessage('bytes where a number belongs')
  return value
}
const text = (value: number | Uint8Array): Uint8Array => {
  if (typeof value === 'number') throw new BadMessage('a number where bytes belong')
  return value
}

/** Orders the messages of one author: the epoch grows with every run, the sequence within one. */
export interface Stamp { epoch: number, sequence: number }
export interface ModelHoldings { model: Uint8Array, manifest: boolean, objects: Uint8Array }
export interface Holdings extends Stamp { kind: 'holdings', peer: Uint8Array, leaseMs: number, addresses: string[], models: ModelHoldings[] }
/** The author has stopped: its last message of this epoch. */
export interface Goodbye extends Stamp { kind: 'goodbye' }

export const isNewer = (one: Stamp, other: Stamp): boolean => one.epoch > other.epoch || (one.epoch === other.epoch && one.sequence > other.sequence)

export function encodeGoodbye ({ epoch, sequence }: Stamp): Uint8Array<ArrayBuffer> {
  return new Writer().bytes(5, new Writer().varint(1, epoch).varint(2, sequence).finish()).finish()
}

export function encodeHoldings (holdings: Holdings): Uint8Array<ArrayBuffer> {
  const body = new Writer().bytes(1, holdings.peer).varint(2, holdings.sequence).varint(3, holdings.leaseMs)
  for (const { model, manifest, objects } of holdings.models) {
    body.bytes(5, new Writer().bytes(1, model).varint(2, manifest ? 1 : 0).bytes(3, objects).finish())
  }
  body.varint(9, holdings.epoch)
  return new Writer().bytes(2, body.finish()).finish()
}

/** Decodes holdings and goodbyes; null for other kinds of message. */
export function decodeEnvelope (bytes: Uint8Array): Holdings | Goodbye | null {
  const body = fields(bytes).findLast(([field]) => field === 2 || field === 5)
  if (body === undefined) return null
  if (body[0] === 5) {
    const goodbye: Goodbye = { kind: 'goodbye', epoch: 0, sequence: 0 }
    for (const [field, value] of fields(text(body[1]))) {
      if (field === 1) goodbye.epoch = number(value)
      if (field === 2) goodbye.sequence = number(value)
    }
    return goodbye
  }
  const holdings: Holdings = { kind: 'holdings', peer: new Uint8Array(), epoch: 0, sequence: 0, leaseMs: 0, addresses: [], models: [] }
  for (const [field, value] of fields(text(body[1]))) {
    if (field === 1) holdings.peer = text(value)
    if (field === 2) holdings.sequence = number(value)
    if (field === 3) holdings.leaseMs = number(value)
    if (field === 9) holdings.epoch = number(value)
    if (field === 4) holdings.addresses.push(new TextDecoder().decode(text(value)))
    if (field === 5) {
      const entry: ModelHoldings = { model: new Uint8Array(), manifest: false, objects: new Uint8Array() }
      for (const [part, inner] of fields(text(value))) {
        if (part === 1) entry.model = text(inner)
        if (part === 2) entry.manifest = number(inner) !== 0
        if (part === 3) entry.objects = text(inner)
      }
      if (entry.model.length !== 32 || entry.objects.length > BITMAP_MAX) throw new BadMessage('a holding out of bounds')
      holdings.models.push(entry)
    }
  }
  if (holdings.leaseMs > LEASE_MAX_MS || holdings.models.length > MODELS_MAX || holdings.addresses.length > ADDRESSES_MAX) {
    throw new BadMessage('holdings out of bounds')
  }
  return holdings
}

export interface ShardRequest { root: Uint8Array, start: number, end: number }

export function encodeRequest ({ root, start, end }: ShardRequest): Uint8Array<ArrayBuffer> {
  return framed(new Writer().bytes(1, root).varint(2, start).varint(3, end).finish())
}

export function decodeRequest (bytes: Uint8Array): ShardRequest {
  const request: ShardRequest = { root: new Uint8Array(), start: 0, end: 0 }
  for (const [field, value] of fields(bytes)) {
    if (field === 1) request.root = text(value)
    if (field === 2) request.start = number(value)
    if (field === 3) request.end = number(value)
  }
  const { root, start, end } = request
  if (root.length !== 32 || start >= end || end - start > REQUEST_MAX || end > OBJECT_MAX) throw new BadMessage('a request out of bounds')
  return request
}

export const Status = { OK: 1, NOT_FOUND: 2, OUT_OF_RANGE: 3, OVERLOADED: 4, REFUSED: 5, FAILED: 6, RELAYED: 7 } as const
export const STATUS_NAMES = ['unknown', 'ok', 'not_found', 'out_of_range', 'overloaded', 'refused', 'failed', 'relayed']

export interface ShardReply { status: number, size: number, length: number }

export function encodeReply ({ status, size, length }: ShardReply): Uint8Array<ArrayBuffer> {
  return framed(new Writer().varint(1, status).varint(2, size).varint(3, length).finish())
}

export function decodeReply (bytes: Uint8Array): ShardReply {
  const reply: ShardReply = { status: 0, size: 0, length: 0 }
  for (const [field, value] of fields(bytes)) {
    if (field === 1) reply.status = number(value)
    if (field === 2) reply.size = number(value)
    if (field === 3) reply.length = number(value)
  }
  if (reply.status === 0 || reply.size > OBJECT_MAX || reply.length > BODY_MAX || (reply.length > 0) !== (reply.status === Status.OK)) {
    throw new BadMessage('a reply out of bounds')
  }
  return reply
}

function framed (bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(2 + bytes.length)
  out.set([bytes.length >> 8, bytes.length & 255])
  out.set(bytes, 2)
  return out
}

/** The length prefix of a message. */
export function frameLength (bytes: Uint8Array): number {
  const length = bytes[0] * 256 + bytes[1]
  if (length > FRAME_MAX) throw new BadMessage(`a message of ${length} bytes`)
  return length
}
