import { useCallback, useEffect, useMemo, useState } from 'react';
import { Page } from './Page.tsx';
import { SignIn } from './SignIn.tsx';
import { openSession, SessionProvider } from './session.ts';
import { forgetToken, keepToken, takeToken } from './token.ts';

export function App() {
  const [token, setToken] = useState(takeToken);
  const [why, setWhy] = useState('');
  const leave = useCallback((reason: string) => {
    forgetToken();
    setWhy(reason);
    setToken(null);
  }, []);
  const session = useMemo(() => (token === null ? null : openSession(token, leave)), [token, leave]);

  useEffect(() => {
    // The address that `anynode dev` prints, opened where the page is open already.
    const look = () => location.hash.includes('token=') && setToken(takeToken());
    addEventListener('hashchange', look);
    return () => removeEventListener('hashchange', look);
  }, []);
  useEffect(() => () => session?.transport.close(), [session]);

  if (session === null) {
    return (
      <SignIn
        why={why}
        onToken={(given) => {
          keepToken(given);
          setToken(given);
        }}
      />
    );
  }
  return (
    <SessionProvider value={session}>
      <Page onLeave={() => leave('')} />
    </SessionProvider>
  );
}
