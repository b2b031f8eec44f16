"""Attacks on memory: large conversations, followers that stay, readers that leave, connections that come and go."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Final

import psutil

from bench.hostile.ordinary import make_conversation
from bench.hostile.peer import AttackRun, Peer, Target, ask, drop_all, noise, request, websocket
from bench.load import CLOSE, TEXT, LoadError, client_frame
from tests.kit.harness import sql

USER: Final = "writer"
FOLLOWERS: Final = 300
FIRST_FOLLOWERS: Final = 30  # who make the node allocate what it needs once
ORDINARY: Final = """
    INSERT INTO messages (id, conversation_id, user_id, client_id, position, role, content, turn_id)
    SELECT gen_random_uuid(), $1::uuid, $2, CASE WHEN p % 2 = 1 THEN p::text END, p,
           CASE WHEN p % 2 = 1 THEN 'user' ELSE 'assistant' END, repeat(md5(p::text), 64), gen_random_uuid()
    FROM generate_series(1, 200) p"""


async def _write_large(target: Target, pairs: int) -> str:
    """Append pairs of a question of 64 kB and an answer of 1 MB over HTTP; return the conversation's id."""
    conversation_id = await make_conversation(target, USER)
    question, answer = noise(65_000), noise(1_000_000)
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    data = request(
        "POST",
        f"/conversations/{conversation_id}/messages",
        target.token(USER),
        json.dumps({"messages": pair * 3}).encode(),
    )
    for _ in range(pairs // 3):
        [(status, body)] = await ask(target, data)
        if status != 201:
            raise LoadError(f"no messages: {status} {body[:200]!r}")
    return conversation_id


def _follow(conversation_id: str, after: int | None = None) -> dict[str, object]:
    frame: dict[str, object] = {"type": "conversation.follow", "conversation_id": conversation_id}
    return frame if after is None else {**frame, "after": after}


async def large_snapshot(target: Target) -> AttackRun:
    """Follow a conversation of 100 × (64 kB + 1 MB) from its snapshot, on 10 sockets that never read."""
    conversation_id = await _write_large(target, target.count(100))
    yield {}
    peers: list[Peer] = []
    for _ in range(10):
        peer = await websocket(target, user=USER, receive_buffer=4096)
        if peer is not None:
            peers.append(peer)
            await peer.send_frame(_follow(conversation_id))
    await asyncio.sleep(target.seconds)
    drop_all(peers)
    yield {"followers": len(peers)}


async def journal_again(target: Target) -> AttackRun:
    """Follow that conversation with `after: 0` again and again on one socket."""
    conversation_id = await _write_large(target, target.count(100))
    yield {}
    frame = client_frame(TEXT, json.dumps(_follow(conversation_id, 0)).encode())
    loop = asyncio.get_running_loop()
    deadline = loop.time() + target.seconds
    sent = 0
    peer: Peer | None = None
    while loop.time() < deadline:
        if peer is None or peer.is_closed:
            peer = await websocket(target, user=USER)
            if peer is None:
                await asyncio.sleep(0.1)
                continue
            peer.discard()
        sent += await peer.send(frame)
        await asyncio.sleep(0.02)
    if peer is not None:
        peer.drop()
    yield {"follows": sent}


async def readers(target: Target) -> AttackRun:
    """Read that conversation's snapshot and leave, 12 connections one after another; then see what the node keeps."""
    conversation_id = await _write_large(target, target.count(100))
    process = psutil.Process(_pid_of(target))
    yield {}
    before = process.memory_info().rss
    whole = 0
    for _ in range(12):
        peer = await websocket(target, user=USER)
        if peer is not None:
            await peer.send_frame(_follow(conversation_id))
            whole += await peer.until("conversation.snapshot") is not None
            peer.drop()
    await asyncio.sleep(1)
    yield {"snapshots": whole, "kept, MB": (process.memory_info().rss - before) / 1e6}


async def followers(target: Target) -> AttackRun:
    """Follow an ordinary conversation of 400 kB (200 messages of 2 kB) from its snapshot, on 300 sockets that idle."""
    conversation_id = await make_conversation(target, USER)
    await sql(target.database_url, ORDINARY, conversation_id, USER)
    process = psutil.Process(_pid_of(target))

    async def follow(count: int) -> list[Peer]:
        peers: list[Peer] = []
        for _ in range(count):
            peer = await websocket(target, user=USER)
            if peer is not None:
                await peer.send_frame(_follow(conversation_id))
                await peer.until("conversation.snapshot")
                peer.discard()
                peers.append(peer)
        return peers

    first = await follow(FIRST_FOLLOWERS)
    yield {}
    before = process.memory_full_info().uss
    peers = await follow(FOLLOWERS)
    await asyncio.sleep(1)
    kept = (process.memory_full_info().uss - before) / 1024 / max(len(peers), 1)
    yield {"followers": len(peers), "KiB of an idle follower": kept}
    drop_all([*first, *peers])


async def churn(target: Target) -> AttackRun:
    """Connect, authenticate, ask, and leave in one of five ways: 15,000 connections, 100 a second."""
    process = psutil.Process(_pid_of(target))
    total = 15_000 if target.scale == 1 else 1_000
    warm = total // 5  # after these, what the node needs once is allocated
    done = answered = 0
    yield {}

    async def visit(number: int) -> None:
        nonlocal done, answered
        peer = await websocket(target, user=f"visitor-{number % 50}")
        is_served = peer is not None
        if peer is not None:
            question = {"type": "message.send", "message_id": uuid.uuid4().hex, "content": "hi"}
            match number % 5:
                case 0:  # the turn's end, and a close
                    await peer.send_frame(question)
                    is_served = await peer.until("turn.completed") is not None
                    await peer.send(client_frame(CLOSE, b"\x03\xe8"))
                    await peer.ended(2)
                case 1:  # vanish in the middle of the turn
                    await peer.send_frame(question)
                    is_served = await peer.until("turn.started") is not None
                case 2:  # half close
                    peer.writer.write_eof()
                    await peer.ended(2)
                case 3:  # a frame that is not UTF-8
                    await peer.send(client_frame(TEXT, b"\xff"))
                    await peer.ended(2)
                case _:  # vanish at once
                    pass
            peer.drop()
        done += 1
        answered += is_served

    async def come(count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(visit(number))
                await asyncio.sleep(0.01)

    await come(warm)
    await asyncio.sleep(1)
    before, files = process.memory_info().rss, process.num_fds()
    await come(total - warm)
    await asyncio.sleep(2)
    yield {
        "connections": done,
        "not served": done - answered,
        "growth of RSS over the last four fifths, MB": (process.memory_info().rss - before) / 1e6,
        "growth of open files": process.num_fds() - files,
    }


def _pid_of(target: Target) -> int:
    """Return the process that listens on the target's port."""
    for connection in psutil.net_connections("tcp"):
        address = connection.laddr
        if connection.status == psutil.CONN_LISTEN and address and address.port == target.port and connection.pid:
            return connection.pid
    raise LoadError(f"no process listens on port {target.port}")
