"""The application: the one place where the parts are put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route, WebSocketRoute

from models.database import Database
from server.agents.load import open_agent
from server.auth import Authenticator
from server.health import health_routes
from server.node import Node
from server.rest import rest_routes
from server.settings import Settings
from server.websocket import WebSocketEndpoint

# Clients that leave a draining node all at once would arrive elsewhere all at once.
LEAVING_SECONDS: Final = 0.5
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Anynode:
    """All parts of a running node."""

    def __init__(self, settings: Settings, database: Database, authenticator: Authenticator, node: Node) -> None:
        self.settings = settings
        self.database = database
        self.authenticator = authenticator
        self.node = node
        self.websocket = WebSocketEndpoint(settings, node, authenticator)

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                WebSocketRoute("/ws", self.websocket),
                *health_routes(self.node, self.database),
                *rest_routes(self.database, self.authenticator),
                *_page_routes(),
            ]
        )

    async def drain(self) -> None:
        """Take no more work, send clients elsewhere, and let the running turns end or hand them over."""
        self.node.is_draining = True
        deadline = time.time() + self.settings.drain_seconds
        leaving = asyncio.create_task(self.websocket.go_away(deadline, LEAVING_SECONDS))
        await self.node.drain(self.settings.drain_seconds)
        await leaving


@asynccontextmanager
async def open_anynode(settings: Settings) -> AsyncIterator[Anynode]:
    """A node with its database and agent. Raises ConfigurationError, or models.database.Unavailable."""
    assert settings.database_url is not None
    database = await Database.connect(settings.database_url, pool_max=settings.database_pool_max)
    authenticator = Authenticator(settings)
    try:
        async with open_agent(settings) as agent:
            node = Node(settings, database, agent)
            running = asyncio.create_task(node.run())
            try:
                yield Anynode(settings, database, authenticator, node)
            finally:
                running.cancel()
                await asyncio.wait((running,))
    finally:
        await authenticator.close()
        await database.close()


def _page_routes() -> list[Route]:
    directory = Path(str(files("server").joinpath("page")))

    def route(path: str, name: str) -> Route:
        async def page(request: Request) -> Response:
            return FileResponse(directory / name, headers=_PAGE_HEADERS)

        return Route(path, page)

    return [route("/", "index.html"), route("/page.js", "page.js"), route("/page.css", "page.css")]
