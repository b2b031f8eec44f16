import { fileURLToPath } from 'node:url';
import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

const path = (name: string) => fileURLToPath(new URL(name, import.meta.url));

export default defineConfig({
  plugins: [react()],
  resolve: {
    alias: {
      // Streamdown's way to read raw HTML, of which this page takes none: without it, and its parser, HTML is shown as text.
      'rehype-raw': path('src/nothing.ts'),
      // It sorts out classes of Tailwind, of which there are none here.
      'tailwind-merge': path('src/nothing.ts'),
      // For browsers it has the browser decode entities, as markup, which the page's policy forbids.
      'decode-named-character-reference': path('node_modules/decode-named-character-reference/index.js'),
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
