"""The AI SDK's WebSocket transport: the same numbered chunks on every node, and nothing but the frames it knows."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from itertools import groupby
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT
from tests.conftest import StartNode
from tests.kit.ai_sdk import (
    SUBPROTOCOL,
    Chunk,
    asking,
    begun_of,
    chat_socket,
    chunks_of,
    new_id,
    question,
    shown,
    statuses,
    steps_of,
)
from tests.kit.harness import Frame, NodeProcess, socket_to, sql, token_for
from tests.kit.rest import MISSING, rest_to

Nodes = Sequence[NodeProcess]
Action = Sequence[Any]
TOOLS: Sequence[Action] = (
    ("text", "Let me "),
    ("text", "look "),
    ("call", "call-1", "search", {"query": "föö"}),
    ("call", "call-2", "search", {"query": "bar"}),
    ("result", "call-2", "search", "broken", True),
    ("result", "call-1", "search", "nothing \u2615"),
)
ANSWER = "Let me look It is 42."


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    # Heartbeats are not of this wire: a node that sends some all the time must not send any here.
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), "HEARTBEAT_SECONDS": "0.1"}


def are(database_url: str, user: str, *expected: str) -> Callable[[], Awaitable[object]]:
    """Whether the user's turns are in these states."""

    async def condition() -> bool:
        return await statuses(database_url, user) == list(expected)

    return condition


async def conversations(database_url: str, user: str) -> list[tuple[str, str | None]]:
    """The ids of the user's conversations, the server's and the client's."""
    rows = await sql(database_url, "SELECT id::text, client_id FROM conversations WHERE user_id = $1", user)
    return [(row["id"], row["client_id"]) for row in rows]


# The answer.


async def test_an_answer_is_the_same_numbered_chunks_live_and_replayed_on_every_node(
    nodes: Nodes, user: str, chat: str
) -> None:
    asked, message_id = asking(TOOLS, [("text", "It is "), ("text", "42.")]), new_id()
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        live = await socket.answer(chat, asked, message_id=message_id)
        for connection in (socket, elsewhere):
            assert await connection.replay(chat) == live
            assert await connection.answer(chat, asked, message_id=message_id) == live
            for after in range(-1, len(live)):
                if after >= 0:
                    assert await connection.replay(chat, after) == live[after + 1 :]
    # How text is cut is up to the journal; nothing else is.
    types = [type for type, _ in groupby(chunk["type"] for chunk in live)]
    assert types == [
        *("start", "start-step", "text-start", "text-delta", "text-end", "tool-input-available"),
        *("tool-output-error", "tool-output-available", "finish-step", "start-step"),
        *("text-start", "text-delta", "text-end", "finish-step", "finish"),
    ]
    message = shown(live)
    assert message.text == ANSWER
    assert [part["toolCallId"] for part in message.calls] == ["call-1", "call-2"]
    assert [text for text, _ in steps_of(message.parts)] == ["Let me look ", "It is 42."]
    assert message.finish_reason == "stop"
    assert message.metadata.keys() == {"usage", "seconds"}
    assert uuid.UUID(message.id).version == 7


async def test_who_comes_in_the_middle_on_any_node_sees_all_from_the_beginning(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str
) -> None:
    gates = [strings.name() for _ in TOOLS]
    actions = [action for name, action in zip(gates, TOOLS, strict=True) for action in (("gate", name), action)]
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(node, user)) for node in nodes]
        first = await sockets[0].ask(chat, asking(actions, [("gate", gate), ("text", "It is 42.")]))
        whole = await sockets[0].until(first, "start-step")
        watching = []
        for number, name in enumerate(gates):
            resumed = [(socket, await socket.resume(chat)) for socket in sockets]
            resumed += [(socket, await socket.resume(chat, len(whole) - 1)) for socket in sockets]
            watching += [(*request, -1 if n < 2 else len(whole) - 1) for n, request in enumerate(resumed)]
            strings.open(name)
            whole += [await sockets[0].next(first)]
            while whole[-1]["chunk"]["type"] in ("text-start", "text-end"):
                whole += [await sockets[0].next(first)]
            assert number + 2 < len(whole)
        strings.open(gate)
        whole += await sockets[0].rest(first)
        live = chunks_of(whole)
        for socket, request, after in watching:
            frames = await socket.rest(request)
            assert frames[0] == {"type": "start", "requestId": request}
            assert chunks_of(frames[1:], after=after) == live[after + 1 :]
    assert shown(live).text == ANSWER


async def test_an_answer_that_is_longer_than_one_reading_is_the_same_everywhere(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str
) -> None:
    asked = asking([("results", 700, "found"), ("gate", gate), ("huge", "x", 900_000)])
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asked)
        begun = [frame for _ in range(700) for frame in await socket.until(request, "tool-output-available")]
        resumed = [await connection.resume(chat, 1500) for connection in (socket, elsewhere)]
        strings.open(gate)
        live = chunks_of(begun + await socket.rest(request))
        for connection, shows in zip((socket, elsewhere), resumed, strict=True):
            assert chunks_of((await connection.rest(shows))[1:], after=1500) == live[1501:]
        assert await elsewhere.replay(chat) == live
    assert len(shown(live).text) == 900_000


async def test_many_chats_at_once_on_one_connection_do_not_mix(nodes: Nodes, user: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        requests = {}
        for number in range(60):  # in a burst, without waiting for anything
            requests[await socket.ask(new_id(), asking([("text", f"<{number}>"), ("text", "!")]))] = number
        for request, number in requests.items():
            assert shown(chunks_of(await socket.rest(request))).text == f"<{number}>!"
        assert not socket.left()


@pytest.mark.parametrize("id", ["a/b?c#d%2F..", " ", "\N{HOT BEVERAGE}" * 128, "'; DROP TABLE turns --", '"\\'])
async def test_ids_are_whatever_the_client_likes(nodes: Nodes, user: str, id: str) -> None:
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        live = await socket.answer(id, asking([("text", "a")]), message_id=id, request_id=id)
        assert shown(live).text == "a"
        assert await elsewhere.replay(id) == live


async def test_text_is_shown_as_it_is(nodes: Nodes, user: str, chat: str) -> None:
    hostile = '\n\ndata: {}\r\u2028\u2029\x85\x0b\x0c"\\ \ufeff\u2615\U0001f600 </script> {"delta":"x"}'
    actions = [
        ("text", hostile),
        ("call", hostile, hostile, {hostile: [hostile]}),
        ("result", hostile, hostile, hostile),
    ]
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        live = await socket.answer(chat, asking(actions, [("text", hostile)]))
        assert await elsewhere.replay(chat) == live
    message = shown(live)
    assert message.text == hostile * 2
    (call,) = message.calls
    assert (call["toolCallId"], call["toolName"], call["input"]) == (hostile, hostile, {hostile: [hostile]})
    assert call["output"] == hostile


# Once.


async def test_repeats_at_once_are_one_turn(nodes: Nodes, module_database_url: str, user: str, chat: str) -> None:
    asked, message_id = asking(TOOLS), new_id()
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(nodes[n % 2], user)) for n in range(8)]
        answers = await asyncio.gather(*(socket.answer(chat, asked, message_id=message_id) for socket in sockets))
    assert all(answer == answers[0] for answer in answers)
    assert await statuses(module_database_url, user) == ["completed"]
    assert [client_id for _, client_id in await conversations(module_database_url, user)] == [chat]


async def test_first_messages_at_once_make_one_conversation(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str, chat: str, gate: str
) -> None:
    asked = asking([("text", "a"), ("gate", gate)])
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(nodes[n % 2], user)) for n in range(10)]
        requests = await asyncio.gather(*(socket.ask(chat, asked) for socket in sockets))
        firsts = [await socket.next(request) for socket, request in zip(sockets, requests, strict=True)]
        assert sorted(frame["type"] for frame in firsts) == ["chunk", *["error"] * 9]
        assert len(await conversations(module_database_url, user)) == 1
        assert await statuses(module_database_url, user) == ["running"]
        strings.open(gate)
        replays = await asyncio.gather(*(socket.replay(chat) for socket in sockets))
    assert all(replay == replays[0] for replay in replays)
    assert shown(replays[0]).finish_reason == "stop"


async def test_another_text_under_the_same_id_is_refused(
    nodes: Nodes, module_database_url: str, user: str, chat: str
) -> None:
    asked, message_id = asking([("text", "a")]), new_id()
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        live = await socket.answer(chat, asked, message_id=message_id)
        assert await elsewhere.refused(await elsewhere.ask(chat, asked + " ", message_id=message_id))
        assert await elsewhere.refused(await elsewhere.ask(new_id(), asked, message_id=message_id))
        assert await socket.replay(chat) == live
    assert await statuses(module_database_url, user) == ["completed"]
    assert len(await conversations(module_database_url, user)) == 1


async def test_what_a_client_says_of_the_past_is_not_believed(
    nodes: Nodes, module_database_url: str, user: str, chat: str
) -> None:
    made_up = [question("forged"), {"id": "x", "role": "assistant", "parts": [{"type": "text", "text": "forged too"}]}]
    first, second = asking([("text", "a")]), asking([("see",)])
    async with chat_socket(nodes[0], user) as socket:
        await socket.answer(chat, first, before=made_up)
        seen = json.loads(shown(await socket.answer(chat, second, before=[*made_up, {"role": 5}])).text)
    assert seen["history"] == [["user", first], ["assistant", "a"], ["user", second]]


async def test_a_megabyte_of_history_is_taken(nodes: Nodes, user: str, chat: str) -> None:
    before = [question("x" * 50_000) for _ in range(21)]
    async with chat_socket(nodes[0], user) as socket:
        assert shown(await socket.answer(chat, asking([("text", "a")]), before=before)).text == "a"
        frame = json.dumps({"type": "abort", "requestId": "r", "metadata": ""})
        await socket.send(frame.replace('""', '"' + "x" * (4_194_304 - len(frame)) + '"'))
        await socket.sync()
        with suppress(EOFError):  # the server may close while it is being sent
            await socket.send(frame.replace('""', '"' + "x" * (4_194_305 - len(frame)) + '"'))
        assert (await socket.closed())[0] == 1009
    async with socket_to(nodes[0], user) as native:  # whose bound has not grown
        with suppress(ConnectionClosed):
            await native.send({"type": "ping", "request_id": "x" * 1_000_000})
        assert await native.closed() == 1009


async def test_a_question_is_as_long_as_a_message_may_be(nodes: Nodes, user: str, chat: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        long = asking([("text", "a")])
        assert await socket.refused(await socket.ask(chat, long + " " * 65_536))
        assert shown(await socket.answer(chat, long + " " * (65_536 - len(long)))).text == "a"


# Again.


async def test_the_last_question_is_answered_again(
    nodes: Nodes, module_database_url: str, user: str, chat: str
) -> None:
    first, second = new_id(), new_id()
    asked = asking([("words", 1)])
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        await socket.answer(chat, asked, message_id=first)
        before = shown(await socket.answer(chat, asked, message_id=second))
        again = await elsewhere.answer(chat, asked, message_id=second, trigger="regenerate-message", messageId="any")
        assert shown(again).text != before.text
        assert shown(again).id != before.id
        assert await socket.replay(chat) == again
        assert await socket.answer(chat, asked, message_id=second) == again
        refused = await socket.refused(await socket.ask(chat, asked, message_id=first, trigger="regenerate-message"))
        assert refused
        assert await socket.replay(chat) == again
    assert await statuses(module_database_url, user) == ["completed"] * 3


@pytest.mark.parametrize("is_there", [False, True])
async def test_a_question_that_was_never_heard_is_asked_when_it_is_to_be_answered_again(
    nodes: Nodes, module_database_url: str, user: str, chat: str, is_there: bool
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        if is_there:
            await socket.answer(chat, asking([("text", "before")]))
        asked, message_id = asking([("text", "a")]), new_id()
        live = await socket.answer(chat, asked, message_id=message_id, trigger="regenerate-message")
        assert shown(live).text == "a"
        assert await socket.answer(chat, asked, message_id=message_id) == live
    assert await statuses(module_database_url, user) == ["completed"] * (1 + is_there)


@pytest.mark.parametrize("is_there", [False, True])
async def test_repeats_at_once_of_what_was_never_heard_are_one_turn(
    nodes: Nodes, module_database_url: str, user: str, chat: str, is_there: bool
) -> None:
    """A client that does not know whether it was heard repeats what it has sent."""
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(nodes[n % 2], user)) for n in range(4)]
        if is_there:
            await sockets[0].answer(chat, asking([("text", "before")]))
        asked, message_id = asking([("words", 1)]), new_id()
        requests = [
            await socket.ask(chat, asked, message_id=message_id, trigger="regenerate-message") for socket in sockets
        ]
        ended = [await socket.rest(request) for socket, request in zip(sockets, requests, strict=True)]
        answers = [chunks_of(frames) for frames in ended if frames[-1]["type"] == "end"]
        # Who comes when the others' turn is known asks for it to be answered again, and there is one at a time.
        refused = {frames[-1]["errorText"] for frames in ended if frames[-1]["type"] == "error"}
        assert refused <= {"A turn is still running in this conversation."}
        assert await sockets[0].replay(chat) in answers
    assert set(await statuses(module_database_url, user)) == {"completed"}


async def test_what_is_refused_interrupts_nothing(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str
) -> None:
    first, asked = new_id(), asking([("text", "a")])
    async with chat_socket(nodes[0], user) as socket:
        await socket.answer(chat, asked, message_id=first)
        running = await socket.ask(chat, asking([("text", "b"), ("gate", gate)]))
        await socket.until(running, "text-delta")
        fields: dict[str, Any] = {"message_id": first, "body": {"if_busy": "interrupt"}}
        assert await socket.refused(await socket.ask(chat, asked, trigger="regenerate-message", **fields))
        assert await socket.refused(await socket.ask(chat, asked + " ", **fields))
        strings.open(gate)
        assert (await socket.rest(running))[-2]["chunk"]["type"] == "finish"


# Stopping.


async def test_an_abort_of_a_send_stops_the_turn_and_keeps_what_was_said(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str
) -> None:
    asked = asking([*TOOLS[:5], ("gate", gate)])
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asked)
        begun = await socket.until(request, "tool-output-error")
        other = await elsewhere.resume(chat)
        assert await elsewhere.until(other, "tool-output-error")
        await socket.abort(request)
        seen = await elsewhere.rest(other)
        assert [frame["chunk"]["type"] for frame in seen[:-1]] == ["tool-output-error", "abort"]
        assert seen[0]["chunk"]["toolCallId"] == "call-1"
        replay = await socket.replay(chat)
        assert replay == await elsewhere.replay(chat)
        assert replay[: len(begun)] == begun_of(begun)
        assert not socket.left(request)
    assert await statuses(module_database_url, user) == ["cancelled"]


async def test_an_abort_stops_a_turn_that_runs_elsewhere(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str
) -> None:
    asked, message_id = asking([("text", "a"), ("gate", gate)]), new_id()
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asked, message_id=message_id)
        await socket.until(request, "text-delta")
        repeated = await elsewhere.ask(chat, asked, message_id=message_id)
        await elsewhere.until(repeated, "text-delta")
        await elsewhere.abort(repeated)
        assert [chunk["type"] for chunk in shown_rest(await socket.rest(request))] == ["text-end", "abort"]
    assert await statuses(module_database_url, user) == ["cancelled"]


def shown_rest(frames: Sequence[dict[str, Any]]) -> list[Chunk]:
    """The chunks of frames that end a request."""
    assert frames[-1]["type"] == "end", frames
    return [frame["chunk"] for frame in frames[:-1]]


async def test_an_abort_of_a_resume_stops_the_turn_where_nobody_resumes(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str
) -> None:
    asked = asking([("text", "a"), ("gate", gate)])
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asked)
        await socket.until(request, "text-delta")
        resumed = await elsewhere.resume(chat)
        await elsewhere.until(resumed, "text-delta")
        began = asyncio.get_running_loop().time()
        await elsewhere.abort(resumed)
        frames = await socket.rest(request)
        assert frames[-2]["chunk"] == {"type": "abort"}
        assert asyncio.get_running_loop().time() - began > 0.2
        await elsewhere.sync()
        assert not elsewhere.left(resumed)
    assert await statuses(module_database_url, user) == ["cancelled"]


async def test_who_aborts_a_resume_for_another_stops_nothing(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str, chat: str, gate: str
) -> None:
    asked = asking([("text", "a"), ("gate", gate), ("text", "b")])
    async with chat_socket(nodes[0], user) as socket:
        request = await socket.ask(chat, asked)
        begun = await socket.until(request, "text-delta")
        resumed = await socket.resume(chat)
        for _ in range(5):
            await socket.abort(resumed)
            resumed = await socket.resume(chat)
            await socket.until(resumed, "text-delta")
        await asyncio.sleep(0.4)  # longer than a stop would wait
        assert await statuses(module_database_url, user) == ["running"]
        strings.open(gate)
        assert (await socket.rest(resumed))[-2]["chunk"]["type"] == "finish"
        assert shown(chunks_of([*begun, *await socket.rest(request)])).text == "ab"


async def test_two_who_abort_their_resumes_for_others_stop_nothing(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str, chat: str, gate: str
) -> None:
    """Two components with one connection do this in React's strict mode."""
    asked = asking([("text", "a"), ("gate", gate)])
    async with chat_socket(nodes[0], user) as socket:
        await socket.until(await socket.ask(chat, asked), "text-delta")
        for request in [await socket.resume(chat) for _ in range(2)]:
            await socket.abort(request)
        resumed = [await socket.resume(chat) for _ in range(2)]
        await socket.until(resumed[1], "text-delta")
        strings.open(gate)
        assert (await socket.rest(resumed[1]))[-2]["chunk"]["type"] == "finish"


async def test_who_aborts_a_resume_and_goes_has_stopped(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        await socket.until(await socket.ask(chat, asking([("text", "a"), ("gate", gate)])), "text-delta")
        async with chat_socket(nodes[1], user) as elsewhere:
            resumed = await elsewhere.resume(chat)
            await elsewhere.until(resumed, "text-delta")
            await elsewhere.abort(resumed)
        await eventually(are(module_database_url, user, "cancelled"))


async def test_aborts_of_what_is_over_or_unknown_are_nothing(
    nodes: Nodes, module_database_url: str, user: str, chat: str
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        request = await socket.ask(chat, asking([("text", "a")]))
        await socket.rest(request)
        for id in (request, request, new_id()):
            await socket.abort(id)
        await socket.sync()
        assert not socket.left()
    assert await statuses(module_database_url, user) == ["completed"]


async def test_requests_are_their_connections_own(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str, chat: str, gate: str
) -> None:
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[0], user) as other:
        asked = asking([("text", "a"), ("gate", gate)])
        begun = await socket.until(await socket.ask(chat, asked, request_id="r"), "text-delta")
        await other.abort("r")
        await other.resume("nothing", request_id="r")
        assert [frame["type"] for frame in await other.rest("r")] == ["no-active"]
        strings.open(gate)
        assert shown(chunks_of([*begun, *await socket.rest("r")])).finish_reason == "stop"
    assert await statuses(module_database_url, user) == ["completed"]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("trigger", ["submit-message", "regenerate-message"])
@pytest.mark.parametrize("kind", ["send", "resume"])
async def test_what_is_asked_right_after_a_stop_is_answered(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str, number: int, trigger: str, kind: str
) -> None:
    asked, message_id = asking([("mark", gate), ("text", "a"), ("stuck", "let-go", 1)]), new_id()
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[number], user) as stopping:
        await socket.until(await socket.ask(chat, asked, message_id=message_id), "text-delta")
        if kind == "send":
            shows = await stopping.ask(chat, asked, message_id=message_id)
        else:
            shows = await stopping.resume(chat)
        await stopping.until(shows, "text-delta")
        await stopping.abort(shows)
        if trigger == "regenerate-message":
            again = await stopping.ask(chat, asked, message_id=message_id, trigger=trigger)
            assert (await stopping.until(again, "text-delta"))[-1]["chunk"]["delta"] == "a"
            await stopping.abort(again)
            await eventually(are(module_database_url, user, "cancelled", "cancelled"))
        else:
            assert shown(await stopping.answer(chat, asking([("text", "b")]))).text == "b"
            assert await statuses(module_database_url, user) == ["cancelled", "completed"]


@pytest.mark.parametrize("trigger", ["submit-message", "regenerate-message"])
async def test_a_busy_chat_refuses_a_question_or_is_interrupted(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str, trigger: str
) -> None:
    message_id = new_id()
    asked = asking([("text", "a"), ("gate", gate)])
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        running = await socket.ask(chat, asked, message_id=message_id)
        await socket.until(running, "text-delta")
        if trigger == "submit-message":
            asked, message_id = asking([("text", "b")]), new_id()
        assert await elsewhere.refused(await elsewhere.ask(chat, asked, message_id=message_id, trigger=trigger))
        fields: dict[str, Any] = {"message_id": message_id, "trigger": trigger, "body": {"if_busy": "reject"}}
        assert await elsewhere.refused(await elsewhere.ask(chat, asked, **fields))
        assert await statuses(module_database_url, user) == ["running"]
        fields["body"] = {"if_busy": "interrupt"}
        request = await elsewhere.ask(chat, asked, **fields)
        await elsewhere.until(request, "text-delta")
        assert (await socket.rest(running))[-2]["chunk"] == {"type": "abort"}
        assert (await statuses(module_database_url, user))[0] == "cancelled"
        await elsewhere.abort(request)


async def test_a_stop_is_of_the_turn_that_it_was_said_of(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str, chat: str, gate: str
) -> None:
    """A client that has stopped a turn does not stop another client's next turn with what it asks then."""
    other = strings.name()
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asking([("text", "a"), ("gate", gate)]))
        await socket.until(request, "text-delta")
        await socket.abort(request)
        await eventually(are(module_database_url, user, "cancelled"))
        running = await elsewhere.ask(chat, asking([("text", "b"), ("gate", other)]))
        await elsewhere.until(running, "text-delta")
        assert await socket.refused(await socket.ask(chat, asking([("text", "c")])))
        strings.open(other)
        assert (await elsewhere.rest(running))[-2]["chunk"]["type"] == "finish"


async def test_who_waits_for_a_turn_to_stop_keeps_no_other_chat_waiting(
    nodes: Nodes, module_database_url: str, user: str, chat: str, gate: str
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        await socket.until(await socket.ask(chat, asking([("text", "a"), ("gate", gate)])), "text-delta")
        # As if it ran on a node that has just died: nobody can stop it before its lease has run out.
        await sql(
            module_database_url,
            "UPDATE turns SET node = 'gone', epoch = epoch + 1, lease_expires_at = clock_timestamp() + interval '4 s' "
            "FROM conversations c WHERE c.id = conversation_id AND c.client_id = $1",
            chat,
        )
        waiting = await socket.ask(chat, asking([("text", "b")]), body={"if_busy": "interrupt"})
        assert shown(await socket.answer(new_id(), asking([("text", "c")]))).text == "c"
        assert await statuses(module_database_url, user) == ["running", "completed"]
        assert shown(chunks_of(await socket.rest(waiting))).text == "b"


async def test_who_goes_stops_nothing_and_leaves_nothing_behind(
    start_node: StartNode, environment: dict[str, str], database_url: str, strings: Strings, user: str, gate: str
) -> None:
    node = start_node(**environment)
    chats = [new_id() for _ in range(20)]
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(chat_socket(node, user)) for _ in range(5)]
        for number, chat in enumerate(chats):
            request = await sockets[number % 5].ask(chat, asking([("text", "a"), ("gate", gate), ("text", "b")]))
            await sockets[number % 5].until(request, "text-delta")
        for number, chat in enumerate(chats):
            await sockets[number % 4].resume(chat)
        for socket in sockets[:3]:
            socket.drop()
    await eventually(are(database_url, user, *["running"] * 20))

    async def is_nobody_there() -> bool:
        return await asyncio.to_thread(node.metric, "anynode_connections") == 0

    await eventually(is_nobody_there)
    strings.open(gate)
    await eventually(are(database_url, user, *["completed"] * 20))
    async with chat_socket(node, user) as socket:
        assert await asyncio.to_thread(node.metric, "anynode_connections") == 1
        for chat in chats:
            assert shown(await socket.replay(chat)).text == "ab"


# Resuming.


async def test_there_is_nothing_to_resume_only_where_nothing_was_asked(nodes: Nodes, user: str, chat: str) -> None:
    async with chat_socket(nodes[0], user) as socket, rest_to(nodes[1], user) as rest:
        empty = await rest.create()
        (await rest.append(empty, {"role": "user", "content": "x"})).expect(201)
        for id in (chat, MISSING, empty):
            request = await socket.resume(id)
            assert await socket.rest(request) == [{"type": "no-active", "requestId": request}]
        live = await socket.answer(chat, asking([("text", "a")]))
        assert await socket.replay(chat, len(live) - 1) == []
        assert await socket.replay(chat, 10**6) == []


async def test_a_request_that_takes_anothers_id_takes_its_place(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        request = await socket.ask(chat, asking([("text", "a"), ("gate", gate)]))
        begun = await socket.until(request, "text-delta")
        await socket.resume(chat, request_id=request)
        frames = await socket.until(request, "text-delta")
        assert frames == [{"type": "start", "requestId": request}, *begun]
        strings.open(gate)
        assert (await socket.rest(request))[-2]["chunk"]["type"] == "finish"
        await socket.sync()
        assert not socket.left()


async def test_a_turn_is_shown_when_its_journal_is_gone(
    start_node: StartNode, environment: dict[str, str], database_url: str, user: str, chat: str
) -> None:
    node = start_node(**environment, JOURNAL_RETENTION_MINUTES="0.001")
    asked, message_id = asking(TOOLS, [("text", "It is 42.")]), new_id()
    failing = new_id()
    async with chat_socket(node, user) as socket:
        live = shown(await socket.answer(chat, asked, message_id=message_id))
        failed = shown(await socket.answer(failing, asking([("text", "a"), ("agent_error", "No.", False)])))

        async def is_gone() -> bool:
            rows = await sql(database_url, "SELECT FROM events UNION ALL SELECT FROM turns WHERE first_seq IS NOT NULL")
            return not rows

        await eventually(is_gone)
        replay = await socket.replay(chat)
        assert await socket.answer(chat, asked, message_id=message_id) == replay
        for after in (0, 3):
            assert await socket.refused(await socket.resume(chat, after))
        later = shown(replay)
        assert (later.id, later.text, later.metadata) == (live.id, live.text, live.metadata)
        assert later.finish_reason == "stop"
        assert [call["toolCallId"] for call in later.calls] == ["call-1", "call-2"]
        assert [text for text, _ in steps_of(later.parts)] == ["Let me look ", "It is 42."]
        assert shown(await socket.replay(failing)).snapshot() == failed.snapshot()
        assert (failed.error, failed.text) == ("No.", "a")
        again = await socket.answer(chat, asked, message_id=message_id, trigger="regenerate-message")
        assert shown(again).text == live.text


# Whose it is.


async def test_the_same_chat_id_is_another_chat_for_another_user(
    nodes: Nodes, module_database_url: str, user: str, chat: str
) -> None:
    other = user + "-2"
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], other) as stranger:
        request = await stranger.resume(chat, request_id="r")
        nothing = await stranger.rest(request)
        mine = await socket.answer(chat, asking([("text", "mine")]), message_id="m")
        assert await stranger.rest(await stranger.resume(chat, request_id="r")) == nothing
        theirs = await stranger.answer(chat, asking([("text", "theirs")]), message_id="m")
        assert (shown(mine).text, shown(theirs).text) == ("mine", "theirs")
        assert await socket.replay(chat) == mine
        assert await stranger.replay(chat) == theirs
        ((conversation_id, _),) = await conversations(module_database_url, user)
        assert await stranger.rest(await stranger.resume(conversation_id, request_id="r")) == nothing
        # What is asked there is asked in a chat of their own.
        await stranger.answer(conversation_id, asking([("text", "x")]))
        assert await socket.replay(chat) == mine
        assert await socket.replay(conversation_id) == mine
    assert len(await conversations(module_database_url, user)) == 1
    assert len(await conversations(module_database_url, other)) == 2


async def test_a_conversation_goes_by_its_own_id_too(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with socket_to(nodes[1], user) as native, chat_socket(nodes[0], user) as socket:
        frames = await native.answer(asking([("text", "a")]))
        id = frames[0]["conversation_id"]
        assert shown(await socket.replay(id)).text == "a"
        live = await socket.answer(id, asking([("see",)]))
        assert len(json.loads(shown(live).text)["history"]) == 3
        assert await socket.replay(id.upper()) == live
    assert await conversations(module_database_url, user) == [(id, None)]


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_conversation_is_deleted_while_it_is_shown(
    nodes: Nodes, strings: Strings, user: str, chat: str, gate: str, is_running: bool
) -> None:
    async with chat_socket(nodes[0], user) as socket, chat_socket(nodes[1], user) as elsewhere:
        request = await socket.ask(chat, asking([("text", "a"), ("gate", gate)]))
        await socket.until(request, "text-delta")
        other = await elsewhere.resume(chat)
        await elsewhere.until(other, "text-delta")
        if not is_running:
            strings.open(gate)
            await socket.rest(request)
        async with rest_to(nodes[1], user) as rest:
            (conversation,) = (await rest.get("/conversations")).expect(200)["conversations"]
            (await rest.ask("DELETE", f"/conversations/{conversation['id']}")).expect(204)
        for connection, shows in ((socket, request), (elsewhere, other))[0 if is_running else 1 :]:
            last = (await connection.rest(shows))[-1]
            assert last["type"] in ("end", "error")
        for connection in (socket, elsewhere):
            nothing = await connection.rest(await connection.resume(chat))
            assert [frame["type"] for frame in nothing] == ["no-active"]
        assert shown(await socket.answer(chat, asking([("text", "new")]))).text == "new"


# Who it is.


@pytest.mark.parametrize("ways", ["header", "subprotocol", "send", "resume"])
async def test_a_client_proves_who_it_is(nodes: Nodes, user: str, chat: str, ways: str) -> None:
    token = token_for(user)
    headers = {"authorization": f"Bearer {token}"}
    if ways == "header":
        async with chat_socket(nodes[0], user) as socket:
            assert socket.connection.subprotocol == SUBPROTOCOL
            assert await socket.answer(chat, asking([("text", "a")]))
    elif ways == "subprotocol":
        async with chat_socket(nodes[0], None, subprotocols=(SUBPROTOCOL, f"bearer.{token}")) as socket:
            assert socket.connection.subprotocol == SUBPROTOCOL
            assert await socket.answer(chat, asking([("text", "a")]))
    elif ways == "send":
        async with chat_socket(nodes[0], None, subprotocols=()) as socket:
            assert socket.connection.subprotocol is None
            assert await socket.answer(chat, asking([("text", "a")]), headers=headers)
    else:
        async with chat_socket(nodes[0], None) as socket:
            request = await socket.resume(chat, headers=headers)
            assert await socket.rest(request) == [{"type": "no-active", "requestId": request}]


async def test_without_a_token_nothing_is_done(nodes: Nodes, module_database_url: str, user: str, chat: str) -> None:
    async with chat_socket(nodes[0], None) as socket:
        assert await socket.refused(await socket.ask(chat, asking([("text", "a")])))
        assert await socket.refused(await socket.resume(chat, headers={"authorization": "Basic x"}))
        assert await conversations(module_database_url, user) == []
        answer = await socket.answer(
            chat, asking([("text", "a")]), headers={"Authorization": f"bearer {token_for(user)}"}
        )
        assert shown(answer).text == "a"


async def test_pages_of_other_origins_do_not_connect(nodes: Nodes, user: str) -> None:
    async with chat_socket(nodes[0], user, headers={"Origin": "https://elsewhere.example"}) as socket:
        assert (await socket.closed())[0] == 3003
    async with chat_socket(nodes[0], user, headers={"Origin": nodes[0].http}) as socket:
        await socket.sync()


@pytest.mark.parametrize("ways", ["header", "subprotocol", "frame"])
async def test_who_proves_nothing_is_closed_out(
    nodes: Nodes, module_database_url: str, user: str, chat: str, ways: str
) -> None:
    token = token_for(user, secret="x" * 48)
    protocols = (SUBPROTOCOL, f"bearer.{token}") if ways == "subprotocol" else (SUBPROTOCOL,)
    headers = {"Authorization": f"Bearer {token}"} if ways == "header" else {}
    async with chat_socket(nodes[0], None, subprotocols=protocols, headers=headers) as socket:
        if ways == "frame":
            request = await socket.ask(chat, asking([("text", "a")]), headers={"authorization": f"Bearer {token}"})
            assert await socket.refused(request)
        code, reason = await socket.closed()
        assert code == 3000
        assert reason
    assert await conversations(module_database_url, user) == []


async def test_a_connection_ends_with_its_token_unless_a_frame_renews_it(
    nodes: Nodes, user: str, strings: Strings, chat: str, gate: str
) -> None:
    ttl = 3.0
    tokens = [token_for(user, ttl_seconds=ttl) for _ in range(2)]
    async with (
        chat_socket(nodes[0], token=tokens[0]) as lapsing,
        chat_socket(nodes[0], token=tokens[1]) as renewed,
    ):
        asked, message_id = asking([("text", "a"), ("gate", gate)]), new_id()
        requests = [await socket.ask(chat, asked, message_id=message_id) for socket in (lapsing, renewed)]
        bad = token_for(user, secret="x" * 48)
        assert await renewed.refused(await renewed.resume(chat, headers={"authorization": f"Bearer {bad}"}))
        headers = {"authorization": f"Bearer {token_for(user)}"}
        await renewed.rest(await renewed.resume("nothing", headers=headers))
        code, _ = await lapsing.closed()
        assert code == 3000
        strings.open(gate)
        assert shown(chunks_of(await renewed.rest(requests[1]))).finish_reason == "stop"
        await renewed.sync()


async def test_a_connection_does_not_become_another_users(nodes: Nodes, user: str, chat: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        headers = {"authorization": f"Bearer {token_for(user + '-2')}"}
        await socket.ask(chat, asking([("text", "a")]), headers=headers)
        assert (await socket.closed())[0] == 3003
        assert not socket.left()
    async with chat_socket(nodes[0], user) as socket:
        await socket.rest(await socket.resume(chat))


# What is no frame.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "[]",
        "{}",
        '{"type":"ping"}',
        '{"type":"message.send","message_id":"m","content":"x"}',
        '{"type":"abort"}',
        '{"type":"abort","requestId":""}',
        '{"type":"abort","requestId":5}',
        '{"type":"send","requestId":"a\\u0000","id":"c"}',
        '{"type":"resume","requestId":"' + "x" * 129 + '","id":"c"}',
        "[" * 100_000,
    ],
)
async def test_what_cannot_be_answered_closes_the_connection(nodes: Nodes, user: str, text: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        await socket.send(text)
        code, reason = await socket.closed()
        assert code == 1008
        assert reason
        assert not socket.left()


@pytest.mark.parametrize(
    "change",
    [
        {"type": "subscribe"},
        {"type": "chunk"},
        {"id": ""},
        {"id": "a\nb"},
        {"trigger": "continue"},
        {"messages": []},
        {"messages": [{"id": "m", "role": "assistant", "parts": [{"type": "text", "text": "x"}]}]},
        {"messages": [question("x"), {"id": "m", "role": "user", "parts": [{"type": "file", "url": "data:,"}]}]},
        {"messages": [question("  \n")]},
        {"messages": [question("a\0b")]},
        {"messages": [question("")]},
        {"messages": [{**question("x"), "id": ""}]},
        {"messages": [{**question("x"), "parts": []}]},
        {"body": {"if_busy": "wait"}},
        {"headers": {"x": 1}},
    ],
)
async def test_what_is_wrong_is_told_and_the_connection_lives_on(
    nodes: Nodes, module_database_url: str, user: str, chat: str, change: dict[str, Any]
) -> None:
    async with chat_socket(nodes[0], user) as socket:
        frame = {"type": "send", "requestId": "r", "id": chat, "trigger": "submit-message", "headers": {}, "body": {}}
        await socket.send({**frame, "messages": [question(asking([("text", "a")]))], **change})
        assert await socket.refused("r")
        assert await conversations(module_database_url, user) == []
        assert shown(await socket.answer(chat, asking([("text", "a")]), newer={"x": 1}, metadata=None)).text == "a"


async def test_frames_are_text(nodes: Nodes, user: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        await socket.connection.send(b"{}")
        assert (await socket.closed())[0] == 1003


async def test_more_frames_than_may_come_are_refused_one_by_one(nodes: Nodes, user: str) -> None:
    async with chat_socket(nodes[0], user) as socket:
        requests = [await socket.resume("nothing") for _ in range(700)]
        kinds = [(await socket.rest(request))[0]["type"] for request in requests]
        assert kinds[:500] == ["no-active"] * 500
        assert set(kinds) == {"no-active", "error"}


# When nodes go.


async def test_a_drain_sends_clients_elsewhere_and_nothing_is_lost(
    start_node: StartNode, environment: dict[str, str], database_url: str, strings: Strings, user: str, gate: str
) -> None:
    leaving, staying = [start_node(**environment) for _ in range(2)]
    chat = new_id()
    async with chat_socket(leaving, user) as socket, chat_socket(staying, user) as elsewhere:
        request = await socket.ask(chat, asking(TOOLS, [("gate", gate), ("text", "It is 42.")]))
        begun = begun_of(await socket.until(request, "tool-output-available"))
        leaving.process.terminate()
        code, _ = await socket.closed()
        assert code == 1012
        assert not [frame for frame in socket.left() if frame["type"] != "chunk"]
        resumed = await elsewhere.resume(chat)
        strings.open(gate)
        frames = await elsewhere.rest(resumed)
        whole = chunks_of(frames[1:])
        assert whole[: len(begun)] == begun
        assert shown(whole).text == ANSWER
        assert shown(whole).finish_reason == "stop"
        assert await elsewhere.replay(chat) == whole


async def test_a_takeover_takes_back_what_does_not_stand_and_what_is_shown_is_right(
    start_node: StartNode, environment: dict[str, str], database_url: str, strings: Strings, user: str, gate: str
) -> None:
    dying, staying = [start_node(**environment, LEASE_SECONDS="1") for _ in range(2)]
    chats = {name: new_id() for name in ("text", "calls", "nothing")}
    asked = {
        "text": asking(TOOLS, [("words", 3), ("gate", gate), ("words", 2)]),
        "calls": asking(TOOLS, [*TOOLS[:5], ("gate", gate), TOOLS[5]], [("words", 1)]),
        "nothing": asking(TOOLS, [("gate", gate), ("text", "It is 42.")]),
    }
    until = {
        "text": ["finish-step", "text-delta"],
        "calls": ["finish-step", "tool-output-error"],
        "nothing": ["tool-output-available"],
    }
    async with chat_socket(dying, user) as socket, chat_socket(staying, user) as elsewhere:
        requests: dict[str, str] = {}
        begun: dict[str, list[Frame]] = {}
        for name, chat in chats.items():
            request = await socket.ask(chat, asked[name])
            # On to where the gate is: in `text` and `calls` that is in the second step.
            for type in until[name]:
                await socket.until(request, type)
            requests[name] = await elsewhere.resume(chat)
            begun[name] = [frame for type in until[name] for frame in await elsewhere.until(requests[name], type)]
        dying.kill()

        async def are_taken_over() -> bool:
            return not await sql(database_url, "SELECT FROM turns WHERE epoch = 1")

        await eventually(are_taken_over)
        strings.open(gate)
        whole = {}
        for name, request in requests.items():
            frames = begun[name] + await elsewhere.rest(request)
            whole[name] = chunks_of(frames[1:])
            assert await elsewhere.replay(chats[name]) == whole[name]
            for after in range(len(whole[name])):
                assert await elsewhere.replay(chats[name], after) == whole[name][after + 1 :]
    types = {name: [chunk["type"] for chunk in chunks] for name, chunks in whole.items()}
    assert [name for name, found in types.items() if "reset-step" in found] == ["text", "calls"]
    for name, chat in chats.items():
        message = shown(whole[name])
        assert message.finish_reason == "stop"
        rows = await sql(
            database_url,
            "SELECT m.content, m.tool_calls::text AS calls FROM messages m JOIN conversations c "
            "ON c.id = m.conversation_id WHERE c.client_id = $1 AND m.role = 'assistant' ORDER BY m.position",
            chat,
        )
        stored = [
            (row["content"], [call["id"] for call in json.loads(row["calls"])] if row["calls"] else []) for row in rows
        ]
        seen = [(text, [call["toolCallId"] for call in calls]) for text, calls in steps_of(message.parts)]
        assert seen == [step for step in stored if step != ("", [])]
    assert shown(whole["nothing"]).text == ANSWER
