// A program on a device: its buffers, its pipelines, and the recording of its dispatches.
// Pipelines are created when a dispatch first needs them: half of a program is for long prompts.

import { COMPUTE, type Device, USAGE } from './device.ts'
import { type Dispatch, type Kept, type Program, type Token, workgroups } from './program.ts'

/** Bytes of one dispatch's parameters in the arena, and of the step's (src/infer/gpu/params.rs). */
const ARENA_SLOT = 256
const STEP_BYTES = 16

export interface Step { tokens: number, position: number, logitStart: number, logitRows: number }

interface Pipeline { pipeline: GPUComputePipeline, storage: GPUBindGroupLayout }

export class Machine {
  readonly buffers: GPUBuffer[]
  private readonly step: GPUBuffer
  private readonly common: GPUBindGroup
  private readonly commonLayout: GPUBindGroupLayout
  private readonly pipelines = new Map<number, Promise<Pipeline>>()
  private readonly groups: Array<GPUBindGroup | undefined> = []
  private readonly readbacks = new Map<number, GPUBuffer>()
  private now: Step = { tokens: 0, position: 0, logitStart: 0, logitRows: 0 }
  private queued: number[] = []
  dispatched = 0
  submitted = 0

  /** `text` returns a kernel's WGSL. */
  constructor (readonly device: Device, readonly program: Program, private readonly text: (kernel: number) => Promise<string>) {
    const { gpu } = device
    const storage = USAGE.STORAGE | USAGE.COPY_DST | USAGE.COPY_SRC
    this.buffers = program.buffers.map((bytes) => device.buffer(bytes, storage))
    // Create all readback buffers now, so that a lack of memory shows before the first step.
    for (const buffer of [program.logits, ...program.moe.map(({ ids }) => ids), ...(program.token === null ? [] : [program.token.state])]) {
      if (!this.readbacks.has(buffer)) this.readbacks.set(buffer, device.buffer(program.buffers[buffer], USAGE.MAP_READ | USAGE.COPY_DST))
    }
    this.step = device.buffer(STEP_BYTES, USAGE.UNIFORM | USAGE.COPY_DST)
    const words = new Uint32Array(Math.max(1, program.dispatches.length) * ARENA_SLOT / 4)
    program.dispatches.forEach(({ params }, i) => { words.set(params, i * ARENA_SLOT / 4) })
    const arena = device.buffer(words.byteLength, USAGE.UNIFORM | USAGE.COPY_DST)
    gpu.queue.writeBuffer(arena, 0, words)
    const visibility = COMPUTE
    this.commonLayout = gpu.createBindGroupLayout({
      entries: [
        { binding: 0, visibility, buffer: { type: 'uniform', minBindingSize: STEP_BYTES } },
        { binding: 1, visibility, buffer: { type: 'uniform', hasDynamicOffset: true, minBindingSize: ARENA_SLOT } }
      ]
    })
    this.common = gpu.createBindGroup({
      layout: this.commonLayout,
      entries: [{ binding: 0, resource: { buffer: this.step } }, { binding: 1, resource: { buffer: arena, size: ARENA_SLOT } }]
    })
  }

  private async pipeline (kernel: number): Promise<Pipeline> {
    let made = this.pipelines.get(kernel)
    if (made === undefined) {
      made = this.make(kernel)
      this.pipelines.set(kernel, made)
    }
    return await made
  }

  private async make (kernel: number): Promise<Pipeline> {
    const { gpu } = this.device
    const { name, subgroups, write } = this.program.kernels[kernel]
    const text = await this.text(kernel)
    const code = subgroups ? `enable subgroups;\n${text}` : text
    const storage = gpu.createBindGroupLayout({
      label: name,
      entries: write.map((written, binding) => ({ binding, visibility: COMPUTE, buffer: { type: written ? 'storage' as const : 'read-only-storage' as const } }))
    })
    const layout = gpu.createPipelineLayout({ bindGroupLayouts: [this.commonLayout, storage] })
    const pipeline = await gpu.createComputePipelineAsync({ label: name, layout, compute: { module: gpu.createShaderModule({ label: name, code }), entryPoint: 'main' } })
    return { pipeline, storage }
  }

  /** The grid of a dispatch for the present step's rows; null if it does not run. */
  private grid ({ rows, when: [least, most], grid }: Dispatch): [number, number] | null {
    const count = rows === 'tokens' ? this.now.tokens : this.now.logitRows
    if (count < least || count > most) return null
    return workgroups(grid, count, this.device.gpu.limits.maxComputeWorkgroupsPerDimension, this.now.position)
  }

  write (buffer: number, offset: number, bytes: BufferSource): void {
    this.device.gpu.queue.writeBuffer(this.buffers[buffer], offset, bytes)
  }

  begin (step: Step, tokens: number[]): void {
    this.queued = []
    this.now = step
    this.device.gpu.queue.writeBuffer(this.step, 0, Uint32Array.of(step.tokens, step.position, step.logitStart, step.logitRows))
    this.write(this.program.tokens, 0, Uint32Array.from(tokens))
  }

  queue (dispatches: number[]): void {
    this.queued.push(...dispatches)
  }

  /** Submits what is queued, then copies the first `bytes` of `buffer` (logits or a router's choice) and returns them. */
  async readAfter (buffer: number, bytes: number): Promise<ArrayBuffer> {
    const readback = this.readbacks.get(buffer) as GPUBuffer
    await this.submit((encoder) => { encoder.copyBufferToBuffer(this.buffers[buffer], 0, readback, 0, bytes) })
    return await this.device.read(readback, bytes)
  }

  /** Copies back what was set aside, submits dispatches `from` to `until` of a token, and reads its report. */
  async token ({ dispatches, state, chosen, aside }: Token, from: number, until: number, kept: Kept[]): Promise<Uint32Array> {
    const readback = this.readbacks.get(state) as GPUBuffer
    const bytes = this.program.buffers[state]
    this.queue(dispatches.slice(from, until))
    await this.submit((encoder) => {
      encoder.copyBufferToBuffer(this.buffers[chosen], 0, this.buffers[state], 4, 4)
      encoder.copyBufferToBuffer(this.buffers[state], 0, readback, 0, bytes)
    }, (encoder) => {
      for (const { buffer, at, bytes } of kept) encoder.copyBufferToBuffer(this.buffers[aside], at, this.buffers[buffer], 0, bytes)
      encoder.clearBuffer(this.buffers[state], 0, 4)
    })
    return new Uint32Array(await this.device.read(readback, bytes))
  }

  /** Submits what is queued in one pass. */
  async submit (after: (encoder: GPUCommandEncoder) => void = () => {}, before: (encoder: GPUCommandEncoder) => void = () => {}): Promise<void> {
    const { gpu } = this.device
    const queued = this.queued.filter((dispatch) => this.grid(this.program.dispatches[dispatch]) !== null)
    this.queued = []
    const pipelines = await Promise.all(queued.map(async (dispatch) => await this.pipeline(this.program.dispatches[dispatch].kernel)))
    this.device.check()
    const encoder = gpu.createCommandEncoder()
    before(encoder)
    if (queued.length > 0) {
      const pass = encoder.beginComputePass()
      pass.setBindGroup(0, this.common, [0])
      queued.forEach((dispatch, i) => {
        const [x, y] = this.grid(this.program.dispatches[dispatch]) as [number, number]
        pass.setPipeline(pipelines[i].pipeline)
        pass.setBindGroup(0, this.common, [dispatch * ARENA_SLOT])
        pass.setBindGroup(1, this.group(dispatch, pipelines[i].storage))
        pass.dispatchWorkgroups(x, y)
      })
      pass.end()
      this.dispatched += queued.length
    }
    after(encoder)
    gpu.queue.submit([encoder.finish()])
    this.submitted += 1
  }

  private group (dispatch: number, layout: GPUBindGroupLayout): GPUBindGroup {
    return this.groups[dispatch] ??= this.device.gpu.createBindGroup({
      layout,
      entries: this.program.dispatches[dispatch].storage.map((buffer, binding) => ({ binding, resource: { buffer: this.buffers[buffer] } }))
    })
  }
}
