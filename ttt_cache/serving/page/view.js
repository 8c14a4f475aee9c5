/** What is seen. */

import { Transcript } from "./transcript.js";
import { duration, size } from "./words.js";

const BUTTON = { idle: "Talk", starting: "Stop", talking: "Stop", paused: "Resume" };
const get = (id) => document.getElementById(id);

export class View {
  constructor() {
    this.form = get("form");
    this.token = get("token");
    this.transcript = new Transcript(get("text"));
  }

  /**
   * @param state idle, starting, talking or paused
   * @param said a sentence; @param trouble whether it is one that somebody must act on
   */
  show(state, said, trouble = false) {
    document.body.dataset.state = state;
    get("talk").textContent = BUTTON[state];
    this.say(said, trouble);
    if (state !== "talking") {
      this.level("you", 0);
      this.level("moshi", 0);
    }
  }

  say(said, trouble = false) {
    if (get("status").textContent === said) return; // a screen reader would say it again
    get("status").textContent = said;
    get("status").classList.toggle("trouble", trouble);
  }

  enable() {
    get("talk").disabled = false;
  }

  /**
   * What can be chosen before a conversation.
   *
   * @param wanted whether a token is, @param last the last conversation or null
   */
  offer(wanted, last) {
    get("token-field").hidden = !wanted;
    get("again").hidden = last === null;
    if (last !== null) get("last").textContent = `(${duration(last.frames)})`;
  }

  get goesOn() {
    return !get("again").hidden && get("go-on").checked;
  }

  /** Unless the user asks again to go on. */
  beginAnew() {
    get("go-on").checked = false;
  }

  /** Ask for another token. */
  wrongToken() {
    this.token.setAttribute("aria-invalid", "true");
    this.token.focus();
    this.token.select();
  }

  level(who, value) {
    get(who).style.setProperty("--level", value);
    get(who).setAttribute("aria-valuenow", Math.round(100 * value));
  }

  time(frames) {
    const text = duration(frames);
    if (get("time").textContent !== text) get("time").textContent = text;
  }

  memory(bytes) {
    get("memory").textContent = size(bytes);
  }

  sound({ level, played, buffered, gaps, dropped }) {
    this.level("moshi", level);
    get("played").textContent = `${played.toFixed(1)} s`;
    get("buffered").textContent = `${buffered.toFixed(2)} s`;
    get("gaps").textContent = gaps;
    get("dropped").textContent = `${dropped.toFixed(1)} s`;
  }
}
