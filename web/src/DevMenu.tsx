import { type KeyboardEvent, useRef, useState } from 'react';
import { IS_DEV } from './isDev.ts';
import { nameOf } from './line.ts';
import { useSession } from './session.ts';
import { useStore } from './store.ts';

const WHAT = {
  kill: ['Kill it', 'kill -9, as a crash would'],
  drain: ['Drain it', 'SIGTERM, as a deploy would'],
} as const;

/** The development server's menu: take away the node that this page is on. */
export function DevMenu() {
  const { api, line } = useSession();
  const { node, status } = useStore(line.state);
  const menu = useRef<HTMLDetailsElement>(null);
  const [problem, setProblem] = useState('');
  if (!IS_DEV) return null;

  async function order(action: keyof typeof WHAT) {
    if (node === null) return;
    setProblem('');
    close();
    await api.order(node, action).catch((error: Error) => setProblem(error.message));
  }

  function close() {
    if (menu.current) menu.current.open = false;
    menu.current?.querySelector('summary')?.focus();
  }

  function onKey(event: KeyboardEvent) {
    if (event.key !== 'Escape' || !menu.current?.open) return;
    event.stopPropagation();
    close();
  }

  return (
    <details
      ref={menu}
      className="dev"
      onKeyDown={onKey}
      onBlur={({ currentTarget, relatedTarget }) => {
        if (!currentTarget.contains(relatedTarget)) currentTarget.open = false;
      }}
    >
      <summary>
        <i className={status} />
        {node === null ? 'No node' : `Node ${nameOf(node)}`}
      </summary>
      <div>
        <p>This page is on {node === null ? 'no node' : `node ${nameOf(node)}`}. Take it away, in mid-answer too:</p>
        {Object.entries(WHAT).map(([action, [what, how]]) => (
          <button
            key={action}
            type="button"
            disabled={status !== 'connected'}
            onClick={() => void order(action as keyof typeof WHAT)}
          >
            {what}
            <small>{how}</small>
          </button>
        ))}
        <p>
          It starts again by itself. This menu is there with <code>anynode dev</code> only.
        </p>
      </div>
      {problem && (
        <p className="problem" role="alert">
          {problem}
        </p>
      )}
    </details>
  );
}
