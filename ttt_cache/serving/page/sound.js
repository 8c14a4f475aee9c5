/** The device's sound: a microphone and a speaker at one clock. */

export class Sound {
  /**
   * Call it from a tap or a key: browsers give sound to nothing else.
   *
   * @param on.frame takes 80 ms of the microphone, a Float32Array
   * @param on.played takes a report of the speaker
   * @param on.changed is called when sound stops or runs again: a phone that locks stops it
   * @param on.lost is called when the microphone is gone
   */
  constructor(on) {
    this.on = on;
    this.closed = false;
    this.context = new AudioContext({ latencyHint: "interactive" });
    this.context.onstatechange = () => this.on.changed();
    this.context.resume(); // not awaited: where it was no gesture it never ends
  }

  get runs() {
    return this.context.state === "running";
  }

  /** Ask for the microphone and begin; throws what the browser says of the microphone. */
  async open() {
    const { context } = this;
    this.stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
    if (this.closed) return this.close(); // while somebody was asked
    for (const track of this.stream.getTracks()) track.onended = () => this.on.lost();
    const modules = ["microphone-worklet.js", "speaker-worklet.js"];
    await Promise.all(modules.map((name) => context.audioWorklet.addModule(new URL(name, import.meta.url))));
    if (this.closed) return;
    const mono = { channelCount: 1, channelCountMode: "explicit", outputChannelCount: [1] };
    const microphone = new AudioWorkletNode(context, "microphone", mono);
    this.speaker = new AudioWorkletNode(context, "speaker", { ...mono, numberOfInputs: 0 });
    microphone.port.onmessage = ({ data }) => this.on.frame(data);
    this.speaker.port.onmessage = ({ data }) => this.on.played(data);
    context.createMediaStreamSource(this.stream).connect(microphone);
    microphone.connect(context.destination); // silent; some browsers run only what leads there
    this.speaker.connect(context.destination);
  }

  play(samples) {
    this.speaker?.port.postMessage(samples, [samples.buffer]);
  }

  /** Forget what waits to be played. */
  clear() {
    this.speaker?.port.postMessage("clear");
  }

  resume() {
    return this.context.resume();
  }

  close() {
    this.closed = true;
    this.context.onstatechange = null;
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    if (this.context.state !== "closed") this.context.close();
  }
}
