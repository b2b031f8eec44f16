// Chats of the packages: `AbstractChat` with a plain state, or `Chat` and the hook `useChat` in a React tree.

import * as ai5 from 'ai5';
import * as ai6 from 'ai6';
import * as ai7 from 'ai';
import { Chat, useChat } from '@ai-sdk/react';
import { createElement } from 'react';
import { create } from 'react-test-renderer';

import { followOthers } from './others.mjs';
import { reconnecting } from './reconnect.mjs';
import { overHttp, overWebSocket } from './transports.mjs';

const VERSIONS = { 5: ai5, 6: ai6, 7: ai7 };

/** What the packages' own framework bindings do with messages: what is shown is never changed in place. */
class State {
  #messages;
  #status = 'ready';
  #error = undefined;

  constructor(messages, changed) {
    this.#messages = messages;
    this.changed = changed;
  }

  get messages() {
    return this.#messages;
  }

  set messages(messages) {
    this.#messages = [...messages];
    this.changed();
  }

  get status() {
    return this.#status;
  }

  set status(status) {
    this.#status = status;
    this.changed();
  }

  get error() {
    return this.#error;
  }

  set error(error) {
    this.#error = error;
    this.changed();
  }

  pushMessage = (message) => {
    this.messages = this.#messages.concat(message);
  };

  popMessage = () => {
    this.messages = this.#messages.slice(0, -1);
  };

  replaceMessage = (index, message) => {
    this.messages = this.#messages.with(index, this.snapshot(message));
  };

  snapshot = (thing) => structuredClone(thing);
}

/** One chat in one tab, with what a test asks of it. */
export class Tab {
  #changed = new Set();
  #left = new AbortController();
  #pending = new Set();
  #reconnecting;
  #rendered;
  #root;
  wire = { connections: 0, sent: [], received: [], closed: [] };
  finishes = [];
  complaints = [];

  constructor({ version = 7, face = 'ws', url, id, token, messages = [], reconnect = true, hook, resume, other, ...rest }) {
    const sdk = VERSIONS[version];
    const { follow, ...ways } = rest;
    const access = { url, token, ...ways, wire: this.wire, received: () => this.#notify() };
    if (other !== undefined) {
      this.transport = other.transport;
      this.wire = other.wire;
    } else {
      this.transport = face === 'ws' ? overWebSocket(access) : overHttp(sdk, access);
    }
    this.#reconnecting = reconnecting(() => this.chat, { hasReplay: version > 5 });
    const options = {
      id,
      messages,
      transport: this.transport,
      onError: (error) => {
        if (!(error instanceof TypeError)) this.complaints.push(`${error.name}: ${error.message}`);
      },
      onFinish: ({ isAbort, isDisconnect, isError, finishReason, message, ...rest }) => {
        this.finishes.push({ isAbort, isDisconnect, isError, finishReason });
        if (reconnect) this.#track(this.#reconnecting.onFinish({ isDisconnect, message, ...rest }));
      },
    };
    if (hook) {
      this.chat = new Chat(options);
      this.#render(resume);
    } else {
      const state = new State(messages, () => this.#notify());
      this.chat = new (class extends sdk.AbstractChat {})({ ...options, state });
      if (resume) this.begin('resumeStream');
    }
    if (follow) {
      const headers = { authorization: `Bearer ${token}` };
      const load = async () => {
        const response = await fetch(`${url}/api/chat/${encodeURIComponent(id)}/messages`, { headers });
        return (await response.json()).messages;
      };
      followOthers(this.chat, this.transport, load, this.#left.signal);
    }
  }

  #render(resume) {
    const View = () => {
      this.#rendered = useChat({ chat: this.chat, resume });
      queueMicrotask(() => this.#notify());
      return null;
    };
    this.#root = create(createElement(View));
  }

  /** What a person sees: with the hook, what is rendered, which comes a little later. */
  get shown() {
    return this.#rendered ?? this.chat;
  }

  get isShown() {
    const { messages, status, error } = this.shown;
    return messages === this.chat.messages && status === this.chat.status && error === this.chat.error;
  }

  #notify() {
    for (const check of [...this.#changed]) check();
  }

  #track(promise) {
    this.#pending.add(promise);
    promise.finally(() => {
      this.#pending.delete(promise);
      this.#notify();
    });
  }

  /** Call a method of the chat without waiting for its end. */
  begin(method, ...parameters) {
    this.#track((this.#rendered ?? this.chat)[method](...parameters));
  }

  /** Wait for a condition on what is shown. */
  until(condition) {
    return new Promise((resolve) => {
      const check = () => {
        if (!condition(this)) return;
        this.#changed.delete(check);
        resolve();
      };
      this.#changed.add(check);
      check();
    });
  }

  /** Wait until nothing is under way: no call, no attempt to connect again. */
  async settled() {
    const hasEnded = () => this.#pending.size === 0 && ['ready', 'error'].includes(this.chat.status);
    await this.until(() => hasEnded() && this.isShown);
  }

  get text() {
    const message = this.shown.messages.at(-1);
    if (message?.role !== 'assistant') return '';
    return message.parts.map((part) => (part.type === 'text' ? part.text : '')).join('');
  }

  get view() {
    const { messages, status, error } = this.shown;
    const { wire, finishes, complaints, text } = this;
    return { messages, status, error: error?.message ?? null, text, wire, finishes, complaints };
  }

  /** What closing the tab does. */
  close() {
    this.#left.abort();
    this.#root?.unmount();
    this.transport.close?.();
  }
}
