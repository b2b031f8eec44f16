import { useChat } from '@ai-sdk/react';
import { useCallback, useEffect, useState } from 'react';
import { Composer, focusComposer } from './Composer.tsx';
import type { Conversation } from './conversation.ts';
import { Empty } from './Empty.tsx';
import { Icon } from './Icon.tsx';
import { Messages } from './Messages.tsx';
import { Problem } from './Problem.tsx';
import { Spoken } from './Spoken.tsx';
import { StatusLine } from './StatusLine.tsx';
import { useStore } from './store.ts';
import { useBottom } from './useBottom.ts';
import { useSteady } from './useSteady.ts';

const FRAME_MS = 50; // how often text is painted while it streams: 20 times a second is smooth, and calm

interface Props {
  conversation: Conversation;
  onAsk: () => void;
  onStreaming: () => void;
}

export function ConversationView({ conversation, onAsk, onStreaming }: Props) {
  const { messages, status, error } = useChat({ chat: conversation.chat, throttle: FRAME_MS });
  const loading = useStore(conversation.loading);
  const [draft, setDraft] = useState('');
  const [isStopping, setIsStopping] = useState(false);
  const isLost = error instanceof TypeError;
  const isBusy = isLost || status === 'submitted' || status === 'streaming';
  const shown = useSteady(messages, isBusy);
  const bottom = useBottom();
  const isEmpty = loading === 'loaded' && shown.length === 0;

  function jump() {
    bottom.go();
    focusComposer();
  }

  function ask(text: string) {
    onAsk();
    setDraft('');
    bottom.go();
    void conversation.send(text);
  }

  useEffect(() => {
    if (status === 'streaming') onStreaming(); // so it is stored, and has a title
  }, [status, onStreaming]);

  const regenerate = useCallback(() => {
    focusComposer(); // the button goes
    void conversation.regenerate();
  }, [conversation]);

  const stop = useCallback(() => {
    setIsStopping(true);
    void conversation.stop().finally(() => setIsStopping(false));
  }, [conversation]);
  useEffect(() => {
    if (!isBusy) return;
    const onKey = ({ key, target }: KeyboardEvent) => {
      if (key === 'Escape' && !(target instanceof HTMLInputElement)) stop(); // there it clears what is sought
    };
    addEventListener('keydown', onKey);
    return () => removeEventListener('keydown', onKey);
  }, [isBusy, stop]);

  return (
    <>
      <section className="scroller" aria-label="Messages" ref={bottom.scroller}>
        <div className="messages" ref={bottom.content}>
          {isEmpty && <Empty onAsk={ask} />}
          <Messages conversation={conversation} messages={shown} isBusy={isBusy} regenerate={regenerate} />
          {loading instanceof Error && <Problem error={loading} retry={conversation.load} />}
          {error && !isLost && (
            <Problem
              error={error}
              retry={conversation.retry}
              edit={messages.at(-1)?.role === 'user' ? () => setDraft(conversation.takeBack()) : undefined}
            />
          )}
        </div>
      </section>
      <div className="foot">
        {!bottom.isThere && (
          <button type="button" className="icon jump" aria-label="To the newest message" onClick={jump}>
            <Icon name="down" />
          </button>
        )}
        <Composer draft={draft} onDraft={setDraft} isBusy={isBusy} isStopping={isStopping} onAsk={ask} onStop={stop} />
        <StatusLine />
        <Spoken message={shown.at(-1)} isBusy={isBusy} />
      </div>
    </>
  );
}
