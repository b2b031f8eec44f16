import assert from 'node:assert/strict';
import { test } from 'node:test';
import { segments } from '../src/segments.ts';

const paragraph = `${'word '.repeat(100).trim()}\n\n`;
const long = paragraph.repeat(60);

test('short texts are one piece', () => {
  assert.deepEqual(segments('short'), ['short']);
  assert.deepEqual(segments(''), ['']);
});

test('pieces are the whole text, and begin where blocks do', () => {
  const pieces = segments(long);
  assert.equal(pieces.join(''), long);
  assert.ok(pieces.length > 4);
  for (const piece of pieces.slice(0, -1)) assert.ok(piece.endsWith('\n\n') && piece.length < 5000);
});

test('a text that grows is cut where it would be cut at once', () => {
  let pieces: string[] = [];
  for (let length = 0; length <= long.length; length += 37) {
    const grown = segments(long.slice(0, length), pieces);
    assert.deepEqual(grown.slice(0, pieces.length - 1), pieces.slice(0, -1), 'what is done stays');
    pieces = grown;
  }
  assert.deepEqual(segments(long, pieces), segments(long));
});

test('code, lists, tables and quotes are not cut', () => {
  const code = `${'```'}\n${'line\n\nAnother\n'.repeat(600)}${'```'}\n\n`;
  for (const block of [code, '- item\n\n  more\n\n'.repeat(500), `| a |\n|---|\n${'| b |\n'.repeat(1500)}\n`]) {
    const pieces = segments(block + long);
    assert.equal(pieces.join(''), block + long);
    assert.ok(pieces[0]?.startsWith(block), block.slice(0, 20));
  }
});

test('a fence is closed by its own kind only', () => {
  const text = `~~~~\n${'```\n\nText\n\n'.repeat(600)}~~~~\n\n`;
  assert.ok(segments(text + long)[0]?.startsWith(text));
});

test('texts with footnotes and link definitions stay whole', () => {
  assert.equal(segments(`${long}[^1]: a note\n`).length, 1);
  assert.equal(segments(`${long}[name]: https://example.org\n`).length, 1);
});

test('another text is cut afresh', () => {
  const other = long.replaceAll('word', 'term');
  assert.deepEqual(segments(other, segments(long)), segments(other));
  assert.deepEqual(segments('short', segments(long)), ['short']);
});
