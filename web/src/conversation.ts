// One open conversation: the AI SDK's chat, kept going. What was lost is resumed, what others begin is followed, and what
// has ended is read again from the server, so that the page shows what is stored.
import { Chat } from '@ai-sdk/react';
import { newId } from './ids.ts';
import { type Message, textOf, withNewest } from './message.ts';
import type { Session } from './session.ts';
import { createStore } from './store.ts';
import { nextWait, pause } from './waits.ts';

const SHOWN_FIRST = 60; // stored messages: an answer with tools is several
const SHOWN_MORE = 200;
const NO_MESSAGE = 'none';
const STOP_TRIES = 20;

export type Conversation = ReturnType<typeof openConversation>;

/** `onChange` is called when its place or title in a list may have changed. */
export function openConversation(session: Session, id: string, isNew: boolean, onChange: () => void) {
  const { api, line, transport } = session;
  const closed = new AbortController();
  const older = createStore<{ before: string | null; isLoading: boolean }>({ before: null, isLoading: false });
  const loading = createStore<'loading' | 'loaded' | Error>(isNew ? 'loaded' : 'loading');
  const chat = new Chat<Message>({ id, messages: [], transport, generateId: newId });
  let round = 0; // what began an earlier one leaves the chat alone
  let waiting: AbortController | undefined;
  let olderTries = 0;

  const isLost = () => chat.error instanceof TypeError; // the SDK has this where the connection is lost, and only there
  const isQuestion = () => chat.lastMessage?.role === 'user';

  /** Do something that streams, resume it until it has ended, and then wait for what others begin. */
  async function attend(begin: () => Promise<void>): Promise<void> {
    const mine = ++round;
    const isOver = () => mine !== round || closed.signal.aborted;
    waiting?.abort();
    await begin();
    for (let tries = 0; isLost() && !isOver(); ) {
      line.interrupted();
      await pause(nextWait(tries), closed.signal);
      if (isOver()) return;
      const at = Date.now();
      await chat.resumeStream();
      // Nothing to resume: the question was lost. It keeps its id, so that it is asked but once.
      if (!isOver() && chat.status === 'ready' && isQuestion()) await chat.sendMessage();
      tries = Date.now() - at > 2000 ? 0 : tries + 1;
    }
    if (isOver()) return;
    if (!isQuestion()) await refresh(isOver).catch(() => {}); // what is shown is right as it is
    onChange();
    if (!isOver()) await wait(isOver);
  }

  /** Wait for a turn that somebody else begins, in another tab or on another device; and be connected meanwhile. */
  async function wait(isOver: () => boolean): Promise<void> {
    for (let tries = 0; !isOver(); ) {
      const isRefused = isQuestion(); // and not stored: the user sends it again, or something else
      const last = chat.messages.at(isRefused ? -2 : -1)?.id ?? NO_MESSAGE;
      waiting = new AbortController();
      const signal = AbortSignal.any([waiting.signal, closed.signal]);
      try {
        const news = await transport.reconnectToStream({ chatId: id, abortSignal: signal, body: { wait_after: last } });
        if (news === null || isRefused) {
          await line.lost(signal); // there is no such chat yet, or none to be changed now
          continue;
        }
        await refresh(isOver);
        onChange();
        if (isOver()) return;
        if (isQuestion()) return await attend(() => chat.resumeStream());
        tries = chat.lastMessage?.id === last ? tries + 1 : 0;
      } catch {
        tries++;
      }
      if (tries > 0 && !isOver()) await pause(nextWait(tries), signal);
    }
  }

  async function refresh(isOver: () => boolean): Promise<void> {
    const { messages, next_before } = await api.messages(id, SHOWN_FIRST);
    if (isOver()) return;
    const merged = withNewest(chat.messages, messages, next_before === null);
    // Where what is shown begins as before, what is older is the same, and may be on its way.
    if (next_before === null || merged[0]?.id !== chat.messages[0]?.id) {
      older.set({ before: next_before, isLoading: false });
    }
    chat.messages = merged;
  }

  return {
    id,
    chat,
    older,
    loading,

    /** Read it, and take up what runs. */
    async load(): Promise<void> {
      if (isNew) return attend(async () => {});
      loading.set('loading');
      for (let tries = 0; !closed.signal.aborted; tries++) {
        try {
          await refresh(() => closed.signal.aborted);
          break;
        } catch (error) {
          if (!(error instanceof TypeError || (error as Error).name === 'TimeoutError')) {
            loading.set(error as Error);
            return;
          }
          await pause(nextWait(tries), closed.signal);
        }
      }
      loading.set('loaded');
      await attend(async () => {
        if (isQuestion()) await chat.resumeStream();
      });
    },

    async loadOlder(): Promise<void> {
      const { before, isLoading } = older.get();
      if (before === null || isLoading) return;
      const asked = { before, isLoading: true };
      older.set(asked);
      const isOver = () => older.get() !== asked; // what is shown begins elsewhere since
      try {
        const { messages, next_before } = await api.messages(id, SHOWN_MORE, before);
        if (isOver()) return;
        chat.messages = [...messages, ...chat.messages];
        older.set({ before: next_before, isLoading: false });
        olderTries = 0;
      } catch {
        await pause(nextWait(olderTries++), closed.signal);
        if (!isOver()) older.set({ before, isLoading: false }); // it is tried again while the reader is near
      }
    },

    send(text: string): Promise<void> {
      line.settled();
      return attend(() => chat.sendMessage({ text }));
    },

    regenerate(): Promise<void> {
      line.settled();
      return attend(() => chat.regenerate());
    },

    /** A question that was refused is the same one again; an answer that failed is another answer. */
    retry(): Promise<void> {
      line.settled();
      return attend(() => (isQuestion() ? chat.sendMessage() : chat.regenerate()));
    },

    /** Take a question back that was refused. */
    takeBack(): string {
      const last = chat.lastMessage;
      if (last?.role !== 'user') return '';
      chat.clearError();
      chat.messages = chat.messages.slice(0, -1);
      void attend(async () => {});
      return textOf(last);
    },

    /** The server stops it, and its stream ends with all that was said. Without a connection it is tried again. */
    async stop(): Promise<void> {
      const mine = round;
      for (let tries = 0; tries < STOP_TRIES && mine === round && !closed.signal.aborted; tries++) {
        try {
          await api.stop(id);
          return;
        } catch {
          await pause(nextWait(tries), closed.signal);
        }
      }
    },

    /** Nobody looks at it any more. A turn that runs goes on. */
    close(): void {
      closed.abort();
    },
  };
}
