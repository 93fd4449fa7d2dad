// The page's hashing and proving against known answers and damaged encodings; needs no browser.

import assert from 'node:assert/strict'
import { randomFillSync, randomInt } from 'node:crypto'
import { test } from 'node:test'
import { MIB, tree } from './harness.mjs'

const { Blake3, Decoder, encode, encodedLength, GROUP, hashObject, hex, WrongBytes } = await tree()
const blake3 = new Blake3(MIB)

test('hashes are those of the official test vectors', () => {
  // BLAKE3's test_vectors.json: the input is 0, 1, ..., 250, 0, 1, ...
  const vectors = {
    0: 'af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262',
    1: '2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213',
    1023: '10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11',
    1024: '42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7',
    1025: 'd00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444',
    31744: '62b6960e1a44bcc1eb1a611a8d6235b6b4b78f32e7abc4fb4c6cdcce94895c47',
    102400: 'bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085'
  }
  for (const [length, hash] of Object.entries(vectors)) {
    const input = Uint8Array.from({ length: Number(length) }, (_, i) => i % 251)
    assert.equal(hex(hashObject(blake3, input).root), hash, `${length} bytes`)
  }
})

/** An object, its tree, and the encoding of a range of it. */
function sample () {
  const size = randomInt(1, 40 * GROUP)
  const bytes = randomFillSync(new Uint8Array(size))
  const { root, nodes } = hashObject(blake3, bytes)
  const start = randomInt(0, size)
  const end = randomInt(start + 1, size + 1)
  const encoded = encode(blake3, root, size, start, end, (index) => nodes.subarray(64 * index, 64 * index + 64),
    (item, into) => { into.set(bytes.subarray(item.at, item.at + item.length)) })
  return { size, bytes, root, start, end, encoded }
}

test('what is encoded is decoded again, however it is cut on the way', () => {
  for (let round = 0; round < 40; round++) {
    const { size, bytes, root, start, end, encoded } = sample()
    assert.equal(encoded.length, encodedLength(size, start, end))
    const got = new Map()
    const decoder = new Decoder(blake3, root, size, start, end, { node () {}, group: (group, part) => { got.set(group, part.slice()) } })
    for (let at = 0; at < encoded.length;) {
      const part = encoded.subarray(at, at + randomInt(1, 3 * GROUP))
      assert.equal(decoder.push(part), part.length)
      at += part.length
    }
    assert.ok(decoder.done)
    assert.deepEqual([...got.keys()].sort((a, b) => a - b)[0], Math.floor(start / GROUP))
    for (const [group, part] of got) assert.deepEqual(part, bytes.slice(group * GROUP, group * GROUP + part.length))
  }
})

test('a changed bit is refused before its group reaches anybody', () => {
  for (let round = 0; round < 60; round++) {
    const { size, bytes, root, start, end, encoded } = sample()
    encoded[randomInt(0, encoded.length)] ^= 1 << randomInt(0, 8)
    const sink = { node () {}, group: (group, part) => { assert.deepEqual(part.slice(), bytes.slice(group * GROUP, group * GROUP + part.length)) } }
    assert.throws(() => new Decoder(blake3, root, size, start, end, sink).push(encoded), WrongBytes)
  }
})
