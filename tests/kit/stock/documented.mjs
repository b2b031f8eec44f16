// The lines of docs/clients.md that no example has, with one version of the AI SDK; prints what each transport answers.

const url = process.env.ANYNODE_URL;
const token = process.env.ANYNODE_TOKEN;
const { DefaultChatTransport, WebSocketChatTransport } = await import(process.env.AI);

const transport = new DefaultChatTransport({
  api: `${url}/api/chat`,
  headers: () => ({ authorization: `Bearer ${token}` }),
  prepareSendMessagesRequest: ({ id, messages, trigger, messageId }) => ({
    body: { id, trigger, messageId, messages: messages.slice(-1) },
  }),
});

const params = async () => {
  const response = await fetch(`${url}/auth/ticket`, { method: 'POST', headers: { authorization: `Bearer ${token}` } });
  return { ticket: (await response.json()).ticket };
};

async function answer(transport, id) {
  const messages = [{ id: `question-${id}`, role: 'user', parts: [{ type: 'text', text: 'Are you there?' }] }];
  const chunks = await transport.sendMessages({ chatId: id, messages, trigger: 'submit-message', messageId: undefined });
  let text = '';
  for await (const chunk of chunks) if (chunk.type === 'text-delta') text += chunk.delta;
  console.log(text);
}

await answer(transport, `http-${process.env.AI}`);
if (WebSocketChatTransport) {
  const socket = new WebSocketChatTransport({ url: `${url}/api/chat`, params });
  await answer(socket, 'ticket');
  socket.close();
}
