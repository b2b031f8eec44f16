// Long texts in pieces: what has been read of an answer stays as it is, however long the answer becomes.

const LENGTH_MIN = 4000; // characters of a piece that is done
const BEYOND = 1500; // that must have come after it: Markdown may look back

// What ties distant parts of a text together: footnotes, and links whose addresses are elsewhere.
const TIES = /^ {0,3}\[[^\]\n]+\]:/m;
// The beginning of a paragraph or heading at the left margin ends whatever was open before, but for a fence of code.
const BEGINS = /^(?:#{1,6} |[^\s#>|\-+*=_~`\d<[:(])/;
const FENCE = /^ {0,3}(`{3,}|~{3,})/;

/** The text in pieces, in order, each a whole number of Markdown's blocks, but for the last one. A text that has grown is
 * cut where it was cut `before`. */
export function segments(text: string, before: readonly string[] = []): string[] {
  const kept = before.slice(0, -1);
  const start = kept.reduce((length, piece) => length + piece.length, 0);
  const isGrown = kept.length > 0 && text.startsWith(kept.join(''));
  const pieces = isGrown ? [...kept] : [];
  let begin = isGrown ? start : 0;
  if (text.length - begin < LENGTH_MIN + BEYOND || TIES.test(text)) return [...pieces, text.slice(begin)];
  for (let cut = nextCut(text, begin); cut !== null; cut = nextCut(text, begin)) {
    pieces.push(text.slice(begin, cut));
    begin = cut;
  }
  return [...pieces, text.slice(begin)];
}

/** Where the piece that begins here ends, if enough of what follows is known. */
function nextCut(text: string, begin: number): number | null {
  let fence: string | null = null;
  let isAfterBlank = false;
  for (let at = begin; at < text.length - BEYOND; ) {
    const end = text.indexOf('\n', at);
    if (end < 0) return null;
    const line = text.slice(at, end);
    const mark = FENCE.exec(line)?.[1];
    if (fence !== null) {
      if (mark?.startsWith(fence) && line.trim() === mark) fence = null;
    } else if (mark) {
      fence = mark;
    } else if (isAfterBlank && at - begin >= LENGTH_MIN && BEGINS.test(line)) {
      return at;
    }
    isAfterBlank = fence === null && line.trim() === '';
    at = end + 1;
  }
  return null;
}
