// The adapter: opened with all of its limits, and no longer used once it has failed or is lost.

import { Failure } from '../messages.ts'

/** WebGPU's flags (its specification, sections 5.1.2, 5.2 and 9.3), which TypeScript does not define as values. */
export const USAGE = { MAP_READ: 1, COPY_SRC: 4, COPY_DST: 8, UNIFORM: 64, STORAGE: 128 }
export const COMPUTE = 4
const MAP_READ = 1
const FILTERS: GPUErrorFilter[] = ['validation', 'out-of-memory', 'internal']

/** Invocations that add up together (kernels/shared/team_subgroup.wgsl). */
const TEAM = 32
/** The kernels index with 32 bits. */
const BINDING_MAX = 0xffffffff

/**
 * The adapter on which this tab's models run.
 * Throws what keeps them from running here.
 */
export async function adapterOf (): Promise<GPUAdapter> {
  // Absent if the page is not a secure context or the browser has it switched off.
  const gpu = (navigator as { gpu?: GPU }).gpu
  if (gpu === undefined) {
    throw new Failure('no_webgpu', 'this browser gives the page no WebGPU: use one that has it (Chrome and Edge do from 113 on), at the address that the node prints (localhost, not a name of the network); on Linux, Chromium may have to be started with --enable-unsafe-webgpu')
  }
  const adapter = await gpu.requestAdapter({ powerPreference: 'high-performance' })
  if (adapter === null) {
    throw new Failure('no_adapter', 'WebGPU is available, but no adapter: see chrome://gpu for the reason; the browser may have to be started with --enable-unsafe-webgpu, or with hardware acceleration on')
  }
  return adapter
}

export class Device {
  private fault: Failure | null = null

  private constructor (readonly gpu: GPUDevice, readonly name: string, readonly software: boolean, readonly subgroups: boolean) {
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
      : new Failure('device', `the adapter reports an error: ${error.message}`)
  }

  private watch (): void {
    for (const filter of FILTERS) this.gpu.pushErrorScope(filter)
  }

  /**
   * Waits for all work so far and throws its first error. Without this call, an error may be
   * reported only after a wrong result has been read.
   */
  async settle (): Promise<void> {
    const scopes = FILTERS.map(async () => await this.gpu.popErrorScope())
    this.watch()
    // A lost device reports no errors.
    const errors = await Promise.all(scopes).catch(() => [])
    // Running out of memory makes later calls invalid: report the cause first.
    for (const error of errors.sort((a, b) => Number(b instanceof GPUOutOfMemoryError) - Number(a instanceof GPUOutOfMemoryError))) this.note(error)
    this.check()
  }

  static async open (): Promise<Device> {
    const adapter = await adapterOf()
    const { maxStorageBufferBindingSize, maxBufferSize, maxComputeWorkgroupsPerDimension } = adapter.limits
    // Teams of the kernels are 32.
    const subgroups = adapter.features.has('subgroups') && (adapter.info.subgroupMinSize ?? 0) >= TEAM
    const requiredFeatures: GPUFeatureName[] = subgroups ? ['subgroups'] : []
    const device = await adapter.requestDevice({ requiredFeatures, requiredLimits: { maxStorageBufferBindingSize, maxBufferSize, maxComputeWorkgroupsPerDimension } })
    const { vendor, architecture, description, isFallbackAdapter } = adapter.info
    const name = description !== '' ? description : [vendor, architecture].filter((word) => word !== '').join(' ')
    const software = isFallbackAdapter || /swiftshader|llvmpipe|lavapipe|basic render/i.test(`${architecture} ${description}`)
    return new Device(device, name === '' ? 'an adapter without a name' : name, software, subgroups)
  }

  /** Bytes of the largest storage binding. */
  get bindingMax (): number {
    const { maxStorageBufferBindingSize, maxBufferSize } = this.gpu.limits
    return Math.min(maxStorageBufferBindingSize, maxBufferSize, BINDING_MAX)
  }

  /** Throws the first error since the device was opened, if there was one. */
  check (): void {
    if (this.fault !== null) throw this.fault
  }

  buffer (bytes: number, usage: GPUBufferUsageFlags): GPUBuffer {
    this.check()
    return this.gpu.createBuffer({ size: bytes, usage })
  }

  /** Waits for submitted work and returns `bytes` of a mappable buffer; throws if anything has failed by then. */
  async read (buffer: GPUBuffer, bytes: number): Promise<ArrayBuffer> {
    const [mapped, settled] = await Promise.allSettled([buffer.mapAsync(MAP_READ, 0, bytes), this.settle()])
    try {
      if (settled.status === 'rejected') throw settled.reason
      if (mapped.status === 'rejected') throw mapped.reason
    } catch (error) {
      // On a lost device all maps fail; wait for the loss, which says more.
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
