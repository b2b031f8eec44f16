import { isValidElement, type ReactNode, useEffect, useState } from 'react';
import { useIsCodeFenceIncomplete } from 'streamdown';
import { CopyButton } from './CopyButton.tsx';

const COLOURED_MAX = 40_000; // characters; beyond that colours cost more than they tell

/** A block of code; it is coloured when it is whole, as colours that change with each token are a flicker. */
export function CodeBlock({ children }: { children: ReactNode }) {
  const isStreaming = useIsCodeFenceIncomplete();
  const { code, language } = codeIn(children);
  const [coloured, setColoured] = useState<{ of: string; shown: ReactNode }>();

  useEffect(() => {
    if (isStreaming || !language || code.length > COLOURED_MAX) return;
    let isCurrent = true;
    import('./colours.tsx').then(
      ({ colours }) => isCurrent && setColoured({ of: code, shown: colours(code, language) }),
      () => {}, // without a network, without colours
    );
    return () => {
      isCurrent = false;
    };
  }, [isStreaming, code, language]);

  return (
    <figure className="code">
      <figcaption>
        <span>{language || 'text'}</span>
        <CopyButton what="code" text={() => code} />
      </figcaption>
      {/* biome-ignore lint/a11y/noNoninteractiveTabindex: who has no mouse scrolls it too */}
      <pre tabIndex={0}>
        <code>{coloured?.of === code ? coloured.shown : code}</code>
      </pre>
    </figure>
  );
}

function codeIn(node: ReactNode): { code: string; language: string } {
  if (!isValidElement<{ className?: string; children?: ReactNode }>(node)) return { code: String(node), language: '' };
  const { className = '', children } = node.props;
  return {
    code: (Array.isArray(children) ? children.join('') : String(children ?? '')).replace(/\n$/, ''),
    language: /language-([\w+#-]+)/.exec(className)?.[1] ?? '',
  };
}
