"""A client over HTTP that is cheap enough not to be the bottleneck: one connection, one request at a time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from bench.load import ANSWER_SECONDS_MAX, LoadError


class HttpClient:
    """A client that sends one request after another over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str) -> None:
        self._reader = reader
        self._writer = writer
        self._head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"

    @classmethod
    async def open(cls, port: int, token: str) -> HttpClient:
        """Connect."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        return cls(reader, writer, token)

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """Send a request and return the JSON of its response. Raises LoadError unless it succeeds."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            answered = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(answered.partition("content-length: ")[2].partition("\r\n")[0])
            content = await self._reader.readexactly(length)
        if not answered.startswith("http/1.1 2"):
            raise LoadError(f"{method} {path}: {answered.partition(chr(13))[0]} {content[:200]!r}")
        return json.loads(content)

    def close(self) -> None:
        """Drop the connection."""
        self._writer.transport.abort()
