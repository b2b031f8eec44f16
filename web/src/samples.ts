// Questions to begin with, for `anynode dev`, whose echo agent says them back.
export const SAMPLES = [
  {
    title: 'A long answer, to kill a node in',
    text: `How an answer outlives its server.

You are reading an answer that comes **token by token**. Each token was committed to Postgres before you saw it. That is why any node can go on with it, and why nothing is lost when the one that speaks is gone.

Open the menu at the top right, and *kill* the node that this page is on. What you will see:

1. The line below says that the connection is lost.
2. The page reconnects, to whichever node the load balancer chooses.
3. That node reads the answer from Postgres, and shows it as far as it had come.
4. When the dead node's lease has run out, another one takes the turn over.
5. The text goes on, in the middle of a sentence, with no word lost and none twice.

> A client may drop at any instant, come back to any node, and lose nothing.

## What is not needed

| usually | here |
|---|---|
| sticky sessions | any plain load balancer |
| a cache for running answers | the journal, in Postgres |
| a queue and its workers | leases, in Postgres |

## How it works

The journal is a table. Each row is an event with a number that counts up without a gap, so that a client can say how far it has read:

\`\`\`python
async def follow(conversation_id, after):
    while True:
        for event in await journal.read(conversation_id, after):
            yield event
            after = event.seq
        await journal.changed(conversation_id)
\`\`\`

A follower is a cursor over these rows, and not a queue. A slow phone falls behind and reads on when it can. A second tab reads the same rows, and so does the node that you came back to. Nobody has to be told where the answer is produced, since everybody reads it from the same place.

Deploys are the same story in slow motion. *Drain* the node instead: it takes no new turns, sends its clients elsewhere, and lets what runs come to its end, or hands it over. There is nothing to see, which is the point.

Still here? Then there was time enough. Kill this one too.`,
  },
  {
    title: 'Code, a table and a list',
    text: `How to merge two sorted lists:

\`\`\`typescript
export function merge(left: readonly number[], right: readonly number[]): number[] {
  const merged: number[] = [];
  let [i, j] = [0, 0];
  while (i < left.length && j < right.length) {
    merged.push(left[i] <= right[j] ? left[i++] : right[j++]);
  }
  return [...merged, ...left.slice(i), ...right.slice(j)];
}
\`\`\`

What it costs:

| | time | memory |
|---|---:|---:|
| merge | O(n) | O(n) |
| sort | O(n log n) | O(n) |

- [x] stable
- [ ] in place

See [Merge sort](https://en.wikipedia.org/wiki/Merge_sort) for more, or \`git log --merges\` for a **pun**.`,
  },
  { title: 'Just a hello', text: 'Hello! Who am I talking to?' },
] as const;
