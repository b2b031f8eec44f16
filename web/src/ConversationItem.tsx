import { type KeyboardEvent, useRef, useState } from 'react';
import type { Listed } from './api.ts';
import { Icon } from './Icon.tsx';
import { type List, routeOf, titleOf } from './list.ts';
import { go, hashOf } from './route.ts';

const TITLE_MAX = 200;

interface Props {
  listed: Listed;
  isCurrent: boolean;
  list: List;
  onChosen: () => void;
  onDeletedCurrent: () => void;
}

export function ConversationItem({ listed, isCurrent, list, onChosen, onDeletedCurrent }: Props) {
  const [doing, setDoing] = useState<'nothing' | 'renaming' | 'deleting'>('nothing');
  const [problem, setProblem] = useState('');
  const link = useRef<HTMLAnchorElement>(null);
  const item = useRef<HTMLLIElement>(null);
  const title = titleOf(listed);
  const route = routeOf(listed);

  function finish() {
    setDoing('nothing');
    requestAnimationFrame(() => link.current?.focus());
  }

  async function attempt(work: Promise<void>): Promise<boolean> {
    setProblem('');
    return work.then(
      () => true,
      (error: Error) => {
        setProblem(error.message);
        return false;
      },
    );
  }

  async function rename(text: string) {
    const wanted = text.trim();
    finish();
    if (wanted && wanted !== listed.title) await attempt(list.rename(listed.id, wanted));
  }

  async function remove() {
    setDoing('nothing');
    const neighbour = item.current?.nextElementSibling ?? item.current?.previousElementSibling;
    if (!(await attempt(list.delete(listed.id)))) return finish();
    if (isCurrent) onDeletedCurrent();
    else (neighbour?.querySelector('a') ?? document.querySelector<HTMLElement>('.new'))?.focus();
  }

  function onRenamingKey(event: KeyboardEvent<HTMLInputElement>) {
    if (event.key === 'Enter' && !event.nativeEvent.isComposing) void rename(event.currentTarget.value);
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    finish();
  }

  return (
    <li ref={item} className={isCurrent ? 'current' : undefined}>
      {doing === 'renaming' ? (
        <input
          aria-label={`New title of ${title}`}
          defaultValue={listed.title ?? ''}
          maxLength={TITLE_MAX}
          onKeyDown={onRenamingKey}
          onBlur={({ currentTarget }) => void rename(currentTarget.value)}
          ref={(input) => input?.select()}
        />
      ) : (
        <a
          ref={link}
          href={hashOf(route)}
          aria-current={isCurrent ? 'page' : undefined}
          title={title}
          onClick={(event) => {
            if (event.metaKey || event.ctrlKey || event.shiftKey) return;
            event.preventDefault();
            go(route);
            onChosen();
          }}
        >
          {title}
        </a>
      )}
      {doing === 'nothing' && (
        <span className="actions">
          <button type="button" className="icon" aria-label={`Rename ${title}`} onClick={() => setDoing('renaming')}>
            <Icon name="rename" />
          </button>
          <button type="button" className="icon" aria-label={`Delete ${title}`} onClick={() => setDoing('deleting')}>
            <Icon name="delete" />
          </button>
        </span>
      )}
      {doing === 'deleting' && (
        <span
          className="sure"
          role="alertdialog"
          aria-label={`Delete ${title}?`}
          onKeyDown={(event) => event.key === 'Escape' && finish()}
        >
          <button type="button" className="danger" onClick={() => void remove()} ref={(button) => button?.focus()}>
            Delete
          </button>
          <button type="button" onClick={finish}>
            Keep
          </button>
        </span>
      )}
      {problem && (
        <p className="problem" role="alert">
          {problem}
        </p>
      )}
    </li>
  );
}
