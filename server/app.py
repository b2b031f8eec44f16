"""The application: the one place where the parts of a node are put together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeAlias

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, WebSocketRoute

from anynode.models.database import Database, Unavailable
from anynode.models.revocations import load_revocations
from anynode.models.schema_version import check_schema
from anynode.server.agents.load import open_agent
from anynode.server.api.ai_sdk.connection import AiSdkConnection
from anynode.server.api.ai_sdk.handlers import AiSdk
from anynode.server.api.anynode_v1 import AnynodeConnection
from anynode.server.api.health import health_routes
from anynode.server.api.openai.handlers import Responses
from anynode.server.api.operations import AI_SDK, AI_SDK_PATH, RESPONSES, REST
from anynode.server.api.page import page_routes
from anynode.server.api.rest import Rest
from anynode.server.api.tickets import Tickets
from anynode.server.auth import Authenticator
from anynode.server.auth.revocations import Revocations
from anynode.server.engine.node import Node
from anynode.server.engine.users import Emails
from anynode.server.origins import pattern_of
from anynode.server.reference.page import reference_routes
from anynode.server.settings import Settings
from anynode.server.startup import explain_database_errors, require_url
from anynode.server.store.store import Store
from anynode.server.transport.http import refuse_route, routes_of
from anynode.server.transport.shares import Shares
from anynode.server.transport.websocket import Sockets, WebSocketEndpoint

logger = logging.getLogger("anynode")

# Clients that leave a draining node all at once would arrive elsewhere all at once.
LEAVING_SECONDS: Final = 0.5
CONTACT_PAUSE_SECONDS: Final = (0.1, 0.5)  # the first and the longest wait between attempts to find Postgres there

ExtraRoutes: TypeAlias = Callable[[Authenticator], Sequence[BaseRoute]]


def no_routes(authenticator: Authenticator) -> Sequence[BaseRoute]:
    """Return no routes: a node in production has only its own."""
    return ()


class Anynode:
    """All parts of a running node.

    `running` ends by itself only when the node has failed, or with ConfigurationError when a Postgres that came late
    cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        authenticator: Authenticator,
        node: Node,
        running: asyncio.Task[None],
        revocations: Revocations,
        extra_routes: ExtraRoutes = no_routes,
    ) -> None:
        self.settings = settings
        self.database = database
        self.authenticator = authenticator
        self.node = node
        self.running = running
        self.extra_routes = extra_routes
        self.shares = Shares(settings, revocations.is_revoked)
        self.sockets = Sockets(settings, node, self.shares)
        revocations.on_news = partial(self.shares.sessions.end_if, revocations.is_revoked)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        settings, node, database, authenticator = self.settings, self.node, self.database, self.authenticator
        tickets, sessions = Tickets(database, settings.user_limits), self.shares.sessions
        anynode = partial(AnynodeConnection, settings, node, authenticator, self.shares)
        ai_sdk = partial(AiSdkConnection, settings, node, authenticator, self.shares, tickets=tickets)
        apis = [
            (REST, Rest(settings, node, sessions)),
            (AI_SDK, AiSdk(settings, node, sessions, tickets)),
            (RESPONSES, Responses(settings, node, sessions)),
        ]
        app = Starlette(
            routes=[
                *self.extra_routes(authenticator),  # first, so that they may replace one of ours
                WebSocketRoute("/ws", WebSocketEndpoint(self.sockets, anynode)),
                WebSocketRoute(AI_SDK_PATH, WebSocketEndpoint(self.sockets, ai_sdk)),
                *health_routes(node, database.is_reachable, lambda: authenticator.has_keys),
                *routes_of(
                    apis,
                    authenticator,
                    node.conversations.find,
                    self.shares,
                    body_bytes_max=settings.frame_bytes_max,
                ),
                *reference_routes(),
                *page_routes(),
            ],
            exception_handlers={404: refuse_route, 405: refuse_route},
            middleware=_cross_origin(self.settings),
        )
        app.router.redirect_slashes = False  # to http, behind a proxy that ends TLS
        return app

    async def drain(self) -> None:
        """Take no more work, send clients elsewhere, and let the running turns end or hand them over."""
        self.node.draining.set()
        deadline = time.time() + self.settings.drain_seconds
        leaving = asyncio.create_task(self.sockets.go_away(deadline, LEAVING_SECONDS))
        await self.node.drain(self.settings.drain_seconds)
        await leaving


@asynccontextmanager
async def open_anynode(settings: Settings, extra_routes: ExtraRoutes = no_routes) -> AsyncIterator[Anynode]:
    """Open a node with its database and agent. Postgres need not be there yet. `extra_routes` makes routes that are
    served before the node's own. Raises ConfigurationError."""
    revocations = Revocations()

    async def check(url: str) -> None:
        await check_schema(url)
        await load_revocations(url, revocations.hear)

    with explain_database_errors():
        url = require_url(settings.database_url)
        database = await Database.connect(url, pool_max=settings.database_pool_max, check=check)
    emails = Emails(database)
    authenticator = Authenticator(settings, on_verified=emails.note, is_revoked=revocations.is_revoked)
    fetching_keys = asyncio.create_task(authenticator.run())
    try:
        try:
            with explain_database_errors():
                await database.contact()
        except Unavailable as error:
            logger.warning("Postgres cannot be reached at DATABASE_URL; the node will work when it can: %s", error)
        async with open_agent(settings) as agent:
            store = Store.in_node(settings, database, agent)
            node = Node(settings, database, agent, store=store, emails=emails, revocations=revocations)
            running = asyncio.create_task(_run(node, database))
            try:
                yield Anynode(settings, database, authenticator, node, running, revocations, extra_routes)
            finally:
                running.cancel()
                await asyncio.wait((running,))
                await store.close()
    finally:
        fetching_keys.cancel()
        await asyncio.wait((fetching_keys,))
        await authenticator.close()
        await database.close()


async def _run(node: Node, database: Database) -> None:
    """Wait until Postgres can be reached, then run the node."""
    pause, longest = CONTACT_PAUSE_SECONDS
    while True:
        try:
            with explain_database_errors():
                await database.contact()
            break
        except Unavailable:
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
    logger.info("Postgres is there%s", ", behind a pooler" if database.is_pooled else "")
    await node.run()


def _cross_origin(settings: Settings) -> list[Middleware]:
    """Return the middleware that lets pages of the allowed origins send requests over HTTP."""
    if not settings.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origin_regex=pattern_of(settings.allowed_origins),
            allow_methods=("GET", "POST", "PATCH", "DELETE"),
            allow_headers=("*",),  # stock clients send headers of their own, and none is trusted but the token
            expose_headers=("Link", "Location", "Retry-After"),
        )
    ]
