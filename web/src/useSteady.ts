import { useEffect, useRef, useState } from 'react';
import { isBeginning, type Message, steady } from './message.ts';

const CHANGED_MS = 1500;

/** The messages to show. After a resume the answer is streamed once more from its beginning: until it has caught up, it is
 * shown as it was before, so that nothing flickers. That may take any time, as a takeover begins again too, and a second
 * one may follow. But an answer that is not the same is soon shown as it is: its text was taken back. */
export function useSteady(messages: Message[], isBusy: boolean): Message[] {
  const before = useRef<Message>(undefined);
  const [expired, setExpired] = useState<Message>();
  const last = messages.at(-1);
  const held = isBusy && last && before.current !== expired ? steady(before.current, last) : last;
  const isHeld = held !== last;
  const isChanged = isHeld && held && last && !isBeginning(last, held);

  useEffect(() => {
    before.current = held;
  }, [held]);

  useEffect(() => {
    if (!isChanged) return;
    const timer = setTimeout(() => setExpired(held), CHANGED_MS);
    return () => clearTimeout(timer);
  }, [isChanged, held]);

  return isHeld && held ? [...messages.slice(0, -1), held] : messages;
}
