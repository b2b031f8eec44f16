import { useEffect, useLayoutEffect, useRef } from 'react';
import type { Conversation } from './conversation.ts';
import { useStore } from './store.ts';

interface Place {
  id: string;
  top: number;
}

/** Reads what is older when the reader comes near, and keeps what is being read where it is. */
export function Older({ conversation, first }: { conversation: Conversation; first: string | undefined }) {
  const { before, isLoading } = useStore(conversation.older);
  const mark = useRef<HTMLDivElement>(null);
  const firstShown = useRef(first);
  const place = useRef<Place>(undefined);
  // Looked at while the page still shows what it showed before.
  if (firstShown.current !== first) place.current = read(scrollerOf(mark.current));

  useEffect(() => {
    const scroller = scrollerOf(mark.current);
    if (!mark.current || !scroller || before === null || isLoading) return;
    // A busy page is told of several frames at once, and only the last is how it is now.
    const look = (entries: IntersectionObserverEntry[]) => {
      if (entries.at(-1)?.isIntersecting) void conversation.loadOlder();
    };
    const near = new IntersectionObserver(look, { root: scroller, rootMargin: '600px 0px 0px 0px' });
    near.observe(mark.current);
    return () => near.disconnect();
  }, [conversation, before, isLoading]);

  useLayoutEffect(() => {
    const scroller = scrollerOf(mark.current);
    if (scroller && place.current) keep(scroller, place.current);
    firstShown.current = first;
    place.current = undefined;
  }, [first]);

  return (
    <div ref={mark} className="older">
      {before !== null && <span className="quiet">Reading older messages…</span>}
    </div>
  );
}

function scrollerOf(element: Element | null): Element | null {
  return element?.closest('.scroller') ?? null;
}

/** The message at the top of what is seen. */
function read(scroller: Element | null): Place | undefined {
  if (!scroller) return undefined;
  const { left, top, width, height } = scroller.getBoundingClientRect();
  for (let down = 8; down < height; down += 24) {
    const seen = document.elementFromPoint(left + width / 2, top + down)?.closest<HTMLElement>('[data-message]');
    if (seen?.dataset.message) return { id: seen.dataset.message, top: seen.getBoundingClientRect().top };
  }
  return undefined;
}

function keep(scroller: Element, { id, top }: Place): void {
  const moved = scroller.querySelector(`[data-message="${CSS.escape(id)}"]`)?.getBoundingClientRect().top;
  if (moved !== undefined) scroller.scrollTop += moved - top;
}
