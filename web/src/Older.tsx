import { useEffect, useLayoutEffect, useRef } from 'react';
import type { Conversation } from './conversation.ts';
import { useStore } from './store.ts';

/** Reads what is older when the reader comes near, and keeps what is being read where it is. */
export function Older({ conversation, first }: { conversation: Conversation; first: string | undefined }) {
  const { before, isLoading } = useStore(conversation.older);
  const mark = useRef<HTMLDivElement>(null);
  const height = useRef(0);

  useEffect(() => {
    const element = mark.current;
    const scroller = element?.closest('.scroller');
    if (!element || !scroller || before === null || isLoading) return;
    const near = new IntersectionObserver(
      ([entry]) => {
        if (!entry?.isIntersecting) return;
        height.current = scroller.scrollHeight;
        void conversation.loadOlder();
      },
      { root: scroller, rootMargin: '600px 0px 0px 0px' },
    );
    near.observe(element);
    return () => near.disconnect();
  }, [conversation, before, isLoading]);

  // biome-ignore lint/correctness/useExhaustiveDependencies: when the first message is another one, there are older ones
  useLayoutEffect(() => {
    const scroller = mark.current?.closest('.scroller');
    if (scroller && height.current) scroller.scrollTop += scroller.scrollHeight - height.current;
    height.current = 0;
  }, [first]);

  return (
    <div ref={mark} className="older">
      {before !== null && <span className="quiet">Reading older messages…</span>}
    </div>
  );
}
