// Adds the token of a private swarm's gateway to every request to this page's node.

export function authorise (token: string): void {
  const plain = globalThis.fetch.bind(globalThis)
  globalThis.fetch = async (input, init) => {
    const request = new Request(input, init)
    if (new URL(request.url).origin === location.origin) request.headers.set('authorization', `Bearer ${token}`)
    return await plain(request)
  }
}
