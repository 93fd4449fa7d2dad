// The page as the node's face, in Chromium: the chat with a model that says what it is told to, the
// swarm, the models and what the owner does with them, a phone's width, light and dark, and axe-core.
//
// `tests/commands/web.rs` makes the model and the Hub. With DOPPLER_UPDATE_DOCS the pictures taken on the
// way are those of the documentation; DOPPLER_EVERY_PICTURE names a directory for one of each view.

import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import http from 'node:http'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { after, before, test } from 'node:test'
import { byteTokenizer, cleanUp, folder, joined, Node, openBrowser, openTab, PATIENCE } from './harness.mjs'

const root = new URL('../../', import.meta.url).pathname
const axe = readFileSync(join(root, 'web/node_modules/axe-core/axe.min.js'), 'utf8')
const { DOPPLER_CHECKPOINT: checkpoint, DOPPLER_MODEL: model, DOPPLER_PICTURES: pictures, DOPPLER_EVERY_PICTURE: every, DOPPLER_NODE_BIN: binary } = process.env
const embedded = join(root, 'models/tiny-mixtral-q4_k_m')
const NAME = 'Sorting-Assistant-bf16'
const FOREIGN = 'Sorting-Assistant-q8_0'
const PHONE = { width: 390, height: 844 }
const WIDE = { width: 1180, height: 820 }
const options = { timeout: 3 * PATIENCE }

let browser, node, other, page, key
before(async () => {
  mkdirSync(pictures, { recursive: true })
  const made = spawnSync(binary, ['convert', checkpoint, '--out', model, '--quantize', 'bf16'])
  assert.equal(made.status, 0, made.stderr.toString())
  browser = await openBrowser(['--enable-unsafe-webgpu'])
  node = await Node.start('face')
  await node.ask('publish', model)
})
after(async () => {
  await cleanUp()
  await browser.close()
})

const turn = (who, at = -1) => page.locator(`#turns .turn.${who}`).nth(at)
const idle = async () => { await page.waitForSelector('body[data-answering=false]') }
const note = async () => await turn('assistant').locator('.note').textContent()
const go = async (view) => {
  await page.getByRole('navigation', { name: 'Views' }).getByRole('link', { name: view }).click()
  await page.waitForSelector(`body[data-view=${view === 'This tab' ? 'tab' : view.toLowerCase()}]`)
}

async function say (text) {
  await page.getByLabel('Message', { exact: true }).fill(text)
  await page.keyboard.press('Enter')
}

/** Sends a message and waits for the whole answer. */
async function asked (text) {
  await say(text)
  await turn('assistant').locator('.note').filter({ hasText: /./ }).waitFor()
  await idle()
}

const openOptions = async () => { await page.evaluate(() => { document.getElementById('chat-options').open = true }) }
const answer = async () => await turn('assistant').locator('.markdown').textContent()

/** Takes a picture for the documentation. */
async function picture (name) {
  await page.screenshot({ path: join(pictures, name) })
}

/** What axe-core found on any view, and what hung out of the window. */
const faults = []

/** Notes what axe-core finds and what hangs out of the window, in light and dark, wide and on a phone. The last test asserts that it was nothing. */
async function clean (what) {
  for (const colorScheme of ['light', 'dark']) {
    for (const [size, viewport] of [['wide', WIDE], ['phone', PHONE]]) {
      await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' })
      await page.setViewportSize(viewport)
      await page.evaluate(axe)
      const found = await page.evaluate(async () => {
        const { violations } = await globalThis.axe.run(document, { resultTypes: ['violations'] })
        return violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map(({ html }) => html.slice(0, 160)).join(' | ')}`)
      })
      faults.push(...found.map((fault) => `${what}, ${colorScheme}, ${size}: ${fault}`))
      const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth)
      if (over > 0) faults.push(`${what}, ${size}: ${over} px too wide`)
      if (every !== undefined) await page.screenshot({ path: join(every, `${what}-${colorScheme}-${size}.png`), fullPage: what !== 'dialog' && size === 'phone' })
    }
  }
  await page.emulateMedia({ colorScheme: 'light' })
  await page.setViewportSize(WIDE)
}

test('while the node has not answered yet, nothing is said to be missing', options, async () => {
  let answerNow
  const held = new Promise((resolve) => { answerNow = resolve })
  page = await openTab(node.url, {
    within: browser,
    view: 'chat',
    before: async (_, page) => {
      for (const path of ['**/v1/models', '**/models']) {
        await page.route(path, async (route) => {
          await held
          await route.continue()
        })
      }
    }
  })
  await page.setViewportSize(WIDE)
  await page.getByText('Asking the node for its models…').first().waitFor()
  const shown = async () => await page.evaluate(() => document.body.innerText)
  assert.doesNotMatch(await shown(), /no model/i)
  for (const view of ['Models', 'This tab']) {
    await go(view)
    assert.doesNotMatch(await shown(), /knows no model/i, view)
  }
  answerNow()
  await go('Chat')
  await page.locator(`#chat-model option[value="node:${NAME}"]`).waitFor({ state: 'attached' })
  await page.unrouteAll({ behavior: 'ignoreErrors' })
})

test('a conversation: Markdown, code, a table, editing, another answer, and what is kept', options, async () => {
  await page.selectOption('#chat-model', `node:${NAME}`)
  await asked('How do I sort a list in Rust?')
  const body = turn('assistant').locator('.markdown')
  assert.equal(await body.locator('.as-h2').textContent(), 'Sorting in Rust')
  assert.equal(await body.locator('strong code').textContent(), 'sort_unstable')
  assert.equal(await body.locator('figure.code pre').textContent(), 'let mut list = vec![3, 1, 2];\nlist.sort_unstable();\nassert_eq!(list, [1, 2, 3]);')
  assert.deepEqual(await body.locator('tbody td').allTextContents(), ['sort', 'kept', 'half of the list', 'sort_unstable', 'free', 'none'])
  assert.equal(await body.locator('ol li').count(), 2)
  assert.equal(await body.getByRole('link', { name: 'the documentation' }).getAttribute('rel'), 'noopener noreferrer nofollow')
  assert.match(await note(), /^11 tokens · ([\d.,]+ tokens\/s · )?first after [\d.]+ s · (\d+ tokens? of the prompt known from before · )?the model ended it$/)
  await page.context().grantPermissions(['clipboard-read', 'clipboard-write'])
  await body.getByRole('button', { name: 'Copy the code (rust)' }).click()
  await body.getByText('Copied').waitFor()
  assert.match(await page.evaluate(async () => await navigator.clipboard.readText()), /^let mut list/)

  await asked('And the sum of 2 and 3?')
  assert.equal(await answer(), 'It is 5.')
  const thoughts = turn('assistant').locator('details.thoughts')
  assert.equal(await thoughts.getAttribute('open'), null, 'the reasoning is folded')
  assert.equal(await thoughts.locator('.plain').textContent(), 'Two and three. That makes five.')
  await clean('chat')
  await picture('page.png')
  await page.setViewportSize(PHONE)
  await page.evaluate(() => { scrollTo(0, document.documentElement.scrollHeight) })
  await picture('page-phone.png')
  await page.setViewportSize(WIDE)

  // A message is edited and sent again: what came after it goes.
  await turn('user', 1).getByRole('button', { name: 'Edit this message' }).click()
  await page.getByLabel('Your message').fill('Set a trap')
  await page.getByRole('button', { name: 'Send again' }).click()
  await turn('assistant').getByText('alert(1)').first().waitFor()
  await idle()
  assert.equal(await page.locator('#turns .turn').count(), 4)
  assert.equal(await answer(), '<img src=x onerror=alert(1)> [click](javascript:alert(1)) <script>alert(1)</script>')
  assert.equal(await page.locator('#turns :is(img, script, a[href^="javascript"])').count(), 0, 'tags of a model are text')
  await turn('assistant').getByRole('button', { name: 'Try again' }).click()
  await idle()
  await turn('assistant').getByText('alert(1)').first().waitFor()
  assert.equal(await page.locator('#turns .turn').count(), 4)

  // It is there after a reload, and a new one does not touch it.
  await page.reload()
  await page.locator(`#chat-model option[value="node:${NAME}"]`).waitFor({ state: 'attached' })
  assert.equal(await turn('user', 1).locator('.body').textContent(), 'Set a trap')
  await page.getByRole('button', { name: 'New chat' }).click()
  assert.equal(await page.locator('#turns .turn').count(), 0)
  await openOptions()
  await page.getByLabel('System prompt', { exact: true }).fill('Be kind.')
  await asked('Hello')
  assert.equal(await answer(), 'Your wish is my command.')
  await page.getByLabel('System prompt', { exact: true }).fill('')
  await page.locator('#history[open]').or(page.locator('#history')).first().waitFor()
  if (await page.locator('#history').getAttribute('open') === null) await page.locator('#history summary').click()
  assert.equal(await page.locator('#history-list li').count(), 2)
  await page.getByRole('button', { name: 'Delete the conversation “Hello”' }).click()
  await page.getByRole('dialog').getByRole('button', { name: 'Cancel' }).click()
  assert.equal(await page.locator('#history-list li').count(), 2)
  await page.getByRole('button', { name: 'Delete the conversation “Hello”' }).click()
  await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click()
  await page.waitForFunction(() => document.querySelectorAll('#history-list li').length === 1)
  assert.equal(await turn('user', 0).locator('.body').textContent(), 'How do I sort a list in Rust?')
})

test('an answer is stopped, bounds hold, and a refusal is told in words', options, async () => {
  await page.getByRole('button', { name: 'New chat' }).click()
  await say('Please sing')
  await turn('assistant').getByText('la la').waitFor()
  assert.ok(await page.getByRole('button', { name: 'Send' }).isHidden())
  await page.getByRole('button', { name: 'Stop' }).click()
  await idle()
  assert.match(await note(), /you stopped it$/)
  await node.json('ps').then(({ running }) => { assert.ok(running <= 1) })
  const limit = page.getByLabel('Limit of tokens')
  await openOptions()
  for (const [field, value, wrong] of [['Limit of tokens', '0', /limit of tokens must be a whole number from 1 to/], ['Temperature', '3', /temperature must be a number from 0 to 2/]]) {
    const before = await page.getByLabel(field).inputValue()
    await page.getByLabel(field).fill(value)
    const turns = await page.locator('#turns .turn').count()
    await say('Please sing')
    await page.locator('#chat-error').filter({ hasText: wrong }).waitFor()
    assert.equal(await page.locator('#turns .turn').count(), turns, 'nothing was sent')
    assert.equal(await page.getByLabel('Message', { exact: true }).inputValue(), 'Please sing', 'nothing is lost')
    await page.getByLabel(field).fill(before)
  }
  await limit.fill('5')
  await asked('Please sing')
  assert.match(await note(), /^5 tokens · .*it reached the limit of tokens$/)
  assert.equal(await page.locator('#chat-error').isHidden(), true)
  await limit.fill('')
  await page.route('**/v1/chat/completions', async (route) => {
    await route.fulfill({ status: 429, headers: { 'retry-after': '3' }, json: { error: { message: '64 requests wait already', code: 'rate_limit_exceeded' } } })
  })
  await asked('Hello')
  assert.match(await note(), /64 requests wait already; try again in 3 s/)
  await page.unroute('**/v1/chat/completions')
  await turn('assistant').getByRole('button', { name: 'Try again' }).click()
  await turn('assistant').getByText('Sorting in Rust').waitFor()
  await idle()
})

test('the page waits for a node that goes, and goes on when it is back', options, async () => {
  await say('Please sing')
  await turn('assistant').getByText('la la').waitFor()
  await node.kill()
  await page.getByRole('status').filter({ hasText: 'Reconnecting to the node' }).waitFor()
  await turn('assistant').locator('.note').filter({ hasText: /broke off.*kept/ }).waitFor()
  await idle()
  assert.ok(await page.getByRole('button', { name: 'Send' }).isDisabled())
  assert.match(await answer(), /la la/)
  assert.doesNotMatch(await page.evaluate(() => document.body.innerText), /failed to fetch|signal timed out/i)
  const address = node.url
  node = await Node.start('face', { data: node.data, args: ['--trust-policy', 'listed'] })
  assert.equal(node.url, address)
  await joined(page)
  await page.locator('#chat-send:not([disabled])').waitFor()
  await asked('How do I sort?')
  assert.match(await answer(), /Sorting in Rust/)
})

test('a model without a chat template goes on from the text, on the node and in this tab', options, async () => {
  await node.ask('publish', embedded)
  await page.getByRole('button', { name: 'New chat' }).click()
  await openOptions()
  await page.getByLabel('Limit of tokens').fill('12')
  await page.getByLabel('Temperature').fill('0')
  await page.locator('#chat-model option[value="node:tiny-mixtral-q4_k_m"]').waitFor({ state: 'attached' })
  await page.selectOption('#chat-model', 'node:tiny-mixtral-q4_k_m')
  await asked('Once upon a time')
  const there = await answer()
  assert.ok(there.length > 10, there)
  const inTab = page.locator('#chat-model option[value^="tab:"]:not([disabled])', { hasText: 'tiny-mixtral' })
  await inTab.waitFor({ state: 'attached' })
  await page.getByRole('button', { name: 'New chat' }).click()
  await page.selectOption('#chat-model', await inTab.getAttribute('value'))
  await asked('Once upon a time')
  assert.equal(await answer(), there, 'the tab writes what the node writes')
  assert.match(await turn('assistant').locator('.who').textContent(), /tiny-mixtral.*in this tab/)
  assert.match(await note(), /12 tokens · .*it reached the limit of tokens$/)
  await page.getByLabel('Limit of tokens').fill('')
  await page.getByLabel('Temperature').fill('0.7')
})

test('a model with a chat template gets its prompt from it in this tab, too', options, async () => {
  const source = join(folder(), 'Chatty')
  cpSync(join(root, 'tests/data/goldens/llama3'), source, { recursive: true })
  writeFileSync(join(source, 'tokenizer.json'), byteTokenizer())
  writeFileSync(join(source, 'tokenizer_config.json'), JSON.stringify({ chat_template: "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[answer]" }))
  const made = spawnSync(binary, ['convert', source, '--out', join(source, 'rdrr'), '--quantize', 'bf16'])
  assert.equal(made.status, 0, made.stderr.toString())
  const { model: id } = await node.json('publish', join(source, 'rdrr'))
  await openOptions()
  await page.getByLabel('Limit of tokens').fill('8')
  await page.getByLabel('Temperature').fill('0')
  await page.getByLabel('System prompt', { exact: true }).fill('Be brief.')
  const answers = []
  for (const value of ['node:Chatty-bf16', `tab:${id}`]) {
    await page.getByRole('button', { name: 'New chat' }).click()
    await page.locator(`#chat-model option[value="${value}"]:not([disabled])`).waitFor({ state: 'attached' })
    await page.selectOption('#chat-model', value)
    await asked('Hi')
    assert.doesNotMatch(await turn('assistant').locator('.who').textContent(), /goes on/)
    answers.push(await page.evaluate(() => JSON.parse(localStorage.getItem('doppler-conversations')).list[0].turns[1].text))
  }
  assert.notEqual(answers[0], '')
  assert.equal(answers[1], answers[0])
  await page.getByLabel('System prompt', { exact: true }).fill('')
  await page.getByLabel('Limit of tokens').fill('')
  await page.getByLabel('Temperature').fill('0.7')
})

test('a page without the key looks and does not change; no other site can', options, async () => {
  await go('Models')
  await page.getByText('This page may look, not change').waitFor()
  for (const name of ['Pull', 'Publish']) assert.ok(await page.getByRole('button', { name, exact: true }).isHidden(), name)
  assert.equal(await page.getByRole('button', { name: /^(Remove|Pin|Unpin|Trust) / }).count(), 0)
  const { url } = await node.json('page')
  key = /#key=([0-9a-f]{32})$/.exec(url)[1]
  assert.ok(url.startsWith(node.url))
  const ask = async (path, headers, method = 'POST') => await new Promise((resolve, reject) => {
    const asking = http.request(node.url + path, { method, headers: { 'content-type': 'application/json', ...headers } }, (reply) => {
      reply.resume()
      resolve(reply.statusCode)
    })
    asking.on('error', reject)
    asking.end(method === 'POST' ? '{"target":"nothing-of-the-kind"}' : undefined)
  })
  const host = new URL(node.url).host
  const shown = { authorization: `Bearer ${key}` }
  assert.equal(await ask('/control/v1/ps', shown, 'GET'), 200)
  assert.equal(await ask('/control/v1/ps', { ...shown, origin: node.url }, 'GET'), 200)
  for (const path of ['pull', 'pull/stop', 'publish', 'trust', 'store/pin', 'store/unpin', 'store/rm']) {
    assert.equal(await ask(`/control/v1/${path}`, {}), 401, `${path} without the key`)
    for (const foreign of [{ origin: 'https://evil.example' }, { origin: 'null' }, { origin: 'http://127.0.0.1:1' }, { 'sec-fetch-site': 'cross-site' }, { host: 'evil.example' }, { host, origin: `http://localhost:${new URL(node.url).port}` }]) {
      assert.equal(await ask(`/control/v1/${path}`, { ...shown, ...foreign }), 401, `${path} from ${JSON.stringify(foreign)}`)
    }
  }
  // What only commands may ask stays closed to the page, too.
  for (const path of ['leave', 'generate', 'store/gc', 'store/fsck']) assert.equal(await ask(`/control/v1/${path}`, shown), 401, path)
  for (const path of ['invite', 'page', 'status']) assert.equal(await ask(`/control/v1/${path}`, shown, 'GET'), 401, path)

  // A page of another origin, in the same browser, that even has the key.
  const server = http.createServer((_, reply) => { reply.setHeader('content-type', 'text/html').end('<title>evil</title>') })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  try {
    const evil = await page.context().newPage()
    await evil.goto(`http://127.0.0.1:${server.address().port}/`)
    const got = await evil.evaluate(async ([url, key]) => {
      const tries = {}
      for (const [name, init] of Object.entries({
        plain: { method: 'POST', body: '{"target":"x"}' },
        blind: { method: 'POST', mode: 'no-cors', body: '{"target":"x"}' },
        key: { method: 'POST', body: '{"target":"x"}', headers: { authorization: `Bearer ${key}` } }
      })) tries[name] = await fetch(`${url}/control/v1/store/rm`, init).then(({ type, status }) => `${type} ${status}`, () => 'refused')
      return tries
    }, [node.url, key])
    assert.deepEqual(got, { plain: 'refused', blind: 'opaque 0', key: 'refused' })
    await evil.close()
  } finally {
    server.close()
  }

  // The link unlocks the page, and leaves nothing of the key in its address.
  await page.getByLabel('The page’s link or key').fill('nonsense')
  await page.getByRole('button', { name: 'Unlock' }).click()
  await page.getByText('This is no such link').waitFor()
  await clean('locked')
  await page.goto('about:blank')
  await page.goto(url)
  await page.waitForSelector('body[data-view=chat]')
  assert.equal(new URL(page.url()).hash, '')
  await go('Models')
  await page.getByRole('button', { name: 'Pull', exact: true }).waitFor()
  await page.reload()
  await page.getByRole('button', { name: 'Pull', exact: true }).waitFor()
})

const row = (name) => page.locator('[data-known]', { has: page.getByRole('heading', { name, exact: true }) })

test('models: pulled from the Hub, pinned, and the last copy removed only on purpose', options, async () => {
  await page.getByLabel('From the Hugging Face Hub').fill('lab/nothing')
  await page.getByRole('button', { name: 'Pull', exact: true }).click()
  await page.locator('#pulls .failed', { hasText: 'lab/nothing' }).filter({ hasText: /no such model/ }).waitFor()
  await page.getByLabel('From the Hugging Face Hub').fill('hf:lab/small:Q8_0')
  await page.getByRole('button', { name: 'Pull', exact: true }).click()
  await page.locator('#pulls li', { hasText: 'hf:lab/small:Q8_0' }).filter({ hasText: 'here as small-Q8_0' }).waitFor()
  await page.getByLabel('From the Hugging Face Hub').fill('hf:lab/slow:Q8_0')
  await page.getByRole('button', { name: 'Pull', exact: true }).click()
  await page.getByRole('button', { name: 'Stop pulling hf:lab/slow:Q8_0' }).click()
  await page.locator('#pulls li', { hasText: 'hf:lab/slow:Q8_0' }).filter({ hasText: 'stopped; the next pull goes on' }).waitFor()
  const small = row('small-Q8_0')
  await small.getByText(/all of it here · pinned/).waitFor()
  await small.getByRole('button', { name: 'Unpin small-Q8_0' }).click()
  await small.getByRole('button', { name: 'Pin small-Q8_0', exact: true }).click()
  await small.getByRole('button', { name: 'Unpin small-Q8_0' }).waitFor()
  await small.getByRole('button', { name: 'Remove small-Q8_0' }).click()
  const dialog = page.getByRole('dialog')
  await dialog.getByRole('button', { name: 'Remove', exact: true }).click()
  await dialog.getByText('Remove the last copy of small-Q8_0?').waitFor()
  assert.match(await dialog.textContent(), /\d+ of \d+ objects? \(.*\) (is|are) held by no other peer/)
  await clean('dialog')
  await dialog.getByRole('button', { name: 'Cancel' }).click()
  assert.ok((await node.json('ls')).some(({ name }) => name === 'small-Q8_0'))
  await small.getByRole('button', { name: 'Remove small-Q8_0' }).click()
  await dialog.getByRole('button', { name: 'Remove', exact: true }).click()
  await dialog.getByRole('button', { name: 'Remove the last copy' }).click()
  await small.waitFor({ state: 'detached' })
  assert.ok((await node.json('ls')).every(({ name }) => name !== 'small-Q8_0'))
  await page.getByLabel('From a directory of this machine').fill('/nowhere')
  await page.getByRole('button', { name: 'Publish' }).click()
  await page.locator('#add-error').filter({ hasText: '/nowhere' }).waitFor()
})

test('a publisher is trusted by key, a model fetched, and each copy shown', options, async () => {
  // Another publisher's model, of bytes of its own.
  const dir = join(folder(), 'rdrr')
  const made = spawnSync(binary, ['convert', checkpoint, '--out', dir, '--quantize', 'q8_0'])
  assert.equal(made.status, 0, made.stderr.toString())
  const tcp = node.addresses.find((address) => /\/tcp\/\d+\/p2p/.test(address))
  other = await Node.start('face', { bootstrap: [tcp] })
  await other.ask('publish', dir)
  const foreign = row(FOREIGN)
  await foreign.getByRole('button', { name: `Fetch all ${FOREIGN}` }).click()
  await foreign.getByRole('alert').filter({ hasText: /trusted its publisher yet/ }).waitFor()
  const { publisher } = await other.json('status')
  await foreign.locator('code.key').filter({ hasText: publisher }).waitFor()
  await foreign.getByRole('button', { name: /^Trust the publisher/ }).click()
  await page.getByRole('dialog').getByText(publisher).waitFor()
  await page.getByRole('dialog').getByRole('button', { name: 'Trust' }).click()
  await foreign.getByText('a publisher you trust').first().waitFor()
  assert.ok((await node.json('trust', 'list')).some((one) => one.publisher === publisher))
  await foreign.getByRole('button', { name: `Fetch all ${FOREIGN}` }).click()
  await foreign.getByText(/all of it here · pinned/).waitFor()
  const copies = foreign.getByRole('region', { name: 'Copies by node' })
  await copies.getByRole('row', { name: /this node/ }).waitFor()
  await copies.getByRole('img', { name: /^holds (\d+) of \1 objects$/ }).nth(1).waitFor()
  await clean('models')
  await foreign.locator('.keys').scrollIntoViewIfNeeded()
  await picture('page-models.png')
  await foreign.getByRole('button', { name: `Chat ${FOREIGN}` }).click()
  await page.waitForFunction(() => document.getElementById('chat-model').value === 'node:Sorting-Assistant-q8_0')
  await go('Swarm')
  const peers = page.locator('#people')
  await peers.getByRole('row', { name: /this tab/ }).filter({ hasText: 'browser tab' }).filter({ hasText: 'WebSocket' }).waitFor()
  await peers.getByRole('row', { name: /node \d/ }).filter({ hasText: 'TCP' }).waitFor()
  assert.doesNotMatch(await page.evaluate(() => document.body.innerText), /\b1 (objects|nodes|copies|shards)\b/)
  await page.locator('#tiers').getByText('Disk').waitFor()
  assert.match(await page.locator('#heal').textContent(), /(enough|too few) copies/)
  await clean('swarm')
  await picture('page-swarm.png')
})

test('this tab: what it does as a peer, by its number, and the key field of a private swarm is whole', options, async () => {
  await go('This tab')
  await joined(page)
  assert.equal(await page.locator('#tab').textContent(), 'This tab')
  await clean('tab')
  for (const [field, value, wrong] of [['Tokens', '5000', /number of tokens must be a whole number from 1 to 4,096/], ['Expert slots', '0', /expert slots must be/]]) {
    const before = await page.getByLabel(field, { exact: true }).inputValue()
    await page.getByLabel(field, { exact: true }).fill(value)
    await page.getByRole('button', { name: 'Run in this tab' }).click()
    await page.locator('#run-error').filter({ hasText: wrong }).waitFor()
    assert.equal(await page.evaluate(() => globalThis.doppler.runner.busy), false)
    await page.getByLabel(field, { exact: true }).fill(before)
  }
  const second = await page.context().newPage()
  await second.goto(`${node.url}/#tab`)
  await joined(second)
  assert.equal(await second.locator('#tab').textContent(), 'This tab, number 2 of this browser')
  await second.evaluate(() => { document.getElementById('key').hidden = false })
  const field = second.getByLabel('Key', { exact: true })
  const shown = await field.evaluate((input) => {
    input.type = 'text'
    input.value = 'f'.repeat(64)
    return [input.scrollWidth, input.clientWidth]
  })
  assert.ok(shown[0] <= shown[1] + 1, `64 digits need ${shown[0]} px, the field has ${shown[1]}`)
  await second.close()
  // By keyboard alone: to the chat, a message, an answer.
  await page.locator('#to-chat').focus()
  await page.keyboard.press('Enter')
  await page.waitForSelector('body[data-view=chat]')
  await page.getByRole('button', { name: 'New chat' }).focus()
  await page.keyboard.press('Enter')
  await page.selectOption('#chat-model', `node:${NAME}`)
  assert.equal(await page.evaluate(() => document.activeElement.id), 'chat-text')
  await page.keyboard.type('How do I sort?')
  await page.keyboard.press('Enter')
  await turn('assistant').getByText('Sorting in Rust').waitFor()
  await idle()
})

test('the page of a node that serves without a swarm', options, async () => {
  const child = spawn(binary, ['serve', model, '--json', '--http', '127.0.0.1:0', '--backend', 'cpu', '--data', folder()], { stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise((resolve) => { child.on('exit', resolve) })
  try {
    let address
    for await (const line of createInterface({ input: child.stdout })) {
      const event = JSON.parse(line)
      if (event.event === 'serving') address = event.address
      if (address !== undefined) break
    }
    const before = page
    page = await openTab(`http://${address}`, { within: browser, view: 'chat' })
    await page.getByRole('status').filter({ hasText: 'The node serves without a swarm' }).waitFor()
    await page.locator('#chat-send:not([disabled])').waitFor()
    await asked('How do I sort?')
    assert.match(await answer(), /Sorting in Rust/)
    await go('Swarm')
    await page.getByText('This node serves without a swarm').waitFor()
    assert.ok(await page.locator('#failure').isHidden())
    page = before
  } finally {
    child.kill()
    await ended
  }
})

test('axe-core found nothing on any view, and nothing was wider than the window', () => {
  assert.deepEqual([...new Set(faults)], [])
})
