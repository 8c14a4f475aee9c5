/**
 * From one rate to another, in a stream.
 *
 * Browsers disagree on contexts of another rate than the device's: one refuses to connect a
 * microphone, another distorts. So the page takes the device's rate and does this itself.
 */

const CROSSINGS = 16; // of the sinc on either side
const PASSED = 0.94; // of the lower of both bands; the rest is for the filter's slope

export class Resampler {
  /** @param {number} from samples a second  @param {number} to samples a second */
  constructor(from, to) {
    const common = divisor(from, to);
    this.up = to / common;
    this.down = from / common;
    this.filters = makeFilters(this.up, Math.min(1, to / from) * PASSED);
    this.taps = this.filters[0].length;
    this.rest = new Float32Array(this.taps / 2 - 1);
    this.at = 0; // of the next sample, in 1 / up samples of what is taken in
  }

  /** The samples, a Float32Array, that these complete. */
  process(samples) {
    const all = new Float32Array(this.rest.length + samples.length);
    all.set(this.rest);
    all.set(samples, this.rest.length);
    const end = (all.length - this.taps + 1) * this.up;
    const made = new Float32Array(Math.max(0, Math.ceil((end - this.at) / this.down)));
    for (let n = 0; n < made.length; n++, this.at += this.down) {
      const filter = this.filters[this.at % this.up];
      const first = Math.floor(this.at / this.up);
      let sum = 0;
      for (let k = 0; k < this.taps; k++) sum += filter[k] * all[first + k];
      made[n] = sum;
    }
    const used = Math.min(all.length, Math.floor(this.at / this.up));
    this.rest = all.slice(used);
    this.at -= used * this.up;
    return made;
  }
}

/** Windowed sincs, one for each place that a sample may have between two others. */
function makeFilters(places, cutoff) {
  const half = Math.ceil(CROSSINGS / cutoff);
  return Array.from({ length: places }, (_, place) => {
    const filter = Float32Array.from({ length: 2 * half }, (_, k) => {
      const x = k - (half - 1) - place / places;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / half);
      return x === 0 ? 1 : (window * Math.sin(Math.PI * cutoff * x)) / (Math.PI * cutoff * x);
    });
    const sum = filter.reduce((a, b) => a + b);
    return filter.map((weight) => weight / sum);
  });
}

function divisor(a, b) {
  return b === 0 ? a : divisor(b, a % b);
}
