// What a user writes to go on after a lost connection.

import { setTimeout as sleep } from 'node:timers/promises';

const WAIT_MS_MIN = 20;
const WAIT_MS_MAX = 500;
const TRIES_MAX = 100;

/**
 * An `onFinish` that resumes the chat when its connection has broken.
 * `hasReplay`: ai@6 and later begin a resumed message anew; for ai@5 its partial must be emptied first.
 */
export function reconnecting(getChat, { hasReplay }) {
  let partial;
  let isReconnecting = false;

  async function reconnect() {
    const chat = getChat();
    for (let tries = 0, waitMs = WAIT_MS_MIN; tries < TRIES_MAX; tries++, waitMs = Math.min(2 * waitMs, WAIT_MS_MAX)) {
      await sleep(waitMs);
      if (!hasReplay) partial.parts.length = 0;
      await chat.resumeStream();
      // Nothing ever ran there: the question itself was lost. It keeps its id, so that it is asked but once.
      if (chat.status === 'ready' && chat.lastMessage?.role === 'user') await chat.sendMessage();
      // The SDK has a TypeError for a lost connection; any other error is an answer.
      if (!(chat.status === 'error' && chat.error instanceof TypeError)) return;
    }
  }

  const onFinish = async ({ isDisconnect, message }) => {
    if (!isDisconnect) return;
    partial = message;
    if (isReconnecting) return; // the loop sees it
    isReconnecting = true;
    try {
      await reconnect();
    } finally {
      isReconnecting = false;
    }
  };
  return { onFinish, isReconnecting: () => isReconnecting };
}
