import { useEffect, useState } from 'react';
import { Icon } from './Icon.tsx';

const SHOWN_MS = 1600;

export function CopyButton({ what, text }: { what: string; text: () => string }) {
  const [state, setState] = useState<'' | 'Copied' | 'Could not be copied'>('');
  useEffect(() => {
    if (!state) return;
    const timer = setTimeout(() => setState(''), SHOWN_MS);
    return () => clearTimeout(timer);
  }, [state]);

  return (
    <button
      type="button"
      className="icon"
      aria-label={state || `Copy ${what}`}
      title={state || `Copy ${what}`}
      onClick={() =>
        copy(text()).then(
          () => setState('Copied'),
          () => setState('Could not be copied'),
        )
      }
    >
      <Icon name={state === 'Copied' ? 'done' : 'copy'} />
    </button>
  );
}

async function copy(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // A page on plain http, in the network at home: browsers have the older way only.
  const box = document.createElement('textarea');
  box.value = text;
  document.body.append(box);
  box.select();
  const isDone = document.execCommand('copy');
  box.remove();
  if (!isDone) throw new Error('the browser does not let this page copy');
}
