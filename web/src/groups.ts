import type { Message } from './message.ts';

const TOGETHER = 8; // questions, on average

/** The messages in groups that stay as they are when older ones come before them and newer ones behind: where one begins
 * is decided by its first message alone. */
export function groups(messages: readonly Message[]): Message[][] {
  const all: Message[][] = [];
  for (const message of messages) {
    const open = all.at(-1);
    if (open === undefined || begins(message)) all.push([message]);
    else open.push(message);
  }
  return all;
}

function begins({ id, role }: Message): boolean {
  return role === 'user' && id.charCodeAt(id.length - 1) % TOGETHER === 0;
}
