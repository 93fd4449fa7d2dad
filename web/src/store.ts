// The tab's disk: one file per object in the origin private file system, named `ID-SIZE`. It
// contains the object's bytes, then its hash-tree nodes, then one byte for each group, 1 if held.
//
// Invariant: a group counts as held only after it was verified. What is read back is verified
// again, and what fails is no longer held. Runs only in a worker (synchronous handles). Refuses
// what the browser's quota has no room for, before anything is fetched.

import { type Blake3, GROUP } from './blake3.ts'
import { encode, groupsOf, NODE, OBJECT_MAX, type Proved, unhex, walk, WrongBytes } from './tree.ts'

/** The most files open at once; the least recently used is closed. */
const OPEN_MAX = 32
/** Bytes written between two flushes; the most that a crash of the machine loses. */
const FLUSH_BYTES = 16 * 1024 * 1024
/** Bytes of the quota left free for the browser's own bookkeeping. */
const RESERVE = 4 * 1024 * 1024

export class StoreError extends Error {
  constructor (readonly code: 'quota' | 'not_held' | 'too_large' | 'busy', message: string) {
    super(message)
  }
}

interface File {
  handle: FileSystemSyncAccessHandle
  size: number
  have: Uint8Array
  /** The hash-tree nodes, as they are or will be on disk. */
  nodes: Uint8Array
  unflushed: number
}

export interface Held { id: string, size: number, bytes: number }

export class Store {
  private readonly open = new Map<string, File>()
  private readonly opening = new Map<string, Promise<File>>()
  /** Sizes of the objects that have a file. */
  private readonly sizes = new Map<string, number>()

  private constructor (private readonly blake3: Blake3, private readonly dir: FileSystemDirectoryHandle) {}

  static async start (blake3: Blake3, name: string): Promise<Store> {
    const root = await navigator.storage.getDirectory()
    const store = new Store(blake3, await root.getDirectoryHandle(name, { create: true }))
    for await (const entry of (store.dir as any).keys() as AsyncIterable<string>) {
      const match = /^([0-9a-f]{64})-(\d{1,8})$/.exec(entry)
      if (match != null && Number(match[2]) <= OBJECT_MAX) store.sizes.set(match[1], Number(match[2]))
    }
    return store
  }

  /** A small file of the tab's own, such as its key. Created again if it is incomplete. */
  async note (name: string, make: () => Uint8Array<ArrayBuffer>): Promise<Uint8Array> {
    const file = await this.dir.getFileHandle(name, { create: true })
    const handle = await file.createSyncAccessHandle()
    try {
      const made = make()
      const bytes = new Uint8Array(made.length)
      if (handle.getSize() === made.length && handle.read(bytes, { at: 0 }) === made.length) return bytes
      put(handle, made, 0)
      sync(handle)
      return made
    } finally {
      handle.close()
    }
  }

  async list (): Promise<Held[]> {
    const held: Held[] = []
    for (const [id, size] of [...this.sizes]) {
      try {
        const { have } = await this.file(id, size)
        held.push({ id, size, bytes: heldBytes(have, size) })
      } catch {
        // This file never got its space or cannot be opened; that does not affect the others.
        this.sizes.delete(id)
      }
    }
    return held
  }

  async held (id: string): Promise<Held | null> {
    const size = this.sizes.get(id)
    if (size === undefined) return null
    return { id, size, bytes: heldBytes((await this.file(id, size)).have, size) }
  }

  /** Ranges of whole groups that are missing and touch `within`; none crosses a multiple of `longest` bytes. */
  async missing (id: string, size: number, longest: number, within: [number, number] = [0, size]): Promise<Array<[number, number]>> {
    const known = this.sizes.get(id) === size
    const have = known ? (await this.file(id, size)).have : new Uint8Array(groupsOf(size))
    const ranges: Array<[number, number]> = []
    have.forEach((held, group) => {
      if (held !== 0) return
      const [start, end] = [group * GROUP, Math.min(size, (group + 1) * GROUP)]
      if (end <= within[0] || start >= within[1]) return
      const last = ranges[ranges.length - 1]
      if (last !== undefined && last[1] === start && start % longest !== 0) last[1] = end
      else ranges.push([start, end])
    })
    return ranges
  }

  /** Checks that an object fits and allocates its file, before any of it is stored. */
  async reserve (id: string, size: number): Promise<void> {
    if (size > OBJECT_MAX) throw new StoreError('too_large', `${size} bytes is more than an object may have`)
    if (this.sizes.get(id) !== size) await this.room(fileBytes(size), 1)
    await this.file(id, size)
  }

  /** Throws unless `bytes` more fit into the browser's quota. */
  async room (bytes: number, objects: number): Promise<void> {
    const { quota = 0, usage = 0 } = await navigator.storage.estimate()
    const free = Math.max(0, quota - usage - RESERVE)
    if (bytes > free) {
      throw new StoreError('quota', `this browser gives the page ${mib(quota)} MiB, of which ${mib(free)} MiB are free, ` +
        `but ${objects === 1 ? 'the shard needs' : `${objects} shards need`} ${mib(bytes)} MiB: free disk space, remove another model here, or keep fewer shards`)
    }
  }

  /** Stores verified groups. They count as held once their bytes are handed to the file system. */
  async keep (id: string, size: number, { first, bytes, length, indices, nodes: pairs }: Proved): Promise<void> {
    await this.reserve(id, size)
    const file = await this.file(id, size)
    const { nodes, have } = file
    const next = first + Math.ceil(length / GROUP)
    try {
      put(file.handle, bytes.subarray(0, length), first * GROUP)
      let [low, high] = [nodes.length, 0]
      indices.forEach((index, i) => {
        const [at, pair] = [index * NODE, pairs.subarray(i * NODE, (i + 1) * NODE)]
        if (pair.every((byte, i) => nodes[at + i] === byte)) return
        nodes.set(pair, at)
        ;[low, high] = [Math.min(low, at), Math.max(high, at + NODE)]
      })
      if (low < high) put(file.handle, nodes.subarray(low, high), size + low)
      put(file.handle, new Uint8Array(next - first).fill(1), haveAt(size) + first)
      have.fill(1, first, next)
      file.unflushed += length
      if (file.unflushed >= FLUSH_BYTES) this.flush(file)
    } catch (error) {
      this.drop(id, size, file)
      throw error
    }
  }

  /** Makes what is stored of an object so far survive a crash of the machine. */
  async settle (id: string): Promise<void> {
    const size = this.sizes.get(id) ?? 0
    const file = this.open.get(`${id}-${size}`)
    if (file === undefined) return
    try {
      this.flush(file)
    } catch (error) {
      this.drop(id, size, file)
      throw error
    }
  }

  private flush (file: File): void {
    if (file.unflushed > 0) sync(file.handle)
    file.unflushed = 0
  }

  /** Closes a file that could not be written; what it holds is read again when it is reopened. */
  private drop (id: string, size: number, file: File): void {
    const name = `${id}-${size}`
    if (this.open.get(name) === file) this.open.delete(name)
    file.handle.close()
  }

  /** The encoding of a held range, verified as it is read; empty if it ends outside the object. */
  async encode (id: string, start: number, end: number): Promise<{ size: number, bytes: Uint8Array<ArrayBuffer> }> {
    const size = this.sizes.get(id)
    if (size === undefined) throw new StoreError('not_held', 'not held here')
    if (end > Math.max(size, 1)) return { size, bytes: new Uint8Array(0) }
    const file = await this.file(id, size)
    const to = Math.min(end, size)
    for (let group = Math.floor(start / GROUP); group * GROUP < to; group++) {
      if (file.have[group] === 0) throw new StoreError('not_held', 'not all of it is held here')
    }
    try {
      const from = Math.floor(start / GROUP) * GROUP
      const stored = new Uint8Array(Math.min(size, Math.ceil(to / GROUP) * GROUP) - from)
      file.handle.read(stored, { at: from })
      const bytes = encode(this.blake3, unhex(id), size, start, to, (index) => file.nodes.subarray(index * NODE, (index + 1) * NODE),
        (item, into) => { into.set(stored.subarray(item.at - from, item.at - from + item.length)) })
      return { size, bytes }
    } catch (error) {
      if (!(error instanceof WrongBytes)) throw error
      // Do not search for the damaged groups: fetch the whole range again.
      for (let group = Math.floor(start / GROUP); group * GROUP < to; group++) file.have[group] = 0
      try {
        put(file.handle, file.have, haveAt(size))
        sync(file.handle)
      } catch {
        // The damage could not be recorded; the next read will find it again.
      }
      throw new StoreError('not_held', `damaged here: ${error.message}`)
    }
  }

  /** The bytes of a held range, verified as they are read. */
  async range (id: string, start: number, end: number): Promise<Uint8Array> {
    const { size, bytes } = await this.encode(id, start, end)
    if (bytes.length === 0) throw new StoreError('not_held', 'the range ends outside the object')
    const from = Math.floor(start / GROUP) * GROUP
    const groups = new Uint8Array(Math.min(size, Math.ceil(end / GROUP) * GROUP) - from)
    let at = 0
    for (const item of walk(size, Math.floor(start / GROUP), Math.ceil(end / GROUP))) {
      const length = item.kind === 'node' ? NODE : item.length
      if (item.kind === 'group') groups.set(bytes.subarray(at, at + length), item.at - from)
      at += length
    }
    return groups.subarray(start - from, end - from)
  }

  /** The verified bytes of a whole object, such as a manifest. */
  async read (id: string): Promise<Uint8Array<ArrayBuffer>> {
    const size = this.sizes.get(id) ?? 0
    await this.encode(id, 0, Math.max(1, size))
    const bytes = new Uint8Array(size)
    const file = await this.file(id, size)
    file.handle.read(bytes, { at: 0 })
    return bytes
  }

  async remove (id: string): Promise<void> {
    const size = this.sizes.get(id)
    if (size === undefined) return
    const name = `${id}-${size}`
    this.open.get(name)?.handle.close()
    this.open.delete(name)
    this.sizes.delete(id)
    await this.dir.removeEntry(name)
  }

  private async file (id: string, size: number): Promise<File> {
    const name = `${id}-${size}`
    const known = this.open.get(name)
    if (known !== undefined) {
      this.open.delete(name)
      this.open.set(name, known)
      return known
    }
    let opening = this.opening.get(name)
    if (opening === undefined) {
      opening = this.openFile(name, id, size).finally(() => { this.opening.delete(name) })
      this.opening.set(name, opening)
    }
    return await opening
  }

  private async openFile (name: string, id: string, size: number): Promise<File> {
    const other = this.sizes.get(id)
    if (other !== undefined && other !== size) await this.remove(id)
    const handle = await (await this.dir.getFileHandle(name, { create: true })).createSyncAccessHandle()
    const have = new Uint8Array(groupsOf(size))
    // Writing the last byte allocates the file. Browsers round the quota that they report, for
    // privacy, so only this shows before the download whether there is room.
    let room = true
    try {
      room = handle.getSize() >= fileBytes(size) || handle.write(new Uint8Array(1), { at: fileBytes(size) - 1 }) === 1
    } catch {
      room = false
    }
    if (!room) {
      handle.close()
      await this.dir.removeEntry(name).catch(() => {})
      throw new StoreError('quota', `this browser has no room for a shard of ${mib(size)} MiB: free disk space or remove another model here`)
    }
    handle.read(have, { at: haveAt(size) })
    const nodes = new Uint8Array(haveAt(size) - size)
    handle.read(nodes, { at: size })
    const file = { handle, size, have, nodes, unflushed: 0 }
    this.open.set(name, file)
    this.sizes.set(id, size)
    for (const [old, { handle, unflushed }] of this.open) {
      if (this.open.size <= OPEN_MAX) break
      if (old === name || unflushed > 0) continue
      handle.close()
      this.open.delete(old)
    }
    return file
  }
}

/** Writes all of `bytes`, or throws with the code `quota`: the disk, or this page's share of it, is full. */
function put (handle: FileSystemSyncAccessHandle, bytes: Uint8Array, at: number): void {
  asQuotaError(() => {
    if (handle.write(bytes as Uint8Array<ArrayBuffer>, { at }) !== bytes.length) throw new Error('short write')
  })
}

const sync = (handle: FileSystemSyncAccessHandle): void => { asQuotaError(() => { handle.flush() }) }

/** Reports a failed write as a [`StoreError`] with the code `quota`. */
function asQuotaError (work: () => void): void {
  try {
    work()
  } catch (error) {
    // The file was closed meanwhile because its object was removed.
    if (error instanceof DOMException && error.name === 'InvalidStateError') throw error
    throw new StoreError('quota', `the browser could not write any more (${String(error)}): free disk space or remove another model here`)
  }
}

const mib = (bytes: number): string => (bytes / 1048576).toFixed(bytes < 10485760 ? 1 : 0)
const haveAt = (size: number): number => size + (groupsOf(size) - 1) * NODE
const fileBytes = (size: number): number => haveAt(size) + groupsOf(size)

function heldBytes (have: Uint8Array, size: number): number {
  let groups = 0
  for (const held of have) groups += held !== 0 ? 1 : 0
  const short = groupsOf(size) * GROUP - size
  return groups * GROUP - (have[have.length - 1] !== 0 ? short : 0)
}
