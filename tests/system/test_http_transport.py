"""What a peer can do to the HTTP transport is bounded: heads that never end, connections that say nothing."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.kit.harness import NodeProcess, token_for

# Bytes that come in one piece with the last allowed one are read before they are counted.
ONE_READ = 262_144


async def connect(node: NodeProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", node.port)


async def is_dropped(reader: asyncio.StreamReader, *, within_seconds: float = 30.0) -> bool:
    """Whether the server ends the connection without an answer."""
    async with asyncio.timeout(within_seconds):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


async def test_a_head_that_does_not_end_is_dropped_by_its_length(shared_node: NodeProcess) -> None:
    reader, writer = await connect(shared_node)
    writer.write(b"GET /livez HTTP/1.1\r\n")
    sent = 0
    try:
        while sent < 16 * ONE_READ:
            writer.write(b"X-%06d: %s\r\n" % (sent, b"x" * 1000))
            sent += 1000
            await writer.drain()
    except ConnectionError:
        pass
    assert await is_dropped(reader)
    writer.close()


async def test_a_request_that_begins_and_does_not_go_on_is_dropped(shared_node: NodeProcess) -> None:
    reader, writer = await connect(shared_node)
    writer.write(b"GET /livez HTT")
    assert await is_dropped(reader)
    writer.close()


@pytest.mark.parametrize("token", [None, "good"])
async def test_the_rest_of_a_body_is_not_waited_for_behind_a_refusal(
    shared_node: NodeProcess, user: str, token: str | None
) -> None:
    reader, writer = await connect(shared_node)
    bearer = f"Authorization: Bearer {token_for(user)}\r\n" if token else ""
    writer.write(f"POST /conversations HTTP/1.1\r\nHost: a\r\n{bearer}Content-Length: 100000000\r\n\r\n{{".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == (b"413" if token else b"401")
    writer.write(b" ")
    async with asyncio.timeout(20):
        assert (await reader.read()).startswith(b'{"error"')
    writer.close()


async def test_a_second_request_of_a_connection_has_the_same_bounds(shared_node: NodeProcess) -> None:
    reader, writer = await connect(shared_node)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    writer.write(b"GET /livez HTTP/1.1\r\nHost")
    assert await is_dropped(reader)
    writer.close()


async def test_a_long_body_is_no_long_head(shared_node: NodeProcess, user: str) -> None:
    body = json.dumps({"title": "t", "system_prompt": "x" * 60_000, "metadata": {"m": "x" * 15_000}}).encode()
    reader, writer = await connect(shared_node)
    head = f"POST /conversations HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token_for(user)}\r\n"
    for _ in range(2):  # in one piece with its head
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 201")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
    writer.close()
