import { type KeyboardEvent, useEffect, useRef } from 'react';
import { Icon } from './Icon.tsx';

const BYTES_MAX = 65_536; // MESSAGE_BYTES_MAX, unless the server has another one and says so
const ID = 'composer';

interface Props {
  draft: string;
  onDraft: (text: string) => void;
  isBusy: boolean;
  isStopping: boolean;
  onAsk: (text: string) => void;
  onStop: () => void;
}

export function Composer({ draft, onDraft, isBusy, isStopping, onAsk, onStop }: Props) {
  const box = useRef<HTMLTextAreaElement>(null);
  useEffect(focusComposer, []);
  // biome-ignore lint/correctness/useExhaustiveDependencies: the text decides how high its box is
  useEffect(() => {
    if (!box.current || CSS.supports('field-sizing', 'content')) return;
    box.current.style.height = 'auto';
    box.current.style.height = `${box.current.scrollHeight + 2}px`;
  }, [draft]);
  const bytes = draft.length > BYTES_MAX / 4 ? new TextEncoder().encode(draft).length : 0;

  function submit() {
    if (!draft.trim() || isBusy) return;
    onAsk(draft);
    focusComposer(); // the button will be another one
  }

  function stop() {
    onStop();
    focusComposer();
  }

  function onKeyDown(event: KeyboardEvent) {
    if (event.key !== 'Enter' || event.shiftKey || event.nativeEvent.isComposing) return;
    event.preventDefault();
    submit();
  }

  return (
    <form
      className="composer"
      onSubmit={(event) => {
        event.preventDefault();
        submit();
      }}
    >
      <textarea
        id={ID}
        ref={box}
        rows={1}
        value={draft}
        aria-label="Your message"
        placeholder="Ask something"
        enterKeyHint="send"
        aria-describedby="keys"
        onChange={({ target }) => onDraft(target.value)}
        onKeyDown={onKeyDown}
      />
      <span id="keys" className="unseen">
        Enter sends, Shift and Enter begins a new line, Escape stops an answer.
      </span>
      {bytes > BYTES_MAX && (
        <span className="problem">
          {Math.ceil(bytes / 1024)} kB: the server takes {BYTES_MAX / 1024}
        </span>
      )}
      {isBusy ? (
        <button type="button" className="icon primary" aria-label="Stop" disabled={isStopping} onClick={stop}>
          <Icon name="stop" />
        </button>
      ) : (
        <button type="submit" className="icon primary" aria-label="Send" disabled={!draft.trim()}>
          <Icon name="send" />
        </button>
      )}
    </form>
  );
}

/** Write on, where no keyboard covers half of the page because of it. */
export function focusComposer(): void {
  if (matchMedia('(pointer: fine)').matches) goToComposer();
}

/** Write, whatever a keyboard covers. */
export function goToComposer(): void {
  document.getElementById(ID)?.focus();
}
