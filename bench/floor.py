"""The floor: the least code that does the same necessary work, for the product to be compared with.

It authenticates each connection once by its JWT. For each message it reads the newest messages of the conversation,
stores the user's, streams the agent's tokens as they come, one frame a token, and stores the answer. The libraries and
the options of uvicorn are the product's; the pool has asyncpg's defaults; frames are encoded by msgspec.

It leaves out whatever else the product promises: no journal, so nothing can be resumed and an answer is lost with its
process or its connection; no check of ownership, of repeated messages, of the role order or of a running turn; no
leases, takeover, cancel, drain, limits or metrics.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import asyncpg
import jwt
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from anynode.server.settings import Settings, read_settings
from bench.agents import paced

SCHEMA = """
CREATE TABLE messages (
    conversation_id uuid NOT NULL,
    position integer NOT NULL,
    role text NOT NULL,
    content text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (conversation_id, position)
)
"""
NEWEST = "SELECT position, role, content FROM messages WHERE conversation_id = $1 ORDER BY position DESC LIMIT $2"
INSERT = "INSERT INTO messages (conversation_id, position, role, content) VALUES ($1, $2, $3, $4)"


class Send(msgspec.Struct, tag_field="type", tag="message.send"):
    """A message that a client sends."""

    conversation_id: UUID
    message_id: str
    content: str


class Delta(msgspec.Struct, tag_field="type", tag="turn.delta"):
    """A token."""

    conversation_id: UUID
    text: str


class Completed(msgspec.Struct, tag_field="type", tag="turn.completed"):
    """The end of an answer."""

    conversation_id: UUID


class Floor:
    """The server: its settings and its pool."""

    def __init__(self, settings: Settings) -> None:
        assert settings.jwt_secret is not None
        self.settings = settings
        self.secret = settings.jwt_secret
        self.decode = msgspec.json.Decoder(Send).decode
        self.encode = msgspec.json.Encoder().encode
        self.pool: asyncpg.Pool

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Hold the pool; stop when standard input ends, as it does when the benchmark dies."""
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os.kill, os.getpid(), signal.SIGTERM)
        async with asyncpg.create_pool(self.settings.database_url) as self.pool:
            yield

    async def chat(self, websocket: WebSocket) -> None:
        """Serve one connection."""
        settings = self.settings
        try:
            jwt.decode(
                websocket.headers["authorization"].removeprefix("Bearer "),
                self.secret,
                algorithms=["HS256"],
                audience=settings.jwt_audience,
                issuer=settings.jwt_issuer,
            )
        except (KeyError, jwt.PyJWTError):
            await websocket.close(3000)
            return
        await websocket.accept(subprotocol="anynode.v1")
        await websocket.send_text('{"type":"ready"}')
        try:
            while True:
                await self.answer(websocket, self.decode(await websocket.receive_text()))
        except WebSocketDisconnect:
            pass

    async def answer(self, websocket: WebSocket, question: Send) -> None:
        """Answer one message."""
        conversation_id = question.conversation_id
        async with self.pool.acquire() as connection:
            rows = await connection.fetch(NEWEST, conversation_id, self.settings.history_messages_max)
            position = rows[0]["position"] + 1 if rows else 1
            await connection.execute(INSERT, conversation_id, position, "user", question.content)
        history = [{"role": row["role"], "content": row["content"]} for row in reversed(rows)]
        history.append({"role": "user", "content": question.content})
        texts = []
        async for text in self.agent(history):
            texts.append(text)
            await websocket.send_text(self.encode(Delta(conversation_id, text)).decode())
        await self.pool.execute(INSERT, conversation_id, position + 1, "assistant", "".join(texts))
        await websocket.send_text(self.encode(Completed(conversation_id)).decode())

    def agent(self, history: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the tokens of the product's agent, at its speed."""
        settings = self.settings
        is_timed = settings.agent.endswith(":timed")
        return paced(settings.echo_tokens, settings.echo_tokens_per_second, is_timed=is_timed)


def main() -> None:
    """Serve with the product's settings."""
    settings = read_settings(os.environ)
    floor = Floor(settings)
    uvicorn.run(
        Starlette(routes=[WebSocketRoute("/ws", floor.chat)], lifespan=floor.lifespan),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="websockets-sansio",
        ws_max_size=6 * settings.message_bytes_max + 16_384,
        ws_per_message_deflate=False,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        timeout_graceful_shutdown=3,
        access_log=False,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    main()
