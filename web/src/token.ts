// Adds the token of a private swarm's gateway to every request to this page's node that shows nothing else.

export function authorise (token: string): void {
  const plain = globalThis.fetch.bind(globalThis)
  globalThis.fetch = async (input, init) => {
    const request = new Request(input, init)
    const isOwn = new URL(request.url).origin === location.origin
    if (isOwn && !request.headers.has('authorization')) request.headers.set('authorization', `Bearer ${token}`)
    return await plain(request)
  }
}
