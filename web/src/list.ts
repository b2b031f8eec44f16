// The user's conversations, as far as they were looked at.
import type { Api, Listed } from './api.ts';
import { createStore } from './store.ts';

const TYPING_MS = 200;

export type List = ReturnType<typeof createList>;

export interface ListState {
  conversations: readonly Listed[];
  search: string;
  next: string | null;
  status: 'loading' | 'loaded' | 'failed';
}

/** A title as text: it may be the beginning of a question in Markdown. */
export function titleOf({ title }: Listed): string {
  return title?.replace(/^[#>\s]+|[`*_]{2,}|`/g, '').trim() || 'Untitled';
}

export function createList(api: Api) {
  const state = createStore<ListState>({ conversations: [], search: '', next: null, status: 'loading' });
  let asked = 0; // an answer that was overtaken is of no use
  let typing: ReturnType<typeof setTimeout> | undefined;

  async function read(before: string | null): Promise<void> {
    const mine = ++asked;
    const { search } = state.get();
    try {
      const page = await api.list(search, before);
      if (mine !== asked) return;
      const conversations =
        before === null ? page.conversations : [...state.get().conversations, ...page.conversations];
      state.set({ conversations, search, next: page.next_before, status: 'loaded' });
    } catch {
      if (mine === asked) state.set({ ...state.get(), status: 'failed' });
    }
  }

  const refresh = () => void read(null);

  return {
    state,
    refresh,
    more: () => void read(state.get().next),
    search(text: string): void {
      state.set({ ...state.get(), search: text });
      clearTimeout(typing);
      typing = setTimeout(refresh, TYPING_MS);
    },
    async rename(id: string, title: string): Promise<void> {
      await api.rename(id, title);
      refresh();
    },
    async delete(id: string): Promise<void> {
      await api.delete(id);
      refresh();
    },
    /** Read it, now and whenever the page is looked at again; returns what ends that. */
    follow(): () => void {
      refresh();
      const look = () => document.visibilityState === 'visible' && refresh();
      document.addEventListener('visibilitychange', look);
      return () => document.removeEventListener('visibilitychange', look);
    },
  };
}
