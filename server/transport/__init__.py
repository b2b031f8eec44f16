"""What all APIs stand on: HTTP requests, WebSocket connections, server-sent events, and the end of a turn."""
