import { IS_DEV } from './isDev.ts';
import { SAMPLES } from './samples.ts';

export function Empty({ onAsk }: { onAsk: (text: string) => void }) {
  return (
    <div className="empty">
      <p className="greeting">What would you like to know?</p>
      {IS_DEV && (
        <ul>
          {SAMPLES.map(({ title, text }) => (
            <li key={title}>
              <button type="button" onClick={() => onAsk(text)}>
                {title}
              </button>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}
