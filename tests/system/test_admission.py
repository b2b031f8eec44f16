"""Admission: crowds at one conversation, repeated messages, and a history that is read anew each time."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import asyncpg
import pytest

from anynode.models.queries import Bound, bind
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql, text_of

TRANSCRIPT = "tests.agents.transcript:transcript"


@asynccontextmanager
async def sockets_to(node: NodeProcess, user: str, count: int) -> AsyncIterator[list[Socket]]:
    """Open `count` connections of one user."""
    async with AsyncExitStack() as stack:
        opening = [stack.enter_async_context(socket_to(node, user)) for _ in range(count)]
        sockets = [await each for each in opening]
        yield sockets
        for socket in sockets:
            socket.drop()  # a closing handshake would wait behind what has not been read


def seen(frames: Sequence[Frame]) -> list[list[str]]:
    """The history that the transcript agent was given: [role, content] each."""
    assert frames[-1]["type"] == "turn.completed"
    history: list[list[str]] = json.loads(text_of(frames))
    return history


async def assert_gapless(database_url: str, conversation_id: str) -> None:
    """`position` and `seq` count from 1 without a gap, and the conversation knows the last."""
    (row,) = await sql(
        database_url,
        "SELECT (SELECT array_agg(position ORDER BY position) FROM messages WHERE conversation_id = c.id) AS positions,"
        " (SELECT array_agg(seq ORDER BY seq) FROM events WHERE conversation_id = c.id) AS seqs, last_seq"
        " FROM conversations c WHERE id = $1",
        uuid.UUID(conversation_id),
    )
    assert row["positions"] == list(range(1, len(row["positions"]) + 1))
    assert row["seqs"] == list(range(1, len(row["seqs"]) + 1))
    assert row["last_seq"] == row["seqs"][-1]


# Crowds.


async def test_of_50_messages_at_once_to_one_conversation_one_is_admitted(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node()
    slow = start_node(ECHO_TOKENS="1000000", ECHO_TOKENS_PER_SECOND="50")
    async with sockets_to(slow, user, 50) as sockets, socket_to(node, user) as first:
        conversation_id = (await first.answer("hello"))[0]["conversation_id"]
        await asyncio.gather(*(_look_at(socket, conversation_id) for socket in sockets))
        contents = [f"number {number}" for number in range(50)]
        await asyncio.gather(
            *(socket.ask(content, conversation_id) for socket, content in zip(sockets, contents, strict=True))
        )
        answers = await asyncio.gather(*(socket.until("turn.started", "error") for socket in sockets))
        last = [frames[-1] for frames in answers]
        assert [frame["code"] for frame in last if frame["type"] == "error"] == ["conversation_busy"] * 49
        (winner,) = (number for number, frame in enumerate(last) if frame["type"] == "turn.started")
        turns = await sql(
            database_url, "SELECT status FROM turns WHERE conversation_id = $1 ORDER BY id", uuid.UUID(conversation_id)
        )
        assert [row["status"] for row in turns] == ["completed", "running"]
        await sockets[winner].send({"type": "turn.cancel", "conversation_id": conversation_id})
        await sockets[winner].until("turn.cancelled")
    messages = await sql(
        database_url,
        "SELECT content FROM messages WHERE conversation_id = $1 AND role = 'user' ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert [row["content"] for row in messages] == ["hello", contents[winner]]
    await assert_gapless(database_url, conversation_id)


async def _look_at(socket: Socket, conversation_id: str) -> None:
    """Read the conversation once: when all have, the node has all of its connections to Postgres open."""
    await socket.follow(conversation_id)
    assert (await socket.receive())["type"] == "conversation.snapshot"
    await socket.send({"type": "conversation.unfollow", "conversation_id": conversation_id})


async def test_messages_that_insist_are_all_admitted_one_after_another(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node()
    async with sockets_to(node, user, 20) as sockets:
        conversation_id = (await sockets[0].answer("hello"))[0]["conversation_id"]

        async def insist(socket: Socket, content: str) -> None:
            message_id = str(uuid.uuid4())
            async with asyncio.timeout(30):
                while True:
                    await socket.send(
                        {
                            "type": "message.send",
                            "conversation_id": conversation_id,
                            "message_id": message_id,
                            "content": content,
                            "request_id": message_id,
                        }
                    )
                    while True:
                        frame = await socket.receive()
                        if frame["type"] == "turn.started" and frame["message_id"] == message_id:
                            return
                        if frame["type"] == "error":
                            assert frame["code"] == "conversation_busy"
                            break

        await asyncio.gather(*(insist(socket, f"number {number}") for number, socket in enumerate(sockets)))
        # The last turn may still run: its end is the 21st.
        await sockets[0].follow(conversation_id, after=0)
        ended = 0
        while ended < 21:
            ended += (await sockets[0].receive())["type"] == "turn.completed"
    roles = await sql(
        database_url,
        "SELECT role FROM messages WHERE conversation_id = $1 ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert [row["role"] for row in roles] == ["user", "assistant"] * 21
    await assert_gapless(database_url, conversation_id)


@pytest.mark.parametrize("is_new", [True, False], ids=["new conversation", "existing conversation"])
async def test_a_message_sent_20_times_at_once_is_one_turn_that_everybody_sees_whole(
    start_node: StartNode, database_url: str, user: str, is_new: bool
) -> None:
    node = start_node()
    message_id = str(uuid.uuid4())
    async with socket_to(node, user) as first, sockets_to(node, user, 20) as sockets:
        conversation_id = None if is_new else (await first.answer("before"))[0]["conversation_id"]
        answers = await asyncio.gather(
            *(socket.answer("one two three", conversation_id, message_id) for socket in sockets)
        )
    assert len({json.dumps(frames[-1], sort_keys=True) for frames in answers}) == 1
    for frames in answers:
        assert [frame["type"] for frame in frames][:2] == ["message.created", "turn.started"]
        assert frames[1]["message_id"] == message_id
        assert text_of(frames) == frames[-1]["message"]["content"] == ("[1]" if is_new else "[3]") + " one two three"
        seqs = [frame["seq"] for frame in frames]
        assert seqs == sorted(set(seqs))
    await assert_sent_once(database_url, message_id, turns=1 if is_new else 2)


@pytest.mark.parametrize("is_new", [True, False], ids=["new conversation", "existing conversation"])
async def test_a_message_sent_20_times_at_once_to_two_nodes_is_one_message_and_one_turn(
    start_node: StartNode, database_url: str, user: str, is_new: bool
) -> None:
    nodes = [start_node(), start_node()]
    message_id = str(uuid.uuid4())
    async with (
        socket_to(nodes[0], user) as first,
        sockets_to(nodes[0], user, 10) as here,
        sockets_to(nodes[1], user, 10) as there,
    ):
        conversation_id = None if is_new else (await first.answer("before"))[0]["conversation_id"]
        sockets = here + there
        await asyncio.gather(*(socket.ask("hello", conversation_id, message_id) for socket in sockets))
        started = await asyncio.gather(*(socket.until("turn.started", "error") for socket in sockets))
        # Only the node that runs the turn shows its end by itself.
        ends = [asyncio.create_task(socket.until(*TERMINAL)) for socket in sockets]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        await asyncio.wait(ends)
    assert len({(frames[-1]["type"], frames[-1]["turn_id"]) for frames in started}) == 1
    await assert_sent_once(database_url, message_id, turns=1 if is_new else 2)


async def assert_sent_once(database_url: str, message_id: str, *, turns: int) -> None:
    """Assert that one message has this id, in the only conversation, which has `turns` ended turns and no gap."""
    messages = await sql(database_url, "SELECT conversation_id FROM messages WHERE client_id = $1", message_id)
    assert len(messages) == 1
    conversations = await sql(database_url, "SELECT id FROM conversations")
    assert [row["id"] for row in conversations] == [messages[0]["conversation_id"]]
    assert [row["status"] for row in await sql(database_url, "SELECT status FROM turns")] == ["completed"] * turns
    await assert_gapless(database_url, str(messages[0]["conversation_id"]))


async def test_a_first_message_that_is_repeated_later_finds_its_conversation(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node()
    async with socket_to(node, user) as socket:
        message_id = await socket.ask("first")
        frames = await socket.until(*TERMINAL)
        conversation_id = frames[0]["conversation_id"]
        await socket.answer("second", conversation_id)
    async with socket_to(start_node(), user) as elsewhere:
        again = await elsewhere.answer("first", message_id=message_id)
    assert (again[0], again[-1]) == (frames[0], frames[-1])
    assert len(await sql(database_url, "SELECT FROM conversations")) == 1
    assert len(await sql(database_url, "SELECT FROM messages")) == 4


async def test_of_50_first_messages_at_once_each_makes_a_conversation(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node()
    async with sockets_to(node, user, 50) as sockets:
        answers = await asyncio.gather(*(socket.answer("hello") for socket in sockets))
    assert len({frames[-1]["conversation_id"] for frames in answers}) == 50
    assert {frames[-1]["type"] for frames in answers} == {"turn.completed"}
    assert len(await sql(database_url, "SELECT FROM users")) == 1


# Statelessness.


async def test_a_row_that_is_changed_between_two_messages_is_seen_by_the_next_answer(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with socket_to(start_node(AGENT=TRANSCRIPT), user) as socket:
        frames = await socket.answer("one")
        conversation_id = frames[0]["conversation_id"]
        await sql(
            database_url,
            "UPDATE messages SET content = role || ' rewritten' WHERE conversation_id = $1",
            uuid.UUID(conversation_id),
        )
        assert seen(await socket.answer("two", conversation_id)) == [
            ["user", "user rewritten"],
            ["assistant", "assistant rewritten"],
            ["user", "two"],
        ]


async def test_rows_that_are_deleted_between_two_messages_are_not_seen_again(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with socket_to(start_node(AGENT=TRANSCRIPT), user) as socket:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
        await sql(database_url, "DELETE FROM messages WHERE conversation_id = $1", uuid.UUID(conversation_id))
        assert seen(await socket.answer("two", conversation_id)) == [["user", "two"]]


async def test_a_conversation_that_is_given_away_is_no_longer_its_first_owners(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with socket_to(start_node(AGENT=TRANSCRIPT), user) as socket:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
        await sql(database_url, "INSERT INTO users (id) VALUES ('heir')")
        await sql(database_url, "UPDATE conversations SET user_id = 'heir'")
        assert (await socket.answer("two", conversation_id))[-1]["code"] == "not_found"


async def test_messages_of_another_node_are_part_of_the_history(
    start_node: StartNode, database_url: str, user: str
) -> None:
    one, two = start_node(AGENT=TRANSCRIPT), start_node()
    async with socket_to(one, user) as socket:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
    async with socket_to(two, user) as elsewhere:
        await elsewhere.answer("two", conversation_id)
    async with socket_to(one, user) as socket:
        history = seen(await socket.answer("three", conversation_id))
    assert [content for _, content in history[2:]] == ["two", "[3] two", "three"]


# What the agent sees.


async def test_the_system_prompt_of_the_settings_comes_first(start_node: StartNode, user: str) -> None:
    node = start_node(AGENT=TRANSCRIPT, SYSTEM_PROMPT="Be brief.")
    async with socket_to(node, user) as socket:
        assert seen(await socket.answer("one")) == [["system", "Be brief."], ["user", "one"]]


async def test_a_conversations_own_system_prompt_counts_more(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node(AGENT=TRANSCRIPT, SYSTEM_PROMPT="Be brief.")
    async with socket_to(node, user) as socket:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
        await sql(database_url, "UPDATE conversations SET system_prompt = 'Be long.'")
        assert [said[0] for said in seen(await socket.answer("two", conversation_id))] == [
            *("system", "user", "assistant", "user")
        ]
        assert seen(await socket.answer("three", conversation_id))[0] == ["system", "Be long."]


async def make_conversation(database_url: str, user: str, roles: Sequence[str]) -> str:
    """A conversation whose messages are `m1`, `m2`, … of these roles."""
    conversation_id = str(uuid.uuid4())
    await sql(database_url, "INSERT INTO users (id) VALUES ($1)", user)
    await sql(database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, $2)", conversation_id, user)
    await sql(
        database_url,
        "INSERT INTO messages (id, conversation_id, user_id, position, role, content)"
        " SELECT gen_random_uuid(), $1, $2, n, role, 'm' || n FROM unnest($3::text[]) WITH ORDINALITY AS r (role, n)",
        conversation_id,
        user,
        list(roles),
    )
    return conversation_id


async def test_a_system_message_of_the_conversation_counts_most(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node(AGENT=TRANSCRIPT, SYSTEM_PROMPT="Be brief.", HISTORY_MESSAGES_MAX="2")
    conversation_id = await make_conversation(database_url, user, ["system", "user", "assistant"])
    async with socket_to(node, user) as socket:
        assert seen(await socket.answer("two", conversation_id)) == [["system", "m1"], ["user", "two"]]


@pytest.mark.parametrize(
    ("messages_max", "expected"),
    [
        ("1", ["q"]),
        ("2", ["q"]),
        ("3", ["m5", "m6", "q"]),
        ("4", ["m5", "m6", "q"]),
        ("7", ["m1", "m2", "m3", "m4", "m5", "m6", "q"]),
        ("100", ["m1", "m2", "m3", "m4", "m5", "m6", "q"]),
    ],
)
async def test_the_agent_gets_the_newest_messages_beginning_with_a_users(
    start_node: StartNode, database_url: str, user: str, messages_max: str, expected: list[str]
) -> None:
    conversation_id = await make_conversation(database_url, user, ["user", "assistant"] * 3)
    async with socket_to(start_node(AGENT=TRANSCRIPT, HISTORY_MESSAGES_MAX=messages_max), user) as socket:
        history = seen(await socket.answer("q", conversation_id))
    assert [content for _, content in history] == expected


async def test_a_tool_loop_that_is_cut_in_two_is_left_out(start_node: StartNode, database_url: str, user: str) -> None:
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
    conversation_id = await make_conversation(database_url, user, roles)
    async with socket_to(start_node(AGENT=TRANSCRIPT, HISTORY_MESSAGES_MAX="5"), user) as socket:
        history = seen(await socket.answer("q", conversation_id))
    assert [content for _, content in history] == ["m5", "m6", "q"]


async def test_a_turn_that_failed_without_a_word_is_left_out_with_its_question(
    start_node: StartNode, user: str
) -> None:
    async with socket_to(start_node(AGENT="tests.agents.transcript:silent"), user) as socket:
        one = await socket.answer("one")
        conversation_id = one[0]["conversation_id"]
        failed = await socket.answer("fail", conversation_id)
        assert failed[-1]["type"] == "turn.failed"
        assert failed[-1]["message"]["content"] == ""
        history = seen(await socket.answer("two", conversation_id))
        assert history == [["user", "one"], ["assistant", text_of(one)], ["user", "two"]]
        # People still see it.
        await socket.follow(conversation_id)
        shown = (await socket.until("conversation.snapshot"))[-1]["messages"]
        assert [message["content"] for message in shown][2:4] == ["fail", ""]
        assert shown[3]["status"] == "failed"


async def test_what_a_failed_turn_said_is_seen(start_node: StartNode, user: str) -> None:
    failing, transcript = start_node(ECHO_TOKENS="9", ECHO_FAIL_AFTER="2"), start_node(AGENT=TRANSCRIPT)
    async with socket_to(failing, user) as socket, socket_to(transcript, user) as elsewhere:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
        history = seen(await elsewhere.answer("two", conversation_id))
    assert history == [["user", "one"], ["assistant", "w0 w1 "], ["user", "two"]]


# A long history.

HISTORY_QUERY = re.compile(r"FROM \((SELECT m\.role.*?LIMIT v_messages_max)\) h", re.DOTALL)


async def test_the_history_of_10_000_messages_is_read_by_an_index_scan_with_a_limit(
    database_url: str, user: str
) -> None:
    conversation_id = await make_conversation(database_url, user, ["user", "assistant"] * 5000)
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("ANALYZE")
        source = await connection.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'anynode_read_history'")
        found = HISTORY_QUERY.search(source)
        assert found is not None
        statement = found[1].replace("p_conversation_id", f"'{conversation_id}'").replace("v_messages_max", "200")
        plan = "\n".join(row[0] for row in await connection.fetch("EXPLAIN (COSTS OFF) " + statement))
        assert "Limit" in plan, plan
        assert "Index Scan Backward using messages_position on messages" in plan, plan
        assert "Seq Scan" not in plan, plan
    finally:
        await connection.close()


async def test_an_admission_to_10_000_messages_reads_no_more_than_it_needs(database_url: str, user: str) -> None:
    conversation_id = await make_conversation(database_url, user, ["user", "assistant"] * 5000)
    connection = await asyncpg.connect(database_url)
    try:
        # Other conversations: of a table that fits a page, reading all of it is right.
        await connection.execute(
            "INSERT INTO conversations (id, user_id) SELECT gen_random_uuid(), $1 FROM generate_series(1, 5000)", user
        )
        await connection.execute("ANALYZE")
        # More than the five executions after which Postgres may settle on a generic plan.
        for number in range(8):
            transaction = connection.transaction()
            await transaction.start()
            before = await _reads(connection)
            sql, arguments, _ = _question(user, conversation_id, number)
            rows = await connection.fetch(sql, *arguments)
            after = await _reads(connection)
            await transaction.rollback()
            assert rows[0]["outcome"] == "admitted"
            assert len(rows[0]["contents"]) == 200
            seq_scans = {table: after[table][0] - before[table][0] for table in after}
            assert [seq_scans[table] for table in ("conversations", "messages", "events")] == [0, 0, 0]
            # The history, the last message, the repeated one and the first one.
            # Each is read twice: for its size, and then for what it says.
            assert 400 <= after["messages"][1] - before["messages"][1] <= 405
    finally:
        await connection.close()


async def _reads(connection: asyncpg.Connection) -> dict[str, tuple[int, int]]:
    """Sequential scans, and rows fetched through an index, of this connection so far, by table."""
    rows = await connection.fetch(
        "SELECT relname, seq_scan, coalesce(idx_tup_fetch, 0) AS fetched FROM pg_stat_xact_user_tables"
    )
    return {row["relname"]: (row["seq_scan"], row["fetched"]) for row in rows}


def _question(user: str, conversation_id: str, number: int) -> Bound:
    """The statement `admit` with its arguments."""
    return bind(
        "admit",
        user_id=user,
        conversation_id=uuid.UUID(conversation_id),
        new_conversation_id=uuid.uuid4(),
        title="title",
        message_id=uuid.uuid4(),
        client_message_id=f"client-{number}",
        content="question",
        created_at=datetime.now(UTC),
        turn_id=uuid.uuid4(),
        node="node",
        lease_seconds=5.0,
        message_created='{"message": {}}',
        turn_started='{"message_id": "m"}',
        history_messages_max=200,
        limits=None,
    )


async def test_a_node_answers_in_a_conversation_of_10_000_messages(
    start_node: StartNode, database_url: str, user: str
) -> None:
    conversation_id = await make_conversation(database_url, user, ["user", "assistant"] * 5000)
    async with socket_to(start_node(AGENT=TRANSCRIPT), user) as socket:
        history = seen(await socket.answer("q", conversation_id))
    assert [content for _, content in history] == [f"m{number}" for number in range(9803, 10_001)] + ["q"]
    (row,) = await sql(
        database_url,
        "SELECT max(position) AS last FROM messages WHERE conversation_id = $1",
        uuid.UUID(conversation_id),
    )
    assert row["last"] == 10_002
