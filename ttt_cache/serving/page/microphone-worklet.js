/** Makes frames of Mimi's rate of what the microphone hears. */

import { FRAME, RATE } from "./pcm.js";
import { Resampler } from "./resample.js";

class MicrophoneProcessor extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.frame = new Float32Array(FRAME);
    this.filled = 0;
  }

  process([[heard]]) {
    // While a microphone is muted by the system, a browser may give no channel at all.
    for (const sample of heard ? this.resampler.process(heard) : []) {
      this.frame[this.filled++] = sample;
      if (this.filled === FRAME) {
        this.port.postMessage(this.frame.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", MicrophoneProcessor);
