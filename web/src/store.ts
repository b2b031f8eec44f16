// A value that components can follow.
import { useSyncExternalStore } from 'react';

export interface Store<Value> {
  get(): Value;
  set(value: Value): void;
  subscribe(heard: () => void): () => void;
}

export function createStore<Value>(value: Value): Store<Value> {
  const all = new Set<() => void>();
  return {
    get: () => value,
    set(next) {
      if (Object.is(value, next)) return;
      value = next;
      for (const heard of all) heard();
    },
    subscribe(heard) {
      all.add(heard);
      return () => all.delete(heard);
    },
  };
}

export function useStore<Value>(store: Store<Value>): Value {
  return useSyncExternalStore(store.subscribe, store.get);
}
