"""The AI SDK's transport over HTTP: streams that are whole or broken off, and what a chat begins with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT
from tests.conftest import StartNode
from tests.kit.ai_sdk import (
    PATH,
    answered,
    asking,
    chat_path,
    chat_socket,
    messages_of,
    new_id,
    posted,
    question,
    replayed,
    request_of,
    resumed,
    shown,
    statuses,
    stopped,
)
from tests.kit.harness import Frame, NodeProcess, sql, token_for
from tests.kit.rest import Rest, rest_to

Nodes = Sequence[NodeProcess]
Action = Sequence[Any]
TOOLS: Sequence[Action] = (
    ("text", "Let me look "),
    ("call", "call-1", "search", {"query": "föö"}),
    ("call", "call-2", "search", {"query": "bar"}),
    ("result", "call-2", "search", "broken", True),
    ("result", "call-1", "search", "nothing \u2615"),
)
ANSWER = "Let me look It is 42."


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), "HEARTBEAT_SECONDS": "0.1"}


@pytest.fixture
async def rest(nodes: Nodes, user: str) -> AsyncIterator[Rest]:
    async with rest_to(nodes[0], user) as rest:
        yield rest


@pytest.fixture
async def elsewhere(nodes: Nodes, user: str) -> AsyncIterator[Rest]:
    async with rest_to(nodes[1], user) as rest:
        yield rest


def are(database_url: str, user: str, *expected: str) -> Callable[[], Awaitable[object]]:
    """Whether the user's turns are in these states."""

    async def condition() -> bool:
        return await statuses(database_url, user) == list(expected)

    return condition


# The answer.


async def test_an_answer_is_the_same_message_on_every_node_and_over_the_socket(
    nodes: Nodes, rest: Rest, elsewhere: Rest, user: str, chat: str
) -> None:
    asked, message_id = asking(TOOLS, [("text", "It is "), ("text", "42.")]), new_id()
    live = await answered(rest, chat, asked, message_id)
    async with chat_socket(nodes[1], user) as socket:
        assert await socket.replay(chat) == live
    message = shown(live)
    assert message.text == ANSWER
    assert message.finish_reason == "stop"
    for client in (rest, elsewhere):
        for chunks in (await replayed(client, chat), await answered(client, chat, asked, message_id)):
            assert shown(chunks).snapshot() == message.snapshot()
            assert [chunk["type"] for chunk in chunks].count("text-delta") == 2  # in few chunks
    loaded = await messages_of(elsewhere, chat)
    assert [(m["id"], m["role"]) for m in loaded] == [(message_id, "user"), (message.id, "assistant")]
    assert loaded[0]["parts"] == [{"type": "text", "text": asked}]
    assert loaded[1]["parts"] == message.parts
    assert loaded[1]["metadata"] == message.metadata


async def test_who_comes_in_the_middle_on_any_node_sees_all_from_the_beginning(
    strings: Strings, rest: Rest, elsewhere: Rest, user: str, chat: str, gate: str
) -> None:
    gates = [strings.name() for _ in TOOLS]
    actions: list[Action] = []
    for name, action in zip(gates, TOOLS, strict=True):
        actions += [("gate", name), action]
    ends = ["text-delta", "tool-input-available", "tool-input-available", "tool-output-error", "tool-output-available"]
    asked, message_id = asking(actions, [("gate", gate), ("text", "It is 42.")]), new_id()
    async with AsyncExitStack() as stack:
        live = await stack.enter_async_context(posted(rest, chat, asked, message_id))
        await live.until("start-step")
        streams = [live]
        for name, end in zip(gates, ends, strict=True):
            streams += [await stack.enter_async_context(resumed(client, chat)) for client in (rest, elsewhere)]
            streams += [await stack.enter_async_context(posted(elsewhere, chat, asked, message_id))]
            strings.open(name)
            await live.until(end)
        strings.open(gate)
        messages = []
        for stream in streams:
            await stream.rest()
            messages.append(shown(stream.chunks).snapshot())
    assert all(message == messages[0] for message in messages)
    assert shown(live.chunks).text == ANSWER


async def test_while_nothing_is_said_comments_keep_the_connection(
    strings: Strings, rest: Rest, chat: str, gate: str
) -> None:
    async with posted(rest, chat, asking([("text", "a"), ("gate", gate)])) as stream:
        await stream.until("text-delta")

        async def is_kept() -> bool:
            return stream.heartbeats >= 3

        reading = asyncio.create_task(stream.rest())
        await eventually(is_kept)
        strings.open(gate)
        assert (await reading)[-1]["type"] == "finish"


async def test_text_is_shown_as_it_is(rest: Rest, elsewhere: Rest, chat: str) -> None:
    hostile = '\n\ndata: [DONE]\r\r\n\u2028\u2029\x85\x0b"\\ \ufeff\u2615\U0001f600 {"delta":"x"}\n\n: \n'
    actions = [("text", hostile), ("call", "c", hostile, {hostile: hostile}), ("result", "c", hostile, hostile)]
    live = shown(await answered(rest, chat, asking(actions, [("text", hostile)])))
    assert live.text == hostile * 2
    assert shown(await replayed(elsewhere, chat)).snapshot() == live.snapshot()
    assert (await messages_of(rest, chat))[1]["parts"] == live.parts


async def test_a_failure_is_told(rest: Rest, elsewhere: Rest, chat: str) -> None:
    actions: list[Action] = [("text", "a"), ("call", "c", "search", {}), ("agent_error", "No luck.", False)]
    live = shown(await answered(rest, chat, asking(actions)))
    assert (live.text, live.error) == ("a", "No luck.")
    assert [call["state"] for call in live.calls] == ["output-error"]
    assert shown(await replayed(elsewhere, chat)).snapshot() == live.snapshot()
    assert (await messages_of(rest, chat))[1]["metadata"]["status"] == "failed"


# Once.


async def test_repeats_at_once_are_one_turn(
    nodes: Nodes, module_database_url: str, rest: Rest, elsewhere: Rest, user: str, chat: str
) -> None:
    asked, message_id = asking(TOOLS), new_id()
    answers = await asyncio.gather(*(answered((rest, elsewhere)[n % 2], chat, asked, message_id) for n in range(10)))
    assert all(shown(answer).snapshot() == shown(answers[0]).snapshot() for answer in answers)
    assert await statuses(module_database_url, user) == ["completed"]


async def test_first_messages_at_once_make_one_conversation(
    module_database_url: str, rest: Rest, elsewhere: Rest, user: str, chat: str
) -> None:
    asked = asking([("text", "a")])
    replies = await asyncio.gather(
        *((rest, elsewhere)[n % 2].post(PATH, request_of(chat, asked, f"m-{n}")) for n in range(10))
    )
    assert {reply.status for reply in replies} <= {200, 409}
    assert all(reply.refusal == (409, "conversation_busy") for reply in replies if reply.status != 200)
    admitted = sum(reply.status == 200 for reply in replies)
    assert admitted >= 1
    rows = await sql(module_database_url, "SELECT client_id FROM conversations WHERE user_id = $1", user)
    assert [row["client_id"] for row in rows] == [chat]
    assert await statuses(module_database_url, user) == ["completed"] * admitted


async def test_a_repeated_message_must_be_as_it_was(rest: Rest, elsewhere: Rest, chat: str) -> None:
    asked, message_id = asking([("text", "a")]), new_id()
    await answered(rest, chat, asked, message_id)
    assert (await elsewhere.post(PATH, request_of(chat, asked + " ", message_id))).refusal == (409, "role_order")
    assert (await elsewhere.post(PATH, request_of(new_id(), asked, message_id))).refusal == (409, "invalid_frame")
    assert len(await messages_of(rest, chat)) == 2


async def test_what_a_client_says_of_the_past_is_not_believed(rest: Rest, chat: str) -> None:
    made_up = [question("forged"), {"id": "x", "role": "assistant", "parts": [{"type": "text", "text": "forged"}]}]
    first, second = asking([("text", "a")]), asking([("see",)])
    await answered(rest, chat, first)
    seen = json.loads(shown(await answered(rest, chat, "", messages=[*made_up, question(second)])).text)
    assert seen["history"] == [["user", first], ["assistant", "a"], ["user", second]]


async def test_the_last_question_is_answered_again(rest: Rest, elsewhere: Rest, chat: str) -> None:
    asked, message_id = asking([("words", 1)]), new_id()
    first = await answered(rest, chat, asked, message_id, trigger="regenerate-message")  # it was never heard
    again = await answered(elsewhere, chat, asked, message_id, trigger="regenerate-message", messageId="any")
    assert shown(again).text != shown(first).text
    assert shown(await replayed(rest, chat)).snapshot() == shown(again).snapshot()
    loaded = await messages_of(rest, chat)
    assert [m["id"] for m in loaded] == [message_id, shown(again).id]
    await answered(rest, chat, asked)
    request = request_of(chat, asked, message_id, trigger="regenerate-message")
    assert (await rest.post(PATH, request)).refusal == (409, "role_order")


# Stopping.


@pytest.mark.parametrize("number", [0, 1])
async def test_a_stop_on_any_node_waits_for_the_end_and_keeps_what_was_said(
    module_database_url: str, rest: Rest, elsewhere: Rest, user: str, chat: str, gate: str, number: int
) -> None:
    async with posted(rest, chat, asking([*TOOLS[:4], ("gate", gate)])) as stream:
        begun = await stream.until("tool-output-error")
        stop = (await stopped((rest, elsewhere)[number], chat)).expect(200)
        assert await statuses(module_database_url, user) == ["cancelled"]
        assert stop == {"conversation_id": stop["conversation_id"], "turn_id": begun[0]["messageId"]}
        await stream.rest()
    message = shown(stream.chunks)
    assert message.is_aborted
    assert message.text == "Let me look "
    loaded = (await messages_of(rest, chat))[1]
    assert loaded["metadata"]["status"] == "cancelled"
    assert [part["toolCallId"] for part in loaded["parts"] if part["type"] == "dynamic-tool"] == ["call-2"]
    assert shown(await answered(elsewhere, chat, asking([("text", "b")]))).text == "b"
    again = (await stopped(rest, chat)).expect(200)
    assert again == {"conversation_id": stop["conversation_id"], "turn_id": None}


async def test_who_goes_stops_nothing(
    module_database_url: str, strings: Strings, rest: Rest, elsewhere: Rest, user: str, chat: str, gate: str
) -> None:
    for client in (rest, elsewhere):
        name = strings.name()
        async with posted(client, chat, asking([("text", "a"), ("gate", name), ("text", "b")])) as stream:
            await stream.until("text-delta")
            async with resumed(elsewhere, chat) as other:
                await other.until("text-delta")
                other.drop()
            stream.drop()
        strings.open(name)
        assert shown(await replayed(elsewhere, chat)).text == "ab"
        assert shown(await replayed(rest, chat)).finish_reason == "stop"


async def test_a_busy_chat_refuses_a_question_or_is_interrupted(
    rest: Rest, elsewhere: Rest, chat: str, gate: str
) -> None:
    async with posted(rest, chat, asking([("text", "a"), ("gate", gate)])) as stream:
        await stream.until("text-delta")
        for fields in ({}, {"if_busy": "reject"}):
            request = request_of(chat, asking([("text", "b")]), **fields)
            assert (await elsewhere.post(PATH, request)).refusal == (409, "conversation_busy")
        assert shown(await answered(elsewhere, chat, asking([("text", "b")]), if_busy="interrupt")).text == "b"
        await stream.rest()
        assert shown(stream.chunks).is_aborted


# Whose it is.


async def test_somebody_elses_chat_is_like_none(nodes: Nodes, rest: Rest, user: str, chat: str) -> None:
    live = await answered(rest, chat, asking([("text", "mine")]))
    conversation_id = (await stopped(rest, chat)).expect(200)["conversation_id"]
    assert shown(await replayed(rest, conversation_id)).snapshot() == shown(live).snapshot()
    async with rest_to(nodes[1], user + "-2") as stranger:
        for id in (chat, conversation_id):
            for method, what, status in (("GET", "stream", 204), ("GET", "messages", 200), ("POST", "stop", 404)):
                theirs = await stranger.ask(method, chat_path(id, what))
                missing = await stranger.ask(method, chat_path(new_id(), what))
                assert theirs.status == missing.status == status
                assert theirs.body == missing.body
        assert shown(await answered(stranger, chat, asking([("text", "theirs")]))).text == "theirs"
        assert shown(await replayed(stranger, chat)).text == "theirs"
    assert shown(await replayed(rest, chat)).text == "mine"
    assert len(await messages_of(rest, chat)) == 2


async def test_without_a_token_nothing_is_done(nodes: Nodes, chat: str) -> None:
    async with rest_to(nodes[0], None) as nobody:
        for method, path in (
            ("POST", PATH),
            ("GET", chat_path(chat, "stream")),
            ("POST", chat_path(chat, "stop")),
            ("GET", chat_path(chat, "messages")),
        ):
            reply = await nobody.ask(method, path, request_of(chat, "x") if path == PATH else None)
            assert reply.refusal == (401, "unauthorized")


# Chats and their messages.


@pytest.mark.parametrize("id", ["a/b?c#d%2F", "a/stream", "stop", " ", "\N{HOT BEVERAGE}" * 128, "/", "a//b/messages"])
async def test_ids_are_whatever_the_client_likes(rest: Rest, elsewhere: Rest, id: str) -> None:
    live = await answered(rest, id, asking([("text", "a")]), id)
    assert shown(await replayed(elsewhere, id)).snapshot() == shown(live).snapshot()
    assert [m["id"] for m in await messages_of(elsewhere, id)] == [id, shown(live).id]
    (await stopped(rest, id)).expect(200)


async def test_there_is_nothing_to_resume_only_where_nothing_was_asked(rest: Rest, chat: str) -> None:
    empty = await rest.create()
    for id in (chat, empty):
        for method in ("GET", "HEAD"):
            reply = await rest.ask(method, chat_path(id, "stream"))
            assert (reply.status, reply.body) == (204, b"")
    assert await messages_of(rest, empty) == []
    await answered(rest, chat, asking([("text", "a")]))
    reply = await rest.ask("HEAD", chat_path(chat, "stream"))
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["x-vercel-ai-ui-message-stream"] == "v1"


async def test_a_chat_is_loaded_page_by_page(rest: Rest, elsewhere: Rest, chat: str) -> None:
    for number in range(4):
        await answered(rest, chat, asking(TOOLS, [("text", f"{number}")]))
    everything = await messages_of(elsewhere, chat)
    assert [m["role"] for m in everything] == ["user", "assistant"] * 4
    assert len({m["id"] for m in everything}) == 8
    for limit in range(4, 21):  # an answer is four stored messages
        pages: list[Frame] = []
        before: dict[str, Any] = {}
        while True:
            path = chat_path(chat, "messages")
            page = (await elsewhere.ask("GET", path, query={"limit": limit, **before})).expect(200)
            assert page.keys() == {"messages", "next_before"}
            assert page["messages"]
            pages = page["messages"] + pages
            if page["next_before"] is None:
                break
            before = {"before": page["next_before"]}
        assert pages == everything, limit
    for query in ({"limit": 0}, {"limit": 1001}, {"before": "x"}, {"limit": "x"}, {"after": 1}):
        reply = await rest.ask("GET", chat_path(chat, "messages"), query=query)
        assert reply.refusal == (422, "invalid_frame")
    reply = await rest.ask("GET", chat_path(chat, "messages"), query={"before": await rest.create()})
    assert reply.refusal == (404, "not_found")


async def test_while_a_turn_runs_its_question_is_loaded_and_its_answer_resumed(
    strings: Strings, rest: Rest, elsewhere: Rest, chat: str, gate: str
) -> None:
    async with posted(rest, chat, asking([("text", "a"), ("gate", gate)]), "m-1") as stream:
        await stream.until("text-delta")
        assert [m["id"] for m in await messages_of(elsewhere, chat)] == ["m-1"]
        strings.open(gate)
        await stream.rest()


async def test_a_conversation_is_deleted_while_it_is_shown(
    strings: Strings, rest: Rest, elsewhere: Rest, chat: str, gate: str
) -> None:
    async with posted(rest, chat, asking([("text", "a"), ("gate", gate)])) as stream:
        await stream.until("text-delta")
        id = (await rest.get("/conversations")).expect(200)["conversations"][0]["id"]
        (await elsewhere.ask("DELETE", f"/conversations/{id}")).expect(204)
        try:
            assert [chunk["type"] for chunk in await stream.rest()] == ["text-end", "abort"]
        except aiohttp.ClientPayloadError:
            assert not stream.is_done
    for client in (rest, elsewhere):
        assert (await client.ask("GET", chat_path(chat, "stream"))).status == 204
        assert (await stopped(client, chat)).refusal == (404, "not_found")


async def test_a_question_that_was_appended_is_answered(rest: Rest, elsewhere: Rest) -> None:
    id = await rest.create()
    asked = asking([("see",)])
    appended = (await rest.append(id, {"role": "user", "content": asked})).expect(201)
    (loaded,) = await messages_of(rest, id)
    assert (loaded["id"], loaded["role"]) == (appended["id"], "user")
    live = await answered(elsewhere, id, asked, loaded["id"], trigger="regenerate-message")
    assert json.loads(shown(live).text)["history"] == [["user", asked]]
    assert shown(await replayed(rest, id)).snapshot() == shown(live).snapshot()


async def test_an_answer_that_is_longer_than_one_reading_is_shown_from_any_place(
    strings: Strings, rest: Rest, elsewhere: Rest, chat: str, gate: str
) -> None:
    asked = asking([("results", 700, "found"), ("gate", gate), ("huge", "x", 900_000)])
    async with posted(rest, chat, asked) as stream:
        for _ in range(700):
            await stream.until("tool-output-available")
        async with resumed(elsewhere, chat) as other:
            strings.open(gate)
            await other.rest()
        await stream.rest()
    message = shown(stream.chunks)
    assert len(message.calls) == 700
    assert len(message.text) == 900_000
    assert shown(other.chunks).snapshot() == message.snapshot()
    assert shown(await replayed(elsewhere, chat)).snapshot() == message.snapshot()


# What is refused.


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"id": ""}, 422),
        ({"id": "a\nb"}, 422),
        ({"id": None}, 422),
        ({"messages": []}, 422),
        ({"messages": None}, 422),
        ({"trigger": "x"}, 422),
        ({"if_busy": "wait"}, 422),
        ({"messages": [{"id": "m", "role": "assistant", "parts": [{"type": "text", "text": "x"}]}]}, 422),
        ({"messages": [{"id": "m", "role": "user", "parts": [{"type": "file", "url": "data:,"}]}]}, 422),
        ({"messages": [question(" ")]}, 422),
        ({"messages": [question("a\0")]}, 422),
        ({"messages": [question("x" * 65_537)]}, 413),
    ],
)
async def test_what_is_wrong_is_refused_and_leaves_nothing_behind(
    module_database_url: str, rest: Rest, user: str, chat: str, change: dict[str, Any], code: int
) -> None:
    reply = await rest.post(PATH, {**request_of(chat, asking([("text", "a")])), **change})
    assert reply.refusal[0] == code
    assert not await sql(module_database_url, "SELECT FROM conversations WHERE user_id = $1", user)


async def test_fields_that_nobody_knows_are_ignored(rest: Rest, chat: str) -> None:
    fields: dict[str, Any] = {"model": "x", "metadata": {"a": [1]}, "messageId": None, "newer": None}
    assert shown(await answered(rest, chat, asking([("text", "a")]), **fields)).text == "a"


async def test_a_megabyte_of_history_is_taken_and_more_than_four_are_not(rest: Rest, chat: str) -> None:
    request = request_of(chat, "")
    request["messages"] = [*(question("x" * 50_000) for _ in range(21)), question(asking([("text", "a")]))]
    reply = await rest.post(PATH, request)
    assert reply.status == 200
    assert reply.body.endswith(b"data: [DONE]\n\n")
    body = json.dumps({**request_of(chat, asking([("text", "b")])), "pad": ""})
    full = body.replace('"pad": ""', '"pad": "' + "x" * (4_194_304 - len(body)) + '"').encode()
    assert (await rest.ask("POST", PATH, data=full)).status == 200
    assert (await rest.ask("POST", PATH, data=full + b" ")).refusal == (413, "message_too_large")
    assert (await rest.ask("POST", "/conversations", data=b'{"title":"' + b"x" * 1_000_000)).refusal[0] == 413
    assert len(await messages_of(rest, chat)) == 4


# Streams that are broken off.


async def test_a_stream_breaks_off_when_its_token_runs_out(
    nodes: Nodes, strings: Strings, rest: Rest, user: str, chat: str, gate: str
) -> None:
    async with rest_to(nodes[0], None, token=token_for(user, ttl_seconds=5)) as lapsing:
        asked, message_id = asking([("text", "a"), ("gate", gate)]), new_id()
        async with posted(lapsing, chat, asked, message_id) as stream, resumed(lapsing, chat) as other:
            for taken in (stream, other):
                await taken.until("text-delta")
            for taken in (stream, other):
                assert await taken.broken() == []
        assert (await lapsing.ask("GET", chat_path(chat, "stream"))).refusal == (401, "unauthorized")
    strings.open(gate)
    assert shown(await replayed(rest, chat)).finish_reason == "stop"


async def test_a_stream_breaks_off_when_its_node_drains_and_goes_on_elsewhere(
    start_node: StartNode, environment: dict[str, str], strings: Strings, user: str, chat: str, gate: str
) -> None:
    leaving, staying = [start_node(**environment) for _ in range(2)]
    asked, message_id = asking(TOOLS, [("gate", gate), ("text", "It is 42.")]), new_id()
    async with rest_to(leaving, user) as rest, rest_to(staying, user) as elsewhere:
        async with posted(rest, chat, asked, message_id) as stream, resumed(elsewhere, chat) as other:
            await stream.until("tool-output-available")
            leaving.process.terminate()
            assert await stream.broken() == []
            strings.open(gate)
            await other.rest()
        message = shown(other.chunks)
        assert (message.text, message.finish_reason) == (ANSWER, "stop")
        assert shown(await answered(elsewhere, chat, asked, message_id)).snapshot() == message.snapshot()


async def test_a_takeover_breaks_a_stream_off_only_where_it_takes_something_back(
    start_node: StartNode, environment: dict[str, str], database_url: str, strings: Strings, user: str, gate: str
) -> None:
    dying, staying = [start_node(**environment, LEASE_SECONDS="1") for _ in range(2)]
    asked = {
        "text": asking(TOOLS, [("words", 1), ("gate", gate), ("words", 2)]),
        "calls": asking(TOOLS, [*TOOLS[:4], ("gate", gate), TOOLS[4]], [("words", 1)]),
        "nothing": asking(TOOLS, [("gate", gate), ("text", "It is 42.")]),
    }
    until = {
        "text": ["finish-step", "text-delta"],
        "calls": ["finish-step", "tool-output-error"],
        "nothing": ["tool-output-available"],
    }
    chats = {name: new_id() for name in asked}
    async with AsyncExitStack() as stack:
        rest, elsewhere = [await stack.enter_async_context(rest_to(node, user)) for node in (dying, staying)]
        streams = {}
        for name, chat in chats.items():
            first = await stack.enter_async_context(posted(rest, chat, asked[name]))
            for type in until[name]:
                await first.until(type)
            streams[name] = await stack.enter_async_context(resumed(elsewhere, chat))
            for type in until[name]:
                await streams[name].until(type)
        dying.kill()

        async def are_taken_over() -> bool:
            return not await sql(database_url, "SELECT FROM turns WHERE epoch = 1")

        await eventually(are_taken_over)
        assert await streams["text"].broken() == []
        assert await streams["calls"].broken() == []
        # What is shown then has nothing in it of what was taken back.
        resumed_text = await stack.enter_async_context(resumed(elsewhere, chats["text"]))
        strings.open(gate)
        await streams["nothing"].rest()
        await resumed_text.rest()
        finals = {name: shown(await replayed(elsewhere, chat)) for name, chat in chats.items()}
        for name, chat in chats.items():
            assert finals[name].finish_reason == "stop"
            assert (await messages_of(elsewhere, chat))[1]["parts"] == finals[name].parts
    assert shown(streams["nothing"].chunks).snapshot() == finals["nothing"].snapshot()
    assert shown(resumed_text.chunks).snapshot() == finals["text"].snapshot()
    assert shown(streams["text"].chunks).text not in finals["text"].text
    assert finals["nothing"].text == ANSWER


async def test_a_turn_is_shown_when_its_journal_is_gone(
    start_node: StartNode, environment: dict[str, str], database_url: str, user: str, chat: str
) -> None:
    node = start_node(**environment, JOURNAL_RETENTION_MINUTES="0.001")
    asked, message_id = asking(TOOLS, [("text", "It is 42.")]), new_id()
    async with rest_to(node, user) as rest:
        live = shown(await answered(rest, chat, asked, message_id))

        async def is_gone() -> bool:
            rows = await sql(database_url, "SELECT FROM events UNION ALL SELECT FROM turns WHERE first_seq IS NOT NULL")
            return not rows

        await eventually(is_gone)
        for chunks in (await replayed(rest, chat), await answered(rest, chat, asked, message_id)):
            later = shown(chunks)
            assert (later.id, later.finish_reason, later.metadata) == (live.id, "stop", live.metadata)
            assert later.parts == live.parts
        assert (await stopped(rest, chat)).expect(200)["turn_id"] is None
