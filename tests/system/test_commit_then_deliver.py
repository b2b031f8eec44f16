"""No client sees what is not committed, no agent waits for Postgres, and each end is one transaction."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.stoppable_postgres import StoppablePostgres, stoppable_postgres
from tests.kit.stored import assert_seqs_are_gapless, said_in

StartNode = Callable[..., NodeProcess]

# Every commit that appends events takes a moment longer than its statement, so that who does not wait for it is seen.
SLOW_COMMITS = """
CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.03); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER dawdle AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION dawdle();
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[StoppablePostgres]:
    with stoppable_postgres() as running:
        yield running


@pytest.fixture
def own_database_url(postgres: StoppablePostgres) -> Iterator[str]:
    url = postgres.new_database()
    yield url
    postgres.resume()
    asyncio.run(sql(postgres.server.url, f"DROP DATABASE {url.split('?')[0].rsplit('/', 1)[1]} WITH (FORCE)"))


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


async def has_answered_pings(socket: Socket, count: int) -> list[Frame]:
    """Return the frames that come with the answers to `count` pings; a frame that was sent before is among them."""
    frames = []
    for _ in range(count):
        await socket.send({"type": "ping"})
        frames += await socket.until("pong")
    return frames


async def test_while_postgres_is_stopped_no_delta_arrives_and_the_agent_goes_on(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, strings: Strings, user: str
) -> None:
    script = script_of(("text", "first "), ("gate", "go"), ("paced", 20, "w{number} ", 0.01), ("mark", "all said"))
    expected = "first " + "".join(f"w{number} " for number in range(20))
    environment = {**strings.environment, "LEASE_SECONDS": "60"}
    with running_node(own_database_url, tmp_path, environment) as node:
        async with socket_to(node, user) as socket:
            await socket.ask(script)
            frames = await socket.until("turn.delta")

            async def is_committed() -> object:
                return await sql(own_database_url, "SELECT FROM events WHERE type = 'turn.delta'")

            await eventually(is_committed)  # so that no flush is under way, and the next one begins in the stall
            postgres.stall()
            strings.open("go")

            async def is_all_said() -> object:
                return strings.marks("all said")

            await eventually(is_all_said)
            during = await has_answered_pings(socket, 20)
            postgres.resume()
            frames += await socket.until(*TERMINAL)
    assert {frame["type"] for frame in during} == {"pong"}
    assert frames[-1]["type"] == "turn.completed"
    assert "turn.restarted" not in [frame["type"] for frame in frames]
    assert text_of(frames) == frames[-1]["message"]["content"] == expected
    assert await said_in(own_database_url, frames[0]["conversation_id"]) == expected
    await assert_seqs_are_gapless(own_database_url, frames[0]["conversation_id"])


async def test_several_stalls_shorter_than_the_lease_restart_nothing(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, user: str
) -> None:
    environment = {"ECHO_TOKENS": "300", "ECHO_TOKENS_PER_SECOND": "200", "LEASE_SECONDS": "10"}
    with running_node(own_database_url, tmp_path, environment) as node:
        async with socket_to(node, user) as socket:
            await socket.ask("go")
            frames: list[Frame] = []
            for _ in range(5):
                frames += await socket.until("turn.delta", *TERMINAL)
                postgres.stall()
                during = await has_answered_pings(socket, 50)
                frames += [frame for frame in during if frame["type"] != "pong"]
                postgres.resume()
            frames += await socket.until(*TERMINAL)
    assert frames[-1]["type"] == "turn.completed"
    assert "turn.restarted" not in [frame["type"] for frame in frames]
    assert text_of(frames) == frames[-1]["message"]["content"] == "".join(f"w{n} " for n in range(300))


async def test_a_stall_longer_than_the_lease_restarts_the_turn_and_finishes_it(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, strings: Strings, user: str
) -> None:
    script = script_of(("text", "attempt {attempt} "), ("gate", "go"), ("text", "of {attempt}"))
    environment = {**strings.environment, "LEASE_SECONDS": "2"}
    with running_node(own_database_url, tmp_path, environment) as node:
        async with socket_to(node, user) as socket:
            await socket.ask(script)
            frames = await socket.until("turn.delta")
            postgres.stall()
            await eventually(is_lost_by(node))
            postgres.resume()
            strings.open("go")
            frames += await socket.until(*TERMINAL)
    assert [frame["type"] for frame in frames].count("turn.restarted") == 1
    assert frames[-1]["type"] == "turn.completed"
    assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 2 of 2"
    assert await said_in(own_database_url, frames[0]["conversation_id"]) == "attempt 2 of 2"
    await assert_seqs_are_gapless(own_database_url, frames[0]["conversation_id"])


async def test_a_follower_sees_the_end_although_the_lost_attempts_agent_does_not_let_go(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, strings: Strings, user: str
) -> None:
    script = script_of(("text", "attempt {attempt}"), ("hold", "let go", 1))
    environment = {**strings.environment, "LEASE_SECONDS": "1"}
    with running_node(own_database_url, tmp_path, environment) as node:
        async with socket_to(node, user) as socket:
            await socket.ask(script)
            frames = await socket.until("turn.delta")
            try:
                postgres.stall()
                await eventually(is_lost_by(node, "anynode_turns_running", 0))
                postgres.resume()
                frames += await socket.until(*TERMINAL)
            finally:
                strings.open("let go")
        assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 2"


def is_lost_by(node: NodeProcess, metric: str = "anynode_turns_lost_total", value: float = 1) -> Callable[..., Any]:
    async def condition() -> bool:
        return await asyncio.to_thread(node.metric, metric) == value

    return condition


async def test_every_delta_is_in_the_database_when_a_client_gets_it(
    start_node: StartNode, database_url: str, user: str
) -> None:
    await run_script(database_url, SLOW_COMMITS)
    node = start_node(ECHO_TOKENS="200", ECHO_TOKENS_PER_SECOND="100")
    statement = (
        "SELECT coalesce(string_agg(payload ->> 'text', '' ORDER BY seq), '') FROM events "
        "WHERE conversation_id = $1 AND seq <= $2 AND type = 'turn.delta' AND EXISTS "
        "(SELECT FROM events WHERE conversation_id = $1 AND seq = $2)"
    )
    connection = await asyncpg.connect(database_url)
    try:
        async with socket_to(node, user) as socket:
            await socket.ask("go")
            frames: list[Frame] = []
            while not frames or frames[-1]["type"] not in TERMINAL:
                frames.append(await socket.receive())
                conversation_id = uuid.UUID(frames[-1]["conversation_id"])
                committed = await connection.fetchval(statement, conversation_id, frames[-1]["seq"])
                assert committed == text_of(frames)
    finally:
        await connection.close()
    assert text_of(frames) == "".join(f"w{number} " for number in range(200))
    assert len([frame for frame in frames if frame["type"] == "turn.delta"]) > 10


async def run_script(database_url: str, statements: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


ENDINGS: dict[str, Sequence[Sequence[Any]]] = {
    "turn.completed": (("text", "all "), ("text", "of it")),
    "turn.failed": (("text", "some of it"), ("agent_error", "no more", False)),
    "turn.cancelled": (("text", "some of it"), ("hang",)),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_an_ending_its_message_status_and_cursor_commit_in_one_transaction_before_it_is_shown(
    start_node: StartNode, database_url: str, strings: Strings, user: str, ending: str
) -> None:
    await run_script(database_url, SLOW_COMMITS)
    node = start_node(**strings.environment)
    connection = await asyncpg.connect(database_url)
    try:
        async with socket_to(node, user) as socket:
            await socket.ask(script_of(*ENDINGS[ending]))
            frame = (await socket.until("turn.delta"))[-1]
            if ending == "turn.cancelled":
                await socket.send({"type": "turn.cancel", "conversation_id": frame["conversation_id"]})
            end = (await socket.until(*TERMINAL))[-1]
            row = await connection.fetchrow(
                "SELECT m.content, m.status AS message_status, t.status, t.finished_at, c.last_seq, e.type, "
                "  ARRAY[m.xmin::text, t.xmin::text, c.xmin::text] AS transactions, e.xmin::text AS transaction "
                "FROM messages m JOIN turns t ON t.id = m.turn_id JOIN conversations c ON c.id = m.conversation_id "
                "JOIN events e ON e.conversation_id = c.id AND e.seq = $2 WHERE m.id = $1",
                uuid.UUID(end["message"]["id"]),
                end["seq"],
            )
    finally:
        await connection.close()
    assert end["type"] == ending
    assert row is not None
    assert row["type"] == ending
    assert row["content"] == end["message"]["content"]
    assert f"turn.{row['status']}" == f"turn.{row['message_status']}" == ending
    assert row["finished_at"] is not None
    assert row["last_seq"] == end["seq"]
    assert row["transactions"] == [row["transaction"]] * 3


async def flushes_of(node: NodeProcess, user: str, turns: int) -> float:
    """Return the number of flush statements of a number of turns at once."""
    before = node.metric("anynode_flushes_total")

    async def answer() -> None:
        async with socket_to(node, user) as socket:
            assert (await socket.answer("go"))[-1]["type"] == "turn.completed"

    await asyncio.gather(*(answer() for _ in range(turns)))
    return node.metric("anynode_flushes_total") - before


async def test_turns_that_stream_at_once_share_their_flushes(start_node: StartNode, user: str) -> None:
    node = start_node(ECHO_TOKENS="200", ECHO_TOKENS_PER_SECOND="200")
    alone = await flushes_of(node, user, 1)
    two = await flushes_of(node, user, 2)
    ten = await flushes_of(node, user, 10)
    assert alone > 10
    assert two < 1.8 * alone  # on a busy machine one turn's flushes are fewer, as each takes longer
    assert ten < 3 * alone


async def test_the_tokens_of_an_interval_are_one_event(start_node: StartNode, database_url: str, user: str) -> None:
    node = start_node(ECHO_TOKENS="1000", ECHO_TOKENS_PER_SECOND="0", FLUSH_INTERVAL_MS="100")
    async with socket_to(node, user) as socket:
        assert text_of(await socket.answer("go")) == "".join(f"w{number} " for number in range(1000))
    rows = await sql(database_url, "SELECT count(*) FROM events WHERE type = 'turn.delta'")
    assert rows[0]["count"] < 100
