// The hash tree over groups of 16 KiB, as in src/store/verified.rs. An encoding of a range is the
// tree's nodes (64 bytes: two child hashes) and the range's groups, in pre-order.
//
// Invariant: nothing reaches a sink before it has been checked against the object's root.

import { type Blake3, GROUP, SCRATCH } from './blake3.ts'

export const NODE = 64
export const OBJECT_MAX = 64 * 1024 * 1024
/** The most bytes one request may ask for. */
export const REQUEST_MAX = 4 * 1024 * 1024

export class WrongBytes extends Error {
  readonly code = 'wrong_bytes'
}

export const groupsOf = (size: number): number => Math.max(1, Math.ceil(size / GROUP))

type Item =
  | { kind: 'node', index: number, at: number, root: boolean, left: boolean, right: boolean }
  | { kind: 'group', group: number, at: number, length: number, root: boolean }

/** The nodes and groups that encode groups `from..to` of an object, in pre-order. */
export function walk (size: number, from: number, to: number): Item[] {
  const items: Item[] = []
  const visit = (low: number, high: number, index: number, root: boolean): void => {
    if (high - low === 1) {
      items.push({ kind: 'group', group: low, at: low * GROUP, length: Math.min(GROUP, size - low * GROUP), root })
      return
    }
    // The left side has the largest power of two that leaves at least one group on the right.
    const middle = low + 2 ** Math.floor(Math.log2(high - low - 1))
    const left = from < middle
    const right = to > middle
    items.push({ kind: 'node', index, at: low * GROUP, root, left, right })
    if (left) visit(low, middle, index + 1, false)
    if (right) visit(middle, high, index + (middle - low), false)
  }
  visit(0, groupsOf(size), 0, true)
  return items
}

/** Bytes of the encoding of the groups that bytes `start..end` touch. */
export function encodedLength (size: number, start: number, end: number): number {
  return walk(size, Math.floor(start / GROUP), Math.ceil(end / GROUP))
    .reduce((sum, item) => sum + (item.kind === 'node' ? NODE : item.length), 0)
}

export interface Sink {
  node: (index: number, pair: Uint8Array) => void
  group: (group: number, bytes: Uint8Array) => void
}

/** Consecutive verified groups and the nodes that prove them, stored in one call. */
export interface Proved {
  /** The number of the first group. */
  first: number
  /** The groups' bytes; only the first `length` of them are used. */
  bytes: Uint8Array<ArrayBuffer>
  length: number
  /** The nodes' places in the outboard, and the nodes, concatenated. */
  indices: number[]
  nodes: Uint8Array<ArrayBuffer>
}

/** Collects consecutive verified groups until a buffer is full. */
export class Parcel implements Sink {
  private first = 0
  private next = 0
  private length = 0
  private indices: number[] = []
  private nodes: Uint8Array[] = []
  private bytes: Uint8Array<ArrayBuffer> | null = null

  /** `take` may keep the buffer; `fresh` supplies the next one. */
  constructor (private readonly fresh: () => Uint8Array<ArrayBuffer>, private readonly take: (proved: Proved) => void) {}

  node (index: number, pair: Uint8Array): void {
    this.indices.push(index)
    this.nodes.push(pair)
  }

  group (group: number, part: Uint8Array): void {
    if (this.length > 0 && group !== this.next) this.end()
    this.bytes ??= this.fresh()
    if (this.length === 0) this.first = group
    this.bytes.set(part, this.length)
    this.length += part.length
    this.next = group + 1
    if (this.length + GROUP > this.bytes.length) this.end()
  }

  /** Hands over what has been collected. */
  end (): void {
    const { first, bytes, length, indices } = this
    if (bytes === null || length === 0) return
    const nodes = new Uint8Array(this.nodes.length * NODE)
    this.nodes.forEach((pair, i) => { nodes.set(pair, i * NODE) })
    ;[this.length, this.indices, this.nodes, this.bytes] = [0, [], [], null]
    this.take({ first, bytes, length, indices, nodes })
  }
}

const same = (a: Uint8Array, b: Uint8Array): boolean => a.length === b.length && a.every((byte, i) => byte === b[i])

/** Checks the hashes of a walk; the last of `expected` is the next one. */
class Check {
  private readonly expected: Uint8Array[]
  constructor (private readonly blake3: Blake3, root: Uint8Array) {
    this.expected = [root]
  }

  node (item: Item & { kind: 'node' }, pair: Uint8Array): void {
    const hash = this.blake3.parent(pair, item.root)
    if (!same(hash, this.expected.pop() as Uint8Array)) throw new WrongBytes(`wrong hash-tree node at byte ${item.at}`)
    if (item.right) this.expected.push(pair.slice(32))
    if (item.left) this.expected.push(pair.slice(0, 32))
  }

  /** The group's bytes lie at `at` in the hasher's memory. */
  group (item: Item & { kind: 'group' }, at: number): void {
    const hash = this.blake3.group(at, item.length, item.at / 1024, item.root)
    if (!same(hash, this.expected.pop() as Uint8Array)) throw new WrongBytes(`wrong bytes in the group at byte ${item.at}`)
  }
}

/** Decodes one encoding as it arrives; refuses it at most one group after its first wrong byte. */
export class Decoder {
  private readonly items: Item[]
  private readonly check: Check
  private next = 0
  private have = 0
  /** The part of an item that has arrived. It is not in the hasher's memory, which others use in between. */
  private readonly part = new Uint8Array(GROUP)

  constructor (private readonly blake3: Blake3, root: Uint8Array, size: number, start: number, end: number, private readonly sink: Sink) {
    this.items = walk(size, Math.floor(start / GROUP), Math.ceil(end / GROUP))
    this.check = new Check(blake3, root)
  }

  get done (): boolean {
    return this.next === this.items.length
  }

  /** Takes the bytes that belong to this encoding. Returns how many it took. */
  push (bytes: Uint8Array): number {
    let taken = 0
    while (!this.done) {
      const item = this.items[this.next]
      const wanted = item.kind === 'node' ? NODE : item.length
      const part = bytes.subarray(taken, taken + wanted - this.have)
      taken += part.length
      const whole = this.blake3.bytes(SCRATCH, wanted)
      if (part.length === wanted) {
        whole.set(part)
      } else {
        this.part.set(part, this.have)
        this.have += part.length
        if (this.have < wanted) return taken
        whole.set(this.part.subarray(0, wanted))
      }
      if (item.kind === 'node') {
        const pair = whole.slice()
        this.check.node(item, pair)
        this.sink.node(item.index, pair)
      } else {
        this.check.group(item, SCRATCH)
        this.sink.group(item.group, whole)
      }
      this.next += 1
      this.have = 0
    }
    return taken
  }
}

/** Encodes a range from stored bytes and nodes, and checks both. */
export function encode (
  blake3: Blake3, root: Uint8Array, size: number, start: number, end: number,
  node: (index: number) => Uint8Array, group: (item: { at: number, length: number }, into: Uint8Array) => void
): Uint8Array<ArrayBuffer> {
  const items = walk(size, Math.floor(start / GROUP), Math.ceil(end / GROUP))
  const check = new Check(blake3, root)
  const out = new Uint8Array(items.reduce((sum, item) => sum + (item.kind === 'node' ? NODE : item.length), 0))
  let place = 0
  for (const item of items) {
    if (item.kind === 'node') {
      const pair = node(item.index)
      check.node(item, pair)
      out.set(pair, place)
      place += NODE
    } else {
      const bytes = blake3.bytes(SCRATCH, item.length)
      group(item, bytes)
      check.group(item, SCRATCH)
      out.set(bytes, place)
      place += item.length
    }
  }
  return out
}

/** The hash tree of a whole object in memory: its root and its nodes. */
export function hashObject (blake3: Blake3, bytes: Uint8Array): { root: Uint8Array, nodes: Uint8Array } {
  const nodes = new Uint8Array((groupsOf(bytes.length) - 1) * NODE)
  const visit = (low: number, high: number, index: number, root: boolean): Uint8Array => {
    if (high - low === 1) {
      const part = bytes.subarray(low * GROUP, high * GROUP)
      blake3.bytes(SCRATCH, part.length).set(part)
      return blake3.group(SCRATCH, part.length, low * 16, root)
    }
    const middle = low + 2 ** Math.floor(Math.log2(high - low - 1))
    const pair = new Uint8Array(NODE)
    pair.set(visit(low, middle, index + 1, false))
    pair.set(visit(middle, high, index + (middle - low), false), 32)
    nodes.set(pair, index * NODE)
    return blake3.parent(pair, root)
  }
  return { root: visit(0, groupsOf(bytes.length), 0, true), nodes }
}

export const hex = (bytes: Uint8Array): string => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
export const unhex = (text: string): Uint8Array => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16))
