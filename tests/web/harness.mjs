// What the page's tests share: nodes as processes, models of random bytes, a browser, and a proxy
// that damages what passes through it.

import { spawn, spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

/** Far above what anything here takes. */
export const PATIENCE = Number(process.env.DOPPLER_PATIENCE ?? 120_000)
export const MIB = 1024 * 1024

const web = new URL('../../web/', import.meta.url).pathname
const binary = process.env.DOPPLER_NODE_BIN
const chromium = process.env.DOPPLER_CHROMIUM ?? '/usr/bin/chromium'
const require = createRequire(join(web, 'package.json'))
const scratch = mkdtempSync(join(tmpdir(), 'doppler-web-'))
const undo = []
let made = 0

process.on('exit', () => { rmSync(scratch, { recursive: true, force: true }) })

export const later = (work) => { undo.push(work) }

/** Ends everything a test started, last first. */
export async function cleanUp () {
  while (undo.length > 0) await undo.pop()()
}

export const folder = () => {
  const dir = join(scratch, String(made++))
  mkdirSync(dir)
  return dir
}

/** The page's own hashing, as a module for Node.js. */
export const tree = async () => await modules('blake3', 'tree')

/** Files of `web/src` that need no browser, as one module. */
export async function modules (...names) {
  const { build } = require('esbuild')
  const outfile = join(folder(), 'modules.mjs')
  await build({
    stdin: { contents: names.map((name) => `export * from './src/${name}.ts'`).join('; '), resolveDir: web, loader: 'ts' },
    bundle: true, format: 'esm', target: 'es2022', outfile, logLevel: 'warning'
  })
  return await import(pathToFileURL(outfile).href)
}

/** An RDRR directory with shards of random bytes, which cannot be run. */
export async function randomModel (name, sizes) {
  const { Blake3, hashObject, hex } = await tree()
  const blake3 = new Blake3(MIB)
  const dir = folder()
  let offset = 0
  const shards = sizes.map((size, index) => {
    const bytes = randomFillSync(new Uint8Array(size))
    const filename = `shard_${String(index).padStart(5, '0')}.bin`
    writeFileSync(join(dir, filename), bytes)
    const shard = { index, filename, size, hash: hex(hashObject(blake3, bytes).root), offset }
    offset += size
    return shard
  })
  const tensors = { noise: { shard: 0, offset: 0, size: 4096, shape: [1024], dtype: 'F32', role: 'norm', group: 'noise' } }
  const manifest = { version: 1, modelId: name, modelType: 'noise', quantization: 'F32', architecture: {}, hashAlgorithm: 'blake3', totalSize: offset, shards, tensors }
  writeFileSync(join(dir, 'manifest.json'), JSON.stringify(manifest))
  return { dir, name, shards, bytes: offset }
}

/** A byte-level tokenizer, for checkpoints that come without one. */
export function byteTokenizer () {
  const vocab = {}
  for (let byte = 0, next = 256; byte < 256; byte++) {
    const itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
    vocab[String.fromCodePoint(itself ? byte : next++)] = byte
  }
  const bytes = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true }
  return JSON.stringify({
    version: '1.0', truncation: null, padding: null, added_tokens: [], normalizer: null, pre_tokenizer: bytes, post_processor: null, decoder: bytes,
    model: { type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null, fuse_unk: false, byte_fallback: false, vocab, merges: [] }
  })
}

/** Creates a file with a new swarm key. */
export function swarmKey () {
  const file = join(folder(), 'lab.key')
  const made = spawnSync(binary, ['swarm-key', file])
  if (made.status !== 0) throw new Error(made.stderr.toString())
  return file
}

export class Node {
  static async start (swarm, { bootstrap = [], listen = ['/ip4/127.0.0.1/tcp/0', '/ip4/127.0.0.1/tcp/0/ws', '/ip4/127.0.0.1/udp/0/webrtc-direct'], data = folder(), key = undefined, args: more = [] } = {}) {
    const args = ['join', '--json', '--no-mdns', '--swarm', swarm, '--backend', 'cpu', '--data', data]
    if (key !== undefined) args.push('--swarm-key', key)
    args.push(...more)
    for (const address of listen) args.push('--listen', address)
    for (const address of bootstrap) args.push('--bootstrap', address)
    const child = spawn(binary, args, { stdio: ['ignore', 'pipe', 'inherit'] })
    const node = new Node()
    Object.assign(node, { child, data, events: [], waiting: [] })
    createInterface({ input: child.stdout }).on('line', (line) => {
      node.events.push(JSON.parse(line))
      for (const wake of node.waiting.splice(0)) wake()
    })
    child.on('exit', () => {
      node.gone = true
      for (const wake of node.waiting.splice(0)) wake()
    })
    later(async () => { await node.kill() })
    const ready = await node.event('ready')
    Object.assign(node, { id: ready.peer_id, addresses: ready.addresses, url: `http://${ready.control}` })
    return node
  }

  async event (kind) {
    for (;;) {
      const found = this.events.findIndex((event) => event.event === kind)
      if (found >= 0) return this.events.splice(found, 1)[0]
      if (this.gone) throw new Error(`the node ended before ${kind}`)
      await new Promise((resolve) => this.waiting.push(resolve))
    }
  }

  /** Runs a command against this node without blocking the browser's driver. */
  async ask (...args) {
    const child = spawn(binary, [...args, '--data', this.data], { stdio: ['ignore', 'pipe', 'pipe'] })
    let [out, err] = ['', '']
    child.stdout.on('data', (text) => { out += text })
    child.stderr.on('data', (text) => { err += text })
    const code = await new Promise((resolve) => child.on('close', resolve))
    if (code !== 0) throw new Error(`${args.join(' ')}: ${err}`)
    return out
  }

  async json (...args) {
    return JSON.parse(await this.ask(...args, '--json'))
  }

  async kill () {
    if (this.gone) return
    this.child.kill('SIGKILL')
    while (!this.gone) await new Promise((resolve) => this.waiting.push(resolve))
  }
}

/** A page whose files come from elsewhere does not count as one of this machine. */
const overridden = process.env.DOPPLER_PAGE === undefined ? [] : ['--disable-features=LocalNetworkAccessChecks']

let browser
export async function openBrowser (extra = []) {
  const { chromium: driver } = require('playwright-core')
  const started = await driver.launch({
    executablePath: chromium,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', ...overridden, ...extra]
  })
  return started
}

/** Serves the page's files from a directory instead of those in the binary, to work on it without building the node. */
async function instead (context, dir) {
  const files = readdirSync(dir).filter((file) => file !== 'index.html')
  await context.route((url) => url.pathname === '/' || files.includes(url.pathname.slice(1)), async (route) => {
    const name = new URL(route.request().url()).pathname.slice(1)
    const response = await route.fetch().catch(() => null)
    if (response === null) await route.abort()
    else await route.fulfill({ response, body: readFileSync(join(dir, name === '' ? 'index.html' : name)) })
  })
}

/** A page with storage of its own. */
export async function openTab (url, { via = 'auto', before = async () => {}, within = undefined, view = 'tab' } = {}) {
  // Keep the promise instead of the browser, so that tabs that are opened concurrently share one.
  const opened = within ?? await (browser ??= openBrowser())
  const context = await opened.newContext({ viewport: { width: 1100, height: 800 } })
  later(async () => { await context.close() })
  const page = await context.newPage()
  page.setDefaultTimeout(PATIENCE)
  page.on('pageerror', (error) => { console.log(`page: ${error.stack}`) })
  page.on('console', (message) => { if (message.type() === 'error') console.log(`page: ${message.text()} ${message.location().url}`) })
  if (process.env.DOPPLER_PAGE !== undefined) await instead(context, process.env.DOPPLER_PAGE)
  await before(context, page)
  await page.goto(`${url}/?via=${via}#${view}`)
  return page
}

/** The tab's worker, which has one of its own. */
export async function worker (page) {
  const named = (worker) => worker.url().endsWith('/worker.js')
  return page.workers().find(named) ?? await page.waitForEvent('worker', named)
}

export async function closeBrowser () {
  await (await browser)?.close()
  browser = undefined
}

export const joined = async (page) => { await page.waitForSelector('body[data-state=joined]') }

/** Waits until a model's card is in this state. */
export async function card (page, name, state) {
  const locator = page.locator('article', { has: page.getByRole('heading', { name, exact: true }) })
  await locator.waitFor()
  if (state !== undefined) {
    await page.waitForFunction(([name, state]) => {
      const card = [...document.querySelectorAll('article')].find((card) => card.querySelector('h3')?.textContent === name)
      return card?.dataset.state === state
    }, [name, state])
  }
  return locator
}

/** Makes the tab keep a model. Returns the seconds from the click until the page shows it as kept. */
export async function keep (page, name) {
  const shown = await card(page, name)
  // Timed in the page by an observer; polling every frame would make it paint every frame.
  await shown.evaluate((card) => {
    card.kept = new Promise((resolve) => {
      let began
      card.addEventListener('click', () => { began ??= performance.now() }, { capture: true })
      const look = new MutationObserver(() => {
        if (card.dataset.state !== 'kept') return
        look.disconnect()
        resolve((performance.now() - began) / 1000)
      })
      look.observe(card, { attributeFilter: ['data-state'] })
    })
  })
  await shown.getByRole('button', { name: 'Keep in this tab' }).click()
  return await shown.evaluate((card) => card.kept)
}

/** The tab's counters. */
export const counts = async (page) => await page.evaluate(() => ({
  ...globalThis.doppler.keeper.received, refused: globalThis.doppler.keeper.refused, bans: globalThis.doppler.swarm.bans, sent: globalThis.doppler.swarm.sent
}))

/** A proxy of the gateway where `change(path, offset, chunk)` may alter a chunk or end the reply (null). */
export async function proxy (node, change) {
  const target = new URL(node.url)
  const server = http.createServer((request, response) => {
    const onward = http.request({ host: target.hostname, port: target.port, path: request.url, method: request.method, headers: request.headers }, (reply) => {
      response.writeHead(reply.statusCode, reply.headers)
      let offset = 0
      reply.on('data', (chunk) => {
        const passed = change(request.url, offset, chunk)
        offset += chunk.length
        if (passed === null) response.destroy()
        else response.write(passed)
      })
      reply.on('end', () => { response.end() })
      reply.on('error', () => { response.destroy() })
    })
    onward.on('error', () => { response.destroy() })
    onward.end()
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  later(async () => {
    server.closeAllConnections()
    server.close()
  })
  return `http://127.0.0.1:${server.address().port}`
}

export const chromiumVersion = () => spawnSync(chromium, ['--version']).stdout?.toString().trim()
