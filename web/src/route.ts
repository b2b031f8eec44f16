// Which conversation is open: its id is in the address, as `#c=…`, and none is a new one.
import { useSyncExternalStore } from 'react';

export function idIn(hash: string): string | null {
  return new URLSearchParams(hash.slice(1)).get('c') || null;
}

export function hashOf(id: string | null): string {
  return id === null ? '#' : `#${new URLSearchParams({ c: id })}`;
}

/** Go to a conversation; `replace` where going back should not lead to what was there before. */
export function go(id: string | null, how: 'push' | 'replace' = 'push'): void {
  history[`${how}State`](null, '', location.pathname + hashOf(id));
  dispatchEvent(new HashChangeEvent('hashchange'));
}

export function useRoute(): string | null {
  return useSyncExternalStore(subscribe, () => idIn(location.hash));
}

function subscribe(heard: () => void): () => void {
  addEventListener('hashchange', heard);
  return () => removeEventListener('hashchange', heard);
}
