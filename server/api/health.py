"""Health for operators: whether a node lives, whether it takes work, and its metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from anynode.server import metrics
from anynode.server.engine.node import Node


def health_routes(
    node: Node, is_database_reachable: Callable[[], Awaitable[bool]], has_keys: Callable[[], bool]
) -> list[Route]:
    """Return the routes of `/livez`, `/readyz` and `/metrics`."""

    async def livez(request: Request) -> Response:
        if not node.is_running:
            return JSONResponse({"status": "failed", "node_id": node.node_id}, status_code=503)
        return JSONResponse({"status": "alive", "node_id": node.node_id})

    async def readyz(request: Request) -> Response:
        if node.is_draining:
            return JSONResponse({"status": "draining", "node_id": node.node_id}, status_code=503)
        if not await is_database_reachable():
            return JSONResponse({"status": "database_unavailable", "node_id": node.node_id}, status_code=503)
        if not has_keys():
            return JSONResponse({"status": "keys_unavailable", "node_id": node.node_id}, status_code=503)
        return JSONResponse({"status": "ready", "node_id": node.node_id})

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    return [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", show_metrics)]
