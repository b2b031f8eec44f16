import { useEffect, useRef, useState } from 'react';
import { type Message, textOf } from './message.ts';
import { NOTHING, sentences, type Told } from './speech.ts';

const AT_MOST_EVERY_MS = 1200;
const KEPT = 3;

/** A polite region that is told sentences of the answer that comes, not tokens; and, by `aria-live`, nobody else. */
export function Spoken({ message, isBusy }: { message: Message | undefined; isBusy: boolean }) {
  const [lines, setLines] = useState<{ key: number; text: string }[]>([]);
  const state = useRef({ id: '', told: NOTHING as Told, lines: 0, wasBusy: false });
  const latest = useRef(message);
  latest.current = message;

  useEffect(() => {
    function tell(isWhole: boolean) {
      const message = latest.current;
      const now = state.current;
      if (message?.role !== 'assistant') return;
      if (now.id !== message.id) Object.assign(now, { id: message.id, told: NOTHING });
      const { said, told } = sentences(textOf(message), now.told, isWhole);
      now.told = told;
      if (!said) return;
      const line = { key: ++now.lines, text: said };
      setLines((before) => [...before, line].slice(-KEPT));
    }
    if (isBusy) {
      state.current.wasBusy = true;
      const timer = setInterval(() => tell(false), AT_MOST_EVERY_MS);
      return () => clearInterval(timer);
    }
    if (state.current.wasBusy) tell(true);
    state.current.wasBusy = false;
    return undefined;
  }, [isBusy]);

  return (
    <div className="unseen" aria-live="polite">
      {lines.map(({ key, text }) => (
        <p key={key}>{text}</p>
      ))}
    </div>
  );
}
