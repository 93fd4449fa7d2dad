// The adapter: opened with the limits it has, and given up on when it is lost.

import { Failure } from '../messages.ts'

/** WebGPU's flags (its specification, sections 5.1.2, 5.2 and 9.3), which TypeScript does not have as values. */
export const USAGE = { MAP_READ: 1, COPY_SRC: 4, COPY_DST: 8, UNIFORM: 64, STORAGE: 128 }
export const COMPUTE = 4
const MAP_READ = 1
const FILTERS: GPUErrorFilter[] = ['validation', 'out-of-memory', 'internal']

/** What the node's kernels number words with. */
const BINDING_MAX = 0xffffffff

export class Device {
  private fault: Failure | null = null

  private constructor (readonly gpu: GPUDevice, readonly name: string, readonly software: boolean) {
    void gpu.lost.then(({ message, reason }) => {
      this.fault ??= new Failure('device_lost', `the adapter was lost (${message === '' ? reason : message}): run it again; if that fails, reload the page`)
    })
    gpu.onuncapturederror = ({ error }) => { this.note(error) }
    this.watch()
  }

  private note (error: GPUError | null): void {
    if (error === null) return
    this.fault ??= error instanceof GPUOutOfMemoryError
      ? new Failure('out_of_memory', 'the adapter has no more memory: choose fewer expert slots or a smaller model')
      : new Failure('device', `the adapter refuses: ${error.message}`)
  }

  private watch (): void {
    for (const filter of FILTERS) this.gpu.pushErrorScope(filter)
  }

  /**
   * Throws what went wrong with anything asked of it until now, once it has been seen to. What is
   * not asked so may be told of after a wrong result was read.
   */
  async settle (): Promise<void> {
    const scopes = FILTERS.map(async () => await this.gpu.popErrorScope())
    this.watch()
    // Of a lost device nothing is told.
    const errors = await Promise.all(scopes).catch(() => [])
    // What is out of memory makes what follows invalid: the cause is said.
    for (const error of errors.sort((a, b) => Number(b instanceof GPUOutOfMemoryError) - Number(a instanceof GPUOutOfMemoryError))) this.note(error)
    this.check()
  }

  static async open (): Promise<Device> {
    // Absent where the page is no secure context, or the browser has it off.
    const gpu = (navigator as { gpu?: GPU }).gpu
    if (gpu === undefined) {
      throw new Failure('no_webgpu', 'this browser gives the page no WebGPU: use one that has it (Chrome and Edge do from 113 on), at the address that the node prints (localhost, not a name of the network); on Linux, Chromium may have to be started with --enable-unsafe-webgpu')
    }
    const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' })
    if (adapter === null) {
      throw new Failure('no_adapter', 'WebGPU is here, but no adapter: see chrome://gpu for the reason; the browser may have to be started with --enable-unsafe-webgpu, or with hardware acceleration on')
    }
    const { maxStorageBufferBindingSize, maxBufferSize, maxComputeWorkgroupsPerDimension } = adapter.limits
    const device = await adapter.requestDevice({ requiredLimits: { maxStorageBufferBindingSize, maxBufferSize, maxComputeWorkgroupsPerDimension } })
    const { vendor, architecture, description, isFallbackAdapter } = adapter.info
    const name = description !== '' ? description : [vendor, architecture].filter((word) => word !== '').join(' ')
    const software = isFallbackAdapter || /swiftshader|llvmpipe|lavapipe|basic render/i.test(`${architecture} ${description}`)
    return new Device(device, name === '' ? 'an adapter without a name' : name, software)
  }

  /** Bytes of the largest storage binding. */
  get bindingMax (): number {
    const { maxStorageBufferBindingSize, maxBufferSize } = this.gpu.limits
    return Math.min(maxStorageBufferBindingSize, maxBufferSize, BINDING_MAX)
  }

  /** Throws what went wrong since it was opened, if anything did. */
  check (): void {
    if (this.fault !== null) throw this.fault
  }

  buffer (bytes: number, usage: GPUBufferUsageFlags): GPUBuffer {
    this.check()
    return this.gpu.createBuffer({ size: bytes, usage })
  }

  /** Waits for what is submitted and gives `bytes` of a mappable buffer, unless anything went wrong until then. */
  async read (buffer: GPUBuffer, bytes: number): Promise<ArrayBuffer> {
    const [mapped, settled] = await Promise.allSettled([buffer.mapAsync(MAP_READ, 0, bytes), this.settle()])
    try {
      if (settled.status === 'rejected') throw settled.reason
      if (mapped.status === 'rejected') throw mapped.reason
    } catch (error) {
      // Of a lost device all maps fail; its loss says more.
      await Promise.race([this.gpu.lost, new Promise((resolve) => setTimeout(resolve, 100))])
      this.check()
      throw error
    }
    this.check()
    const copy = buffer.getMappedRange(0, bytes).slice(0)
    buffer.unmap()
    return copy
  }

  close (): void {
    this.fault ??= new Failure('closed', 'the model is no longer loaded')
    this.gpu.destroy()
  }
}
