// The line between the page and a node: which one it is, and what became of it. The AI SDK's transport opens the socket,
// and the frames that are read here it leaves alone (PROTOCOL.md, "Heartbeats").
import type { WebSocketChatTransport } from 'ai';
import { createStore, type Store } from './store.ts';

export interface LineState {
  status: 'connecting' | 'connected' | 'lost';
  node: string | null;
  /** The node before, where an answer was taken up again on this one. */
  continuedFrom: string | null;
}

type WebSocketConstructor = NonNullable<ConstructorParameters<typeof WebSocketChatTransport>[0]['webSocket']>;

export interface Line {
  readonly state: Store<LineState>;
  readonly webSocket: WebSocketConstructor;
  /** Resolves when there is no connection, or the signal is aborted. */
  lost(signal: AbortSignal): Promise<void>;
  /** The connection was lost in mid-answer. */
  interrupted(): void;
  /** What there was to say about the last time was seen. */
  settled(): void;
}

interface Beside {
  type: string;
  requestId: '';
  node_id?: string;
  heartbeat_seconds?: number;
}

const OPENING_MS_MAX = 10_000;
const UNAUTHORIZED = [3000, 3003];

export function createLine(onUnauthorized: (why: string) => void): Line {
  const state = createStore<LineState>({ status: 'connecting', node: null, continuedFrom: null });
  let lostIn: string | null = null; // the node on which an answer was interrupted

  class NodeSocket extends WebSocket {
    #silence: ReturnType<typeof setTimeout> | undefined;
    #silenceMs = OPENING_MS_MAX;

    constructor(url: string | URL, protocols?: string | string[]) {
      super(url, protocols);
      this.#wait();
      this.addEventListener('message', ({ data }) => {
        this.#wait();
        if (typeof data === 'string' && data.includes('"requestId":""')) this.#hear(JSON.parse(data));
      });
      this.addEventListener('close', ({ code, reason }) => {
        clearTimeout(this.#silence);
        if (UNAUTHORIZED.includes(code)) onUnauthorized(reason);
        else state.set({ ...state.get(), status: 'lost' });
      });
    }

    #hear(frame: Beside): void {
      if (frame.type !== 'ready') return;
      this.#silenceMs = 2000 * (frame.heartbeat_seconds ?? 10) + 500;
      this.#wait();
      state.set({ status: 'connected', node: frame.node_id ?? null, continuedFrom: lostIn });
      lostIn = null;
    }

    /** A frozen node is silent, and would not answer a closing handshake either: the transport is told at once. */
    #wait(): void {
      clearTimeout(this.#silence);
      this.#silence = setTimeout(() => {
        state.set({ ...state.get(), status: 'lost' });
        this.onerror?.(new Event('error'));
        this.close();
      }, this.#silenceMs);
    }
  }

  return {
    state,
    webSocket: NodeSocket as WebSocketConstructor, // the SDK's type also sends shared memory, which it does not
    lost(signal) {
      return new Promise((resolve) => {
        const look = () => {
          if (state.get().status !== 'lost' && !signal.aborted) return;
          stop();
          resolve();
        };
        const stop = state.subscribe(look);
        signal.addEventListener('abort', look, { once: true });
        look();
      });
    },
    interrupted() {
      lostIn ??= state.get().node;
    },
    settled() {
      state.set({ ...state.get(), continuedFrom: null });
    },
  };
}

/** A node's name, without what tells its lives apart. */
export function nameOf(node: string): string {
  return node.replace(/-[0-9a-f]{8}$/, '');
}
