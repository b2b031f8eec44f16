"""Attacks without a token: over WebSockets, in handshakes and over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from bench.hostile.ordinary import make_conversation
from bench.hostile.peer import (
    AttackRun,
    Peer,
    Target,
    again_and_again,
    drop_all,
    handshake,
    noise,
    request,
    websocket,
    websockets,
    words,
)
from bench.load import PING, PONG, TEXT, client_frame
from tests.kit.harness import sql

EMPTY_PING: Final = client_frame(PING, b"")
EMPTY_PONG: Final = client_frame(PONG, b"")
EMPTY_TEXT: Final = client_frame(TEXT, b"")
TRAILER: Final = b"a: 12345678\r\n" * 2048  # about 27 kB
SLOW_HEAD: Final = b"GET /livez HTTP/1.1\r\nX-Slow: " + b"x" * 100
LIMBO_SECONDS: Final = 10.0
SLACK_SECONDS: Final = 1.5  # of a timer on a machine of which the attackers have a part


async def _flood(target: Target, count: int, data: bytes, pause_seconds: float) -> float:
    """Send the same bytes over each of `count` sockets again and again; open a new one where the node ends one.

    Return how many MB the node took.
    """
    peers: dict[int, Peer | None] = {}
    taken = 0

    async def push(number: int) -> None:
        nonlocal taken
        peer = peers.get(number)
        if peer is None or peer.is_closed:
            if peer is not None:
                peer.drop()
            peers[number] = peer = await websocket(target)
            if peer is None:
                return
            peer.discard()
        if await peer.send(data):
            taken += len(data)

    await again_and_again(target, count, push, pause_seconds=pause_seconds)
    drop_all(peer for peer in peers.values() if peer is not None)
    return taken / 1e6


async def pings(target: Target) -> AttackRun:
    """Send 7,000 empty pings every 20 ms over one socket, 2.1 MB a second."""
    yield {}
    yield {"MB taken": await _flood(target, 1, EMPTY_PING * 7_000, 0.02)}


async def pongs(target: Target) -> AttackRun:
    """Send pongs over 40 sockets, up to 18 MB a second, while 20 turns of another user run on the node."""
    async with websockets(target, 20, user="worker") as workers:
        for worker in workers:
            worker_id = noise(20)
            await worker.send_frame({"type": "message.send", "message_id": worker_id, "content": words(5_000)})
            await worker.until("turn.delta")
            worker.discard()
        yield {}
        taken = await _flood(target, target.count(40), EMPTY_PONG * 15_000, 0.2)
        await asyncio.sleep(1)
        lost = await sql(target.database_url, "SELECT count(*) AS lost FROM turns WHERE epoch > 1")
        yield {"MB taken": taken, "turns that lost their lease": lost[0]["lost"]}


async def empty_frames(target: Target) -> AttackRun:
    """Send 43,000 empty text frames over each of 100 sockets, once."""
    yield {}

    async def push() -> int:
        peer = await websocket(target)
        if peer is None:
            return 0
        peer.discard()
        await peer.send(EMPTY_TEXT * 43_000)
        await asyncio.sleep(1)
        peer.drop()
        return peer.sent_bytes

    taken = await asyncio.gather(*(push() for _ in range(target.count(100))))
    await asyncio.sleep(target.count(8))  # the attack is short: with few samples more, its p99 would be one sample
    yield {"MB taken": sum(taken) / 1e6}


def limbo_heads() -> Sequence[bytes]:
    """Return five handshakes that a parser of WebSocket handshakes refuses: two have a body, three are too large."""
    return (
        handshake(lines=["Content-Length: 2"]) + b"hi",
        handshake(lines=["Transfer-Encoding: chunked"]) + b"2\r\nhi\r\n0\r\n\r\n",
        handshake(lines=[f"X-Long: {noise(9_000)}"]),
        handshake(lines=[f"X-{number}: 1" for number in range(140)]),
        handshake(path="/ws?" + noise(9_000)),
    )


async def limbo(target: Target) -> AttackRun:
    """Send handshakes that cannot be parsed; hold some more of them while the node drains."""
    yield {}
    peers = []
    for head in limbo_heads():
        for _ in range(target.count(60)):
            peers.append(await Peer.open(target))
            await peers[-1].send(head)
    began = time.monotonic()
    answers = await asyncio.gather(*(peer.head(LIMBO_SECONDS + SLACK_SECONDS) for peer in peers))
    seconds = time.monotonic() - began
    # A peer is in limbo that was not answered and whose connection the node has not ended.
    unanswered = sum(not answer and not peer.is_closed for answer, peer in zip(answers, peers, strict=True))
    drop_all(peers)
    held = [await Peer.open(target) for _ in limbo_heads()]
    for peer, head in zip(held, limbo_heads(), strict=True):
        await peer.send(head)
    yield {"neither answered nor closed after 10 s": unanswered, "seconds of the slowest": seconds}
    drop_all(held)


async def _trailers(target: Target, head: bytes, megabytes: float) -> float:
    peer = await Peer.open(target)
    await peer.send(head + b"0\r\n")
    peer.discard()
    deadline = time.monotonic() + 2 * target.seconds
    while peer.sent_bytes < megabytes * 1e6 and time.monotonic() < deadline:
        if not await peer.send(TRAILER):
            break
    await asyncio.sleep(0.5)
    peer.drop()
    return peer.sent_bytes / 1e6


async def trailers(target: Target) -> AttackRun:
    """Send 36 MB of trailers behind the chunked body of a `GET /livez`."""
    yield {}
    yield {"MB taken": await _trailers(target, request("GET", "/livez", None, None, "Transfer-Encoding: chunked"), 36)}


async def trailers_stream(target: Target) -> AttackRun:
    """Send 100 MB of trailers behind the chunked body of a `GET …/events`, with a token."""
    conversation_id = await make_conversation(target, "streamer")
    yield {}
    path = f"/conversations/{conversation_id}/events"
    head = request("GET", path, target.token("streamer"), None, "Transfer-Encoding: chunked")
    yield {"MB taken": await _trailers(target, head, target.count(100))}


async def unfinished_frames(target: Target) -> AttackRun:
    """Send all but the last byte of a frame of 4.2 MB over each of 150 sockets to `/api/chat`."""
    yield {}
    data = client_frame(TEXT, b"x" * 4_190_000)[:-1]

    async def push() -> Peer | None:
        peer = await websocket(target, "/api/chat")
        if peer is None:
            return None
        peer.discard()
        for start in range(0, len(data), 65_536):
            if not await peer.send(data[start : start + 65_536]):
                break
        return peer

    peers = await asyncio.gather(*(push() for _ in range(target.count(150))))
    await asyncio.sleep(1)
    taken = sum(peer.sent_bytes for peer in peers if peer is not None) / 1e6
    held = sum(peer is not None and not peer.is_closed for peer in peers)
    drop_all(peer for peer in peers if peer is not None)
    yield {"MB taken": taken, "sockets that still hold": held}


async def unauthenticated(target: Target) -> AttackRun:
    """Open sockets that send nothing, up to 250 a second, against a CONNECTIONS_MAX of 200."""
    yield {}
    peers: list[Peer] = []

    async def open_one(number: int) -> None:
        peer = await websocket(target)
        if peer is not None:
            peers.append(peer)
            peer.discard()

    tries = await again_and_again(target, 6, open_one, pause_seconds=0.02)
    held = sum(not peer.is_closed for peer in peers)
    drop_all(peers)
    yield {"tries": tries, "held at the end": held}


async def idle_tcp(target: Target) -> AttackRun:
    """Open 4,000 TCP connections that send nothing."""
    yield {}
    peers: list[Peer] = []
    for _ in range(target.count(80)):
        peers += await asyncio.gather(*(Peer.open(target) for _ in range(50)))
    await asyncio.sleep(target.seconds / 2)
    for peer in peers:
        peer.discard()
    await asyncio.sleep(0.2)
    yield {"held": sum(not peer.is_closed for peer in peers)}
    drop_all(peers)


async def slow_heads(target: Target) -> AttackRun:
    """Send the head of a request, a byte every half second, over 100 connections."""
    yield {}

    async def drip() -> float:
        peer = await Peer.open(target)
        began = time.monotonic()
        peer.discard()
        while time.monotonic() - began < LIMBO_SECONDS + 5:
            if not await peer.send(SLOW_HEAD[peer.sent_bytes : peer.sent_bytes + 1]):
                break
            await asyncio.sleep(0.5)
        peer.drop()
        return time.monotonic() - began

    seconds = await asyncio.gather(*(drip() for _ in range(target.count(100))))
    yield {"seconds until the last is cut": max(seconds)}


async def long_tokens(target: Target) -> AttackRun:
    """Connect with good tokens of 8, 12 and 16 kB in the header, in the subprotocol and over HTTP."""
    yield {}
    failed = 0
    for size in (5_000, 6_200, 9_000, 11_900):  # of a claim; in base64 it is a third longer
        token = target.token("longtoken", claim=noise(size))
        heads = (
            handshake(token=token),
            handshake(protocols=("anynode.v1", f"bearer.{token}")),
            request("GET", "/conversations?limit=1", token),
        )
        for head in heads:
            peer = await Peer.open(target)
            await peer.send(head)
            answer = await peer.head(5)
            failed += not (b" 101 " in answer or b" 200 " in answer)
            peer.drop()
    yield {"handshakes and requests of 12 that fail": failed}


async def cookies(target: Target) -> AttackRun:
    """Connect with cookies of 4, 9, 20 and 60 kB, and ask over HTTP with them."""
    yield {}
    unanswered = 0
    for size in (4_000, 9_000, 20_000, 60_000):
        line = f"Cookie: session={noise(size)}"
        for head in (
            handshake(token=target.token("cookies"), lines=[line]),
            request("GET", "/livez", None, None, line),
        ):
            peer = await Peer.open(target)
            await peer.send(head)
            unanswered += not await peer.head(3)
            peer.drop()
    yield {"without an answer": unanswered}


async def invalid_utf8(target: Target) -> AttackRun:
    """Send a bad frame and a frame that is not UTF-8, or 1,025 fragments, in one packet, over one socket after
    another."""
    yield {}
    bad = client_frame(TEXT, b"{ secret-of-a-client")
    fragments = client_frame(0x01, b"x") + client_frame(0x00, b"y") * 1_025
    packets = (bad + client_frame(TEXT, b"\xff"), bad + fragments)

    async def push(number: int) -> None:
        peer = await websocket(target)
        if peer is not None:
            await peer.send(packets[number % 2])
            await peer.ended(0.2)
            peer.drop()

    yield {"connections": await again_and_again(target, 8, push)}


async def long_assets(target: Target) -> AttackRun:
    """Ask for `/assets/` and 300 characters, again and again over 10 connections."""
    yield {}
    peers: dict[int, Peer] = {}
    failures = 0

    async def push(number: int) -> None:
        nonlocal failures
        if number not in peers or peers[number].is_closed:
            peers[number] = await Peer.open(target)
        await peers[number].send(request("GET", f"/assets/{'x' * 300}"))
        status, _ = await peers[number].answer(5)
        failures += status >= 500

    requests = await again_and_again(target, 10, push, pause_seconds=0.005)
    drop_all(peers.values())
    yield {"requests": requests, "answers 500": failures}


async def malformed_http(target: Target) -> AttackRun:
    """Send what is not HTTP, over 20 connections again and again."""
    yield {}

    async def push(number: int) -> None:
        peer = await Peer.open(target)
        await peer.send(b"\x16\x03\x01 NOT HTTP\r\n\r\n")
        await peer.ended(2)
        peer.drop()

    yield {"connections": await again_and_again(target, 20, push, pause_seconds=0.005)}
