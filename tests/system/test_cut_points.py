"""One invariant at every cut point: a client that comes back with its cursor gets every event exactly once."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.gated_turn import ACTIONS, ANSWER, EVENTS, LAST_TEXT, Gated, begin, drive
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql, text_of
from tests.kit.stored import ended
from tests.kit.transcripts import merged, whole

QUICK = (("text", "a "), ("text", "b"))


@pytest.fixture(scope="module")
def node(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), strings.environment) as running:
        yield running


async def test_an_uninterrupted_turn_shows_every_event(node: NodeProcess, gated: Gated, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.ask(gated.question)
        frames = await drive(socket, gated, to=EVENTS)
    assert [frame["seq"] for frame in frames] == list(range(1, EVENTS + 1))
    kinds = {"text": "turn.delta", "call": "turn.tool_call", "result": "turn.tool_result"}
    expected = [kinds[action[0]] for action in ACTIONS]
    assert [f["type"] for f in frames] == ["message.created", "turn.started", *expected, "turn.completed"]
    assert text_of(frames) == ANSWER
    assert frames[5]["arguments"] == {"query": "föö"}
    assert frames[-1]["message"]["content"] == LAST_TEXT


@pytest.mark.parametrize("cut", range(1, EVENTS + 1))
async def test_nothing_is_lost_or_repeated_when_the_client_comes_back_while_the_turn_runs(
    node: NodeProcess, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(node, user) as socket:
        conversation_id, frames = await begin(socket, gated)
        frames += await drive(socket, gated, to=cut, after=1)
        socket.drop()
    async with socket_to(node, user) as socket:
        await socket.follow(conversation_id, cut)
        frames += await drive(socket, gated, to=EVENTS, after=cut)
    assert merged(frames) == merged(await whole(node, user, conversation_id))
    assert text_of(frames) == ANSWER


@pytest.mark.parametrize("cut", range(1, EVENTS + 1))
async def test_nothing_is_lost_or_repeated_when_the_agent_goes_on_during_the_reconnect(
    node: NodeProcess, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(node, user) as socket:
        conversation_id, frames = await begin(socket, gated)
        frames += await drive(socket, gated, to=cut, after=1)
        gated.open_all()
        socket.drop()
    if cut < EVENTS:
        async with socket_to(node, user) as socket:
            await socket.follow(conversation_id, cut)
            frames += await socket.until(*TERMINAL, "error", "conversation.snapshot")
    assert merged(frames) == merged(await whole(node, user, conversation_id))
    assert text_of(frames) == ANSWER


@pytest.mark.parametrize("cut", range(EVENTS))
async def test_nothing_is_lost_or_repeated_when_the_client_comes_back_after_the_end(
    node: NodeProcess, module_database_url: str, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(node, user) as watcher:
        conversation_id, uninterrupted = await begin(watcher, gated)
        async with socket_to(node, user) as socket:
            await socket.follow(conversation_id, 0)
            frames = await drive(socket, gated, to=min(cut, 1))
            frames += await drive(socket, gated, to=cut, after=min(cut, 1))
            socket.drop()
        gated.open_all()
        uninterrupted += await watcher.until(*TERMINAL)
        await eventually(ended(module_database_url, conversation_id))
    async with socket_to(node, user) as socket:
        await socket.follow(conversation_id, cut)
        frames += await socket.until(*TERMINAL, "error", "conversation.snapshot")
    assert merged(frames) == merged(uninterrupted)
    assert text_of(frames) == ANSWER


async def test_a_client_that_saw_nothing_begins_at_zero_before_the_first_token(
    node: NodeProcess, gated: Gated, user: str
) -> None:
    async with socket_to(node, user) as sender, socket_to(node, user) as socket:
        conversation_id, _ = await begin(sender, gated)
        sender.drop()
        await socket.follow(conversation_id, 0)
        frames = await drive(socket, gated, to=EVENTS)
    assert [frame["seq"] for frame in frames] == list(range(1, EVENTS + 1))
    assert text_of(frames) == ANSWER


async def test_a_cursor_at_the_end_gets_nothing_until_a_new_turn_comes_live(
    node: NodeProcess, gated: Gated, user: str
) -> None:
    gated.open_all()
    async with socket_to(node, user) as sender, socket_to(node, user) as socket:
        end = (await sender.answer(gated.question))[-1]
        await socket.follow(end["conversation_id"], end["seq"])
        await socket.send({"type": "ping"})
        assert (await socket.receive())["type"] == "pong"
        seen_by_sender = await sender.answer(script_of(*QUICK), end["conversation_id"])
        frames = await socket.until(*TERMINAL)
    assert frames[0]["type"] == "message.created"
    assert frames[0]["seq"] == end["seq"] + 1
    assert merged(frames) == merged(seen_by_sender)


async def test_a_cursor_ahead_of_the_journal_gets_a_snapshot(node: NodeProcess, gated: Gated, user: str) -> None:
    gated.open_all()
    async with socket_to(node, user) as socket:
        end = (await socket.answer(gated.question))[-1]
        await socket.follow(end["conversation_id"], end["seq"] + 1)
        frame = await socket.receive()
    assert frame["type"] == "conversation.snapshot"
    assert frame["seq"] == end["seq"]
    assert frame["messages"][-1] == end["message"]


async def test_a_cursor_ahead_of_a_running_turn_gets_a_snapshot_and_then_the_rest(
    node: NodeProcess, gated: Gated, user: str
) -> None:
    async with socket_to(node, user) as sender, socket_to(node, user) as socket:
        conversation_id, frames = await begin(sender, gated)
        frames += await drive(sender, gated, to=5, after=1)
        await socket.follow(conversation_id, 1_000_000)
        snapshot = await socket.receive()
        assert snapshot["type"] == "conversation.snapshot"
        assert snapshot["seq"] == 5
        rest = await drive(socket, gated, to=EVENTS, after=5)
    assert text_of([snapshot, *rest]) == ANSWER


@pytest.mark.parametrize("cut", range(1, EVENTS))
async def test_a_snapshot_and_what_comes_after_it_make_the_whole_answer(
    node: NodeProcess, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(node, user) as sender:
        conversation_id, seen = await begin(sender, gated)
        seen += await drive(sender, gated, to=cut, after=1)
        sender.drop()
    async with socket_to(node, user) as socket:
        await socket.follow(conversation_id)
        snapshot = await socket.receive()
        assert snapshot["type"] == "conversation.snapshot"
        frames = [snapshot, *await drive(socket, gated, to=EVENTS, after=max(snapshot["seq"], 2))]
    assert snapshot["seq"] == max(cut, 2)  # turn.started commits with message.created
    assert snapshot["turn"]["text"] == text_of(seen)
    assert [message["role"] for message in snapshot["messages"]] == ["user"]
    assert text_of(frames) == ANSWER
    assert frames[-1]["message"]["content"] == LAST_TEXT


async def test_a_snapshot_after_the_end_holds_every_message_and_no_turn(
    node: NodeProcess, gated: Gated, user: str
) -> None:
    gated.open_all()
    async with socket_to(node, user) as socket:
        end = (await socket.answer(gated.question))[-1]
        await socket.follow(end["conversation_id"])
        snapshot = await socket.receive()
    assert snapshot["turn"] is None
    assert snapshot["seq"] == end["seq"]
    roles = [message["role"] for message in snapshot["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert "".join(m["content"] for m in snapshot["messages"] if m["role"] == "assistant") == ANSWER


async def test_a_disconnect_right_after_the_message_does_not_cancel(
    node: NodeProcess, module_database_url: str, gated: Gated, user: str
) -> None:
    gated.open_all()
    async with socket_to(node, user) as socket:
        message_id = await socket.ask(gated.question)
        socket.drop()

    async def is_completed() -> bool:
        rows = await sql(
            module_database_url,
            "SELECT t.status, t.epoch FROM messages m JOIN turns t ON t.id = m.turn_id WHERE m.client_id = $1",
            message_id,
        )
        return [(row["status"], row["epoch"]) for row in rows] == [("completed", 1)]

    await eventually(is_completed)


async def test_a_disconnect_in_mid_turn_does_not_cancel(
    node: NodeProcess, module_database_url: str, gated: Gated, user: str
) -> None:
    async with socket_to(node, user) as socket:
        conversation_id, _ = await begin(socket, gated)
        await drive(socket, gated, to=4, after=1)
        socket.drop()
    gated.open_all()
    await eventually(ended(module_database_url, conversation_id))
    rows = await sql(
        module_database_url,
        "SELECT string_agg(content, '' ORDER BY position) AS said FROM messages "
        "WHERE conversation_id = $1 AND role = 'assistant' AND status = 'completed'",
        uuid.UUID(conversation_id),
    )
    assert rows[0]["said"] == ANSWER


async def test_every_cursor_of_a_long_conversation_gets_exactly_what_follows(node: NodeProcess, user: str) -> None:
    turn = script_of(("text", "a "), ("call", "1", "tool", {}), ("result", "1", "tool", "r"), ("step",), ("text", "b"))
    async with socket_to(node, user) as socket:
        frames = await socket.answer(turn)
        conversation_id = frames[0]["conversation_id"]
        frames += await socket.answer(turn, conversation_id)
        frames += await socket.answer(turn, conversation_id)
        assert len([frame for frame in frames if frame["type"] == "turn.completed"]) == 3
        last_seq = frames[-1]["seq"]
        assert [frame["seq"] for frame in frames] == list(range(1, last_seq + 1))
        for after in range(last_seq):
            await socket.follow(conversation_id, after)
            replayed: list[Frame] = []
            while not replayed or replayed[-1]["seq"] < last_seq:
                replayed.append(await socket.receive())
            assert replayed == frames[after:]


@pytest.mark.parametrize("after", [0, 1, 4, None])
async def test_after_the_journals_retention_a_snapshot_holds_the_whole_answer(
    start_node: Callable[..., NodeProcess],
    database_url: str,
    strings: Strings,
    gated: Gated,
    user: str,
    after: int | None,
) -> None:
    gated.open_all()
    node = start_node(**strings.environment, JOURNAL_RETENTION_MINUTES="0.001")
    async with socket_to(node, user) as socket:
        end = (await socket.answer(gated.question))[-1]

        async def is_forgotten() -> bool:
            return not await sql(database_url, "SELECT FROM events")

        await eventually(is_forgotten)
        await socket.follow(end["conversation_id"], after)
        snapshot = await socket.receive()
        assert snapshot["type"] == "conversation.snapshot"
        assert snapshot["seq"] == end["seq"]
        assert snapshot["messages"][-1] == end["message"]
        said = [message["content"] for message in snapshot["messages"] if message["role"] == "assistant"]
        assert "".join(said) == ANSWER


async def test_a_cursor_at_the_end_stays_good_when_the_journal_has_been_emptied(
    start_node: Callable[..., NodeProcess], database_url: str, strings: Strings, gated: Gated, user: str
) -> None:
    gated.open_all()
    node = start_node(**strings.environment, JOURNAL_RETENTION_MINUTES="0.001")
    async with socket_to(node, user) as sender, socket_to(node, user) as socket:
        end = (await sender.answer(gated.question))[-1]

        async def is_forgotten() -> bool:
            return not await sql(database_url, "SELECT FROM events")

        await eventually(is_forgotten)
        await socket.follow(end["conversation_id"], end["seq"])
        await sender.ask(script_of(*QUICK), end["conversation_id"])
        frames = await socket.until(*TERMINAL, "conversation.snapshot")
    assert frames[0]["type"] == "message.created"
    assert frames[0]["seq"] == end["seq"] + 1
    assert text_of(frames) == "a b"
