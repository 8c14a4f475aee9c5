/** Plays what arrives in frames of Mimi's rate, and says now and then how that goes. */

import { JitterBuffer } from "./jitter.js";
import { RATE, loudness } from "./pcm.js";
import { Resampler } from "./resample.js";

const REPORT_S = 0.08;

class SpeakerProcessor extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(RATE, sampleRate);
    this.buffer = new JitterBuffer(sampleRate);
    this.loudest = 0;
    this.since = 0; // samples
    this.port.onmessage = ({ data }) => {
      if (data === "clear") this.buffer.clear();
      else this.buffer.push(this.resampler.process(data));
    };
  }

  process(_, [[out]]) {
    this.buffer.take(out);
    this.loudest = Math.max(this.loudest, loudness(out));
    this.since += out.length;
    if (this.since >= REPORT_S * sampleRate) this.report();
    return true;
  }

  report() {
    const { played, waiting, gaps, dropped } = this.buffer;
    this.port.postMessage({
      level: this.loudest,
      played: played / sampleRate,
      buffered: waiting / sampleRate,
      gaps,
      dropped: dropped / sampleRate,
    });
    this.loudest = this.since = 0;
  }
}

registerProcessor("speaker", SpeakerProcessor);
