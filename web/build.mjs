// Builds the page into web/dist, whose files are committed and embedded in the binary.
// The same sources and locked packages give the same bytes, which a test checks.

import { build } from 'esbuild'
import { copyFile, mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

const out = process.argv[2] ?? new URL('dist', import.meta.url).pathname
const src = new URL('src', import.meta.url).pathname
await mkdir(out, { recursive: true })
const { metafile } = await build({
  entryPoints: [`${src}/app.ts`, `${src}/worker.ts`, `${src}/prover.ts`],
  outdir: out,
  absWorkingDir: new URL('.', import.meta.url).pathname,
  bundle: true,
  format: 'esm',
  platform: 'browser',
  target: 'es2022',
  minify: true,
  legalComments: 'none',
  metafile: true,
  define: { 'process.env.NODE_DEBUG': 'undefined', 'process.env.DUMP_SESSION_KEYS': 'undefined', global: 'globalThis' },
  logLevel: 'warning'
})
for (const file of ['index.html', 'app.css']) await copyFile(`${src}/${file}`, `${out}/${file}`)

// The notices that the packages' licences ask for.
const root = new URL('.', import.meta.url).pathname
const packages = new Set(Object.keys(metafile.inputs).map((input) => /^.*node_modules\/(@[^/]+\/[^/]+|[^/]+)/.exec(input)?.[0]).filter((dir) => dir !== undefined))
const notices = []
for (const dir of [...packages].sort()) {
  const { name, version, license } = JSON.parse(await readFile(join(root, dir, 'package.json'), 'utf8'))
  const files = (await readdir(join(root, dir))).filter((file) => /^licen[cs]e/i.test(file)).sort()
  const texts = await Promise.all(files.map(async (file) => await readFile(join(root, dir, file), 'utf8')))
  notices.push([`${name} ${version}, ${license}`, ...texts.map((text) => text.replaceAll('\r', '').trim())].join('\n\n'))
}
await writeFile(`${out}/licences.txt`, notices.join('\n\n----\n\n') + '\n')
