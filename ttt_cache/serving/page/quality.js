/** Whether sound comes and goes too slowly, from the moments at which something was missing. */

const WINDOW_MS = 10000;
const MANY = 3; // faults within the window

export class Quality {
  constructor() {
    this.faults = [];
    this.gaps = 0;
  }

  fault() {
    this.faults.push(performance.now());
  }

  /** Take in how many gaps the speaker has counted so far. */
  counted(gaps) {
    for (; this.gaps < gaps; this.gaps++) this.fault();
  }

  get slow() {
    const since = performance.now() - WINDOW_MS;
    this.faults = this.faults.filter((at) => at > since);
    return this.faults.length >= MANY;
  }
}
