import assert from 'node:assert/strict';
import { test } from 'node:test';
import { NOTHING, plain, sentences, type Told } from '../src/speech.ts';

/** All that is told of a text that comes in pieces of so many characters. */
function told(text: string, step: number): string[] {
  const all: string[] = [];
  let state: Told = NOTHING;
  for (let length = 0; length < text.length + step; length += step) {
    const next = sentences(text.slice(0, length), state, length >= text.length);
    state = next.told;
    if (next.said) all.push(next.said);
  }
  return all;
}

const TEXT = 'One is **here**. Two is not yet? Three\nis a line\n\n```py\nx = 1. \ny\n```\n\n- an item\n\nThe end';
const SPOKEN = 'One is here . Two is not yet? Three is a line Code. an item The end';

test('sentences are told when they are whole, and once', () => {
  for (const step of [1, 2, 3, 7, 200]) assert.equal(told(TEXT, step).join(' ').replace(/\s+/g, ' '), SPOKEN);
});

test('no half of a sentence is told before its end', () => {
  for (const said of told(TEXT, 1).slice(0, 2)) assert.match(said, /[.?]$/);
  assert.equal(sentences('Not a whole', NOTHING, false).said, '');
  assert.equal(sentences('Version 1.5 is', NOTHING, false).said, '');
});

test('marks are not spoken', () => {
  assert.equal(plain('## A [link](https://example.org) and `code`'), 'A link and code');
  assert.equal(plain('| a | b |\n|---|---|\n| 1 | 2 |'), 'a b 1 2');
});
