/** The page: what is pressed, and what follows from it. */

import { loudness } from "./pcm.js";
import { Quality } from "./quality.js";
import { health } from "./server.js";
import { Sound } from "./sound.js";
import * as storage from "./storage.js";
import { Talk } from "./talk.js";
import { View } from "./view.js";
import * as words from "./words.js";

const KEPT_EVERY = 25; // frames between two notes of how far the conversation is
const view = new View();
let server = null; // what it says of itself
let running = null; // the conversation: its sound, talk, quality and lock of the screen

async function load() {
  view.token.value = storage.token();
  if (!navigator.mediaDevices?.getUserMedia || !window.AudioWorkletNode) {
    return view.show("idle", window.isSecureContext ? words.OLD : words.INSECURE, true);
  }
  server = await health();
  offer();
  view.enable();
  const full = server !== null && server.conversations >= server.rows;
  if (server === null) view.show("idle", words.NO_ANSWER, true);
  else view.show("idle", full ? words.FULL : words.READY, full);
}

function offer() {
  view.offer(Boolean(server?.token), server?.sessions ? storage.last() : null);
}

async function start() {
  const run = { quality: new Quality(), noted: 0 };
  const session = view.goesOn ? storage.last().session : "new";
  running = run;
  view.show("starting", words.CONNECTING);
  try {
    run.sound = new Sound(heard(run)); // before anything is waited for: it takes a tap or a key
    server = await health(); // it may have begun to want a token
    if (running !== run) return;
    if (server === null) return stop(words.NO_ANSWER, true);
    view.say(words.ASKING);
    await run.sound.open();
  } catch (error) {
    if (running === run) stop(words.microphone(error), true);
    return;
  }
  if (running !== run) return;
  view.say(words.CONNECTING);
  stayAwake();
  if (session === "new") {
    view.transcript.clear();
    view.time(0);
  }
  const asked = { session, token: server.token ? view.token.value : "" };
  run.talk = new Talk(asked, server.sessions, talked(run));
}

/** Show a conversation; while its sound is stopped, only that. */
function show(run, said, trouble = false) {
  if (!run.sound.runs) view.show("paused", words.PAUSED, true);
  else view.show(run.connected ? "talking" : "starting", said, trouble);
}

/** End what runs, and say why; `anew`: it cannot be gone on with now. */
function stop(said, trouble = false, anew = false) {
  const { sound, talk, lock } = running;
  running = null;
  note(talk);
  talk?.stop();
  sound?.close();
  lock?.release();
  offer();
  if (anew) view.beginAnew(); // its name is kept: the server may have it again later
  view.show("idle", said, trouble);
}

/** What the device's sound does with a conversation. */
function heard(run) {
  return {
    frame(samples) {
      if (running !== run || !run.talk) return;
      if (!run.talk.send(samples)) run.quality.fault();
      if (document.body.dataset.state === "talking") view.level("you", loudness(samples));
    },
    played(report) {
      if (running !== run || document.body.dataset.state !== "talking") return;
      view.sound(report);
      run.quality.counted(report.gaps);
      if (run.quality.slow) view.say(words.SLOW, true);
      else if (document.querySelector("#status.trouble")) view.say(words.TALKING);
    },
    changed() {
      if (running === run && run.talk) show(run, run.connected ? words.TALKING : words.CONNECTING);
    },
    lost() {
      if (running === run) stop(words.LOST_MICROPHONE, true);
    },
  };
}

/** What a conversation does with the page. */
function talked(run) {
  return {
    talking({ frames, lost, again }) {
      run.connected = true;
      run.sound.clear();
      if (run.talk.asked.token) storage.keepToken(run.talk.asked.token);
      view.token.removeAttribute("aria-invalid");
      view.offer(false, null);
      view.time(frames);
      view.memory(run.talk.bytes);
      note(run.talk);
      show(run, again || frames > 0 ? words.goneOn(lost) : words.TALKING);
    },
    waiting(why) {
      run.connected = false;
      show(run, words.waiting(why), true);
    },
    sound(samples) {
      run.sound.play(samples);
      view.time(run.talk.frames);
      if (run.talk.frames - run.noted >= KEPT_EVERY) {
        run.noted = run.talk.frames;
        note(run.talk);
      }
    },
    text(piece) {
      view.transcript.add(piece, run.talk.frames);
    },
    ended({ refused, code, reason }) {
      const kept = Boolean(server?.sessions);
      const said = refused ? words.REFUSED[refused] : words.closed(code, reason, kept);
      if (refused === "token") server = { ...server, token: true };
      stop(said, true, refused === "session");
      if (refused === "token") view.wrongToken();
    },
  };
}

/** Remember how far a conversation is, where it can be gone on with. */
function note(talk) {
  if (server?.sessions && talk?.name) storage.keepLast(talk.name, talk.frames);
}

/** A phone's screen that turns off would stop the sound. */
async function stayAwake() {
  const run = running;
  try {
    const lock = await navigator.wakeLock?.request("screen");
    if (running === run) run.lock = lock;
    else lock?.release();
  } catch {
    // Refused, for example while the battery is low.
  }
}

view.form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running === null) start();
  else if (document.body.dataset.state === "paused") running.sound.resume();
  else stop(words.ENDED);
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState !== "visible" || running === null) return;
  running.sound?.resume().catch(() => {}); // else the button does
  stayAwake(); // a lock ends when the page is hidden
});
load();
