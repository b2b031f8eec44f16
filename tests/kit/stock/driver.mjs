// Answers requests of the tests, a line of JSON each, about any number of chats at once.

import { createInterface } from 'node:readline';

import { Tab } from './chats.mjs';

const tabs = new Map();
const unhandled = [];

process.on('unhandledRejection', (error) => unhandled.push(String(error?.stack ?? error)));
process.on('uncaughtException', (error) => unhandled.push(String(error?.stack ?? error)));

const METHODS = {
  /** `shares`: the tab whose transport this one uses too. */
  open: ({ tab, shares, ...options }) => void tabs.set(tab, new Tab({ ...options, other: tabs.get(shares) })),
  send: ({ tab, text, messageId, body }) =>
    void tabs.get(tab).begin('sendMessage', text === undefined ? undefined : { text, messageId }, { body }),
  regenerate: ({ tab, messageId, body }) => void tabs.get(tab).begin('regenerate', { messageId, body }),
  resume: ({ tab }) => void tabs.get(tab).begin('resumeStream'),
  stop: ({ tab }) => tabs.get(tab).chat.stop(),
  view: ({ tab }) => tabs.get(tab).view,
  async settled({ tab }) {
    await tabs.get(tab).settled();
    return tabs.get(tab).view;
  },
  async until({ tab, characters = 0, messages = 0, status, received }) {
    await tabs
      .get(tab)
      .until(
        ({ text, shown, wire }) =>
          text.length >= characters &&
          shown.messages.length >= messages &&
          (status === undefined || shown.status === status) &&
          (received === undefined || wire.received.includes(received)),
      );
    return tabs.get(tab).view;
  },
  close({ tab }) {
    tabs.get(tab)?.close();
    tabs.delete(tab);
    return null;
  },
  /** The rejections that nobody has handled since the last time. */
  unhandled: () => unhandled.splice(0),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { id, method, parameters } = JSON.parse(line);
  Promise.resolve()
    .then(() => METHODS[method](parameters))
    .then(
      (result = null) => ({ id, result }),
      (error) => ({ id, error: String(error?.stack ?? error) }),
    )
    .then((answer) => process.stdout.write(`${JSON.stringify(answer)}\n`));
}
process.exit();
