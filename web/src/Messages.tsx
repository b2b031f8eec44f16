import { memo } from 'react';
import { Answer } from './Answer.tsx';
import type { Conversation } from './conversation.ts';
import { groups } from './groups.ts';
import type { Message } from './message.ts';
import { Older } from './Older.tsx';
import { Question } from './Question.tsx';
import { useOutOfSight } from './useOutOfSight.ts';

interface Props {
  conversation: Conversation;
  messages: Message[];
  isBusy: boolean;
  regenerate: () => void;
}

export function Messages({ conversation, messages, isBusy, regenerate }: Props) {
  const all = groups(messages);
  return (
    <>
      <Older conversation={conversation} first={messages[0]?.id} />
      <div role="log" aria-live="off" aria-busy={isBusy} aria-label="Conversation">
        {all.map((group) => {
          const isLast = group === all.at(-1);
          return (
            <Group
              key={group[0]?.id}
              messages={group}
              isStreaming={isBusy && isLast}
              isPast={isBusy && !isLast}
              regenerate={isLast && !isBusy ? regenerate : undefined}
            />
          );
        })}
        {isBusy && messages.at(-1)?.role === 'user' && <i className="pulse" />}
      </div>
    </>
  );
}

interface GroupProps {
  messages: Message[];
  isStreaming: boolean;
  isPast: boolean; // above an answer that grows
  regenerate: (() => void) | undefined;
}

/** Neighbours: while the last message grows, nothing of other groups is looked at but whether they are the same. */
const Group = memo(
  function Group({ messages, isStreaming, isPast, regenerate }: GroupProps) {
    const box = useOutOfSight(isPast);
    return (
      <div ref={box} className="group">
        {messages.map((message) => {
          const isLast = message === messages.at(-1);
          if (message.role === 'user') return <Question key={message.id} message={message} />;
          if (message.role !== 'assistant') return null; // instructions are the model's
          return (
            <Answer
              key={message.id}
              message={message}
              isStreaming={isStreaming && isLast}
              regenerate={isLast ? regenerate : undefined}
            />
          );
        })}
      </div>
    );
  },
  (before, now) =>
    before.isStreaming === now.isStreaming &&
    before.isPast === now.isPast &&
    before.regenerate === now.regenerate &&
    before.messages.length === now.messages.length &&
    before.messages.every((message, at) => message === now.messages[at]),
);
