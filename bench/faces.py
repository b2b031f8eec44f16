"""The cost of the other APIs: a turn over each beside one over the socket, and reads of much beside reads of little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias
from uuid import UUID

import asyncpg

from bench.http import HttpClient
from bench.load import LoadError, UiChat, open_chats
from bench.measures import CLIENTS, STAGGER_SECONDS, TOKENS, TOKENS_PER_SECOND, Stopwatch, ask_all, close_all
from bench.report import Figure, Target, percentile
from bench.servers import CONTENT, USER, Bench, Server

LITTLE: Final = 1_000  # messages, ten in each conversation, all of one user
MUCH: Final = 1_000_000
MESSAGES_EACH: Final = 10
WARM_UP_READS: Final = 50
ALTERNATIONS: Final = 10  # how often the two servers take turns within a round


@dataclass(frozen=True)
class Scale:
    """The sizes of all measures."""

    rounds: int
    turns: int  # of each client and in each of four legs
    reads: int  # of each kind


DEFAULT: Final = Scale(rounds=3, turns=1, reads=400)
QUICK: Final = Scale(rounds=1, turns=1, reads=100)


async def continued(bench: Bench, scale: Scale) -> list[Figure]:
    """Measure the server's CPU for a turn of 200 tokens at 50 tokens/s: for 100 sockets, and for 100 clients of
    `POST …/continue`."""
    async with bench.serve("product", ECHO_TOKENS=TOKENS, ECHO_TOKENS_PER_SECOND=TOKENS_PER_SECOND) as server:
        ids = bench.conversations[0]
        chats = await open_chats(server.port, bench.token, ids[:CLIENTS])
        clients = [await HttpClient.open(server.port, bench.token) for _ in range(CLIENTS)]
        figures = await _beside(
            bench,
            server,
            scale,
            lambda: ask_all(chats, scale.turns, STAGGER_SECONDS),
            "continue",
            lambda: _continue_all(clients, ids[CLIENTS : 2 * CLIENTS], scale.turns),
            Target("product", 1.2),
        )
        close_all(chats)
        for client in clients:
            client.close()
    return figures


async def ai_sdk(bench: Bench, scale: Scale) -> list[Figure]:
    """Measure the server's CPU for a turn for 100 sockets, and for 100 clients on the AI SDK's WebSocket."""
    async with bench.serve("product", ECHO_TOKENS=TOKENS, ECHO_TOKENS_PER_SECOND=TOKENS_PER_SECOND) as server:
        ids = bench.conversations[0]
        chats = await open_chats(server.port, bench.token, ids[:CLIENTS])
        others = await open_chats(server.port, bench.token, ids[CLIENTS : 2 * CLIENTS], UiChat)
        figures = await _beside(
            bench,
            server,
            scale,
            lambda: ask_all(chats, scale.turns, STAGGER_SECONDS),
            "AI SDK",
            lambda: ask_all(others, scale.turns, STAGGER_SECONDS),
            Target("product", 1.3),
        )
        close_all([*chats, *others])
    return figures


Leg: TypeAlias = Callable[[], Awaitable[None]]


async def _beside(
    bench: Bench, server: Server, scale: Scale, socket: Leg, name: str, other: Leg, target: Target
) -> list[Figure]:
    """Measure a turn over the socket and over another API. The legs alternate, so that a drift affects both."""
    spent = {"socket": 0.0, name: 0.0}
    legs: Mapping[str, Leg] = {"socket": socket, name: other}
    for leg in legs.values():  # one run that is not timed
        await leg()
    for of in ("socket", name, name, "socket"):
        stopwatch = Stopwatch(bench, server)
        await legs[of]()
        spent[of] += stopwatch.stop()[1]
    count = 2 * CLIENTS * scale.turns
    return [
        *(Figure(f"{of}: server CPU, ms a turn", 1000 * seconds / count) for of, seconds in spent.items()),
        Figure(f"{name} / socket", spent[name] / spent["socket"], target),
    ]


async def _continue_all(clients: Sequence[HttpClient], ids: Sequence[UUID], turns: int) -> None:
    async def ask(client: HttpClient, id: UUID, number: int) -> None:
        await asyncio.sleep(STAGGER_SECONDS * number / len(clients))
        for _ in range(turns):
            answer = await client.ask("POST", f"/conversations/{id}/continue", {"content": "What is new?"})
            if answer["response"].count(" ") != TOKENS:
                raise LoadError(f"an answer has {answer['response'].count(' ')} tokens, not {TOKENS}")

    async with asyncio.TaskGroup() as group:
        for number, (client, id) in enumerate(zip(clients, ids, strict=True)):
            group.create_task(ask(client, id, number))


async def reads(bench: Bench, scale: Scale) -> list[Figure]:
    """Measure the median of each read for a user with a million messages in 100,000 conversations, beside a user with
    1,000 messages in 100. Each has a server and a database of its own; both run at once and are asked in turn."""
    async with bench.serve("product") as little, bench.serve("product") as much:
        samples: dict[str, tuple[list[float], list[float]]] = {}
        sides = [await _Reader.open(bench, server, messages) for server, messages in ((little, LITTLE), (much, MUCH))]
        for name in sides[0].kinds:
            samples[name] = ([], [])
            for reader in sides:
                for _ in range(WARM_UP_READS):
                    await reader.kinds[name]()
            for alternation in range(ALTERNATIONS):
                for side, reader in enumerate(sides) if alternation % 2 else [*enumerate(sides)][::-1]:
                    for _ in range(scale.reads // ALTERNATIONS):
                        started = time.perf_counter()
                        await reader.kinds[name]()
                        samples[name][side].append(1000 * (time.perf_counter() - started))
        for reader in sides:
            reader.close()
    figures = []
    for name, (of_little, of_much) in samples.items():
        p50s = percentile(of_little, 50), percentile(of_much, 50)
        figures += [
            Figure(f"{name}: p50 of {LITTLE:,}, ms", p50s[0]),
            Figure(f"{name}: p50 of {MUCH:,}, ms", p50s[1]),
            Figure(f"{name}: ratio", p50s[1] / p50s[0], Target("product", 1.5)),
        ]
    return figures


class _Reader:
    """Reads one user's conversations, a different one each time."""

    def __init__(self, client: HttpClient, ids: Sequence[UUID], deep: str) -> None:
        self._client = client
        self._ids = ids
        self._next = 0
        self.kinds: Mapping[str, Callable[[], Awaitable[Any]]] = {
            "list": partial(client.ask, "GET", "/conversations"),
            "list, far down": partial(client.ask, "GET", f"/conversations?before={deep}"),
            "conversation": self._each(""),
            "messages": self._each("/messages"),
            "export": self._each("/messages?format=openai"),
        }

    def _each(self, suffix: str) -> Callable[[], Awaitable[Any]]:
        async def read() -> Any:
            self._next = (self._next + 7919) % len(self._ids)
            return await self._client.ask("GET", f"/conversations/{self._ids[self._next]}{suffix}")

        return read

    @classmethod
    async def open(cls, bench: Bench, server: Server, messages: int) -> _Reader:
        """Fill the server's database, and connect."""
        ids = await _fill(server.database_url, messages)
        client = await HttpClient.open(server.port, bench.token)
        # The list's mark of a place at nine tenths of it.
        skip = len(ids) * 9 // 10
        page = await client.ask("GET", f"/conversations?limit=1&skip={skip}")
        return cls(client, ids, page["next_before"])

    def close(self) -> None:
        """Drop the connection."""
        self._client.close()


async def _fill(url: str, messages: int) -> list[UUID]:
    connection = await asyncpg.connect(url)
    try:
        # The rows of the template are another user's, in the same tables.
        await connection.execute("TRUNCATE users, conversations, messages, turns, events")
        await connection.execute("INSERT INTO users (id) VALUES ($1)", USER)
        rows = await connection.fetch(
            """INSERT INTO conversations (id, user_id, title, updated_at)
               SELECT gen_random_uuid(), $1, 'a title', now() - make_interval(secs => n)
               FROM generate_series(1, $2::integer) n RETURNING id""",
            USER,
            messages // MESSAGES_EACH,
        )
        await connection.execute(
            """INSERT INTO messages (id, conversation_id, user_id, client_id, position, role, content, created_at)
               SELECT gen_random_uuid(), c.id, $1, CASE WHEN p % 2 = 1 THEN gen_random_uuid()::text END, p,
                      CASE WHEN p % 2 = 1 THEN 'user' ELSE 'assistant' END, $2, now()
               FROM generate_series(1, $3::integer) p, conversations c""",
            USER,
            CONTENT,
            MESSAGES_EACH,
            timeout=300,
        )
        await connection.execute("VACUUM ANALYZE users, conversations, messages", timeout=300)
    finally:
        await connection.close()
    return [row["id"] for row in rows]


Measure: TypeAlias = Callable[[Bench, Scale], Awaitable[list[Figure]]]
FACES: Final[Mapping[str, Measure]] = {"continue": continued, "reads": reads, "ai_sdk": ai_sdk}
