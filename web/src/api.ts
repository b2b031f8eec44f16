// What the page asks the server for over HTTP.
import type { Message } from './message.ts';

export interface Listed {
  id: string;
  client_id: string | null;
  title: string | null;
  updated_at: string;
}

export interface ListPage {
  conversations: Listed[];
  next_before: string | null;
}

export interface MessagesPage {
  messages: Message[];
  next_before: string | null;
}

/** The server refused, in words for people. */
export class Refused extends Error {
  readonly status: number;

  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

const REQUEST_MS_MAX = 15_000;

export type Api = ReturnType<typeof createApi>;

export function createApi(token: string, onUnauthorized: (why: string) => void) {
  async function request<Reply>(method: string, path: string, body?: unknown): Promise<Reply> {
    const response = await fetch(path, {
      method,
      headers: {
        authorization: `Bearer ${token}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      body: body === undefined ? null : JSON.stringify(body),
      signal: AbortSignal.timeout(REQUEST_MS_MAX),
    });
    const text = await response.text();
    const reply = text && response.headers.get('content-type')?.includes('json') ? JSON.parse(text) : null;
    if (response.ok) return reply;
    const message = reply?.error?.message ?? `The server answered ${response.status}.`;
    if (response.status === 401) onUnauthorized(message);
    throw new Refused(response.status, message);
  }

  const conversation = (id: string) => `/conversations/${encodeURIComponent(id)}`;
  const chat = (id: string) => `/api/chat/${encodeURIComponent(id)}`;
  return {
    list(search: string, before: string | null): Promise<ListPage> {
      const query = new URLSearchParams({ limit: '50', ...(search && { search }), ...(before && { before }) });
      return request('GET', `/conversations?${query}`);
    },
    rename: (id: string, title: string): Promise<Listed> => request('PATCH', conversation(id), { title }),
    delete: (id: string): Promise<void> => request('DELETE', conversation(id)),
    messages(id: string, limit: number, before: string | null = null): Promise<MessagesPage> {
      const query = new URLSearchParams({ limit: String(limit), ...(before && { before }) });
      return request('GET', `${chat(id)}/messages?${query}`);
    },
    /** Stop the running turn, wherever it runs. */
    stop: (id: string): Promise<unknown> => request('POST', `${chat(id)}/stop`),
    /** Only with `anynode dev`. */
    order: (node: string, action: 'kill' | 'drain'): Promise<unknown> =>
      request('POST', `/dev/nodes/${encodeURIComponent(node)}`, { action }),
  };
}
