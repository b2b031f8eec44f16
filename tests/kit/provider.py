"""A model provider for tests: a real HTTP server that speaks streaming chat completions as a script tells it to."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web


def event(data: Any) -> bytes:
    """One server-sent event with `data` as JSON."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def delta(finish_reason: str | None = None, **fields: Any) -> bytes:
    """An event with one choice: `delta(content="Hi")`, `delta("stop")`."""
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "model": "fake-1",
            "choices": [{"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}],
        }
    )


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    tokens = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event({"model": "fake-1", "choices": [], "usage": tokens})


DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What the provider does with one request; each chunk reaches the client by itself.

    `then`: `end` the response; `cut` the connection without ending it; `hang` until the client leaves.
    """

    chunks: Sequence[bytes] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "text/event-stream"
    then: Literal["end", "cut", "hang"] = "end"


def answer(*texts: str) -> Reply:
    """A whole answer, one chunk for each text, with its usage."""
    words = (delta(content=text) for text in texts)
    return Reply((delta(role="assistant", content=""), *words, delta("stop"), usage(7, len(texts)), DONE))


def call_of(id: str, name: str, /, **arguments: Any) -> dict[str, Any]:
    """A call of a tool, whole, as a delta has it; its index is that in `calling`."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def calling(*calls: dict[str, Any], text: str = "", then: Literal["end", "cut", "hang"] = "end") -> Reply:
    """A whole step that calls tools, with its usage; each call's arguments come in two pieces."""
    deltas = [delta(content=text)] if text else []
    for index, call in enumerate(calls):
        function = call["function"]
        half = len(function["arguments"]) // 2
        begun = {**function, "arguments": function["arguments"][:half]}
        deltas.append(delta(tool_calls=[{**call, "index": index, "function": begun}]))
        deltas.append(delta(tool_calls=[{"index": index, "function": {"arguments": function["arguments"][half:]}}]))
    return Reply((*deltas, delta("tool_calls"), usage(7, 1), DONE), then=then)


@dataclass(frozen=True)
class Request:
    headers: Mapping[str, str]
    body: Any
    peer: Any  # address and port of the client: two requests of one connection have the same


class Provider:
    """`url` is its base URL, `requests` what it was asked; `replies` are used in order, then `default`."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.replies: deque[Reply] = deque()
        self.default = answer("Hello ", "world.")
        self.hanging = asyncio.Event()  # a reply has sent its chunks and hangs
        self.left = asyncio.Event()  # a client has closed its connection in the middle of a reply

    async def complete(self, request: web.Request) -> web.StreamResponse:
        peer = request.transport.get_extra_info("peername") if request.transport else None
        self.requests.append(Request(request.headers.copy(), await request.json(), peer))
        reply = self.replies.popleft() if self.replies else self.default
        try:
            return await self._stream(request, reply)
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise

    async def _stream(self, request: web.Request, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.content_type = reply.content_type
        await response.prepare(request)
        for chunk in reply.chunks:
            await response.write(chunk)
            for _ in range(4):  # a client in this loop reads what is there before more of it comes
                await asyncio.sleep(0)
        if reply.then == "hang":
            self.hanging.set()
            await asyncio.Event().wait()
        if reply.then == "cut" and request.transport is not None:
            request.transport.abort()
        return response


@asynccontextmanager
async def serve_provider() -> AsyncIterator[Provider]:
    """A provider on a free port of 127.0.0.1, for as long as the context lasts."""
    provider = Provider()
    app = web.Application(client_max_size=0)
    app.router.add_post("/v1/chat/completions", provider.complete)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        provider.url = f"http://{host}:{port}/v1"
        yield provider
    finally:
        await runner.cleanup()


def openai_environment(provider: Provider) -> dict[str, str]:
    """The settings of a node whose agent asks this provider."""
    return {"AGENT": "openai", "OPENAI_BASE_URL": provider.url, "OPENAI_API_KEY": "sk-secret", "MODEL": "fake-1"}
