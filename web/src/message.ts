// Messages as the AI SDK shows them, and what the page reads of them.
import type { DynamicToolUIPart, UIMessage } from 'ai';

export interface Metadata {
  status?: 'cancelled' | 'failed';
  model?: string;
  seconds?: number;
  usage?: { inputTokens?: number; outputTokens?: number };
}

export type Message = UIMessage<Metadata>;

export type ToolPart = DynamicToolUIPart;

/** All that a message says, steps apart. */
export function textOf(message: Message): string {
  return message.parts.flatMap((part) => (part.type === 'text' && part.text ? [part.text] : [])).join('\n\n');
}

/** How much of a message there is, in characters and calls: grows while it is streamed. */
export function sizeOf(message: Message): number {
  return message.parts.reduce((size, part) => size + (part.type === 'text' ? part.text.length : 1), 0);
}

/** Messages with their newest ones as the server has them, which may be more, or others. */
export function withNewest(known: readonly Message[], newest: readonly Message[], isAll: boolean): Message[] {
  const first = newest[0];
  if (isAll || first === undefined) return [...newest];
  const at = known.findIndex(({ id }) => id === first.id);
  return [...(at < 0 ? [] : known.slice(0, at)), ...newest];
}

/** A message that is streamed once more from its beginning is shown as it was until it has as much again. */
export function steady(before: Message | undefined, now: Message): Message {
  return before?.id === now.id && sizeOf(now) < sizeOf(before) ? before : now;
}

/** Whether all that a message has is how another one begins. */
export function isBeginning(message: Message, whole: Message): boolean {
  return message.parts.every((part, at) => {
    const other = whole.parts[at];
    if (part.type === 'text') {
      const isLast = at === message.parts.length - 1;
      return other?.type === 'text' && (isLast ? other.text.startsWith(part.text) : other.text === part.text);
    }
    if (part.type === 'dynamic-tool') return other?.type === 'dynamic-tool' && other.toolName === part.toolName;
    return other?.type === part.type;
  });
}
