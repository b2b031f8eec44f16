import { memo, type ReactNode, useMemo, useRef } from 'react';
import { defaultRehypePlugins, Streamdown, type StreamdownProps } from 'streamdown';
import { Boundary } from './Boundary.tsx';
import { CodeBlock } from './CodeBlock.tsx';
import { segments } from './segments.ts';
import { useOutOfSight } from './useOutOfSight.ts';

// Raw HTML is text here (vite.config.ts); what Markdown itself makes is cleaned all the same.
const { sanitize, harden } = defaultRehypePlugins;
const CLEANED = [sanitize, harden].filter((plugin) => plugin !== undefined);

/** What a model says. Nothing of it is loaded, run, or taken for markup other than Markdown's; what is too deep for that
 * is shown as it is. */
export function Markdown({ text, isStreaming }: { text: string; isStreaming: boolean }) {
  const before = useRef<string[]>([]);
  const pieces = useMemo(() => segments(text, before.current), [text]);
  before.current = pieces;
  return pieces.map((piece, index) => {
    const isLast = index === pieces.length - 1;
    return (
      // biome-ignore lint/suspicious/noArrayIndexKey: only the last piece changes
      <Boundary key={index} instead={<div className="plain">{piece}</div>}>
        <Piece text={piece} isStreaming={isStreaming && isLast} isPast={isStreaming && !isLast} />
      </Boundary>
    );
  });
}

interface PieceProps {
  text: string;
  isStreaming: boolean;
  isPast: boolean;
}

const Piece = memo(function Piece({ text, isStreaming, isPast }: PieceProps) {
  const box = useOutOfSight(isPast);
  if (isTooMuch(text)) return <div className="plain">{text}</div>;
  return (
    <div ref={box} className="piece">
      <Streamdown
        className="markdown"
        components={COMPONENTS}
        controls={false}
        isAnimating={isStreaming}
        linkSafety={NO_DIALOG}
        parseIncompleteMarkdown={isStreaming}
        rehypePlugins={CLEANED}
      >
        {text}
      </Streamdown>
    </div>
  );
});

// Of what opens and closes: reading it takes a time that grows with the square of these.
const MARKS_MAX = 2500;

function isTooMuch(text: string): boolean {
  return text.length > MARKS_MAX && (text.match(/[*_[\]>]/g)?.length ?? 0) > MARKS_MAX;
}

const NO_DIALOG = { enabled: false };

type Content = { children?: ReactNode; node?: unknown };

const COMPONENTS: NonNullable<StreamdownProps['components']> = {
  a: ({ href, children }) => <Link href={href}>{children}</Link>,
  img: ({ src, alt }) => (
    <Link href={typeof src === 'string' ? src : undefined}>Image: {alt || 'without a title'}</Link>
  ),
  pre: ({ children }) => <CodeBlock>{children}</CodeBlock>,
  code: ({ children }: Content) => <code>{children}</code>,
  // The page's own headings are the first and second level.
  h1: ({ children }: Content) => <h3 className="h1">{children}</h3>,
  h2: ({ children }: Content) => <h3 className="h2">{children}</h3>,
  h3: ({ children }: Content) => <h4 className="h3">{children}</h4>,
  h4: ({ children }: Content) => <h4>{children}</h4>,
  h5: ({ children }: Content) => <h4>{children}</h4>,
  h6: ({ children }: Content) => <h4>{children}</h4>,
  table: ({ children }: Content) => (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: who has no mouse scrolls a wide table too
    <section className="table" aria-label="Table" tabIndex={0}>
      <table>{children}</table>
    </section>
  ),
  p: ({ children }: Content) => <p>{children}</p>,
  ul: ({ children, className }) => <ul className={className?.includes('task') ? 'tasks' : undefined}>{children}</ul>,
  ol: ({ children, start }) => <ol start={start}>{children}</ol>,
  li: ({ children }: Content) => <li>{children}</li>,
  blockquote: ({ children }: Content) => <blockquote>{children}</blockquote>,
  hr: () => <hr />,
  strong: ({ children }: Content) => <strong>{children}</strong>,
  sub: ({ children }: Content) => <sub>{children}</sub>,
  sup: ({ children }: Content) => <sup>{children}</sup>,
  section: ({ children }: Content) => <div>{children}</div>,
  thead: ({ children }: Content) => <thead>{children}</thead>,
  tbody: ({ children }: Content) => <tbody>{children}</tbody>,
  tr: ({ children }: Content) => <tr>{children}</tr>,
  th: ({ children, style }) => <th style={style}>{children}</th>,
  td: ({ children, style }) => <td style={style}>{children}</td>,
  input: ({ checked }) => <input type="checkbox" checked={checked === true} disabled aria-label="Task" />,
};

/** A link to somewhere else, in a new tab. What leads nowhere of that kind is text. */
function Link({ href, children }: { href: string | undefined } & Content) {
  if (!/^(https?|mailto):/i.test(href ?? '')) return <span>{children}</span>;
  return (
    <a href={href} target="_blank" rel="noopener noreferrer nofollow">
      {children}
    </a>
  );
}
