/** A conversation over as many connections as it takes. */

import { Connection } from "./connection.js";
import { FRAME } from "./pcm.js";
import { refusal } from "./server.js";

// Codes after which the server, or another one, may have the conversation: it stops, the network
// broke, the model failed, it restarts, it is busy.
const AGAIN = new Set([1001, 1006, 1011, 1012, 1013]);
// Why going on may fail at first and not later. A session is busy while a server that did
// not answer in time still takes it up.
const PASSING = new Set(["broke", "unreachable", "stopping", "full", "refused", "session"]);
const BREAKS = { 1001: "stopping", 1012: "stopping" };
const PAUSE_MS = 500;
const MOST_PAUSE_MS = 8000;
const SESSION_TRIES = 3;
const GIVE_UP_MS = 120000;
const SETTLED = 60; // frames after which the next break is a new one

export class Talk {
  /**
   * @param asked `{session, token}`
   * @param keeps whether the server keeps sessions: without, a connection's end is the end
   * @param on.talking takes `{frames, lost, again}`: the server is ready. `lost` frames were not
   *   saved, `again`: it goes on
   * @param on.waiting takes why it is not connected, a key of `REFUSED`
   * @param on.ended takes `{code, reason}` or `{refused}`; called once
   * @param on.sound, on.text as of a connection
   */
  constructor(asked, keeps, on) {
    this.asked = asked;
    this.keeps = keeps;
    this.on = on;
    this.frames = 0; // of the conversation, those before it was gone on with included
    this.bytes = null;
    this.name = null;
    this.here = 0; // frames of this connection
    this.tries = 0;
    this.brokeAt = null;
    this.connect();
  }

  send(samples) {
    return this.connection.send(samples);
  }

  stop() {
    clearTimeout(this.pause);
    this.stopped = true;
    this.connection.close();
  }

  connect() {
    this.here = 0;
    this.connection = new Connection(this.asked, {
      told: (told) => this.told(told),
      sound: (samples) => this.sound(samples),
      text: this.on.text,
      closed: (...how) => this.closed(...how),
    });
  }

  told({ session, frames, state_bytes }) {
    const again = this.brokeAt !== null;
    const lost = again ? Math.max(0, this.frames - frames) : 0;
    this.name = session;
    this.frames = frames;
    this.bytes = state_bytes;
    this.asked = { ...this.asked, session };
    this.on.talking({ frames, lost, again });
  }

  sound(samples) {
    this.frames += samples.length / FRAME;
    this.here += samples.length / FRAME;
    if (this.here > SETTLED) {
      this.brokeAt = null;
      this.tries = 0;
    }
    this.on.sound(samples);
  }

  async closed(code, reason, greeted) {
    const begun = this.name !== null; // else there is nothing to go on with
    if (greeted && !(begun && this.keeps && AGAIN.has(code))) return this.on.ended({ code, reason });
    this.brokeAt ??= performance.now();
    const why = greeted ? (BREAKS[code] ?? "broke") : await refusal(this.asked);
    if (this.stopped) return;
    if (!this.mayPass(why, begun)) return this.on.ended(greeted ? { code, reason } : { refused: why });
    this.on.waiting(why);
    const pause = Math.min(MOST_PAUSE_MS, PAUSE_MS * 2 ** this.tries++);
    // Not all at once: they may be the clients of a server that has just died.
    this.pause = setTimeout(() => this.connect(), pause * (0.5 + Math.random()));
  }

  mayPass(why, begun) {
    if (!begun || !PASSING.has(why) || performance.now() - this.brokeAt > GIVE_UP_MS) return false;
    return why !== "session" || this.tries < SESSION_TRIES;
  }
}
