// The colours of code, loaded when there is some. Elements are made of lowlight's tree: nothing becomes markup.
import { common, createLowlight } from 'lowlight';
import type { ReactNode } from 'react';

const lowlight = createLowlight(common);

type Nodes = ReturnType<typeof lowlight.highlight>['children'];

/** The code in spans with highlight.js's classes, or as it is where the language is unknown. */
export function colours(code: string, language: string): ReactNode {
  if (!lowlight.registered(language)) return code;
  return spans(lowlight.highlight(language, code).children);
}

function spans(nodes: Nodes): ReactNode[] {
  return nodes.map((node, index) => {
    if (node.type === 'text') return node.value;
    if (node.type !== 'element') return null;
    const { className } = node.properties;
    return (
      // biome-ignore lint/suspicious/noArrayIndexKey: made once, and never changed
      <span key={index} className={Array.isArray(className) ? className.join(' ') : undefined}>
        {spans(node.children as Nodes)}
      </span>
    );
  });
}
