// The packages' own transports, and what they have sent and received.

import { WebSocketChatTransport } from 'ai';

import { LeavingWebSocket } from './leaving.mjs';

/** The WebSocket transport of ai@7. `auth`: how the token is given; `received` is told of each frame. */
export function overWebSocket({ url, token, auth = 'protocols', query = '', leaves, wire, received }) {
  const headers = auth === 'handshake' ? { authorization: `Bearer ${token}` } : {};

  class Witness extends (leaves ? LeavingWebSocket : WebSocket) {
    constructor(url, protocols) {
      super(url, { protocols, headers }); // Node.js's own constructor takes headers as well
      wire.connections++;
      this.addEventListener('message', ({ data }) => {
        const frame = JSON.parse(data);
        wire.received.push(frame.type === 'chunk' ? frame.chunk.type : `(${frame.type})`);
        received();
      });
      this.addEventListener('close', ({ code }) => wire.closed.push(code));
    }

    send(data) {
      wire.sent.push(JSON.parse(data).type);
      super.send(data);
    }
  }

  return new WebSocketChatTransport({
    url: `${url}/api/chat${query}`,
    webSocket: Witness,
    ...(auth === 'protocols' && { protocols: ['anynode.ai-sdk', `bearer.${token}`] }),
    ...(auth === 'frames' && { headers: async () => ({ authorization: `Bearer ${token}` }) }),
    ...(auth === 'ticket' && {
      params: async () => {
        const response = await fetch(`${url}/auth/ticket`, {
          method: 'POST',
          headers: { authorization: `Bearer ${token}` },
        });
        if (!response.ok) throw new Error(`no ticket: ${response.status}`);
        return { ticket: (await response.json()).ticket };
      },
    }),
  });
}

/** The HTTP transport of a version. */
export function overHttp({ DefaultChatTransport }, { url, token, wire }) {
  return new DefaultChatTransport({
    api: `${url}/api/chat`,
    headers: () => ({ Authorization: `Bearer ${token}` }),
    fetch: async (input, init) => {
      wire.connections++;
      const response = await fetch(input, init);
      wire.sent.push(`${init.method} ${response.status}`);
      return asInBrowsers(response, wire);
    },
  });
}

/** A body that breaks as in a browser, "network error"; in Node.js it is "terminated", which the SDK does not know. */
function asInBrowsers(response, wire) {
  if (response.body === null) return response;
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let tail = '';
  const body = new ReadableStream({
    async pull(controller) {
      try {
        const { done, value } = await reader.read();
        if (done) return controller.close();
        tail += decoder.decode(value, { stream: true });
        const lines = tail.split('\n');
        tail = lines.pop();
        wire.received.push(...lines.flatMap((line) => line.match(/^data: \{"type":"([\w-]+)"/)?.[1] ?? []));
        controller.enqueue(value);
      } catch (error) {
        controller.error(error.name === 'AbortError' ? error : new TypeError('network error', { cause: error }));
      }
    },
    cancel: (reason) => reader.cancel(reason),
  });
  const { status, statusText, headers } = response;
  return new Response(body, { status, statusText, headers });
}
