// Which models can be asked: those of the node, and those that this tab can run. Pure.

export interface NodeModel { id: string, hash: string }
export interface TabModel { id: string, name: string, embedded?: boolean, manifest: boolean }

export interface Choice { value: string, text: string, off?: boolean }

export type Chosen = { where: 'node', name: string } | { where: 'tab', id: string }

export function chosen (value: string): Chosen | null {
  const at = value.indexOf(':')
  const [where, what] = [value.slice(0, at), value.slice(at + 1)]
  if (what === '') return null
  return where === 'node' ? { where, name: what } : where === 'tab' ? { where, id: what } : null
}

/** The groups of the list. `why`: what keeps this tab from running models; empty if nothing does. */
export function groups (node: NodeModel[], tab: TabModel[], why: string): Array<{ label: string, options: Choice[] }> {
  const here = node.map(({ id }) => ({ value: `node:${id}`, text: id }))
  const own = tab.filter(({ manifest }) => manifest).map(({ id, name, embedded }) => {
    return { value: `tab:${id}`, text: embedded === true ? `${name} (comes with the node)` : name, off: why !== '' }
  })
  return [{ label: 'On the node', options: here }, { label: why === '' ? 'In this tab' : 'In this tab (no WebGPU)', options: own }]
}
