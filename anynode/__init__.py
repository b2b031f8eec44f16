"""Anynode: a WebSocket chat server for streaming AI answers. Any node can resume a dropped connection."""
