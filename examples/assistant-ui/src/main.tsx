import { Chat, useChat } from '@ai-sdk/react';
import { AssistantRuntimeProvider, ComposerPrimitive, MessagePrimitive, ThreadPrimitive } from '@assistant-ui/react';
import { useAISDKRuntime } from '@assistant-ui/react-ai-sdk';
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

function onError(error: Error) {
  const isLost = error instanceof TypeError;
  tries = isLost && chat.status !== 'streaming' ? tries + 1 : 0;
  if (isLost && tries < 12) setTimeout(reconnect, Math.min(100 * 2 ** tries, 5000));
}

async function reconnect() {
  if (!chat.error) return; // the user has gone on
  await chat.resumeStream();
  if (chat.status === 'ready' && chat.lastMessage?.role === 'user') await chat.sendMessage();
  if (!chat.error) tries = 0;
}

const Message = () => (
  <MessagePrimitive.Root>
    <MessagePrimitive.Parts />
  </MessagePrimitive.Root>
);

function App() {
  const runtime = useAISDKRuntime(useChat({ chat, resume: chat.lastMessage?.role === 'user' }));
  return (
    <AssistantRuntimeProvider runtime={runtime}>
      <ThreadPrimitive.Root>
        <ThreadPrimitive.Messages components={{ Message }} />
        <ComposerPrimitive.Root>
          <ComposerPrimitive.Input aria-label="Message" autoFocus />
          <ComposerPrimitive.Send>Send</ComposerPrimitive.Send>
          <ComposerPrimitive.Cancel>Stop</ComposerPrimitive.Cancel>
        </ComposerPrimitive.Root>
      </ThreadPrimitive.Root>
    </AssistantRuntimeProvider>
  );
}

createRoot(document.getElementById('root')!).render(<App />);
