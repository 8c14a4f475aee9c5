/**
 * Sound that waits to be played: enough of it that a late frame is not heard as a gap.
 *
 * It starts once `target` seconds wait. After a gap more is kept; what comes in a burst after a
 * stall is left out, so that the answer does not lag behind for the rest of the conversation.
 */

const TARGET = 0.16; // two frames
const STEP = 0.08; // more after each gap
const MOST_TARGET = 0.48;
const SLACK = 0.6; // above the target before something is left out

export class JitterBuffer {
  /** @param {number} rate samples a second */
  constructor(rate) {
    this.rate = rate;
    this.target = TARGET;
    this.gaps = 0;
    this.dropped = 0; // samples
    this.played = 0; // samples
    this.clear();
  }

  /** Forget what waits: the next sound belongs to another connection. */
  clear() {
    this.parts = [];
    this.waiting = 0; // samples
    this.playing = false;
  }

  push(samples) {
    this.parts.push(samples);
    this.waiting += samples.length;
    if (this.waiting > (this.target + SLACK) * this.rate) {
      this.dropped += this.skip(this.waiting - Math.round(this.target * this.rate));
    }
  }

  /** Fill a Float32Array with what is next; silence where there is nothing. */
  take(out) {
    if (!this.playing && this.waiting < this.target * this.rate) return;
    this.playing = true;
    let filled = 0;
    while (filled < out.length && this.parts.length) {
      const part = this.parts[0].subarray(0, out.length - filled);
      out.set(part, filled);
      filled += this.skip(part.length);
    }
    this.played += filled;
    if (filled < out.length) {
      this.playing = false;
      this.gaps += 1;
      this.target = Math.min(MOST_TARGET, this.target + STEP);
    }
  }

  /** Remove the oldest `count` samples; returns how many. */
  skip(count) {
    let left = count;
    while (left > 0) {
      const part = this.parts[0];
      if (part.length <= left) this.parts.shift();
      else this.parts[0] = part.subarray(left);
      left -= Math.min(left, part.length);
    }
    this.waiting -= count;
    return count;
  }
}
