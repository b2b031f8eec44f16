import { Icon } from './Icon.tsx';
import type { ToolPart } from './message.ts';

export function ToolCall({ part }: { part: ToolPart }) {
  const failed = part.state === 'output-error';
  const isRunning = part.state === 'input-available' || part.state === 'input-streaming';
  return (
    <details className={failed ? 'tool failed' : 'tool'}>
      <summary>
        <Icon name="tool" />
        <span>
          {isRunning ? 'Calls' : failed ? 'Failed:' : 'Called'} <b>{part.toolName}</b>
        </span>
        {isRunning && <i className="pulse" />}
        <Icon name="next" />
      </summary>
      <h3>Input</h3>
      <pre>{shown(part.input)}</pre>
      {part.state === 'output-available' && (
        <>
          <h3>Output</h3>
          <pre>{shown(part.output)}</pre>
        </>
      )}
      {failed && (
        <>
          <h3>Error</h3>
          <pre>{part.errorText}</pre>
        </>
      )}
    </details>
  );
}

function shown(value: unknown): string {
  if (typeof value !== 'string') return JSON.stringify(value, null, 2) ?? '';
  try {
    return JSON.stringify(JSON.parse(value), null, 2);
  } catch {
    return value;
  }
}
