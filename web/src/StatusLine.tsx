import { nameOf } from './line.ts';
import { useSession } from './session.ts';
import { useStore } from './store.ts';

/** Which node serves this page, and what became of an answer whose node has gone. */
export function StatusLine() {
  const { status, node, continuedFrom } = useStore(useSession().line.state);
  return (
    <p className={`line ${status}`} role="status" title={node ?? undefined}>
      <i className={status} />
      {status === 'lost' && 'Connection lost. Reconnecting…'}
      {status === 'connecting' && 'Connecting…'}
      {status === 'connected' && node !== null && !continuedFrom && `Connected to node ${nameOf(node)}`}
      {status === 'connected' && node !== null && continuedFrom && (
        <span>
          Reconnected: continued on <b>node {nameOf(node)}</b>
          {nameOf(continuedFrom) !== nameOf(node) && ` (it was on node ${nameOf(continuedFrom)})`}
        </span>
      )}
    </p>
  );
}
