// How long to wait before what has failed is tried again.
const FIRST_MS = 150;
const LONGEST_MS = 5000;

/** Longer each time, and never the same for many clients that were cut off at once. */
export function nextWait(tries: number, random: () => number = Math.random): number {
  return Math.min(FIRST_MS * 2 ** Math.min(tries, 10), LONGEST_MS) * (0.5 + random() / 2);
}

/** Wait, but no longer than until the network is back or the page is looked at again. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const over = new AbortController();
    const done = () => {
      over.abort();
      clearTimeout(timer);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener('abort', done, { signal: over.signal });
    globalThis.addEventListener?.('online', done, { signal: over.signal });
    globalThis.document?.addEventListener('visibilitychange', done, { signal: over.signal });
  });
}
