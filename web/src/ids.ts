// An id that nobody else makes. Not crypto.randomUUID: browsers have it on https and localhost only.
export function newId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
