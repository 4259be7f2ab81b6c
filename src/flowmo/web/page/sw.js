// Keeps the page's files, so that it works offline, and adds the two headers that threads need.

const CACHE = "flowmo";

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === self.location.origin) event.respondWith(answer(event));
});

async function answer(event) {
  const { request } = event;
  const cache = await caches.open(CACHE);
  const named = new URL(request.url).searchParams.has("v"); // by the hash of its content
  let response = named && request.cache !== "reload" && (await cache.match(request));
  try {
    response ||= await keep(cache, event);
  } catch (error) {
    response = await cache.match(request, { ignoreSearch: !named });
    if (!response) throw error;
  }
  if (response.status === 0) return response; // a redirect, which the browser follows
  const headers = new Headers(response.headers);
  if (!named) headers.set("Cache-Control", "no-cache"); // for the browser's memory, which does not ask this worker
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

// Fetches a file. Keeps it while the page reads it, or not at all if there is no room.
async function keep(cache, event) {
  const { url, redirect } = event.request;
  const named = new URL(url).searchParams.has("v");
  // servers seldom say how long a file lasts, and browsers then guess
  const response = await (named ? fetch(event.request) : fetch(url, { cache: "no-cache", redirect }));
  const store = async (copy) => {
    await cache.delete(event.request, { ignoreSearch: true });
    await cache.put(event.request, copy);
  };
  if (response.status === 200) event.waitUntil(store(response.clone()).catch(() => {}));
  return response;
}
