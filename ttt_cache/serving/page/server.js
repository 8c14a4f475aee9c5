/** The server's addresses, and what it says of itself. */

const PATIENCE_MS = 5000;

/** Where a conversation is: `session` is a name or "new". */
export function chat({ session, token }) {
  const url = new URL("api/chat", document.baseURI);
  url.search = new URLSearchParams({ codec: "pcm", session, ...(token && { token }) });
  return url;
}

/** `{status, conversations, rows, sessions, token}`; null if the server does not answer. */
export async function health() {
  try {
    return await (await ask(new URL("health", document.baseURI))).json();
  } catch {
    return null;
  }
}

/**
 * Why a conversation was refused, as a key of `REFUSED` in words.js.
 *
 * A browser does not tell a page with which status its websocket was refused.
 */
export async function refusal(asked) {
  const server = await health();
  if (server === null) return "unreachable";
  if (server.status !== "ok") return "stopping";
  try {
    // The same address without a websocket: 401, or that it wants a websocket.
    if (server.token && (await ask(chat(asked))).status === 401) return "token";
  } catch {
    return "unreachable";
  }
  if (server.conversations >= server.rows) return "full";
  return asked.session === "new" ? "refused" : "session";
}

function ask(url) {
  return fetch(url, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
}
