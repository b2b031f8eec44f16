"""A hostile model: a server of the chat completions API that never ends, sends a bomb, or lies about its usage.

A question that holds "endless", "bomb" or "odd numbers" gets that; other questions get an answer as models give it.
"""

from __future__ import annotations

import asyncio
import gzip
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from bench.hostile.peer import AttackRun, Target, websocket
from bench.load import LoadError
from tests.kit.provider import DONE, delta, event, usage

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
ANSWER: Final = b"".join((delta(content="Hello."), delta("stop"), usage(7, 1), DONE))
BOMB_MEGABYTES: Final = 256
NUMBER_MAX: Final = 2**53 - 1
NAME_MAX: Final = 1_000
TURN_SECONDS_MAX: Final = 3.0


@asynccontextmanager
async def hostile_model(target: Target) -> AsyncIterator[None]:
    """Serve the hostile model on the port that the node's OPENAI_BASE_URL has."""
    bomb = gzip.compress(delta(content="") * (BOMB_MEGABYTES * 1_000_000 // len(delta(content=""))), 6)
    odd = ({"prompt_tokens": -5, "completion_tokens": 10**23}, "\x1b]0;title\x07" + "m" * 100_000)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            body = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
            if b"endless" in body:
                writer.write(HEAD + b"\r\n")
                while True:
                    writer.write(delta(content=""))
                    await writer.drain()
                    await asyncio.sleep(0.02)
            elif b"bomb" in body:
                writer.write(HEAD + b"Content-Encoding: gzip\r\n\r\n" + bomb)
            elif b"odd numbers" in body:
                told = event({"model": odd[1], "choices": [], "usage": odd[0]})
                writer.write(HEAD + b"\r\n" + delta(content="Hi") + delta("stop") + told + DONE)
            else:
                writer.write(HEAD + b"\r\n" + ANSWER)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", target.provider_port)
    try:
        yield
    finally:
        server.close()


async def _ends(target: Target, question: str, within_seconds: float) -> tuple[float, dict[str, Any]]:
    """Ask, and return after how many seconds the turn ended, and how; an empty frame if it did not."""
    peer = await websocket(target, user="asker")
    if peer is None:
        raise LoadError("the node does not let the asker in")
    began = time.monotonic()
    await peer.send_frame({"type": "message.send", "message_id": uuid.uuid4().hex, "content": question})
    endings = ("turn.completed", "turn.failed", "turn.cancelled", "error")
    frame = await peer.until(*endings, within_seconds=within_seconds)
    seconds = time.monotonic() - began
    peer.drop()
    return seconds, dict(frame or {})


async def endless_model(target: Target) -> AttackRun:
    """Let a model send empty deltas without end, with a TURN_SECONDS_MAX of 3."""
    async with hostile_model(target):
        yield {}
        seconds, frame = await _ends(target, "endless", TURN_SECONDS_MAX + 5)
        yield {"seconds until the turn ended": seconds, "turns without an end": not frame}


async def gzip_bomb(target: Target) -> AttackRun:
    """Let a model send 256 MB of empty deltas in a compressed answer that nobody asked for."""
    async with hostile_model(target):
        yield {}
        seconds, frame = await _ends(target, "bomb", 2 * target.seconds)
        refused = frame.get("type") == "turn.failed"
        yield {"seconds until the turn ended": seconds, "answers that were taken": not refused}


async def odd_usage(target: Target) -> AttackRun:
    """Let a model report −5 and 10^23 tokens, and a name of 100 kB with control characters."""
    async with hostile_model(target):
        yield {}
        _, frame = await _ends(target, "odd numbers", 10)
        told = frame.get("usage") or {}
        numbers = [told.get("input_tokens"), told.get("output_tokens")]
        odd = sum(number is not None and not 0 <= number <= NUMBER_MAX for number in numbers)
        name = told.get("model") or ""
        odd += len(name) > NAME_MAX or not name.isprintable()
        yield {"odd values that were passed on": odd, "turns without an end": not frame}
