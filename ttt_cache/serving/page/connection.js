/** One websocket, in Moshi's protocol: a message's first byte says what it is. */

import { decode, encode } from "./pcm.js";
import { chat } from "./server.js";

const HANDSHAKE = 0, SOUND = 1, TEXT = 2, TOLD = 4;
const ABNORMAL = 1006;
const PATIENCE_MS = 10000; // for the handshake, and then for any message while sound is sent
const BEHIND = 96 * 1024; // bytes that wait to be sent: two seconds of sound

export class Connection {
  /**
   * @param asked `{session, token}`
   * @param on.told takes `{session, frames, state_bytes}`, when the server is ready
   * @param on.sound takes a Float32Array of samples
   * @param on.text takes a piece of text
   * @param on.closed takes the code, the reason and whether it had greeted; called once
   */
  constructor(asked, on) {
    this.on = on;
    this.greeted = false;
    this.heardAt = performance.now();
    this.late = setTimeout(() => this.drop(), PATIENCE_MS);
    const url = chat(asked);
    url.protocol = url.protocol.replace("http", "ws");
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.take(data);
    this.socket.onclose = ({ code, reason }) => this.ended(code, reason);
  }

  /** Send samples; returns false if they were left out, since the network is too slow for them. */
  send(samples) {
    if (!this.greeted || this.socket.readyState !== WebSocket.OPEN) return true;
    // A phone that changes its network is not told that its connection is dead.
    if (performance.now() - this.heardAt > PATIENCE_MS) this.drop();
    else if (this.socket.bufferedAmount > BEHIND) return false;
    else this.socket.send(encode(SOUND, samples));
    return true;
  }

  /** Take leave. */
  close() {
    this.release();
    this.socket.close(1000);
  }

  /** Give it up as dead, without waiting for the other side. */
  drop() {
    this.socket.close();
    this.ended(ABNORMAL, "");
  }

  take(message) {
    this.heardAt = performance.now();
    const kind = new Uint8Array(message)[0];
    if (kind === HANDSHAKE) {
      clearTimeout(this.late);
      this.greeted = true;
    } else if (kind === SOUND) this.on.sound(decode(message));
    else if (kind === TEXT) this.on.text(text(message));
    else if (kind === TOLD) this.on.told(JSON.parse(text(message)));
  }

  ended(code, reason) {
    this.release();
    this.on.closed(code, reason, this.greeted);
  }

  /** Nothing is called from now on. */
  release() {
    clearTimeout(this.late);
    this.socket.onmessage = this.socket.onclose = null;
  }
}

function text(message) {
  return new TextDecoder().decode(new Uint8Array(message, 1));
}
