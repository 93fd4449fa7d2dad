// A question before something is lost. The page has one dialog for it.

import { find, say, tell } from './dom.ts'

/** Asks. True if the answer is yes. Escape and Cancel mean no. */
export async function confirm (question: string, detail: string, yes: string): Promise<boolean> {
  const dialog = find<HTMLDialogElement>('confirm')
  say(find('confirm-question'), question)
  tell(find('confirm-detail'), detail)
  say(find('confirm-yes'), yes)
  dialog.returnValue = ''
  dialog.showModal()
  return await new Promise((resolve) => {
    dialog.onclose = () => { resolve(dialog.returnValue === 'yes') }
  })
}
