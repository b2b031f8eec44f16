"""The counters and gauges of a node, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "exposition"]

registry = CollectorRegistry()

connections = Gauge("anynode_connections", "Open WebSocket connections.", registry=registry)
sessions = Gauge("anynode_sessions", "Sockets, streams and waiting requests of users.", registry=registry)
refused = Counter("anynode_refused", "Requests, frames and sockets refused, by limit.", ["limit"], registry=registry)
turns_running = Gauge("anynode_turns_running", "Turns that this node runs.", registry=registry)
turns_ended = Counter("anynode_turns_ended", "Turns that ended here, by status.", ["status"], registry=registry)
turns_taken_over = Counter("anynode_turns_taken_over", "Turns taken over from nodes that died.", registry=registry)
turns_lost = Counter("anynode_turns_lost", "Turns whose lease this node lost.", registry=registry)
flushes = Counter("anynode_flushes", "Flush statements that committed.", registry=registry)
tcp_connections = Gauge(
    "anynode_tcp_connections", "Open TCP connections of clients, WebSockets too.", registry=registry
)
handshakes_refused = Counter(
    "anynode_handshakes_refused", "WebSocket handshakes that were answered with an error.", registry=registry
)
peers_cut = Counter(
    "anynode_peers_cut", "Connections that were cut off as the peer had passed a bound.", ["bound"], registry=registry
)
events = Counter("anynode_events", "Events that flushes committed.", registry=registry)


def exposition() -> bytes:
    """Return all figures in Prometheus' text format."""
    return generate_latest(registry)
