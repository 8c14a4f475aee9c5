/** Sound as it travels: 16-bit little-endian samples at Mimi's rate, one channel. */

export const RATE = 24000;
export const FRAME = 1920; // samples, 80 ms
export const FRAME_S = FRAME / RATE;
const SCALE = 32767;

/** Bytes of samples in -1 to 1, after one byte that says the kind of the message. */
export function encode(kind, samples) {
  const view = new DataView(new ArrayBuffer(1 + 2 * samples.length));
  view.setUint8(0, kind);
  samples.forEach((sample, n) => {
    view.setInt16(1 + 2 * n, Math.max(-1, Math.min(1, sample)) * SCALE, true);
  });
  return view.buffer;
}

/** The samples of a message, without its first byte. */
export function decode(message) {
  const view = new DataView(message, 1);
  return Float32Array.from({ length: view.byteLength >> 1 }, (_, n) => view.getInt16(2 * n, true) / SCALE);
}

/** How loud samples are, from 0 (-60 dB or less) to 1 (full scale). */
export function loudness(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  const decibels = 10 * Math.log10(sum / (samples.length || 1) + 1e-12);
  return Math.max(0, Math.min(1, 1 + decibels / 60));
}
