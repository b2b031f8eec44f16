import { useEffect, useRef, useState } from 'react';
import { type Message, steady } from './message.ts';

const CATCHING_UP_MS = 1500;

/** The messages to show. After a resume the answer is streamed once more from its beginning: until it has caught up, it is
 * shown as it was before, so that nothing flickers; but not for long, as its text may have been taken back. */
export function useSteady(messages: Message[], isBusy: boolean): Message[] {
  const before = useRef<Message>(undefined);
  const [expired, setExpired] = useState<Message>();
  const last = messages.at(-1);
  const held = isBusy && last && before.current !== expired ? steady(before.current, last) : last;
  const isHeld = held !== last;

  useEffect(() => {
    before.current = held;
  }, [held]);

  useEffect(() => {
    if (!isHeld) return;
    const timer = setTimeout(() => setExpired(held), CATCHING_UP_MS);
    return () => clearTimeout(timer);
  }, [isHeld, held]);

  return isHeld && held ? [...messages.slice(0, -1), held] : messages;
}
