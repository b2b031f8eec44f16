"""`anynode forget`: nothing is left of a user, whatever runs, and all others keep what they have."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import asyncpg
import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit import command_line
from tests.kit.ai_sdk import ticket_of
from tests.kit.command_line import COMMAND, REPOSITORY, anynode
from tests.kit.harness import Frame, NodeProcess, Socket, socket_to, sql, token_for
from tests.kit.rest import rest_to


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return strings.environment


TABLES = {
    "users": "id",
    "conversations": "user_id",
    "messages": "user_id",
    "turns": "(SELECT user_id FROM conversations WHERE id = t.conversation_id)",
    "events": "(SELECT user_id FROM conversations WHERE id = t.conversation_id)",
    "tickets": "user_id",
}


def forget(database_url: str, user: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return anynode("forget", "--user", user, *arguments, stdin=stdin, DATABASE_URL=database_url)


async def forgotten(database_url: str, user: str) -> str:
    """What a `forget` that succeeds without another word says."""
    result = await asyncio.to_thread(forget, database_url, user, "--yes")
    assert (result.returncode, result.stderr) == (0, "")
    return without_revocation(result.stdout)


def without_revocation(said: str) -> str:
    """What a `forget` says of what was deleted. It always ends with the words that the user's tokens are refused."""
    deleted, _, tokens = said.rpartition("; ")
    assert tokens == "the user's older tokens are refused\n"
    return f"{deleted}\n"


@contextmanager
def forgetting(database_url: str, user: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `forget` that runs; killed at the end."""
    process = subprocess.Popen(
        [*COMMAND, "forget", "--user", user, "--yes"],
        env=command_line.environment(DATABASE_URL=database_url),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def rows_of(database_url: str, user: str) -> dict[str, list[str]]:
    """All rows of a user as Postgres writes them, by table."""
    return {
        table: [
            row["row"]
            for row in await sql(
                database_url, f"SELECT t::text AS row FROM {table} t WHERE {owner} = $1 ORDER BY t::text", user
            )
        ]
        for table, owner in TABLES.items()
    }


async def assert_nothing_is_stored(database_url: str, user: str, *conversation_ids: str) -> None:
    """Neither the user nor anything in these conversations is there."""
    assert await rows_of(database_url, user) == {table: [] for table in TABLES}
    ids = [uuid.UUID(id) for id in conversation_ids]
    for table in ("messages", "turns", "events"):
        assert await sql(database_url, f"SELECT FROM {table} WHERE conversation_id = ANY ($1)", ids) == [], table


async def waits_for_a_lock(database_url: str) -> bool:
    statement = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    return bool(await sql(database_url, statement))


@asynccontextmanager
async def asked(node: NodeProcess, user: str, gate: str, id: str) -> AsyncIterator[Socket]:
    """A socket whose question is in mid-answer, up to a gate."""
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(("text", "begun "), ("gate", gate), ("text", "over")), id)
        await socket.until("turn.delta")
        yield socket


async def delete(node: NodeProcess, user: str, id: str) -> None:
    async with rest_to(node, user) as rest:
        (await rest.ask("DELETE", f"/conversations/{id}")).expect(204)


def told(frames: Sequence[Frame]) -> list[tuple[str, str | None]]:
    return [(frame["type"], frame.get("code")) for frame in frames]


async def test_a_forgotten_user_in_mid_answer_is_disconnected_and_another_keeps_everything(
    nodes: Sequence[NodeProcess], module_database_url: str, strings: Strings, user: str
) -> None:
    other = f"{user}-other"
    for each in (user, other):
        async with rest_to(nodes[0], each, token=token_for(each, email=f"{each}@example.org")) as rest:
            for number in range(3):
                (await rest.proceed(await rest.create(), script_of(("text", f"answer {number}")))).expect(200)
            await ticket_of(rest)

    async def has_email() -> bool:
        return len(await sql(module_database_url, "SELECT FROM users WHERE email IS NOT NULL")) == 2

    await eventually(has_email)
    running: dict[str, str] = {}
    for each in (user, other):
        async with rest_to(nodes[0], each) as rest:
            running[each] = await rest.create()
    before = await rows_of(module_database_url, other)
    assert [len(before[table]) for table in ("users", "conversations", "messages", "turns", "tickets")] == [
        1,
        4,
        6,
        3,
        1,
    ]
    assert before["events"]
    ids = [
        row["id"]
        for row in await sql(module_database_url, "SELECT id::text FROM conversations WHERE user_id = $1", user)
    ]

    async with (
        asked(nodes[0], user, strings.name(), running[user]) as socket,
        socket_to(nodes[1], user) as follower,
    ):
        await follower.follow(running[user], 0)
        await follower.until("turn.delta")
        said = await forgotten(module_database_url, user)
        assert [await each.closed() for each in (socket, follower)] == [3000] * 2
    assert said == "deleted 4 conversations with 7 messages and 1 ticket, and the user\n"
    await assert_nothing_is_stored(module_database_url, user, *ids)
    assert await rows_of(module_database_url, other) == before

    async with (
        asked(nodes[0], other, strings.name(), running[other]) as socket,
        socket_to(nodes[1], other) as follower,
    ):
        await follower.follow(running[other], 0)
        await follower.until("turn.delta")
        await delete(nodes[1], other, running[other])
        heard = [told(await each.until("error")) for each in (socket, follower)]
    # The end of the turn may be deleted before a follower has read it.
    for frames in heard:
        assert frames in ([("turn.cancelled", None), ("error", "not_found")], [("error", "not_found")])


async def test_a_node_that_was_frozen_meanwhile_has_its_writes_refused(
    start_node: StartNode, database_url: str, strings: Strings, gate: str, user: str
) -> None:
    node = start_node(**strings.environment, LEASE_SECONDS="300")
    async with rest_to(node, user) as rest:
        id = await rest.create()
    async with asked(node, user, gate, id):
        node.pause()
        strings.open(gate)
        try:
            assert await forgotten(database_url, user) == "deleted 1 conversation with 1 message, and the user\n"
        finally:
            node.resume()

        async def is_over() -> bool:
            return await asyncio.to_thread(node.metric, "anynode_turns_running") == 0

        await eventually(is_over)
    await assert_nothing_is_stored(database_url, user, id)
    assert "Traceback" not in node.log.read_text()


async def fill(database_url: str, user: str, conversations: int) -> None:
    """Give a user conversations, each with two messages and an event."""
    await sql(database_url, "INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING", user)
    await sql(
        database_url,
        "WITH made AS (INSERT INTO conversations (id, user_id) SELECT gen_random_uuid(), $1 FROM generate_series(1, $2)"
        " RETURNING id), said AS (INSERT INTO messages (id, conversation_id, user_id, position, role, content)"
        " SELECT gen_random_uuid(), id, $1, p, 'user', 'x' FROM made, generate_series(1, 2) p)"
        " INSERT INTO events (conversation_id, seq, epoch, type, payload, written_at)"
        " SELECT id, 1, 0, 'message.created', '{}', now() FROM made",
        user,
        conversations,
    )


async def test_a_command_that_is_killed_in_the_middle_is_run_again_and_says_what_is_left(
    database_url: str, user: str
) -> None:
    await fill(database_url, user, 250)
    await fill(database_url, "other", 3)
    before = await rows_of(database_url, "other")
    connection = await asyncpg.connect(database_url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "SELECT FROM conversations WHERE id = "
            "(SELECT id FROM conversations WHERE user_id = $1 ORDER BY created_at, id OFFSET 130 LIMIT 1) FOR UPDATE",
            user,
        )
        with forgetting(database_url, user) as process:
            await eventually(lambda: waits_for_a_lock(database_url))
            process.kill()
            await asyncio.to_thread(process.wait)
    finally:
        await connection.close()

    async def no_statement_is_left() -> bool:  # what the command had asked for may still be done
        statement = "SELECT FROM pg_stat_activity WHERE state = 'active' AND datname = current_database()"
        return len(await sql(database_url, statement)) == 1

    await eventually(no_statement_is_left)
    (row,) = await sql(database_url, "SELECT count(*) AS left FROM conversations WHERE user_id = $1", user)
    assert row["left"] in (119, 120)
    refused = await asyncio.to_thread(forget, database_url, user, stdin="n\n")
    assert f"{row['left']} conversations with {2 * row['left']} messages?" in refused.stderr
    said = await forgotten(database_url, user)
    assert said == f"deleted {row['left']} conversations with {2 * row['left']} messages, and the user\n"
    assert (
        await sql(database_url, "SELECT FROM events WHERE conversation_id NOT IN (SELECT id FROM conversations)") == []
    )
    assert await rows_of(database_url, user) == {table: [] for table in TABLES}
    assert await rows_of(database_url, "other") == before


# Postgres writes for the user: whenever a conversation is gone, there is another one.
GOES_ON_WRITING = """
CREATE FUNCTION write_again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO conversations (id, user_id) VALUES (gen_random_uuid(), old.user_id);
    RETURN NULL;
END $$;
CREATE TRIGGER write_again AFTER DELETE ON conversations FOR EACH ROW EXECUTE FUNCTION write_again();
"""


async def test_a_user_who_goes_on_writing_is_told_of_and_is_forgotten_once_that_is_over(
    database_url: str, user: str
) -> None:
    await fill(database_url, user, 1)
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(GOES_ON_WRITING)
        result = await asyncio.to_thread(forget, database_url, user, "--yes")
        assert result.returncode == 1
        assert without_revocation(result.stdout) == "deleted 801 conversations with 2 messages\n"
        assert result.stderr.startswith("anynode: the user goes on writing")
        assert len(result.stderr.splitlines()) == 1
        assert await connection.fetchval("SELECT count(*) FROM users") == 1
        await connection.execute("DROP TRIGGER write_again ON conversations")
    finally:
        await connection.close()
    assert await forgotten(database_url, user) == "deleted 1 conversation with 0 messages, and the user\n"
    assert await rows_of(database_url, user) == {table: [] for table in TABLES}


async def test_a_user_who_wrote_meanwhile_is_forgotten_with_that_too(
    nodes: Sequence[NodeProcess], module_database_url: str, user: str
) -> None:
    """The command waits for a conversation that is locked; the user makes another one while it does."""
    await fill(module_database_url, user, 2)
    connection = await asyncpg.connect(module_database_url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT FROM conversations WHERE user_id = $1 FOR UPDATE", user)
        forgetting = asyncio.create_task(forgotten(module_database_url, user))
        await eventually(lambda: waits_for_a_lock(module_database_url))
        async with rest_to(nodes[0], user) as rest:
            (await rest.proceed(await rest.create(), script_of(("text", "hello")))).expect(200)
        await transaction.rollback()
        assert await forgetting == "deleted 3 conversations with 6 messages, and the user\n"
    finally:
        await connection.close()
    assert await rows_of(module_database_url, user) == {table: [] for table in TABLES}


async def test_it_asks_first_and_deletes_nothing_without_a_yes(database_url: str, user: str) -> None:
    await fill(database_url, user, 2)
    before = await rows_of(database_url, user)
    for answer in ("n\n", "\n", ""):
        result = await asyncio.to_thread(forget, database_url, user, stdin=answer)
        assert (result.returncode, result.stdout) == (1, "")
        assert "2 conversations with 4 messages?" in result.stderr
        assert "Traceback" not in result.stderr
    assert await rows_of(database_url, user) == before
    result = await asyncio.to_thread(forget, database_url, user, stdin="y\n")
    assert result.returncode == 0
    assert without_revocation(result.stdout) == "deleted 2 conversations with 4 messages, and the user\n"
    assert await rows_of(database_url, user) == {table: [] for table in TABLES}


async def test_a_user_of_whom_nothing_is_stored_is_said_to_be_so_without_asking(database_url: str, user: str) -> None:
    result = await asyncio.to_thread(forget, database_url, user)
    assert result.returncode == 0
    assert without_revocation(result.stdout) == f"nothing is stored of the user {user}\n"


async def test_a_user_who_has_but_tickets_loses_them(database_url: str, user: str) -> None:
    await sql(database_url, "INSERT INTO tickets VALUES ('hash', $1, 4e9, now() + interval '1 minute')", user)
    await asyncio.to_thread(forget, database_url, user)
    assert await sql(database_url, "SELECT FROM tickets") == []


async def test_without_postgres_it_fails_in_one_line() -> None:
    result = await asyncio.to_thread(forget, "postgresql://127.0.0.1:9/nowhere", "ada", "--yes")
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "DATABASE_URL" in result.stderr


async def test_an_older_token_is_refused_from_then_on_and_a_newer_one_begins_anew(
    nodes: Sequence[NodeProcess], module_database_url: str, user: str
) -> None:
    old = token_for(user, email=f"{user}@example.org")
    async with rest_to(nodes[0], user, token=old) as rest:
        await rest.create()
    assert await forgotten(module_database_url, user) == "deleted 1 conversation with 0 messages, and the user\n"
    for node in nodes:
        async with rest_to(node, user, token=old) as rest:
            assert (await rest.post("/conversations", {})).refusal == (401, "unauthorized")
    await assert_nothing_is_stored(module_database_url, user)
    async with rest_to(nodes[1], user) as rest:
        await rest.create()
