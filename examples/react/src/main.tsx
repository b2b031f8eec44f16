import { Chat, useChat } from '@ai-sdk/react';
import { WebSocketChatTransport } from 'ai';
import { createRoot } from 'react-dom/client';

const url = import.meta.env.VITE_ANYNODE_URL ?? 'http://127.0.0.1:8000';
const token = import.meta.env.VITE_ANYNODE_TOKEN;
const id = location.hash.slice(1) || crypto.randomUUID();
location.hash = id;

const headers = { authorization: `Bearer ${token}` };
const { messages } = await (await fetch(`${url}/api/chat/${encodeURIComponent(id)}/messages`, { headers })).json();
const transport = new WebSocketChatTransport({
  url: `${url}/api/chat`,
  protocols: ['anynode.ai-sdk', `bearer.${token}`],
  prepareSendMessagesRequest: ({ messages }) => ({ messages: messages.slice(-1) }), // the server has the others
});

let tries = 0;
const chat = new Chat({ id, messages, transport, onError });

// The SDK has a TypeError where the connection is lost, or is not to be had. Any other error is the server's answer.
function onError(error: Error) {
  const isLost = error instanceof TypeError;
  tries = isLost && chat.status !== 'streaming' ? tries + 1 : 0;
  if (isLost && tries < 12) setTimeout(reconnect, Math.min(100 * 2 ** tries, 5000));
}

async function reconnect() {
  if (!chat.error) return; // the user has gone on
  await chat.resumeStream();
  // Nothing to resume: the question was lost. It keeps its id, so that it is asked but once.
  if (chat.status === 'ready' && chat.lastMessage?.role === 'user') await chat.sendMessage();
  if (!chat.error) tries = 0;
}

function App() {
  // A question without its answer: the turn runs.
  const { messages, status, error, sendMessage, stop } = useChat({ chat, resume: chat.lastMessage?.role === 'user' });
  return (
    <main aria-busy={status === 'submitted' || status === 'streaming'}>
      {messages.map(({ id, role, parts }) => (
        <p key={id} className={role}>
          {parts.map((part) => (part.type === 'text' ? part.text : ''))}
        </p>
      ))}
      {error && <p role="alert">{error instanceof TypeError ? 'Reconnecting …' : error.message}</p>}
      <form action={(form) => void sendMessage({ text: String(form.get('text')) })}>
        <input name="text" aria-label="Message" autoFocus required />
        <button type="submit">Send</button>
        <button type="button" onClick={stop}>
          Stop
        </button>
      </form>
    </main>
  );
}

createRoot(document.getElementById('root')!).render(<App />);
