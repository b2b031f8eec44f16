import './strict.ts';
import { createRoot } from 'react-dom/client';
import { App } from './App.tsx';
import './page.css';

createRoot(document.getElementById('root') as HTMLElement).render(<App />);
