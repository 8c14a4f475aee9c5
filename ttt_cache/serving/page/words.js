/** What people are told. */

import { FRAME_S } from "./pcm.js";

export const READY = "Press Talk and speak.";
export const ASKING = "Waiting for the microphone …";
export const CONNECTING = "Connecting …";
export const TALKING = "Connected. Speak whenever you like.";
export const SLOW = "The sound has gaps: the server or the network is slower than speech.";
export const PAUSED = "The sound was stopped, by a locked screen or a call. Press Resume.";
export const ENDED = "The conversation has ended.";
export const LOST_MICROPHONE = "The microphone is gone. Press Talk to go on with another one.";
export const NO_ANSWER = "The server does not answer. Press Talk to try again.";
export const FULL = "All conversations are taken. Try again in a while.";
export const INSECURE =
  "Browsers give a microphone only to pages from https or localhost. This server needs --ssl, or a " +
  "proxy that speaks https; then open the page by its https address.";
export const OLD = "This browser is too old: it cannot give a page the microphone’s sound.";

/** By what `refusal` in server.js returns. */
export const REFUSED = {
  unreachable: NO_ANSWER,
  stopping: "The server is stopping and takes nobody in. Try again in a while.",
  token: "The server wants its token, and this is not it.",
  full: FULL,
  session: "The server cannot go on with that conversation. Press Talk to begin a new one.",
  refused: "The server refused the conversation. Press Talk to try again.",
};

const WAITING = {
  broke: "The connection broke. Going on in a moment …",
  unreachable: "The server does not answer. Trying again …",
  stopping: "The server is restarting. Trying again …",
  full: "All conversations are taken. Trying again …",
};

const CLOSED = {
  1000: ENDED,
  1001: "The server has stopped.",
  1006: "The connection broke.",
  1011: "The model has failed.",
  4001: "The conversation goes on in another window.",
};

const MICROPHONE = {
  NotAllowedError:
    "The microphone is not allowed. Allow it for this page, beside the address or in the browser’s " +
    "settings, and press Talk again.",
  NotFoundError: "There is no microphone. Connect one and press Talk again.",
  NotReadableError: "Another program holds the microphone. Close it and press Talk again.",
};

export function waiting(why) {
  return WAITING[why] ?? "Trying to go on …";
}

/** Why a conversation has ended; `kept`: the server has it still. */
export function closed(code, reason, kept) {
  const why = CLOSED[code] ?? `The server ended the conversation: ${reason || `code ${code}`}.`;
  if (code === 4001) return why;
  return `${why} ${kept ? "Press Talk to go on." : "Press Talk to begin a new one."}`;
}

/** What went wrong before there was sound. */
export function microphone(error) {
  return MICROPHONE[error.name] ?? `The sound cannot be used: ${error.message || error.name}`;
}

export function goneOn(lost) {
  if (lost * FRAME_S < 1) return "Going on where we were.";
  return `Going on. The last ${Math.round(lost * FRAME_S)} s were not saved; Moshi does not know of them.`;
}

/** "1:02:03" */
export function duration(frames) {
  const seconds = Math.floor(frames * FRAME_S + 1e-6);
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}

/** "72 MB" */
export function size(bytes) {
  const [unit, divisor] = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  const value = bytes / divisor;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
}
