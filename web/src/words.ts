// Numbers and failures in words. Pure.

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB']

/** Bytes with a unit. */
export function size (bytes: number): string {
  let unit = 0
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024
    unit += 1
  }
  return `${unit === 0 || bytes >= 100 ? Math.round(bytes) : bytes.toFixed(1)} ${UNITS[unit]}`
}

/** Bytes a second. */
export const rate = (bytes: number): string => `${size(bytes)}/s`

/** A number and its noun, which takes an s unless another plural is given. */
export function count (n: number, one: string, many = `${one}s`): string {
  return `${n.toLocaleString('en')} ${n === 1 ? one : many}`
}

/** Seconds that are left, as people say them. */
export function left (seconds: number): string {
  const whole = Math.ceil(Math.max(0, seconds))
  if (whole < 60) return `${whole} s left`
  if (whole < 3600) return `${Math.ceil(whole / 60)} min left`
  return `${Math.floor(whole / 3600)} h ${Math.floor(whole % 3600 / 60)} min left`
}

/** An id or a key by its ends: many begin alike. */
export const brief = (id: string): string => id.length <= 14 ? id : `${id.slice(0, 6)}…${id.slice(-6)}`

/** What browsers call a request that took too long, which says nothing to a user. */
const TIMED_OUT = /signal timed out|due to timeout|operation was aborted|timed out/i
/** What browsers call a request that got no connection: Chromium, Firefox and Safari. */
const UNREACHED = /failed to fetch|networkerror|load failed|network error|err_/i

/** A failure in words for the user. `whom` is what was asked. */
export function explain (error: unknown, whom = 'the node'): string {
  const { name, message } = error instanceof Error ? error : new Error(String(error))
  if (name === 'TimeoutError' || TIMED_OUT.test(message)) return `${whom} did not answer in time`
  if (name === 'AbortError') return 'stopped'
  if (UNREACHED.test(message)) return `${whom} cannot be reached`
  return message === '' ? `${whom} failed without saying why` : message
}

/** Whether a failure means that the node itself cannot be reached now, so that asking again may help. */
export function isAway (error: unknown): boolean {
  const { name, message } = error instanceof Error ? error : new Error(String(error))
  return name === 'TimeoutError' || TIMED_OUT.test(message) || UNREACHED.test(message)
}

/** Checks what was typed into a number field. Returns the number, null for an empty field, or what is wrong. */
export function number (text: string, what: string, { min, max, whole = true }: { min: number, max: number, whole?: boolean }): number | null | { wrong: string } {
  if (text.trim() === '') return null
  const value = Number(text)
  const fits = Number.isFinite(value) && value >= min && value <= max && (!whole || Number.isInteger(value))
  return fits ? value : { wrong: `${what} must be ${whole ? 'a whole number' : 'a number'} from ${min.toLocaleString('en')} to ${max.toLocaleString('en')}` }
}
