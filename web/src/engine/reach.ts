// How much of a token to submit before checking whether it has halted. On a software adapter, work
// after a halt costs as much as work that is needed. Pure numbers.

/** How fast the average follows observations. */
const GAIN = 0.25

export class Reach {
  /** MoE layers that tokens have recently passed before they halt, on average. */
  private average: number
  /** Those passed since the last halt. */
  private run = 0

  constructor (readonly layers: number) { this.average = layers }

  /** The MoE layer after whose routing a submission ends that begins before layer `first`; `layers` for the whole token. */
  stop (first: number): number {
    return Math.min(first + Math.floor(this.average), this.layers)
  }

  passed (layers: number): void {
    this.run += layers
    // Two tokens without a halt: perhaps every expert has a slot by now.
    if (this.run >= 2 * this.layers) this.average = this.layers
  }

  halted (): void {
    this.average += (Math.min(this.run, this.layers) - this.average) * GAIN
    this.run = 0
  }
}
