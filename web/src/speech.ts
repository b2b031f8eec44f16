// What a screen reader is told of an answer while it comes: whole sentences, without the marks of Markdown.

/** How far a text has been told. */
export interface Told {
  next: number;
  isInCode: boolean;
}

export const NOTHING: Told = { next: 0, isInCode: false };

const SENTENCE = /[.!?…。！？]["')\]”’]*(?=\s)/g;

/** The sentences that are whole and were not told yet. Code is not read out, but said to be there. */
export function sentences(text: string, told: Told, isWhole: boolean): { said: string; told: Told } {
  const said: string[] = [];
  let { next, isInCode } = told;
  while (next < text.length) {
    const end = text.indexOf('\n', next);
    const line = text.slice(next, end < 0 ? text.length : end);
    const isLineWhole = end >= 0 || isWhole;
    if (!isLineWhole) {
      if (isInCode || /^\s*`/.test(line)) break; // it may be a fence
      const length = [...line.matchAll(SENTENCE)].reduce(
        (last, { index, 0: found }) => index + found.length || last,
        0,
      );
      said.push(line.slice(0, length));
      next += length;
      break;
    }
    if (/^\s*(```|~~~)/.test(line)) {
      isInCode = !isInCode;
      if (isInCode) said.push('Code.');
    } else if (!isInCode) {
      said.push(line);
    }
    next = end < 0 ? text.length : end + 1;
  }
  return { said: plain(said.join('\n')), told: { next, isInCode } };
}

/** Text as it is spoken. */
export function plain(markdown: string): string {
  return markdown
    .replace(/!?\[([^\]]*)\]\([^)]*\)/g, '$1')
    .replace(/^\s*(#{1,6}|>|[-*+]|\d+\.)\s+/gm, '')
    .replace(/^\s*\|?[\s:|-]+\|\s*$/gm, '')
    .replace(/[*_`~|]/g, ' ')
    .replace(/\s+/g, ' ')
    .trim();
}
