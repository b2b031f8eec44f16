"""Anynode's server: WebSocket chat for streaming AI answers, in which any node can resume a dropped connection."""
