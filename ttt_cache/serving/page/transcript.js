/** The text as it comes, in paragraphs. */

const PAUSE = 25; // frames without text after which a paragraph begins, 2 s
const NEAR = 40; // pixels from the end that count as at the end
const MOST = 300; // paragraphs: hours of talk must not fill the browser's memory

export class Transcript {
  constructor(element) {
    this.element = element;
    this.follows = true; // the newest words; whoever reads further up is left there
    element.onscroll = () => {
      this.follows = element.scrollHeight - element.scrollTop - element.clientHeight < NEAR;
    };
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.paragraph = null;
    this.at = 0;
  }

  /** @param {string} piece  @param {number} frame of the conversation */
  add(piece, frame) {
    const { element } = this;
    if (this.paragraph === null || Math.abs(frame - this.at) > PAUSE) {
      this.paragraph = document.createElement("p");
      element.append(this.paragraph);
      if (element.children.length > MOST) element.firstChild.remove();
    }
    this.paragraph.append(piece);
    this.paragraph.normalize(); // one node of text, not one for each piece
    this.at = frame;
    if (this.follows) element.scrollTop = element.scrollHeight;
  }
}
