"""A node or a Postgres may die, be paused or be sent away at any moment: every turn ends once, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import connect

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql, text_of, token_for
from tests.kit.stoppable_postgres import StoppablePostgres, stoppable_postgres
from tests.kit.stored import assert_seqs_are_gapless, said_in

# A postmaster that a test has killed is its holder's child, and is not reaped where the next one is a later context's.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

StartNode = Callable[..., NodeProcess]

TWO_PARTS = script_of(("text", "attempt {attempt} "), ("mark", "begun"), ("gate", "go"), ("text", "of {attempt}"))


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def postgres() -> Iterator[StoppablePostgres]:
    with stoppable_postgres() as running:
        yield running


@pytest.fixture
def own_database_url(postgres: StoppablePostgres) -> str:
    return postgres.new_database()


async def endings_of(database_url: str, conversation_id: str) -> Sequence[str]:
    rows = await sql(
        database_url,
        "SELECT type FROM events WHERE conversation_id = $1 AND type = ANY ($2) ORDER BY seq",
        uuid.UUID(conversation_id),
        list(TERMINAL),
    )
    return [row["type"] for row in rows]


async def turn_of(database_url: str, conversation_id: str) -> Any:
    rows = await sql(
        database_url,
        "SELECT status, epoch, error FROM turns WHERE conversation_id = $1 ORDER BY id DESC LIMIT 1",
        uuid.UUID(conversation_id),
    )
    return rows[0]


def has_status(database_url: str, conversation_id: str, status: str) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return bool((await turn_of(database_url, conversation_id))["status"] == status)

    return condition


def has_ended(node: NodeProcess) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return node.process.poll() is not None

    return condition


def assert_order(frames: Sequence[Frame]) -> None:
    seqs = [frame["seq"] for frame in frames if "seq" in frame]
    assert seqs == sorted(set(seqs))


# A node dies.


async def test_the_turn_of_a_killed_node_is_finished_once_by_another(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    dying = start_node(**strings.environment, LEASE_SECONDS="2")
    async with socket_to(dying, user) as socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        dying.kill()
    conversation_id = frames[0]["conversation_id"]
    other = start_node(**strings.environment, LEASE_SECONDS="2")
    async with socket_to(other, user) as socket:
        await socket.follow(conversation_id, frames[-1]["seq"])
        strings.open("go")
        frames += await socket.until(*TERMINAL, "error")
    assert_order(frames)
    assert [frame["type"] for frame in frames].count("turn.restarted") == 1
    assert frames[-1]["type"] == "turn.completed"
    assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 2 of 2"
    assert await said_in(database_url, conversation_id) == "attempt 2 of 2"
    assert await endings_of(database_url, conversation_id) == ["turn.completed"]
    await assert_seqs_are_gapless(database_url, conversation_id)
    assert strings.marks("begun") == [1, 2]
    assert other.metric("anynode_turns_taken_over_total") == 1


async def test_a_turn_is_not_taken_from_a_node_that_lives(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, LEASE_SECONDS="1")
    other = start_node(**strings.environment, LEASE_SECONDS="1")
    async with socket_to(node, user) as socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        statement = "SELECT lease_expires_at FROM turns"
        first = (await sql(database_url, statement))[0]["lease_expires_at"]

        async def has_outlived_three_leases() -> bool:
            now = (await sql(database_url, statement))[0]["lease_expires_at"]
            return bool((now - first).total_seconds() > 3)

        await eventually(has_outlived_three_leases)
        strings.open("go")
        frames += await socket.until(*TERMINAL)
    assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 1 of 1"
    assert other.metric("anynode_turns_taken_over_total") == 0


async def test_two_nodes_that_find_a_dead_nodes_turns_run_each_of_them_once(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    dying = start_node(**strings.environment, LEASE_SECONDS="2")
    async with socket_to(dying, user) as socket:
        for _ in range(20):
            await socket.ask(TWO_PARTS)

        async def have_all_begun() -> bool:
            return len(strings.marks("begun")) == 20

        await eventually(have_all_begun)
        others = [start_node(**strings.environment, LEASE_SECONDS="2") for _ in range(2)]
        dying.kill()
    strings.open("go")

    async def is_all_over() -> bool:
        rows = await sql(database_url, "SELECT count(*) FROM turns WHERE status = 'completed' AND epoch = 2")
        return bool(rows[0]["count"] == 20)

    await eventually(is_all_over)
    rows = await sql(database_url, "SELECT count(*) FROM messages WHERE content = 'attempt 2 of 2'")
    assert rows[0]["count"] == 20
    assert sum(node.metric("anynode_turns_taken_over_total") for node in others) == 20


async def test_a_paused_node_finds_its_turn_taken_and_writes_nothing_more(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    paused = start_node(**strings.environment, LEASE_SECONDS="2")
    other = start_node(**strings.environment, LEASE_SECONDS="2")
    async with socket_to(paused, user) as socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        paused.pause()

        async def is_taken() -> bool:
            return strings.marks("begun") == [1, 2]

        await eventually(is_taken)
        strings.open("go")
        await eventually(has_status(database_url, conversation_id, "completed"))
        paused.resume()

        async def is_given_up() -> bool:
            return await asyncio.to_thread(paused.metric, "anynode_turns_lost_total") == 1

        await eventually(is_given_up)
    assert other.metric("anynode_turns_taken_over_total") == 1
    assert await said_in(database_url, conversation_id) == "attempt 2 of 2"
    assert await endings_of(database_url, conversation_id) == ["turn.completed"]
    await assert_seqs_are_gapless(database_url, conversation_id)


async def test_a_flush_that_is_under_way_while_another_node_takes_the_turn_is_refused(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, LEASE_SECONDS="60")
    another_node = await asyncpg.connect(database_url)
    try:
        async with socket_to(node, user) as socket:
            await socket.ask(TWO_PARTS)
            await socket.until("turn.delta")
            async with another_node.transaction():
                await another_node.execute("SELECT FROM turns FOR UPDATE")
                strings.open("go")

                async def is_flush_waiting() -> object:
                    statement = (
                        "SELECT FROM pg_stat_activity WHERE datname = current_database() "
                        "AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO events%'"
                    )
                    return await sql(database_url, statement)

                await eventually(is_flush_waiting)
                await another_node.execute("UPDATE turns SET node = 'another', epoch = 2")

            async def is_given_up() -> bool:
                return await asyncio.to_thread(node.metric, "anynode_turns_lost_total") == 1

            await eventually(is_given_up)
    finally:
        await another_node.close()
    rows = await sql(database_url, "SELECT type, payload ->> 'text' AS text FROM events ORDER BY seq OFFSET 2")
    assert [(row["type"], row["text"]) for row in rows] == [("turn.delta", "attempt 1 ")]
    turns = await sql(database_url, "SELECT status, epoch, node FROM turns")
    assert [tuple(turn) for turn in turns] == [("running", 2, "another")]
    assert not await sql(database_url, "SELECT FROM messages WHERE role = 'assistant'")


async def test_a_turn_that_kills_its_nodes_fails_after_the_last_attempt_and_the_next_message_works(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    environment = {**strings.environment, "LEASE_SECONDS": "1", "MAX_ATTEMPTS": "2"}
    node = start_node(**environment)
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(("mark", "begun"), ("kill", 1, 2, 3, 4, 5)))
        conversation_id = (await socket.until("turn.started"))[0]["conversation_id"]
    await eventually(has_ended(node))
    with suppress(AssertionError):  # the turn may kill it before it is found to be ready
        await eventually(has_ended(start_node(**environment)))
    node = start_node(**environment)
    await eventually(has_status(database_url, conversation_id, "failed"))
    assert strings.marks("begun") == [1, 2]
    async with socket_to(node, user) as socket:
        await socket.follow(conversation_id, 0)
        end = (await socket.until(*TERMINAL))[-1]
        assert end["type"] == "turn.failed"
        assert end["error"]["code"] == "agent_failed"
        assert "interrupted" in end["error"]["message"]
        assert (await socket.answer(script_of(("text", "fine")), conversation_id))[-1]["type"] == "turn.completed"
    assert await endings_of(database_url, conversation_id) == ["turn.failed", "turn.completed"]


async def test_a_cancel_that_was_asked_for_while_the_node_was_dead_is_honoured(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    frames, _ = await cancel_a_dead_nodes_turn(start_node, strings, user)
    assert frames[-1]["type"] == "turn.cancelled"
    assert strings.marks("begun") == [1]
    assert await endings_of(database_url, frames[0]["conversation_id"]) == ["turn.cancelled"]


async def test_what_a_dead_node_said_is_kept_when_its_turn_is_cancelled(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    frames, seen = await cancel_a_dead_nodes_turn(start_node, strings, user)
    assert seen == "attempt 1 "
    assert text_of(frames) == frames[-1]["message"]["content"] == seen
    assert await said_in(database_url, frames[0]["conversation_id"]) == seen


async def cancel_a_dead_nodes_turn(start_node: StartNode, strings: Strings, user: str) -> tuple[list[Frame], str]:
    """All frames of the turn, and what was seen of it before its node died."""
    environment = {**strings.environment, "LEASE_SECONDS": "3"}
    dying, other = start_node(**environment), start_node(**environment)
    async with socket_to(dying, user) as socket, socket_to(other, user) as other_socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        seen = text_of(frames)
        dying.kill()
        conversation_id = frames[0]["conversation_id"]
        await other_socket.send({"type": "turn.cancel", "conversation_id": conversation_id})
        await other_socket.follow(conversation_id, frames[-1]["seq"])
        frames += await other_socket.until(*TERMINAL, "error")
    return frames, seen


async def test_what_was_said_is_kept_when_a_turn_fails_after_its_last_attempt(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    environment = {**strings.environment, "LEASE_SECONDS": "1", "MAX_ATTEMPTS": "1"}
    node = start_node(**environment)
    async with socket_to(node, user) as socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        node.kill()
    conversation_id = frames[0]["conversation_id"]
    start_node(**environment)
    await eventually(has_status(database_url, conversation_id, "failed"))
    assert await said_in(database_url, conversation_id) == "attempt 1 "


# Connections to Postgres, or Postgres itself, die.


async def test_backends_that_are_terminated_in_mid_stream_cost_no_text(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node(ECHO_TOKENS="300", ECHO_TOKENS_PER_SECOND="150")
    terminate = (
        "SELECT count(pg_terminate_backend(pid)) AS killed FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'anynode'"
    )
    killed = 0
    async with socket_to(node, user) as socket:
        await socket.ask("go")
        frames = await socket.until("turn.delta")
        while frames[-1]["type"] not in TERMINAL:
            killed += (await sql(database_url, terminate))[0]["killed"]
            frames += await socket.until("turn.delta", *TERMINAL)
    assert killed > 5
    assert_order(frames)
    assert frames[-1]["type"] == "turn.completed"
    assert "turn.restarted" not in [frame["type"] for frame in frames]
    expected = "".join(f"w{number} " for number in range(300))
    assert text_of(frames) == frames[-1]["message"]["content"] == expected
    assert await said_in(database_url, frames[0]["conversation_id"]) == expected
    await assert_seqs_are_gapless(database_url, frames[0]["conversation_id"])


async def test_sends_whose_backends_are_terminated_are_admitted_once(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node()
    terminate = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'anynode'"
    )

    answered = 0

    async def talk(talker: int) -> None:
        nonlocal answered
        async with socket_to(node, user) as socket:
            for number in range(5):
                frames = await socket.answer(f"number {talker}.{number}")
                assert text_of(frames) == f"[1] number {talker}.{number}"
                answered += 1

    talking = asyncio.gather(*(talk(talker) for talker in range(20)))
    for wave in range(0, 80, 10):

        async def has_progressed(wave: int = wave) -> bool:
            return talking.done() or answered >= wave

        await eventually(has_progressed)
        await sql(database_url, terminate)
    await talking
    rows = await sql(database_url, "SELECT count(*) AS n, count(DISTINCT content) AS different FROM messages")
    assert (rows[0]["n"], rows[0]["different"]) == (200, 200)


async def test_a_turn_survives_a_crash_of_postgres(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, strings: Strings, user: str
) -> None:
    script = script_of(("text", "one "), ("gate", "go"), ("text", "two"))
    with ExitStack() as stack:
        node = stack.enter_context(
            running_node(own_database_url, tmp_path, {**strings.environment, "LEASE_SECONDS": "60"})
        )
        async with socket_to(node, user) as socket:
            await socket.ask(script)
            frames = await socket.until("turn.delta")
            postgres.crash()
            strings.open("go")
            stack.enter_context(postgres.running())
            frames += [frame for frame in await socket.until(*TERMINAL) if frame["type"] != "error"]
        assert_order(frames)
        assert frames[-1]["type"] == "turn.completed"
        assert text_of(frames) == frames[-1]["message"]["content"] == "one two"
        assert await said_in(own_database_url, frames[0]["conversation_id"]) == "one two"
        await assert_seqs_are_gapless(own_database_url, frames[0]["conversation_id"])
        async with socket_to(node, user) as socket:
            next_frames = await socket.answer(script_of(("text", "fine")), frames[0]["conversation_id"])
        assert next_frames[-1]["type"] == "turn.completed"


async def test_a_turn_that_a_crash_of_postgres_outlasts_is_restarted(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, strings: Strings, user: str
) -> None:
    with ExitStack() as stack:
        node = stack.enter_context(
            running_node(own_database_url, tmp_path, {**strings.environment, "LEASE_SECONDS": "2"})
        )
        async with socket_to(node, user) as socket:
            await socket.ask(TWO_PARTS)
            frames = await socket.until("turn.delta")
            postgres.crash()

            async def is_lost() -> bool:
                return await asyncio.to_thread(node.metric, "anynode_turns_lost_total") == 1

            await eventually(is_lost)
            stack.enter_context(postgres.running())
            strings.open("go")
            frames += [frame for frame in await socket.until(*TERMINAL) if frame["type"] != "error"]
        assert_order(frames)
        assert frames[-1]["type"] == "turn.completed"
        assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 2 of 2"
        await assert_seqs_are_gapless(own_database_url, frames[0]["conversation_id"])


async def test_a_message_that_is_sent_while_postgres_is_away_is_refused_and_may_be_tried_again(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, user: str
) -> None:
    with ExitStack() as stack:
        node = stack.enter_context(running_node(own_database_url, tmp_path))
        async with socket_to(node, user) as socket:
            postgres.crash()
            message_id = await socket.ask("hello")
            error = await socket.receive()
            assert error["type"] == "error"
            assert error["code"] == "database_unavailable"
            assert error["retryable"] is True
            stack.enter_context(postgres.running())
            frames = await socket.answer("hello", message_id=message_id)
        assert text_of(frames) == "[1] hello"


async def test_the_pool_recovers_wholly_from_a_stall(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path, user: str
) -> None:

    async def send(number: int) -> Frame:
        async with socket_to(node, user) as socket:
            return (await socket.answer(f"number {number}"))[-1]

    with running_node(own_database_url, tmp_path, {"DATABASE_POOL_MAX": "5"}) as node:
        for _ in range(2):  # each is given up after its 5 seconds
            postgres.stall()
            refused = await asyncio.gather(*(send(number) for number in range(15)))
            postgres.resume()
            assert {frame.get("code") for frame in refused} == {"database_unavailable"}
            assert {frame["retryable"] for frame in refused} == {True}
            answered = await asyncio.gather(*(send(number) for number in range(30)))
            assert {frame["type"] for frame in answered} == {"turn.completed"}


async def test_a_node_is_not_ready_while_postgres_is_away_and_ready_again_after(
    postgres: StoppablePostgres, own_database_url: str, tmp_path: Path
) -> None:
    with running_node(own_database_url, tmp_path) as node:
        postgres.stall()
        status, _ = await asyncio.to_thread(node.get, "/readyz")
        alive, _ = await asyncio.to_thread(node.get, "/livez")
        postgres.resume()
        assert (status, alive) == (503, 200)

        async def is_ready() -> bool:
            return (await asyncio.to_thread(node.get, "/readyz"))[0] == 200

        await eventually(is_ready)


# A node is sent away.


async def test_sigterm_sends_clients_elsewhere_and_lets_the_turn_finish(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, DRAIN_SECONDS="60")
    async with socket_to(node, user) as socket:
        await socket.ask(TWO_PARTS)
        conversation_id = (await socket.until("turn.delta"))[0]["conversation_id"]
        node.process.send_signal(signal.SIGTERM)
        goaway = await socket.receive()
        assert goaway["type"] == "goaway"
        assert await socket.closed() == 1012
    assert node.process.poll() is None
    strings.open("go")
    assert await asyncio.to_thread(node.process.wait, 20) == 0
    turn = await turn_of(database_url, conversation_id)
    assert (turn["status"], turn["epoch"]) == ("completed", 1)
    assert await said_in(database_url, conversation_id) == "attempt 1 of 1"


async def test_a_turn_that_outlasts_the_drain_is_handed_over_at_once(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    # With this lease it could not be finished in the test's time by waiting for the lease to run out.
    environment = {**strings.environment, "LEASE_SECONDS": "300", "DRAIN_SECONDS": "1"}
    leaving, other = start_node(**environment), start_node(**environment)
    async with socket_to(leaving, user) as socket:
        await socket.ask(TWO_PARTS)
        frames = await socket.until("turn.delta")
        leaving.process.send_signal(signal.SIGTERM)
        assert (await socket.receive())["type"] == "goaway"
    conversation_id = frames[0]["conversation_id"]
    async with socket_to(other, user) as socket:
        await socket.follow(conversation_id, frames[-1]["seq"])
        frames += await socket.until("turn.restarted", "error")
        strings.open("go")
        frames += await socket.until(*TERMINAL, "error")
    assert await asyncio.to_thread(leaving.process.wait, 20) == 0
    assert_order(frames)
    assert text_of(frames) == frames[-1]["message"]["content"] == "attempt 2 of 2"
    assert await endings_of(database_url, conversation_id) == ["turn.completed"]
    await assert_seqs_are_gapless(database_url, conversation_id)


async def test_a_draining_node_admits_nothing_and_says_so(start_node: StartNode, strings: Strings, user: str) -> None:
    node = start_node(**strings.environment, DRAIN_SECONDS="60")
    async with socket_to(node, user) as socket:
        await socket.ask(TWO_PARTS)
        await socket.until("turn.delta")
        node.process.send_signal(signal.SIGTERM)
        await socket.until("goaway")
        await socket.ask("one more")
        error = await socket.receive()
        assert error["code"] == "draining"
        assert error["retryable"] is True
    assert node.get("/readyz")[0] == 503
    async with socket_to(node, user, ready=False) as socket:
        assert await socket.closed() == 1012
    strings.open("go")
    assert await asyncio.to_thread(node.process.wait, 20) == 0


async def test_a_client_that_never_reads_does_not_hold_up_the_exit(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, DRAIN_SECONDS="1", ANSWER_BYTES_MAX="67108864")
    connection = await connect(
        node.ws + "/ws",
        additional_headers={"Authorization": f"Bearer {token_for(user)}"},
        compression=None,
        max_size=None,
        max_queue=1,  # what is not received stays in the socket
        proxy=None,
    )
    try:
        question = script_of(("repeat", 2000, "x" * 10_000))
        await connection.send(f'{{"type":"message.send","message_id":"1","content":{_json(question)}}}')

        async def is_over() -> bool:
            return bool(await sql(database_url, "SELECT FROM turns WHERE status = 'completed'"))

        await eventually(is_over)
        node.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(node.process.wait, 20) == 0
    finally:
        connection.transport.abort()


def _json(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


async def test_a_second_sigterm_ends_the_drain(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    environment = {**strings.environment, "LEASE_SECONDS": "300", "DRAIN_SECONDS": "3600"}
    leaving = start_node(**environment)
    async with socket_to(leaving, user) as socket:
        await socket.ask(TWO_PARTS)
        conversation_id = (await socket.until("turn.delta"))[0]["conversation_id"]
        leaving.process.send_signal(signal.SIGTERM)
        await socket.until("goaway")
        with pytest.raises(subprocess.TimeoutExpired):
            leaving.process.wait(1)
        leaving.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(leaving.process.wait, 20) == 0
    start_node(**environment)
    strings.open("go")
    await eventually(has_status(database_url, conversation_id, "completed"))
    assert await said_in(database_url, conversation_id) == "attempt 2 of 2"
