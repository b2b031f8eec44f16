import { memo } from 'react';
import { CopyButton } from './CopyButton.tsx';
import { Icon } from './Icon.tsx';
import { Markdown } from './Markdown.tsx';
import { type Message, textOf } from './message.ts';
import { ToolCall } from './ToolCall.tsx';

interface Props {
  message: Message;
  isStreaming: boolean;
  regenerate: (() => void) | undefined;
}

const ENDS = { cancelled: 'Stopped.', failed: 'This answer failed.' };

export const Answer = memo(function Answer({ message, isStreaming, regenerate }: Props) {
  const { parts, metadata } = message;
  const last = parts.findLastIndex(({ type }) => type !== 'step-start');
  const isSilent = isStreaming && (last < 0 || parts[last]?.type !== 'text');
  return (
    <article className={isStreaming ? 'answer streaming' : 'answer'} aria-busy={isStreaming} data-message={message.id}>
      <h2 className="unseen">Answer</h2>
      {parts.map((part, index) => {
        // A call's id is the model's own: two steps may use the same one, and it may look like an index. So both kinds of
        // part have their place as their key.
        if (part.type === 'text') {
          // biome-ignore lint/suspicious/noArrayIndexKey: only the end of the parts changes
          return <Markdown key={index} text={part.text} isStreaming={isStreaming && index === last} />;
        }
        if (part.type === 'dynamic-tool') {
          // biome-ignore lint/suspicious/noArrayIndexKey: only the end of the parts changes
          return <ToolCall key={index} part={part} />;
        }
        return null;
      })}
      {isSilent && <i className="pulse" />}
      {metadata?.status && <p className={`end ${metadata.status}`}>{ENDS[metadata.status]}</p>}
      {!isStreaming && (
        <div className="actions">
          <CopyButton what="message" text={() => textOf(message)} />
          {regenerate && (
            <button type="button" className="icon" onClick={regenerate} aria-label="Answer again">
              <Icon name="again" />
            </button>
          )}
          <Figures metadata={metadata} />
        </div>
      )}
    </article>
  );
});

function Figures({ metadata }: { metadata: Message['metadata'] }) {
  const tokens = metadata?.usage?.outputTokens;
  const said = [
    metadata?.model,
    tokens && `${tokens.toLocaleString('en')} tokens`,
    metadata?.seconds && `${metadata.seconds.toFixed(1)} s`,
  ].filter(Boolean);
  return said.length > 0 && <span className="quiet">{said.join(' · ')}</span>;
}
