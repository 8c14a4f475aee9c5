/** What the browser keeps: the last conversation, and until the tab is closed the token. */

const LAST = "ttt-cache-last";
const TOKEN = "ttt-cache-token";

/** `{session, frames}`, or null. */
export function last() {
  try {
    return JSON.parse(localStorage.getItem(LAST));
  } catch {
    return null; // a browser that keeps nothing, or what is kept is not ours
  }
}

export function keepLast(session, frames) {
  keep(() => localStorage.setItem(LAST, JSON.stringify({ session, frames })));
}

export function token() {
  try {
    return sessionStorage.getItem(TOKEN) ?? "";
  } catch {
    return "";
  }
}

export function keepToken(value) {
  keep(() => sessionStorage.setItem(TOKEN, value));
}

function keep(work) {
  try {
    work();
  } catch {
    // A browser may be told to keep nothing: the page works without.
  }
}
