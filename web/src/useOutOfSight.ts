import { useLayoutEffect, useRef } from 'react';

/** For what changes no more and is above what grows: out of sight it costs nothing then, and is as high as it was, so that
 * whoever scrolls there sees nothing jump. */
export function useOutOfSight(isPast: boolean) {
  const box = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const element = box.current;
    if (!element || !isPast) return;
    element.style.containIntrinsicBlockSize = `${element.getBoundingClientRect().height}px`;
    element.style.contentVisibility = 'auto';
    return () => {
      element.style.contentVisibility = '';
    };
  }, [isPast]);
  return box;
}
