// Keeps the page's files, so that it works offline, and adds the two headers that threads need.

const CACHE = "flowmo";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === self.location.origin) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const named = new URL(request.url).searchParams.has("v"); // by the hash of its content
  let response = named && (await cache.match(request));
  try {
    response ||= await keep(cache, request);
  } catch (error) {
    response = await cache.match(request);
    if (!response) throw error;
  }
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function keep(cache, request) {
  const response = await fetch(request);
  if (response.status === 200) {
    await cache.delete(request, { ignoreSearch: true });
    await cache.put(request, response.clone());
  }
  return response;
}
