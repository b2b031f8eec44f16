// What one user's token opens: the server over HTTP, and the one transport of all conversations.
import { WebSocketChatTransport } from 'ai';
import { createContext, useContext } from 'react';
import { type Api, createApi } from './api.ts';
import { createLine, type Line } from './line.ts';
import type { Message } from './message.ts';

export interface Session {
  readonly api: Api;
  readonly line: Line;
  readonly transport: WebSocketChatTransport<Message>;
}

export function openSession(token: string, onUnauthorized: (why: string) => void): Session {
  const line = createLine(onUnauthorized);
  const transport = new WebSocketChatTransport<Message>({
    url: '/api/chat?heartbeats=true',
    protocols: ['anynode.ai-sdk', `bearer.${token}`],
    webSocket: line.webSocket,
    prepareSendMessagesRequest: ({ messages }) => ({ messages: messages.slice(-1) }), // the server has the others
  });
  return { api: createApi(token, onUnauthorized), line, transport };
}

const SessionContext = createContext<Session | null>(null);

export const SessionProvider = SessionContext.Provider;

export function useSession(): Session {
  const session = useContext(SessionContext);
  if (session === null) throw new Error('there is no session here');
  return session;
}
