"""Anynode's server: WebSocket chat for streaming AI answers, on which any node can pick up a reconnect."""
