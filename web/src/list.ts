// The user's conversations, as far as they were looked at.
import type { Api, Listed, ListPage } from './api.ts';
import { createStore } from './store.ts';

const TYPING_MS = 200;
const PAGES_AT_ONCE = 20; // a page of a search looks at 5,000 titles, and may find none

export type List = ReturnType<typeof createList>;

export interface ListState {
  conversations: readonly Listed[];
  search: string;
  next: string | null;
  status: 'loading' | 'loaded' | 'failed';
}

/** Under which id it is opened: the one that a client has given it, if one has. */
export function routeOf({ id, client_id }: Listed): string {
  return client_id ?? id;
}

/** A title as text: it may be the beginning of a question in Markdown. */
export function titleOf({ title }: Listed): string {
  return title?.replace(/^[#>\s]+|[`*_]{2,}|`/g, '').trim() || 'Untitled';
}

export function createList(api: Api) {
  const state = createStore<ListState>({ conversations: [], search: '', next: null, status: 'loading' });
  let asked = 0; // an answer that was overtaken is of no use
  let wanted = 1; // how many are to be shown, if there are so many
  let pagesMax = PAGES_AT_ONCE; // how many may be asked for; "Show more" allows more
  let typing: ReturnType<typeof setTimeout> | undefined;

  /** Read so many, at the least, from the first one on. */
  async function read(count: number): Promise<void> {
    const mine = ++asked;
    const { search } = state.get();
    wanted = count;
    try {
      const conversations: Listed[] = [];
      let next: string | null = null;
      let pages = 0;
      do {
        const page: ListPage = await api.list(search, next);
        if (mine !== asked) return;
        conversations.push(...page.conversations);
        next = page.next_before;
        pages++;
      } while (next !== null && conversations.length < count && pages < pagesMax);
      state.set({ ...state.get(), conversations, next, status: 'loaded' });
    } catch {
      if (mine === asked) state.set({ ...state.get(), status: 'failed' });
    }
  }

  const refresh = () => void read(wanted);

  return {
    state,
    refresh,
    more(): void {
      pagesMax += PAGES_AT_ONCE;
      void read(state.get().conversations.length + 1);
    },
    search(text: string): void {
      state.set({ ...state.get(), search: text });
      pagesMax = PAGES_AT_ONCE;
      clearTimeout(typing);
      typing = setTimeout(() => void read(1), TYPING_MS);
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
