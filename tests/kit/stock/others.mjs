// What a user writes to show what other tabs and devices ask; docs/clients.md has it.

export { followOthers };

async function followOthers(chat, transport, load, abortSignal) {
  const pause = () => new Promise((resolve) => setTimeout(resolve, 500));
  for (; !abortSignal.aborted; await pause()) {
    const last = chat.lastMessage?.id;
    if (chat.status !== 'ready' || !last) continue; // this tab asks something itself, or nothing was asked yet
    try {
      // Answered, with nothing, as soon as the chat has something newer, on whatever node. Null: there is no such chat.
      const body = { wait_after: last };
      if (!(await transport.reconnectToStream({ chatId: chat.id, abortSignal, body }))) continue;
      const messages = await load();
      if (chat.status !== 'ready' || chat.lastMessage?.id !== last) continue; // it was this tab
      chat.messages = messages;
      if (chat.lastMessage?.role === 'user') await chat.resumeStream();
    } catch {
      // The connection was lost, or the page is left.
    }
  }
}
