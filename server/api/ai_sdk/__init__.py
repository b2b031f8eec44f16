"""The AI SDK's clients, as they are: `useChat` over a WebSocket and over HTTP."""
