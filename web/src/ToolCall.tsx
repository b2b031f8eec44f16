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
  try {
    return indented(typeof value === 'string' ? value : (JSON.stringify(value) ?? ''));
  } catch {
    return 'This is too deep to be shown.';
  }
}

/** JSON in lines, where that says the same and is not much longer; any other text as it is. */
function indented(text: string): string {
  try {
    const value: unknown = JSON.parse(text);
    if (JSON.stringify(value).replaceAll(/\s/g, '') !== text.replaceAll(/\s/g, '')) return text;
    const lines = JSON.stringify(value, null, 2);
    return lines.length > 4 * text.length + 100 ? text : lines;
  } catch {
    return text;
  }
}
