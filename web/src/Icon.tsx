// The page's icons: strokes on a grid of 20, of our own drawing.
const PATHS = {
  brand: 'M10 4 4.5 14.5h11zM10 4v.01M4.5 14.5v.01M15.5 14.5v.01',
  list: 'M3.5 6h13M3.5 10h13M3.5 14h13',
  new: 'M10 4.5v11M4.5 10h11',
  search: 'M9 14.5a5.5 5.5 0 1 1 0-11 5.5 5.5 0 0 1 0 11zM13 13l3.5 3.5',
  rename: 'M4 16l1-4 8.5-8.5 3 3L8 15z',
  delete: 'M4 6h12M8 6V4h4v2M5.5 6l.7 10h7.6l.7-10M8.5 9v4M11.5 9v4',
  send: 'M10 16V4.5M5 9.5l5-5 5 5',
  stop: 'M6.5 6.5h7v7h-7z',
  down: 'M10 4v11.5M5 10.5l5 5 5-5',
  copy: 'M7.5 7.5h9v9h-9zM12.5 7.5v-4h-9v9h4',
  done: 'M4 10.5l4 4 8-9',
  again: 'M16 10a6 6 0 1 1-1.8-4.3M16 3v3.5h-3.5',
  tool: 'M12.5 3.5a4 4 0 0 0-3.6 5.7l-5.4 5.4 1.9 1.9 5.4-5.4a4 4 0 0 0 5.4-4.9l-2.4 2.4-2.1-.5-.5-2.1 2.4-2.4z',
  next: 'M7.5 5l5 5-5 5',
} as const;

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg className={`icon-${name}`} viewBox="0 0 20 20" width="20" height="20" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
