"""The socket and what is served beside it: every frame of a client, every error, every limit."""

from __future__ import annotations

import asyncio
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.conftest import StartNode
from tests.kit.harness import (
    TERMINAL,
    Frame,
    NodeProcess,
    Socket,
    running_node,
    socket_to,
    sql,
    text_of,
    token_for,
)
from tests.kit.turn_requests import cancel

MESSAGE_FIELDS = {
    *("id", "role", "content", "tool_calls", "tool_name", "tool_call_id", "status", "turn_id", "created_at")
}
MESSAGE_BYTES_MAX = 65_536


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node that answers at once."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture(scope="module")
def slow_node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose turns run until they are cancelled; it beats often."""
    settings = {"ECHO_TOKENS": "1000000", "ECHO_TOKENS_PER_SECOND": "200", "HEARTBEAT_SECONDS": "0.3"}
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), settings) as node:
        yield node


@pytest.fixture(scope="module")
def silent_node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose agent never says a word."""
    settings = {"AGENT": "tests.agents.transcript:waiting"}
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), settings) as node:
        yield node


async def next_answer(socket: Socket) -> Frame:
    """The next frame that is not a turn's."""
    while (frame := await socket.receive())["type"].startswith(("turn.", "message.")):
        pass
    return frame


async def lives(socket: Socket) -> bool:
    """Whether the connection lives: a ping is answered, and nothing comes before the answer."""
    request_id = secrets.token_hex(4)
    await socket.send({"type": "ping", "request_id": request_id})
    return await next_answer(socket) == {"type": "pong", "request_id": request_id}


async def closing_code(socket: Socket) -> int:
    """How the connection ends, for a client that goes on reading until then."""
    async with asyncio.timeout(20):
        try:
            while True:
                await socket.connection.recv()
        except ConnectionClosed:
            return await socket.closed()


async def refusal(socket: Socket, frame: Frame) -> Frame:
    """The error that answers a frame, which is also shown to have left the connection alive."""
    await socket.send({**frame, "request_id": "r-1"})
    error = await next_answer(socket)
    assert error["type"] == "error"
    assert error.pop("request_id") == "r-1"
    assert await lives(socket)
    return error


def send_to(conversation_id: str | None, content: str = "hello", **fields: Any) -> Frame:
    return {
        "type": "message.send",
        "message_id": str(uuid.uuid4()),
        "content": content,
        "conversation_id": conversation_id,
        **fields,
    }


async def start_turn(socket: Socket, content: str = "go on") -> tuple[str, str]:
    """Start a turn in a new conversation; returns the ids of both, once its first token is there."""
    await socket.ask(content)
    frames = await socket.until("turn.delta")
    return frames[-1]["conversation_id"], frames[-1]["turn_id"]


def frames_of(conversation_id: str, frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.get("conversation_id") == conversation_id]


# ping, heartbeat


async def test_a_ping_is_answered_with_its_request_id(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.send({"type": "ping", "request_id": "é-1"})
        assert await socket.receive() == {"type": "pong", "request_id": "é-1"}


async def test_a_ping_without_request_id_is_answered_without(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_a_silent_connection_hears_heartbeats(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as socket, asyncio.timeout(15):
        for _ in range(3):
            assert json.loads(await socket.connection.recv()) == {"type": "heartbeat"}


async def test_ready_tells_the_interval_of_heartbeats(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, ready=False, headers={"Authorization": f"Bearer {token_for(user)}"}) as socket:
        assert (await socket.receive())["heartbeat_seconds"] == 0.3


# message.send


async def test_a_message_is_answered_by_the_frames_of_the_design(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        message_id = await socket.ask("hello there")
        frames = await socket.until(*TERMINAL)
    created, started, *deltas, completed = frames
    conversation_id, turn_id = started["conversation_id"], started["turn_id"]
    assert created == {
        "type": "message.created",
        "conversation_id": conversation_id,
        "seq": 1,
        "message": {
            "id": created["message"]["id"],
            "role": "user",
            "content": "hello there",
            "tool_calls": None,
            "tool_name": None,
            "tool_call_id": None,
            "status": "completed",
            "turn_id": turn_id,
            "created_at": created["message"]["created_at"],
        },
    }
    assert started == {
        "type": "turn.started",
        "conversation_id": conversation_id,
        "seq": 2,
        "turn_id": turn_id,
        "message_id": message_id,
    }
    assert {frozenset(delta) for delta in deltas} == {frozenset({"type", "conversation_id", "seq", "turn_id", "text"})}
    assert set(completed) == {"type", "conversation_id", "seq", "turn_id", "message", "usage"}
    assert set(completed["message"]) == MESSAGE_FIELDS
    assert (completed["message"]["role"], completed["message"]["status"]) == ("assistant", "completed")
    assert set(completed["usage"]) == {"input_tokens", "output_tokens", "model", "seconds"}


async def test_a_message_is_the_same_object_live_and_in_a_snapshot(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer("hello")
        await socket.follow(frames[0]["conversation_id"])
        snapshot = await socket.receive()
    assert snapshot["messages"] == [frames[0]["message"], frames[-1]["message"]]


async def test_several_conversations_run_at_once_on_one_connection(node: NodeProcess, user: str) -> None:
    contents = [f"question {number} " * number for number in range(1, 9)]
    async with socket_to(node, user) as socket:
        for content in contents:
            await socket.ask(content)
        frames: list[Frame] = []
        while sum(frame["type"] == "turn.completed" for frame in frames) < len(contents):
            frames += await socket.until(*TERMINAL)
    conversations = {frame["message"]["content"]: frame["conversation_id"] for frame in frames if "message" in frame}
    for content in contents:
        mine = frames_of(conversations[content], frames)
        assert text_of(mine) == mine[-1]["message"]["content"] == f"[1] {content}"
        assert [frame["seq"] for frame in mine] == sorted({frame["seq"] for frame in mine})


async def test_a_repeated_message_shows_its_turn_again_and_is_stored_once(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(node, user) as socket:
        message_id = await socket.ask("once")
        first = await socket.until(*TERMINAL)
        again = await socket.answer("once", first[0]["conversation_id"], message_id)
    assert again[:2] == first[:2]
    assert text_of(again) == text_of(first)
    assert again[-1] == first[-1]
    rows = await sql(module_database_url, "SELECT FROM messages WHERE user_id = $1", user)
    assert len(rows) == 2


async def test_a_message_id_of_another_conversation_is_refused(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(node, user) as socket:
        message_id = await socket.ask("one")
        one = (await socket.until(*TERMINAL))[0]["conversation_id"]
        two = (await socket.answer("two"))[0]["conversation_id"]
        error = await refusal(socket, {**send_to(two, "one"), "message_id": message_id})
    assert (error["code"], error["conversation_id"]) == ("invalid_frame", two)
    rows = await sql(
        module_database_url, "SELECT FROM messages WHERE user_id = $1 AND client_id = $2", user, message_id
    )
    assert len(rows) == 1
    assert one != two


async def test_a_message_id_belongs_to_its_user_alone(node: NodeProcess, user: str) -> None:
    message_id = str(uuid.uuid4())
    async with socket_to(node, user) as mine, socket_to(node, user + "-2") as theirs:
        first = await mine.answer("mine", message_id=message_id)
        second = await theirs.answer("theirs", message_id=message_id)
    assert second[-1]["message"]["content"] == "[1] theirs"
    assert first[0]["conversation_id"] != second[0]["conversation_id"]


async def test_a_message_to_a_running_turn_is_refused_as_busy(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as socket:
        conversation_id, _ = await start_turn(socket)
        error = await refusal(socket, send_to(conversation_id))
        await socket.send(cancel(conversation_id))
        await socket.until("turn.cancelled")
    assert error == {
        "type": "error",
        "code": "conversation_busy",
        "message": error["message"],
        "conversation_id": conversation_id,
        "retryable": True,
    }


async def test_an_interrupting_message_cancels_the_running_turn_and_is_answered(
    slow_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(slow_node, user) as socket:
        conversation_id, first_turn = await start_turn(socket)
        await socket.send(send_to(conversation_id, "no, this", if_busy="interrupt"))
        frames = await socket.until("turn.started")
        cancelled, created, started = frames[-3:]
        assert (cancelled["type"], cancelled["turn_id"]) == ("turn.cancelled", first_turn)
        assert (created["type"], created["message"]["content"]) == ("message.created", "no, this")
        assert [created["seq"], started["seq"]] == [cancelled["seq"] + 1, cancelled["seq"] + 2]
        assert started["turn_id"] != first_turn
        running = await sql(
            module_database_url,
            "SELECT id FROM turns WHERE conversation_id = $1 AND status = 'running'",
            uuid.UUID(conversation_id),
        )
        assert [str(row["id"]) for row in running] == [started["turn_id"]]
        await socket.send(cancel(conversation_id))
        await socket.until("turn.cancelled")


async def test_an_interrupting_message_to_an_idle_conversation_is_just_answered(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        conversation_id = (await socket.answer("one"))[0]["conversation_id"]
        await socket.send(send_to(conversation_id, "two", if_busy="interrupt"))
        assert text_of(await socket.until(*TERMINAL)) == "[3] two"


async def test_a_repeated_interrupting_message_does_not_interrupt_itself(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as socket:
        frame = send_to(None, "mine", if_busy="interrupt")
        await socket.send(frame)
        first = await socket.until("turn.delta")
        conversation_id = first[0]["conversation_id"]
        await socket.send({**frame, "conversation_id": conversation_id})
        while (again := await socket.receive())["type"] != "message.created":
            assert again["type"] == "turn.delta"
        assert again == first[0]
        assert (await socket.until("turn.delta"))[-1]["turn_id"] == first[1]["turn_id"]
        await socket.send(cancel(conversation_id))
        await socket.until("turn.cancelled")


async def test_a_message_where_a_question_is_unanswered_is_refused_for_its_role_order(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    conversation_id = str(uuid.uuid4())
    await sql(module_database_url, "INSERT INTO users (id) VALUES ($1)", user)
    await sql(module_database_url, "INSERT INTO conversations (id, user_id) VALUES ($1, $2)", conversation_id, user)
    await sql(
        module_database_url,
        "INSERT INTO messages (id, conversation_id, user_id, position, role, content)"
        " VALUES (gen_random_uuid(), $1, $2, 1, 'user', 'imported')",
        conversation_id,
        user,
    )
    async with socket_to(node, user) as socket:
        error = await refusal(socket, send_to(conversation_id))
    assert (error["code"], error["conversation_id"], error["retryable"]) == ("role_order", conversation_id, False)


@pytest.mark.parametrize("character", ["a", "é", "\x01", '"', "\U0001f600"])
async def test_a_message_of_the_largest_size_is_answered_however_it_is_escaped(
    node: NodeProcess, user: str, character: str
) -> None:
    content = character * (MESSAGE_BYTES_MAX // len(character.encode()))
    async with socket_to(node, user) as socket:
        assert (await socket.answer(content))[-1]["message"]["content"] == f"[1] {content}"


async def test_a_message_that_is_a_byte_too_long_is_refused(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(node, user) as socket:
        error = await refusal(socket, send_to(None, "é" * (MESSAGE_BYTES_MAX // 2) + "a"))
    assert (error["code"], error["retryable"]) == ("message_too_large", False)
    assert await sql(module_database_url, "SELECT FROM conversations WHERE user_id = $1", user) == []


async def test_more_turns_than_the_node_may_run_are_rate_limited(start_node: StartNode, user: str) -> None:
    node = start_node(TURNS_MAX="1", ECHO_TOKENS="1000000", ECHO_TOKENS_PER_SECOND="100")
    async with socket_to(node, user) as socket:
        conversation_id, _ = await start_turn(socket)
        error = await refusal(socket, send_to(None))
        assert (error["code"], error["retryable"]) == ("rate_limited", True)
        await socket.send(cancel(conversation_id))
        await socket.until("turn.cancelled")
        await socket.ask("now")
        assert (await socket.until("turn.started", "error"))[-1]["type"] == "turn.started"


async def test_an_agent_that_fails_ends_its_turn_with_agent_failed(start_node: StartNode, user: str) -> None:
    node = start_node(ECHO_FAIL_AFTER="2", ECHO_TOKENS="9")
    async with socket_to(node, user) as socket:
        frames = await socket.answer("hello")
        failed = frames[-1]
        assert set(failed) == {"type", "conversation_id", "seq", "turn_id", "message", "error"}
        assert failed["type"] == "turn.failed"
        assert set(failed["error"]) == {"code", "message", "retryable"}
        assert failed["error"]["code"] == "agent_failed"
        assert failed["message"]["content"] == text_of(frames) == "w0 w1 "
        assert failed["message"]["status"] == "failed"
        again = await socket.answer("again", failed["conversation_id"])
        assert [again[0]["type"], again[-1]["type"]] == ["message.created", "turn.failed"]


# conversation.follow, conversation.unfollow


async def test_a_follower_without_a_cursor_gets_a_snapshot_first(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as speaker, socket_to(node, user) as follower:
        frames = await speaker.answer("one")
        conversation_id = frames[0]["conversation_id"]
        await follower.follow(conversation_id)
        snapshot = await follower.receive()
        assert set(snapshot) == {"type", "conversation_id", "messages", "turn", "seq", "has_older"}
        assert [message["content"] for message in snapshot["messages"]] == ["one", "[1] one"]
        assert all(set(message) == MESSAGE_FIELDS for message in snapshot["messages"])
        assert (snapshot["turn"], snapshot["seq"]) == (None, frames[-1]["seq"])
        await speaker.answer("two", conversation_id)
        live = await follower.until(*TERMINAL)
        assert live[0]["seq"] == snapshot["seq"] + 1
        assert text_of(live) == "[3] two"


async def test_a_snapshot_in_the_middle_of_a_turn_goes_on_live(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as speaker, socket_to(slow_node, user) as follower:
        conversation_id, turn_id = await start_turn(speaker)
        await follower.follow(conversation_id)
        frames = await follower.until("turn.delta")
        assert frames[0]["type"] == "conversation.snapshot"
        assert set(frames[0]["turn"]) == {"turn_id", "text"}
        assert frames[0]["turn"]["turn_id"] == turn_id
        assert [message["role"] for message in frames[0]["messages"]] == ["user"]
        await speaker.send(cancel(conversation_id))
        frames += await follower.until("turn.cancelled")
        assert text_of(frames) == frames[-1]["message"]["content"]


async def test_a_follower_from_a_cursor_gets_every_later_event(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer("one two three")
        conversation_id = frames[0]["conversation_id"]
        await socket.follow(conversation_id, after=1)
        again = await socket.until(*TERMINAL)
        assert again[0] == frames[1]
        assert (text_of(again), again[-1]) == (text_of(frames), frames[-1])


async def test_a_follower_from_the_end_hears_of_the_next_turn_only(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as speaker, socket_to(node, user) as follower:
        frames = await speaker.answer("one")
        await follower.follow(frames[0]["conversation_id"], after=frames[-1]["seq"])
        await follower.send({"type": "ping"})
        assert await follower.receive() == {"type": "pong"}
        await speaker.answer("two", frames[0]["conversation_id"])
        assert (await follower.until(*TERMINAL))[0]["message"]["content"] == "two"


async def test_two_followers_of_a_conversation_see_its_turn_live(slow_node: NodeProcess, user: str) -> None:
    async with AsyncExitStack() as stack:
        speaker, one, two = [await stack.enter_async_context(socket_to(slow_node, user)) for _ in range(3)]
        conversation_id, _ = await start_turn(speaker)
        seen: list[list[Frame]] = []
        for follower in (one, two):
            await follower.follow(conversation_id, after=0)
            seen.append(await follower.until("turn.delta"))
        for follower, frames in zip((one, two), seen, strict=True):
            frames += await follower.until("turn.delta")
        await speaker.send(cancel(conversation_id))
        for follower, frames in zip((one, two), seen, strict=True):
            frames += await follower.until("turn.cancelled")
            assert text_of(frames) == frames[-1]["message"]["content"]
        assert seen[0][:2] == seen[1][:2]
        assert seen[0][-1] == seen[1][-1]


async def test_whoever_no_longer_follows_hears_nothing_more(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as leaving, socket_to(node, user) as speaker:
        conversation_id = (await leaving.answer("one"))[0]["conversation_id"]
        await leaving.send({"type": "conversation.unfollow", "conversation_id": conversation_id})
        assert await lives(leaving)
        await speaker.answer("two", conversation_id)
        await leaving.send({"type": "ping"})
        assert await leaving.receive() == {"type": "pong"}


async def test_leaving_one_conversation_keeps_the_others(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as socket:
        left, _ = await start_turn(socket)
        await socket.ask("another")
        while (kept := (await socket.receive())["conversation_id"]) == left:
            pass
        await socket.send({"type": "conversation.unfollow", "conversation_id": left})
        assert await lives(socket)
        assert [(await socket.receive())["conversation_id"] for _ in range(5)] == [kept] * 5
        for conversation_id in (left, kept):
            await socket.send(cancel(conversation_id))
        assert (await socket.until("turn.cancelled"))[-1]["conversation_id"] == kept


async def test_leaving_what_is_not_followed_is_harmless(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.send({"type": "conversation.unfollow", "conversation_id": str(uuid.uuid4())})
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}


async def test_following_again_begins_at_the_new_cursor(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer("one")
        conversation_id = frames[0]["conversation_id"]
        for _ in range(3):
            await socket.follow(conversation_id, after=frames[-1]["seq"] - 1)
            assert await socket.receive() == frames[-1]


async def test_a_message_to_a_followed_conversation_is_shown_once(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        one = await socket.answer("one")
        two = await socket.answer("two", one[0]["conversation_id"])
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        seqs = [frame["seq"] for frame in one + two]
        assert seqs == sorted(set(seqs))


# turn.cancel


async def test_a_turn_cancelled_before_its_first_token_ends_empty(silent_node: NodeProcess, user: str) -> None:
    async with socket_to(silent_node, user) as socket:
        await socket.ask("hello")
        started = (await socket.until("turn.started"))[-1]
        await socket.send(cancel(started["conversation_id"]))
        cancelled = await socket.receive()
        assert set(cancelled) == {"type", "conversation_id", "seq", "turn_id", "message"}
        assert (cancelled["type"], cancelled["turn_id"]) == ("turn.cancelled", started["turn_id"])
        assert (cancelled["message"]["content"], cancelled["message"]["status"]) == ("", "cancelled")


async def test_a_turn_cancelled_in_the_middle_keeps_exactly_what_was_shown(
    slow_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(slow_node, user) as socket:
        conversation_id, turn_id = await start_turn(socket)
        await socket.follow(conversation_id, after=0)
        frames = await socket.until("message.created")
        frames = [frames[-1], *await socket.until("turn.delta")]
        frames += await socket.until("turn.delta")
        await socket.send(cancel(conversation_id, turn_id=turn_id))
        frames += await socket.until("turn.cancelled")
        assert frames[-1]["message"]["content"] == text_of(frames) != ""
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
    stored = await sql(
        module_database_url,
        "SELECT content, status FROM messages WHERE turn_id = $1 AND role = 'assistant'",
        uuid.UUID(turn_id),
    )
    assert [tuple(row) for row in stored] == [(text_of(frames), "cancelled")]
    (turn,) = await sql(module_database_url, "SELECT status, finished_at FROM turns WHERE id = $1", uuid.UUID(turn_id))
    assert turn["status"] == "cancelled"
    assert turn["finished_at"] is not None


async def test_a_turn_is_cancelled_from_another_connection_of_its_user(slow_node: NodeProcess, user: str) -> None:
    async with socket_to(slow_node, user) as speaker, socket_to(slow_node, user) as other:
        conversation_id, turn_id = await start_turn(speaker)
        await other.send(cancel(conversation_id))
        assert (await speaker.until("turn.cancelled"))[-1]["turn_id"] == turn_id
        assert await lives(other)


@pytest.mark.parametrize("names_the_turn", [True, False])
async def test_cancelling_after_the_end_changes_nothing(node: NodeProcess, user: str, names_the_turn: bool) -> None:
    async with socket_to(node, user) as socket:
        ended = (await socket.answer("hello"))[-1]
        conversation_id = ended["conversation_id"]
        await socket.send(cancel(conversation_id, **({"turn_id": ended["turn_id"]} if names_the_turn else {})))
        await socket.send({"type": "ping"})
        assert await socket.receive() == {"type": "pong"}
        await socket.follow(conversation_id, after=ended["seq"] - 1)
        assert await socket.receive() == ended


async def test_a_conversation_goes_on_after_a_cancel(silent_node: NodeProcess, node: NodeProcess, user: str) -> None:
    async with socket_to(silent_node, user) as socket, socket_to(node, user) as elsewhere:
        await socket.ask("never mind")
        conversation_id = (await socket.until("turn.started"))[-1]["conversation_id"]
        await socket.send(cancel(conversation_id))
        await socket.until("turn.cancelled")
        # Said nothing, so the agent does not see it: one message, not three.
        assert text_of(await elsewhere.answer("hello", conversation_id)) == "[1] hello"


# What is refused, and who may not know.


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"turn.explain","conversation_id":"018f0000-0000-7000-8000-000000000000","request_id":"r"}',
        '{"type":"nonsense","request_id":"r"}',
        '{"request_id":"r"}',
        '{"type":"ping","request_id":"r","more":1}',
        '{"type":"conversation.follow","request_id":"r"}',
        '{"type":"conversation.follow","conversation_id":"mine","request_id":"r"}',
        '{"type":"message.send","message_id":"m","content":"a\\u0000b","request_id":"r"}',
        '{"type":"message.send","message_id":"m","content":"a\\ud800b","request_id":"r"}',
        '{"type":"ping","\\ud800":1,"request_id":"r"}',
        '{"type":"ping","type":"ping","request_id":"r"}',
        '{"type":"conversation.follow","after":NaN,"request_id":"r"}',
    ],
)
async def test_a_frame_that_is_not_understood_is_an_error_and_the_connection_lives(
    node: NodeProcess, user: str, text: str
) -> None:
    async with socket_to(node, user) as socket:
        await socket.send(text)
        error = await socket.receive()
        assert (error["type"], error["code"], error["retryable"]) == ("error", "invalid_frame", False)
        assert error["request_id"] == "r"
        assert await lives(socket)


@pytest.mark.parametrize(
    "text", ["", "junk", "[]", "null", '{"type":"ping"', "[" * 50_000, '{"type":' + "9" * 5000 + "}"]
)
async def test_text_that_is_no_frame_at_all_is_an_error_without_request_id(
    node: NodeProcess, user: str, text: str
) -> None:
    async with socket_to(node, user) as socket:
        await socket.send(text)
        error = await socket.receive()
        assert set(error) == {"type", "code", "message", "retryable"}
        assert error["code"] == "invalid_frame"
        assert await lives(socket)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(send_to("X"), id="message.send"),
        pytest.param(send_to("X", if_busy="interrupt"), id="message.send interrupting"),
        pytest.param({"type": "conversation.follow", "conversation_id": "X"}, id="conversation.follow"),
        pytest.param({"type": "conversation.follow", "conversation_id": "X", "after": 0}, id="follow from 0"),
        pytest.param({"type": "conversation.follow", "conversation_id": "X", "after": 3}, id="follow from 3"),
        pytest.param({"type": "conversation.follow", "conversation_id": "X", "after": 10**9}, id="follow from afar"),
        pytest.param(cancel("X"), id="turn.cancel"),
        pytest.param(cancel("X", turn_id="TURN"), id="turn.cancel by id"),
    ],
)
async def test_somebody_elses_conversation_answers_like_one_that_does_not_exist(
    slow_node: NodeProcess, user: str, frame: Frame
) -> None:
    missing = str(uuid.uuid4())
    async with socket_to(slow_node, user) as owner, socket_to(slow_node, user + "-not") as stranger:
        theirs, turn_id = await start_turn(owner)
        answers = []
        for conversation_id in (theirs, missing):
            named = {**frame, "conversation_id": conversation_id, "request_id": "r"}
            if "turn_id" in frame:
                named["turn_id"] = turn_id
            await stranger.send(named)
            async with asyncio.timeout(15):
                while '"heartbeat"' in (text := str(await stranger.connection.recv())):
                    pass
            answers.append(text.replace(conversation_id, "X"))
            assert await lives(stranger)
        assert answers[0] == answers[1]
        assert json.loads(answers[0])["code"] == "not_found"
        # And the owner's turn goes on.
        assert (await owner.until("turn.delta"))[-1]["turn_id"] == turn_id
        await owner.send(cancel(theirs))
        assert (await owner.until("turn.cancelled"))[-1]["turn_id"] == turn_id


async def test_a_stranger_who_asked_to_follow_hears_nothing_of_later_turns(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as owner, socket_to(node, user + "-not") as stranger:
        conversation_id = (await owner.answer("one"))[0]["conversation_id"]
        for after in (None, 0, 2):
            await stranger.follow(conversation_id, after)
            assert (await stranger.receive())["code"] == "not_found"
        await owner.answer("two", conversation_id)
        await stranger.send({"type": "ping"})
        assert await stranger.receive() == {"type": "pong"}


# Limits of the transport.


async def test_a_binary_frame_closes_with_1003(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.connection.send(b'{"type":"ping"}')
        assert await socket.closed() == 1003


@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80", b'{"type":"ping"}\xc3'])
async def test_text_that_is_not_utf_8_closes_with_1007(node: NodeProcess, user: str, text: bytes) -> None:
    async with socket_to(node, user) as socket:
        await socket.connection.send(text, text=True)
        assert await socket.closed() == 1007


async def test_a_frame_that_is_too_big_closes_with_1009(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.send(" " * (7 * MESSAGE_BYTES_MAX))
        assert await socket.closed() == 1009


async def test_a_message_that_is_too_big_in_pieces_closes_with_1009(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        try:
            await socket.connection.send([" " * MESSAGE_BYTES_MAX] * 8)
        except ConnectionClosed:
            pass
        assert await socket.closed() == 1009


async def test_a_frame_in_some_pieces_is_understood(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.connection.send(['{"type":', '"ping",', '"request_id":', '"r"}'])
        assert await socket.receive() == {"type": "pong", "request_id": "r"}


async def test_a_frame_in_very_many_pieces_closes_with_1008(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        try:
            await socket.connection.send([" "] * 5000)
        except ConnectionClosed:
            pass
        assert await socket.closed() == 1008


async def test_empty_pieces_count_too(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        try:
            await socket.connection.send(["{", *[""] * 5000])
        except ConnectionClosed:
            pass
        assert await socket.closed() == 1008


async def test_a_flood_of_frames_is_rate_limited_and_then_cut_off(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        answers: list[Frame] = []

        async def listen() -> None:
            while True:
                answers.append(await socket.receive())

        listening = asyncio.create_task(listen())
        try:
            for number in range(5000):
                await socket.send({"type": "ping", "request_id": str(number)})
        except ConnectionClosed:
            pass
        with pytest.raises(ConnectionClosed):
            await listening
        assert await socket.closed() == 1008
    kinds = [answer.get("code", answer["type"]) for answer in answers]
    assert set(kinds) == {"pong", "rate_limited"}
    assert kinds[0] == "pong"
    limited = [answer for answer in answers if answer["type"] == "error"]
    assert all(error["retryable"] for error in limited)
    # Every frame is answered, in order, until the end.
    assert [answer["request_id"] for answer in answers] == [str(number) for number in range(len(answers))]


async def test_whoever_slows_down_after_a_rate_limit_is_served_again(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:

        async def ping() -> str:
            await socket.send({"type": "ping"})
            answer = await socket.receive()
            return str(answer.get("code", answer["type"]))

        for _ in range(700):
            await socket.send({"type": "ping"})
        answers = [await socket.receive() for _ in range(700)]
        assert any(answer.get("code") == "rate_limited" for answer in answers)
        # One frame at a time, each answered: after a few the allowance has grown.
        assert "pong" in [await ping() for _ in range(100)]


async def test_more_connections_than_the_node_may_have_are_closed_with_1013(start_node: StartNode, user: str) -> None:
    node = start_node(CONNECTIONS_MAX="1")
    async with socket_to(node, user) as first:
        async with socket_to(node, user, ready=False) as second:
            assert await second.closed() == 1013
        assert await lives(first)


# Over HTTP.


def conversations(node: NodeProcess, user: str | None, query: str = "") -> tuple[int, Any]:
    status, body = node.get("/conversations" + query, user=user)
    return status, json.loads(body)


async def test_conversations_are_listed_newest_activity_first(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        ids = [(await socket.answer(f"question {number}"))[0]["conversation_id"] for number in range(3)]
        await socket.answer("again", ids[1])
    status, body = await asyncio.to_thread(conversations, node, user)
    assert status == 200
    assert set(body) == {"conversations", "next_skip", "next_before"}
    assert [conversation["id"] for conversation in body["conversations"]] == [ids[1], ids[2], ids[0]]
    assert [conversation["title"] for conversation in body["conversations"]] == [
        *("question 1", "question 2", "question 0")
    ]
    assert body["next_skip"] is None


async def test_conversations_are_listed_in_pages(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        ids = [(await socket.answer("hello"))[0]["conversation_id"] for _ in range(5)][::-1]
    pages = []
    skip: int | None = 0
    while skip is not None:
        _, body = await asyncio.to_thread(conversations, node, user, f"?limit=2&skip={skip}")
        pages.append([conversation["id"] for conversation in body["conversations"]])
        skip = body["next_skip"]
    assert pages == [ids[:2], ids[2:4], ids[4:]]


async def test_only_ones_own_conversations_are_listed(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as socket:
        await socket.answer("mine")
    assert conversations(node, user + "-not") == (200, {"conversations": [], "next_skip": None, "next_before": None})


@pytest.mark.parametrize("token", [None, "junk"])
def test_the_list_of_conversations_needs_a_good_token(node: NodeProcess, token: str | None) -> None:
    request = urllib.request.Request(node.http + "/conversations")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=10):
        pass
    with refused.value as answer:
        assert answer.code == 401
        assert json.loads(answer.read())["error"]["code"] == "unauthorized"


@pytest.mark.parametrize("query", ["?limit=1", "?limit=100", "?skip=0", "?skip=10000", "?limit=5&skip=5"])
def test_good_bounds_of_the_list_are_taken(node: NodeProcess, user: str, query: str) -> None:
    assert conversations(node, user, query)[0] == 200


@pytest.mark.parametrize(
    "query",
    [
        "?limit=0",
        "?limit=101",
        "?limit=-1",
        "?limit=x",
        "?limit=",
        "?limit=1.5",
        "?skip=-1",
        "?skip=1000001",
        "?skip=²",
    ],
)
def test_bad_bounds_of_the_list_are_refused(node: NodeProcess, user: str, query: str) -> None:
    status, body = conversations(node, user, urllib.parse.quote(query, safe="?=&"))
    assert (status, body["error"]["code"]) == (422, "invalid_frame")


def test_a_node_that_runs_is_alive_and_ready(node: NodeProcess) -> None:
    for path, expected in (("/livez", "alive"), ("/readyz", "ready")):
        status, body = node.get(path)
        assert (status, json.loads(body)["status"]) == (200, expected)


async def test_metrics_count_connections_turns_and_events(start_node: StartNode, user: str) -> None:
    node = start_node()
    async with socket_to(node, user) as socket:
        frames = await socket.answer("one")
        assert await asyncio.to_thread(node.metric, "anynode_connections") == 1
        assert await asyncio.to_thread(node.metric, 'anynode_turns_ended_total{status="completed"}') == 1
        assert await asyncio.to_thread(node.metric, "anynode_turns_running") == 0
        # Two events came with the admission, the others with flushes.
        assert await asyncio.to_thread(node.metric, "anynode_events_total") == frames[-1]["seq"] - 2


def test_the_page_forbids_foreign_scripts(node: NodeProcess) -> None:
    with urllib.request.urlopen(node.http + "/", timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert answer.headers.get_content_type() == "text/html"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"


async def test_no_answer_over_http_is_sniffed(node: NodeProcess, user: str) -> None:
    async with socket_to(node, user) as opened:
        conversation_id = (await opened.answer("one"))[0]["conversation_id"]
        assert opened.connection.response is not None
        assert opened.connection.response.headers["X-Content-Type-Options"] == "nosniff"
    requests = [
        *(f"GET {path}" for path in ("/", "/docs", "/openapi.json", "/livez", "/readyz", "/metrics", "/nope")),
        *("GET /conversations", f"GET /conversations/{conversation_id}/events?after=0", "POST /conversations"),
        *("DELETE /livez", "OPTIONS /conversations", "GET /assets/none.js", "\x01"),
    ]
    for request in requests:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
        token = token_for(user)
        writer.write(f"{request} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.close()
        assert head.count("\r\nx-content-type-options: nosniff\r\n") == 1, request
    assert "400 bad request" in head, "the last one was no HTTP"


def test_no_path_leads_out_of_the_page(node: NodeProcess) -> None:
    for path in ("/settings.py", "/../settings.py", "/page/..%2fsettings.py", "/index.html"):
        assert node.get(path)[0] == 404
