"""Attacks with the token of one ordinary user: work, rates, shares of what all users need, storage."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import replace
from typing import Final

from bench.hostile.peer import (
    AttackRun,
    Peer,
    Target,
    again_and_again,
    ask,
    drop_all,
    noise,
    request,
    websocket,
    websockets,
    words,
)
from bench.load import TEXT, LoadError, client_frame
from tests.kit.harness import sql

TITLES: Final = 100_000
CONVERSATIONS: Final = """
    INSERT INTO conversations (id, user_id, title, updated_at)
    SELECT gen_random_uuid(), $1, 'What a user of number ' || n || ' asked about ' || md5(n::text),
           now() - n * interval '1 second'
    FROM generate_series(1, $2::integer) n"""
# 33 of them, each without its last byte, are 29 bytes short of 128 MiB; the bystander's body is longer than that.
HELD_BODY_BYTES: Final = 4_067_204
STORING_SECONDS_MIN: Final = 4.0  # within which a node without a quota takes more than it
HEARD_OF: Final = "SELECT sessions, xact_commit AS commits FROM pg_stat_database WHERE datname = current_database()"


async def make_conversation(target: Target, user: str) -> str:
    """Make a conversation of a user; return its id."""
    [(status, body)] = await ask(target, request("POST", "/conversations", target.token(user), b"{}"))
    if status != 201:
        raise LoadError(f"no conversation: {status}")
    conversation_id: str = json.loads(body)["id"]
    return conversation_id


class Lines:
    """Connections over HTTP that are kept, one of each attacker."""

    def __init__(self, target: Target) -> None:
        self.statuses: dict[int, int] = {}
        self._target = target
        self._peers: dict[int, Peer] = {}

    async def ask(self, number: int, data: bytes) -> int:
        """Send a request over an attacker's connection, and return the status of its answer; 0 for none."""
        peer = self._peers.get(number)
        if peer is None or peer.is_closed:
            self._peers[number] = peer = await Peer.open(self._target)
        await peer.send(data)
        status, _ = await peer.answer()
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 0:
            peer.drop()
        return status

    def count(self, *statuses: int) -> int:
        """Return how many answers had one of these statuses."""
        return sum(self.statuses.get(status, 0) for status in statuses)

    def drop(self) -> None:
        """Let all vanish."""
        drop_all(self._peers.values())


async def large_json(target: Target) -> AttackRun:
    """Send the largest legal frame, 400 kB with 50,000 objects, again and again over one socket."""
    yield {}
    content = b'{"type":"message.send","message_id":"a","x":[' + b'{"a":1},' * 49_000 + b"{}]}"
    data = client_frame(TEXT, content)
    peer: Peer | None = None

    async def push(number: int) -> None:
        nonlocal peer
        if peer is None or peer.is_closed:
            peer = await websocket(target, user="talker")
            if peer is None:
                return
            peer.discard()
        await peer.send(data)

    yield {"frames": await again_and_again(target, 1, push, pause_seconds=0.001)}


async def _seed_titles(target: Target, user: str) -> None:
    await sql(target.database_url, "INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING", user)
    await sql(target.database_url, CONVERSATIONS, user, target.count(TITLES))
    await sql(target.database_url, "ANALYZE conversations")


async def _reads(target: Target, path: str) -> dict[str, float]:
    lines = Lines(target)
    token = target.token("hoarder")
    times = await again_and_again(target, 20, lambda number: lines.ask(number, request("GET", path, token)))
    lines.drop()
    return {"requests": times, "answered 200": lines.count(200)}


async def searches(target: Target) -> AttackRun:
    """Search among 100,000 titles for what none of them has, 20 requests at once."""
    await _seed_titles(target, "hoarder")
    yield {}
    yield await _reads(target, "/conversations?search=no-title-has-this")


async def far_pages(target: Target) -> AttackRun:
    """Read the list of 100,000 conversations at its end (`skip=99000`), 20 requests at once."""
    await _seed_titles(target, "hoarder")
    yield {}
    yield await _reads(target, f"/conversations?limit=100&skip={target.count(99_000)}")


async def follows(target: Target) -> AttackRun:
    """Follow and unfollow a small conversation, 100 times a second on each of 20 sockets."""
    conversation_id = await make_conversation(target, "follower")
    async with websockets(target, 20, user="follower") as peers:
        for peer in peers:
            peer.discard()
        yield {}
        follow = {"type": "conversation.follow", "conversation_id": conversation_id}
        unfollow = {"type": "conversation.unfollow", "conversation_id": conversation_id}
        begin, end = (client_frame(TEXT, json.dumps(frame).encode()) for frame in (follow, unfollow))

        async def push(number: int) -> None:
            await peers[number].send(begin)
            await asyncio.sleep(0.003)  # the end comes while the node reads
            await peers[number].send(end)

        before = (await sql(target.database_url, HEARD_OF))[0]
        times = await again_and_again(target, len(peers), push, pause_seconds=0.017)
        after = (await sql(target.database_url, HEARD_OF))[0]
        # The one that counted before has come and gone too.
        backends = max(after["sessions"] - before["sessions"] - 1, 0) / target.seconds
        yield {"follows": times, "new Postgres backends/s": backends}


async def interrupts(target: Target) -> AttackRun:
    """Send 400 messages with `if_busy: interrupt` to one conversation, at once, over 80 sockets."""
    conversation_id = await make_conversation(target, "interrupter")
    async with websockets(target, 80, user="interrupter") as peers:
        for peer in peers:
            peer.discard()
        yield {}
        before = (await sql(target.database_url, HEARD_OF))[0]
        for number in range(400):
            frame = {"type": "message.send", "conversation_id": conversation_id, "if_busy": "interrupt"}
            question = {"message_id": uuid.uuid4().hex, "content": words(2_000)}
            await peers[number % len(peers)].send_frame({**frame, **question})
        await asyncio.sleep(2 * target.seconds)
        after = (await sql(target.database_url, HEARD_OF))[0]
        yield {"transactions/s": (after["commits"] - before["commits"]) / (2 * target.seconds)}


async def bodies(target: Target) -> AttackRun:
    """Post 4 MB of strings where messages are expected, over four connections again and again."""
    conversation_id = await make_conversation(target, "poster")
    body = b'{"messages": [' + b'"a",' * 1_040_000 + b'"a"]}'
    data = request("POST", f"/conversations/{conversation_id}/messages", target.token("poster"), body)
    lines = Lines(target)
    yield {}
    times = await again_and_again(target, 4, lambda number: lines.ask(number, data))
    lines.drop()
    yield {"requests": times, "refused 429": lines.count(429)}


async def held_bodies(target: Target) -> AttackRun:
    """Hold 33 bodies that together are just below what the node reads at once, without their last bytes."""
    conversation_id = await make_conversation(target, "holder")
    yield {}
    body = b" " * HELD_BODY_BYTES
    data = request("POST", f"/conversations/{conversation_id}/messages", target.token("holder"), body)[:-1]

    async def push() -> Peer:
        peer = await Peer.open(target)
        peer.discard()
        for start in range(0, len(data), 65_536):
            if not await peer.send(data[start : start + 65_536]):
                break
        return peer

    peers = await asyncio.gather(*(push() for _ in range(33)))
    await asyncio.sleep(target.seconds)
    held = sum(not peer.is_closed for peer in peers)
    drop_all(peers)
    yield {"bodies that are still held": held}


async def streams(target: Target) -> AttackRun:
    """Open streams of events up to a CONNECTIONS_MAX of 200, all of one user."""
    conversation_id = await make_conversation(target, "hog")
    data = request("GET", f"/conversations/{conversation_id}/events", target.token("hog"))
    yield {}
    peers = []
    open_streams = 0
    for _ in range(250):
        peer = await Peer.open(target)
        await peer.send(data)
        open_streams += b" 200 " in await peer.head()
        peer.discard()
        peers.append(peer)
    await asyncio.sleep(target.seconds)
    yield {"streams": open_streams}
    drop_all(peers)


async def _turns(target: Target, count: int) -> AttackRun:
    async with websockets(target, 20, user="eager") as peers:
        for peer in peers:
            peer.discard()
        yield {}
        question = words(5_000)
        for start in range(0, count, 50):
            for number in range(start, start + 50):
                frame = {"type": "message.send", "message_id": f"m-{number}-{noise(8)}", "content": question}
                await peers[number % len(peers)].send_frame(frame)
            await asyncio.sleep(0.1)
        await asyncio.sleep(target.seconds)
        running = await sql(
            target.database_url,
            """SELECT count(*) AS running FROM turns t JOIN conversations c ON c.id = t.conversation_id
               WHERE t.status = 'running' AND c.user_id = 'eager'""",
        )
        yield {"turns that run": running[0]["running"]}


def turns(target: Target) -> AttackRun:
    """Start 1,000 turns of one user, each of 5,000 tokens at 50 a second."""
    return _turns(target, 1_000)


def turns_max(target: Target) -> AttackRun:
    """Start turns of one user up to a TURNS_MAX of 50."""
    return _turns(target, 200)


async def storage(target: Target) -> AttackRun:
    """Make conversations with 16 kB of metadata over 20 connections, with quotas of 1,000 conversations and 8 MB."""
    body = json.dumps({"metadata": {"text": noise(16_000)}}).encode()
    data = request("POST", "/conversations", target.token("hoarder"), body)
    lines = Lines(target)
    target = replace(target, seconds=max(target.seconds, STORING_SECONDS_MIN))
    yield {}
    times = await again_and_again(target, 20, lambda number: lines.ask(number, data), pause_seconds=0.005)
    lines.drop()
    yield {"requests": times, "MB stored": lines.count(201) * len(body) / 1e6}
