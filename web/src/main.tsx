import './strict.ts';
import { createRoot } from 'react-dom/client';
import { App } from './App.tsx';
import { Boundary } from './Boundary.tsx';
import './page.css';

const broken = (
  <main className="sign-in">
    <p role="alert">Something is wrong with this page. Load it again: nothing is lost.</p>
  </main>
);

const root = createRoot(document.getElementById('root') as HTMLElement, {
  onCaughtError: () => {}, // what is shown instead says it
});

root.render(
  <Boundary instead={broken}>
    <App />
  </Boundary>,
);
