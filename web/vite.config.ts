import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

const nothing = new URL('src/nothing.ts', import.meta.url).pathname;

export default defineConfig({
  plugins: [react()],
  resolve: {
    alias: {
      // Streamdown's way to read raw HTML, of which this page takes none: without it, and its parser, HTML is shown as text.
      'rehype-raw': nothing,
      // It sorts out classes of Tailwind, of which there are none here.
      'tailwind-merge': nothing,
    },
  },
  build: {
    outDir: '../server/page',
    emptyOutDir: true,
    target: ['chrome123', 'firefox128', 'safari17.5'], // light-dark(), dvh, field-sizing where there is
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 900,
  },
  server: {
    // `npm run dev` beside `anynode dev`, whose ALLOWED_ORIGINS know this port.
    port: 5173,
    proxy: Object.fromEntries(
      ['/api', '/conversations', '/dev', '/readyz'].map((path) => [
        path,
        { target: 'http://127.0.0.1:8000', ws: true },
      ]),
    ),
  },
});
