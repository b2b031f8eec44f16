// The token: from the address that `anynode dev` prints, or from the form; kept for this tab and later ones.
const KEY = 'anynode.token';

/** The token, if there is one. One in the address is taken from there, so that it is in no history and no screenshot. */
export function takeToken(): string | null {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const given = fragment.get('token');
  if (given === null) return localStorage.getItem(KEY);
  fragment.delete('token');
  history.replaceState(null, '', `${location.pathname}#${fragment}`);
  keepToken(given);
  return given;
}

export function keepToken(token: string): void {
  localStorage.setItem(KEY, token);
}

export function forgetToken(): void {
  localStorage.removeItem(KEY);
}
