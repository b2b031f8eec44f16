import { useCallback, useLayoutEffect, useRef, useState } from 'react';

const NEAR = 40; // pixels
const HANDLED_MS = 400;
const HANDLING = ['wheel', 'touchmove', 'pointerdown', 'pointermove', 'keydown'];

/** Stays at the bottom of what grows, if it was there; leaves the reader alone otherwise. */
export function useBottom() {
  const scroller = useRef<HTMLElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const sticks = useRef(true);
  const [isThere, setIsThere] = useState(true);

  const go = useCallback(() => {
    const box = scroller.current;
    if (!box) return;
    sticks.current = true;
    setIsThere(true);
    box.scrollTop = box.scrollHeight;
  }, []);

  useLayoutEffect(() => {
    const [box, inside] = [scroller.current, content.current];
    if (!box || !inside) return;
    let top = box.scrollTop;
    let handled = 0; // when the reader last did something that may scroll
    const handle = () => {
      handled = performance.now();
    };
    const onScroll = () => {
      const isNear = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
      // Only who scrolls up leaves the bottom; what is laid out anew may move it too.
      if (isNear) sticks.current = true;
      else if (box.scrollTop < top && performance.now() - handled < HANDLED_MS) sticks.current = false;
      top = box.scrollTop;
      setIsThere(isNear || sticks.current);
    };
    const stick = new ResizeObserver(() => {
      if (sticks.current) box.scrollTop = box.scrollHeight;
      else onScroll();
    });
    stick.observe(inside);
    stick.observe(box);
    box.addEventListener('scroll', onScroll, { passive: true });
    for (const kind of HANDLING) addEventListener(kind, handle, { passive: true });
    return () => {
      for (const kind of HANDLING) removeEventListener(kind, handle);
      stick.disconnect();
      box.removeEventListener('scroll', onScroll);
    };
  }, []);

  return { scroller, content, isThere, go };
}
