"""The API that the AI SDK's own clients speak: `useChat` over a WebSocket and over HTTP."""
