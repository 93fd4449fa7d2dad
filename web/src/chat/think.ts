// Finds a model's reasoning in its text: what stands between <think> and </think> before the answer.
// Pure.

const OPEN = '<think>'
const CLOSE = '</think>'

/** `thinking`: the reasoning goes on. */
export interface Split { reasoning: string, answer: string, thinking: boolean }

export function split (text: string): Split {
  const begun = text.trimStart()
  const end = text.indexOf(CLOSE)
  if (end >= 0) {
    // Some templates open it in the prompt, so that only its end is in the text.
    const from = begun.startsWith(OPEN) ? text.indexOf(OPEN) + OPEN.length : 0
    return { reasoning: text.slice(from, end).trim(), answer: text.slice(end + CLOSE.length).trimStart(), thinking: false }
  }
  if (begun.startsWith(OPEN)) return { reasoning: begun.slice(OPEN.length).trimStart(), answer: '', thinking: true }
  // The mark itself may still be on its way.
  if (begun !== '' && OPEN.startsWith(begun)) return { reasoning: '', answer: '', thinking: true }
  return { reasoning: '', answer: text, thinking: false }
}
