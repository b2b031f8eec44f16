import assert from 'node:assert/strict';
import { test } from 'node:test';
import { groups } from '../src/groups.ts';
import { isBeginning, type Message, sizeOf, steady, textOf, withNewest } from '../src/message.ts';

const says = (id: string, text: string, role: 'user' | 'assistant' = 'assistant'): Message => ({
  id,
  role,
  parts: [{ type: 'step-start' }, { type: 'text', text }],
});
const [a, b, c, d] = ['a', 'b', 'c', 'd'].map((id) => says(id, id)) as [Message, Message, Message, Message];

test('the newest messages take the place of those that were known', () => {
  const newer = says('b', 'newer');
  assert.deepEqual(withNewest([a, b], [newer, c], false), [a, newer, c]);
  assert.deepEqual(withNewest([a, b, c], [newer], false), [a, newer]);
  assert.deepEqual(withNewest([a, b], [c, d], false), [c, d]);
  assert.deepEqual(withNewest([a, b], [b], true), [b]);
  assert.deepEqual(withNewest([a], [], true), []);
});

test('an answer that is streamed again is shown when it has caught up', () => {
  const [long, short] = [says('x', 'as it was'), says('x', 'as')];
  assert.equal(steady(long, short), long);
  assert.equal(steady(short, long), long);
  assert.equal(steady(long, says('y', '')).id, 'y');
  assert.equal(steady(undefined, short), short);
});

test('an answer that says the same again has not changed, however little it says yet', () => {
  const call = (toolName: string) => ({
    type: 'dynamic-tool' as const,
    toolName,
    toolCallId: toolName,
    state: 'input-available' as const,
    input: {},
  });
  const whole = says('x', 'Let me see.');
  whole.parts.push(call('search'), { type: 'text', text: 'There.' });
  const cut = (parts: number, text?: string): Message => {
    const message = structuredClone({ ...whole, parts: whole.parts.slice(0, parts) });
    const last = message.parts.at(-1);
    if (last?.type === 'text' && text !== undefined) last.text = text;
    return message;
  };
  for (const same of [cut(0), cut(1), cut(2, ''), cut(2, 'Let'), cut(2), cut(3), cut(4, 'The'), whole]) {
    assert.ok(isBeginning(same, whole));
  }
  const shorter = cut(4, 'There.');
  shorter.parts[1] = { type: 'text', text: 'Let' };
  const other = cut(3);
  other.parts[2] = call('read');
  const early = cut(2);
  early.parts[1] = call('search');
  for (const changed of [cut(2, 'Now'), shorter, other, early]) assert.ok(!isBeginning(changed, whole));
  assert.ok(!isBeginning(whole, cut(3)));
});

test('what a message says is its text, and its size grows with what it shows', () => {
  const message = says('x', 'one');
  message.parts.push({ type: 'text', text: 'two' });
  assert.equal(textOf(message), 'one\n\ntwo');
  assert.equal(sizeOf(message), 7);
});

test('groups stay as they are when messages come before and behind', () => {
  const all = Array.from({ length: 400 }, (_, at) =>
    says(`id-${(at * 7919) % 1000}`, '', at % 2 ? 'assistant' : 'user'),
  );
  const first = (messages: Message[]) => groups(messages).map((group) => group[0]?.id);
  assert.deepEqual(groups(all).flat(), all);
  assert.ok(groups(all).length > 10);
  assert.deepEqual(first(all.slice(100)).slice(1), first(all).slice(-(first(all.slice(100)).length - 1)));
  assert.deepEqual(first(all.slice(0, 300)), first(all).slice(0, first(all.slice(0, 300)).length));
});
