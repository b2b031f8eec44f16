import assert from 'node:assert/strict';
import { test } from 'node:test';
import { hashOf, idIn } from '../src/route.ts';
import { nextWait, pause } from '../src/waits.ts';

test('waits grow, within bounds, and differ', () => {
  assert.equal(
    nextWait(0, () => 1),
    150,
  );
  assert.equal(
    nextWait(2, () => 1),
    600,
  );
  assert.equal(
    nextWait(99, () => 1),
    5000,
  );
  assert.equal(
    nextWait(99, () => 0),
    2500,
  );
});

test('a wait ends with its signal', async () => {
  await pause(60_000, AbortSignal.abort());
  const stop = new AbortController();
  const waited = pause(60_000, stop.signal);
  stop.abort();
  await waited;
});

test('a conversation is in the address, whatever its id', () => {
  for (const id of ['plain', 'with space', 'a&c=b', '#%41', 'é…']) assert.equal(idIn(hashOf(id)), id);
  assert.equal(idIn(hashOf(null)), null);
  assert.equal(idIn('#token=x'), null);
});
