import { memo, useState } from 'react';
import { CopyButton } from './CopyButton.tsx';
import { type Message, textOf } from './message.ts';

const LONG = { characters: 900, lines: 14 };

/** What the user said: text, and never markup. */
export const Question = memo(function Question({ message }: { message: Message }) {
  const text = textOf(message);
  const isLong = text.length > LONG.characters || text.split('\n').length > LONG.lines;
  const [isWhole, setIsWhole] = useState(false);
  return (
    <article className="question" data-message={message.id}>
      <h2 className="unseen">You</h2>
      <div className={isLong && !isWhole ? 'bubble folded' : 'bubble'}>
        <p>{text}</p>
        {isLong && (
          <button type="button" aria-expanded={isWhole} onClick={() => setIsWhole(!isWhole)}>
            {isWhole ? 'Show less' : 'Show all'}
          </button>
        )}
      </div>
      <div className="actions">
        <CopyButton what="message" text={() => text} />
      </div>
    </article>
  );
});
