// Imported first: zod, which checks what the server sends, would try whether it may compile code, which the page's
// Content-Security-Policy forbids, and reports.
import { config } from 'zod';

config({ jitless: true });
