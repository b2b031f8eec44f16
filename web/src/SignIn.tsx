import { type FormEvent, useState } from 'react';

// What a WebSocket can offer as a subprotocol, and so what a token may consist of.
const TOKEN = /^[\w.~+/=-]+$/;

export function SignIn({ why, onToken }: { why: string; onToken: (token: string) => void }) {
  const [problem, setProblem] = useState(why);

  function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const token = String(new FormData(event.currentTarget).get('token')).trim();
    if (TOKEN.test(token)) onToken(token);
    else setProblem('This is not a token.');
  }

  return (
    <main className="sign-in">
      <form onSubmit={submit}>
        <h1>Sign in to Anynode</h1>
        <label htmlFor="token">
          Token, as <code>anynode dev</code> and <code>anynode token</code> print it
        </label>
        {/* biome-ignore lint/a11y/noAutofocus: it is all that there is to do */}
        <input id="token" name="token" type="password" autoComplete="off" spellCheck={false} required autoFocus />
        {problem && (
          <p className="problem" role="alert">
            {problem}
          </p>
        )}
        <button type="submit" className="primary">
          Sign in
        </button>
      </form>
    </main>
  );
}
