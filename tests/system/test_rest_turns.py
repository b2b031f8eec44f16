"""REST: turns that are waited for. They end once, on any node, even if a client leaves or a node dies."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import aiohttp
import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, NodeProcess, running_node, socket_to, sql
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import MISSING, Reply, Rest, rest_to
from tests.kit.stored import turns_of

Nodes = Sequence[NodeProcess]
UUID = uuid.UUID
TABLES = ("messages", "turns", "events")

TOOLS = script_of(
    *(("text", "Let me look. "), ("call", "call-1", "search", {"query": "föö"}), ("result", "call-1", "search", "no")),
    *(("usage", 3, 4, "scripted"), ("text", "Once more. "), ("call", "call-2", "search", {})),
    *(
        ("call", "call-3", "sum", {"of": [1, 2]}),
        ("result", "call-2", "search", "yes"),
        ("result", "call-3", "sum", "3"),
    ),
    *(("text", "It is "), ("text", "42."), ("usage", 5, 6, "scripted")),
)
CALLS = [
    {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": '{"query":"föö"}'}},
    {"id": "call-2", "type": "function", "function": {"name": "search", "arguments": "{}"}},
    {"id": "call-3", "type": "function", "function": {"name": "sum", "arguments": '{"of":[1,2]}'}},
]
QUICK = script_of(("text", "quick"))


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(2)]


@pytest.fixture
def environment(strings: Strings) -> dict[str, str]:
    """The settings of nodes that die: other nodes wait a second."""
    return {**strings.environment, "LEASE_SECONDS": "1"}


def gated(gate: str) -> str:
    """A question that is answered in two parts, with a gate between."""
    return script_of(("text", "begun in {attempt} "), ("gate", gate), ("text", "ended in {attempt}"))


def is_running(database_url: str, conversation_id: str) -> Callable[[], Awaitable[object]]:
    """Whether a turn has begun to speak there."""

    async def condition() -> bool:
        statement = (
            "SELECT FROM turns t JOIN events e ON e.turn_id = t.id "
            "WHERE t.conversation_id = $1 AND t.status = 'running' AND e.type = 'turn.delta'"
        )
        return bool(await sql(database_url, statement, UUID(conversation_id)))

    return condition


def has_no_turns(*nodes: NodeProcess) -> Callable[[], Awaitable[object]]:
    """Whether nothing runs on these nodes any more."""

    async def condition() -> bool:
        running = [await asyncio.to_thread(node.metric, "anynode_turns_running") for node in nodes]
        return not any(running)

    return condition


async def assert_gone(database_url: str, conversation_id: str) -> None:
    """Nothing of the conversation is left."""
    assert await sql(database_url, "SELECT FROM conversations WHERE id = $1", UUID(conversation_id)) == []
    for table in TABLES:
        left = await sql(database_url, f"SELECT * FROM {table} WHERE conversation_id = $1", UUID(conversation_id))
        assert left == [], table


async def shown(rest: Rest, conversation_id: str) -> list[tuple[str, str, str]]:
    return [(each["role"], each["content"], each["status"]) for each in await rest.messages(conversation_id)]


# Answers.


async def test_continue_answers_with_the_end_of_the_turn(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        answer = (await rest.proceed(id, TOOLS)).expect(200)
        messages = await elsewhere.messages(id)
        turn = (await elsewhere.get(f"/conversations/{id}/turns/{answer['turn_id']}")).expect(200)
        async with elsewhere.events(id, 0) as events:
            end = (await events.until(*TERMINAL))[-1][1]
    assert answer.keys() == {"conversation_id", "response", "tool_calls", "turn_id", "message", "usage"}
    assert (answer["conversation_id"], answer["response"]) == (id, "It is 42.")
    assert answer["tool_calls"] == CALLS
    assert answer["message"] == messages[-1] == end["message"]
    assert answer["message"]["content"] == answer["response"]
    roles = ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == [
        "call-1",
        "call-2",
        "call-3",
    ]
    # What it cost is said alike everywhere.
    usage = answer["usage"]
    assert {**usage, "seconds": 0} == {"input_tokens": 8, "output_tokens": 10, "model": "scripted", "seconds": 0}
    (row,) = await sql(
        module_database_url,
        "SELECT usage ->> 'input_tokens' AS input, usage ->> 'output_tokens' AS output, usage ->> 'model' AS model,"
        " (usage ->> 'seconds')::float8 AS seconds FROM turns WHERE id = $1",
        UUID(answer["turn_id"]),
    )
    assert (row["input"], row["output"], row["model"], row["seconds"]) == ("8", "10", "scripted", usage["seconds"])
    assert end["usage"] == turn["usage"] == usage
    assert (turn["status"], turn["error"], turn["messages"]) == ("completed", None, messages[1:])
    assert turn["created_at"] <= turn["finished_at"]


async def test_usage_is_there_when_the_agent_says_nothing_of_it(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        usage = (await rest.proceed(await rest.create(), QUICK)).expect(200)["usage"]
    assert usage.pop("seconds") >= 0
    assert usage == {"input_tokens": None, "output_tokens": None, "model": None}


async def test_chat_makes_a_conversation_and_goes_on_in_it_on_any_node(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        path = f"/api/{user}/chat"
        first = (await rest.post(path, {"message": TOOLS})).expect(200)
        assert first.keys() == {"conversation_id", "response", "tool_calls"}
        assert (first["response"], first["tool_calls"]) == ("It is 42.", CALLS)
        id = first["conversation_id"]
        second = (await elsewhere.post(path, {"message": QUICK, "conversation_id": id})).expect(200)
        assert second == {"conversation_id": id, "response": "quick", "tool_calls": []}
        third = (await elsewhere.post(path, {"message": QUICK, "conversation_id": None})).expect(200)
        assert third["conversation_id"] != id
        assert len(await rest.messages(id)) == 9


async def test_without_waiting_the_answer_is_a_cursor_to_follow_from(
    nodes: Nodes, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        (await rest.proceed(id, QUICK)).expect(200)
        started = (await rest.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202)
        assert started.keys() == {"conversation_id", "turn_id", "after"}
        turn = f"/conversations/{id}/turns/{started['turn_id']}"
        running = (await elsewhere.get(turn)).expect(200)
        assert (running["status"], running["usage"], running["finished_at"]) == ("running", None, None)
        assert running["messages"] == []
        async with elsewhere.events(id, started["after"]) as events:
            begin = await events.until("turn.started")
            assert [frame["type"] for _, frame in begin] == ["message.created", "turn.started"]
            assert begin[0][0] == started["after"] + 1
            assert begin[1][1]["turn_id"] == started["turn_id"]
            # Asked again, it is the same turn, running or not.
            assert (await elsewhere.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202) == started
            strings.open(gate)
            await events.until("turn.completed")
        assert (await rest.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202) == started
        assert (await elsewhere.get(turn)).expect(200)["status"] == "completed"


async def test_regenerate_answers_the_last_question_again(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        first = (await rest.proceed(id, TOOLS, message_id=f"a-{user}")).expect(200)
        path = f"/conversations/{id}/regenerate"
        second = (await elsewhere.post(path)).expect(200)
        assert second["turn_id"] != first["turn_id"]
        assert (second["response"], second["tool_calls"]) == ("It is 42.", CALLS)
        messages = await rest.messages(id)
        assert [message["status"] for message in messages] == ["completed", *["superseded"] * 6, *["completed"] * 6]
        assert messages[-1] == second["message"]
        old = (await rest.get(f"/conversations/{id}/turns/{first['turn_id']}")).expect(200)
        assert [message["id"] for message in old["messages"]] == [message["id"] for message in messages[1:7]]
        assert (await rest.post(path, {"message_id": f"a-{user}"})).status == 200
        assert (await rest.post(path, {"message_id": "another"})).refusal == (409, "role_order")
        assert (await rest.post(f"/conversations/{await rest.create()}/regenerate")).refusal == (409, "role_order")


async def test_regenerate_answers_a_question_that_was_only_appended(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        question = (await rest.append(id, {"role": "user", "content": QUICK})).expect(201)
        answer = (await rest.post(f"/conversations/{id}/regenerate", {"message_id": question["id"]})).expect(200)
        assert answer["response"] == "quick"
        assert await shown(rest, id) == [("user", QUICK, "completed"), ("assistant", "quick", "completed")]


async def test_regenerate_without_waiting_is_followed_from_its_cursor(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        (await rest.proceed(id, QUICK)).expect(200)
        started = (await rest.post(f"/conversations/{id}/regenerate", {"wait": False})).expect(202)
        async with elsewhere.events(id, started["after"]) as events:
            frames = [frame for _, frame in await events.until(*TERMINAL)]
        assert [frame["type"] for frame in frames] == ["turn.started", "turn.delta", "turn.completed"]
        assert {frame["turn_id"] for frame in frames} == {started["turn_id"]}


@pytest.mark.parametrize(
    ("before", "may_come"),
    [
        ([{"role": "user", "content": "x"}], ["assistant"]),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
            ],
            ["tool"],
        ),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
            ["assistant"],
        ),
    ],
)
async def test_a_question_that_may_not_come_is_refused_with_what_may(
    nodes: Nodes, user: str, before: list[dict[str, Any]], may_come: list[str]
) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, *before)).expect(201)
        for reply in (
            await rest.proceed(id, QUICK),
            await rest.post(f"/api/{user}/chat", {"message": QUICK, "conversation_id": id}),
        ):
            assert reply.refusal == (409, "role_order")
            assert all(role in reply.message.split("expected: ")[1] for role in may_come)
        assert len(await rest.messages(id)) == len(before)


# Once.


async def test_the_same_message_many_times_on_two_nodes_is_one_turn_and_one_answer(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        asking = [
            asyncio.create_task(client.proceed(id, gated(gate), message_id=gate))
            for client in (rest, elsewhere)
            for _ in range(10)
        ]
        await eventually(is_running(module_database_url, id))
        late = [asyncio.create_task(client.proceed(id, gated(gate), message_id=gate)) for client in (rest, elsewhere)]
        strings.open(gate)
        replies = [*await asyncio.gather(*asking, *late), await elsewhere.proceed(id, gated(gate), message_id=gate)]
        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        assert replies[0].json["response"] == "begun in 1 ended in 1"
        assert len(await rest.messages(id)) == 2
    assert await turns_of(module_database_url, id) == ["completed"]


async def test_the_same_first_message_many_times_on_two_nodes_makes_one_conversation(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        body = {"message": TOOLS, "message_id": "first"}
        asked = [client.post(f"/api/{user}/chat", body) for client in (rest, elsewhere) for _ in range(10)]
        replies = await asyncio.gather(*asked)
        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        assert len((await rest.get("/conversations")).expect(200)["conversations"]) == 1


async def test_a_message_of_the_socket_and_of_http_with_one_id_is_one(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, socket_to(nodes[1], user) as socket:
        end = (await socket.answer(QUICK, message_id="m-1"))[-1]
        id = end["conversation_id"]
        answer = (await rest.proceed(id, QUICK, message_id="m-1")).expect(200)
        assert (answer["turn_id"], answer["message"]) == (end["turn_id"], end["message"])
        assert (await rest.post(f"/api/{user}/chat", {"message": QUICK, "message_id": "m-1"})).expect(200) == {
            "conversation_id": id,
            "response": "quick",
            "tool_calls": [],
        }


async def test_the_id_of_a_message_of_another_conversation_is_refused(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id, other = await rest.create(), await rest.create()
        (await rest.proceed(id, QUICK, message_id="m-1")).expect(200)
        assert (await rest.proceed(other, QUICK, message_id="m-1")).refusal == (409, "invalid_frame")
        assert await rest.messages(other) == []


# Busy.


async def test_while_a_turn_runs_all_else_is_busy_on_every_node(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        running = asyncio.create_task(rest.proceed(id, gated(gate)))
        await eventually(is_running(module_database_url, id))
        for client in (rest, elsewhere):
            for reply in (
                await client.proceed(id, QUICK),
                await client.proceed(id, QUICK, if_busy="reject"),
                await client.post(f"/api/{user}/chat", {"message": QUICK, "conversation_id": id}),
                await client.post(f"/conversations/{id}/regenerate"),
                await client.append(id, {"role": "assistant", "content": "x"}),
                await client.append(id, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}),
            ):
                assert reply.refusal == (409, "conversation_busy")
        strings.open(gate)
        assert (await running).expect(200)["response"] == "begun in 1 ended in 1"
        assert len(await rest.messages(id)) == 2


@pytest.mark.parametrize("route", ["continue", "chat"])
async def test_an_interrupting_question_on_another_node_is_answered_and_the_interrupted_one_keeps_what_was_said(
    nodes: Nodes, module_database_url: str, gate: str, user: str, route: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        running = asyncio.create_task(rest.proceed(id, gated(gate)))
        await eventually(is_running(module_database_url, id))
        if route == "continue":
            reply = await elsewhere.proceed(id, QUICK, if_busy="interrupt")
        else:
            body = {"message": QUICK, "conversation_id": id, "if_busy": "interrupt"}
            reply = await elsewhere.post(f"/api/{user}/chat", body)
        assert reply.expect(200)["response"] == "quick"
        interrupted = (await running).expect(200)
        assert (interrupted["response"], interrupted["message"]["status"]) == ("begun in 1 ", "cancelled")
        assert [each[1:] for each in await shown(rest, id)] == [
            (gated(gate), "completed"),
            ("begun in 1 ", "cancelled"),
            (QUICK, "completed"),
            ("quick", "completed"),
        ]


async def test_of_many_interrupting_questions_each_is_answered_as_far_as_it_came(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    question = script_of(("paced", 60, "word ", 0.002))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        clients = (rest, elsewhere) * 3
        asked = [
            client.proceed(id, question, if_busy="interrupt", message_id=f"{n}-{id}")
            for n, client in enumerate(clients)
        ]
        replies = await asyncio.gather(*asked)
        # Who was overtaken again and again may have given up.
        assert {reply.status for reply in replies} <= {200, 409}
        answers = {reply.json["turn_id"]: reply.json["message"] for reply in replies if reply.status == 200}
        messages = await rest.messages(id)
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(answers)
    assert {message["turn_id"]: message for message in messages[1::2]} == answers
    assert sorted(await turns_of(module_database_url, id))[-1] in ("completed", "cancelled")
    assert messages[-1]["status"] == "completed"


async def test_of_many_who_regenerate_at_once_one_does_and_the_others_are_told_that_it_is_busy(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        strings.open(gate)
        (await rest.proceed(id, question := gated(gate))).expect(200)
        (strings.directory / gate).unlink()  # closed again
        path = f"/conversations/{id}/regenerate"
        asking = [asyncio.create_task(client.post(path, {"wait": False})) for client in (rest, elsewhere) * 5]
        replies = await asyncio.gather(*asking)
        assert sorted(reply.status for reply in replies) == [202, *[409] * 9]
        strings.open(gate)
        await eventually(has_no_turns(*nodes))
        assert await shown(rest, id) == [
            ("user", question, "completed"),
            ("assistant", "begun in 1 ended in 1", "superseded"),
            ("assistant", "begun in 1 ended in 1", "completed"),
        ]
    assert await turns_of(module_database_url, id) == ["completed"] * 2


# Cancel.


@pytest.mark.parametrize("names_the_turn", [False, True])
async def test_a_turn_that_is_cancelled_from_another_node_answers_with_what_was_said(
    nodes: Nodes, module_database_url: str, gate: str, user: str, *, names_the_turn: bool
) -> None:
    question = script_of(("call", "1", "f", {}), ("result", "1", "f", "x"), ("text", "so far "), ("gate", gate))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        running = asyncio.create_task(rest.proceed(id, question))
        await eventually(is_running(module_database_url, id))
        ((turn_id,),) = await sql(
            module_database_url, "SELECT id::text FROM turns WHERE conversation_id = $1", UUID(id)
        )
        body = {"turn_id": turn_id} if names_the_turn else None
        cancelled = (await elsewhere.post(f"/conversations/{id}/cancel", body)).expect(200)
        assert cancelled == {"conversation_id": id, "turn_id": turn_id}
        answer = (await running).expect(200)
        assert (answer["response"], answer["message"]["status"]) == ("so far ", "cancelled")
        assert [call["id"] for call in answer["tool_calls"]] == ["1"]
        turn = (await rest.get(f"/conversations/{id}/turns/{turn_id}")).expect(200)
        assert (turn["status"], turn["usage"]["seconds"] >= 0) == ("cancelled", True)
        # It has ended: that is all.
        assert (await elsewhere.post(f"/conversations/{id}/cancel", {"turn_id": turn_id})).expect(200) == cancelled
        again = (await elsewhere.post(f"/conversations/{id}/cancel")).expect(200)
        assert again == {"conversation_id": id, "turn_id": None}
        assert (await elsewhere.post(f"/conversations/{id}/cancel", {"turn_id": MISSING})).refusal == (404, "not_found")
    assert await turns_of(module_database_url, id) == ["cancelled"]


async def test_a_stranger_neither_stops_nor_interrupts_nor_deletes_a_turn(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[0], user + "-2") as stranger:
        id = await rest.create()
        started = (await rest.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202)
        await eventually(is_running(module_database_url, id))
        for reply in (
            await stranger.post(f"/conversations/{id}/cancel"),
            await stranger.post(f"/conversations/{id}/cancel", {"turn_id": started["turn_id"]}),
            await stranger.proceed(id, QUICK, if_busy="interrupt"),
            await stranger.proceed(id, QUICK, message_id=gate),
            await stranger.post(f"/conversations/{id}/regenerate"),
            await stranger.append(id, {"role": "user", "content": "x"}),
            await stranger.ask("DELETE", f"/conversations/{id}"),
            await stranger.get(f"/conversations/{id}/turns/{started['turn_id']}"),
        ):
            assert reply.refusal == (404, "not_found")
        strings.open(gate)
        answer = (await rest.proceed(id, gated(gate), message_id=gate)).expect(200)
        assert (answer["response"], answer["message"]["status"]) == ("begun in 1 ended in 1", "completed")


# Failures.


async def test_a_failed_turn_is_a_bad_gateway_and_its_text_stays(nodes: Nodes, user: str) -> None:
    question = script_of(("text", "half "), ("agent_error", "the provider is on fire", True))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        replies = [
            await rest.proceed(id, question, message_id="m-1"),
            await elsewhere.proceed(id, question, message_id="m-1"),
            await elsewhere.post(f"/api/{user}/chat", {"message": question, "message_id": "m-1"}),
        ]
        for reply in replies:
            assert reply.refusal == (502, "agent_failed")
            assert reply.message == "the provider is on fire"
        assert await shown(rest, id) == [("user", question, "completed"), ("assistant", "half ", "failed")]
        turn_id = (await rest.messages(id))[-1]["turn_id"]
        turn = (await elsewhere.get(f"/conversations/{id}/turns/{turn_id}")).expect(200)
        error = {"code": "agent_failed", "message": "the provider is on fire", "retryable": True}
        assert (turn["status"], turn["error"]) == ("failed", error)
        assert turn["usage"]["seconds"] >= 0
        # The conversation goes on.
        assert (await rest.proceed(id, QUICK)).expect(200)["response"] == "quick"


async def test_a_question_that_was_admitted_can_be_found_again_whatever_became_of_its_request(
    nodes: Nodes, user: str
) -> None:
    question = script_of(("text", "half "), ("agent_error", "the provider is on fire", True))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        path = f"/api/{user}/chat"
        failed = await rest.post(path, {"message": question})  # a new conversation, and no id of the client's own
        assert failed.refusal == (502, "agent_failed")
        error = failed.json["error"]
        assert [each["content"] for each in await elsewhere.messages(error["conversation_id"])] == [question, "half "]
        again = await elsewhere.post(path, {"message": question, "message_id": error["message_id"]})
        assert again.body == failed.body


async def test_an_agent_that_breaks_is_a_bad_gateway_that_tells_no_secrets(nodes: Nodes, user: str) -> None:
    question = script_of(("raise", "password=1234"))
    async with rest_to(nodes[0], user) as rest:
        reply = await rest.post(f"/api/{user}/chat", {"message": question})
        assert reply.refusal == (502, "agent_failed")
        assert b"1234" not in reply.body


# Clients that go.


async def test_a_client_that_goes_away_does_not_cancel(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[1], user) as elsewhere:
        id = await elsewhere.create()
        async with rest_to(nodes[0], user) as rest:
            waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
            await eventually(is_running(module_database_url, id))
            waiting.cancel()  # closes the connection
            await asyncio.wait((waiting,))
        assert (await elsewhere.proceed(id, QUICK)).refusal == (409, "conversation_busy")
        strings.open(gate)
        answer = (await elsewhere.proceed(id, gated(gate), message_id=gate)).expect(200)
        assert answer["response"] == "begun in 1 ended in 1"
        assert len(await elsewhere.messages(id)) == 2


async def test_those_who_wait_or_stream_are_bounded_and_make_room_when_they_go(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    node = start_node(**environment, CONNECTIONS_MAX="2")
    async with rest_to(node, user) as rest, AsyncExitStack() as stack:
        id, other = await rest.create(), await rest.create()
        await stack.enter_async_context(rest.events(id))
        waiting = asyncio.create_task(rest.proceed(id, gated(gate)))
        await eventually(is_running(database_url, id))

        async def all_at_once() -> list[Reply]:
            return [
                await rest.proceed(other, QUICK),
                await rest.post(f"/conversations/{other}/regenerate"),
                await rest.post(f"/api/{user}/chat", {"message": QUICK}),
                await rest.get(f"/conversations/{other}/events"),
            ]

        for reply in await all_at_once():
            assert reply.refusal == (429, "rate_limited")
            assert int(reply.headers["Retry-After"]) >= 1
        assert await rest.messages(other) == []
        assert (await rest.get("/conversations")).status == 200  # what is answered at once is not bounded by it
        waiting.cancel()
        await asyncio.wait((waiting,))

        async def has_room() -> bool:
            return (await rest.proceed(other, QUICK)).status == 200

        await eventually(has_room)
        assert await turns_of(database_url, id) == ["running"]


async def test_more_turns_than_a_node_may_run_are_told_to_come_later(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    node = start_node(**environment, TURNS_MAX="1")
    async with rest_to(node, user) as rest:
        id = await rest.create()
        waiting = asyncio.create_task(rest.proceed(id, gated(gate)))
        await eventually(is_running(database_url, id))
        reply = await rest.post(f"/api/{user}/chat", {"message": QUICK, "message_id": "m-1"})
        assert reply.refusal == (429, "rate_limited")
        assert int(reply.headers["Retry-After"]) >= 1
        strings.open(gate)
        (await waiting).expect(200)
        await eventually(has_no_turns(node))
        assert (await rest.post(f"/api/{user}/chat", {"message": QUICK, "message_id": "m-1"})).status == 200


# Nodes that die or drain.


async def test_who_waits_on_another_node_gets_the_whole_answer_when_the_turns_node_is_killed(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    dying, other = start_node(**environment), start_node(**environment)
    async with rest_to(dying, user) as rest, rest_to(other, user) as elsewhere:
        id = await rest.create()
        here = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
        await eventually(is_running(database_url, id))
        there = [asyncio.create_task(elsewhere.proceed(id, gated(gate), message_id=gate)) for _ in range(3)]
        async with elsewhere.events(id, 0) as events:  # by when the others have been heard too
            await events.until("turn.delta")
            dying.kill()
            with pytest.raises(aiohttp.ClientError):
                await here
            strings.open(gate)
            await events.until("turn.restarted")
        replies = [*await asyncio.gather(*there), await elsewhere.proceed(id, gated(gate), message_id=gate)]
        assert {reply.status for reply in replies} == {200}
        assert len({reply.body for reply in replies}) == 1
        assert replies[0].json["response"] == "begun in 2 ended in 2"
        assert len(await elsewhere.messages(id)) == 2
    assert await turns_of(database_url, id) == ["completed"]


async def test_who_waits_while_the_node_drains_is_sent_elsewhere_when_the_turn_is_handed_over(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving = start_node(**environment, DRAIN_SECONDS="1")
    other = start_node(**environment)
    async with rest_to(leaving, user) as rest, rest_to(other, user) as elsewhere:
        id = await rest.create()
        waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
        chatting = asyncio.create_task(rest.post(f"/api/{user}/chat", {"message": gated(gate), "message_id": "c"}))
        await eventually(is_running(database_url, id))

        async def both_run() -> bool:
            return len(await sql(database_url, "SELECT FROM turns WHERE status = 'running'")) == 2

        await eventually(both_run)
        leaving.process.send_signal(signal.SIGTERM)
        for reply in (await waiting, await chatting):
            assert reply.refusal == (503, "draining")
            assert int(reply.headers["Retry-After"]) >= 1
        strings.open(gate)
        answer = (await elsewhere.proceed(id, gated(gate), message_id=gate)).expect(200)
        assert answer["response"] == "begun in 2 ended in 2"
        body = {"message": gated(gate), "message_id": "c"}
        assert (await elsewhere.post(f"/api/{user}/chat", body)).expect(200)["response"] == "begun in 2 ended in 2"
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0
    rows = await sql(database_url, "SELECT status, attempts FROM turns")
    assert [tuple(row) for row in rows] == [("completed", 1)] * 2


async def test_while_a_node_drains_what_waits_is_answered_and_what_is_new_is_refused(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving = start_node(**environment, DRAIN_SECONDS="60")
    async with rest_to(leaving, user) as rest:
        id, other = await rest.create(), await rest.create()
        waiting = asyncio.create_task(rest.proceed(id, gated(gate)))
        await eventually(is_running(database_url, id))
        leaving.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return (await rest.get("/readyz")).status == 503

        await eventually(is_draining)
        for reply in (
            await rest.proceed(other, QUICK, message_id="m-1"),
            await rest.post(f"/api/{user}/chat", {"message": QUICK}),
            await rest.post(f"/conversations/{other}/regenerate"),
        ):
            assert reply.refusal == (503, "draining")
            assert int(reply.headers["Retry-After"]) >= 1
        assert (await rest.get(f"/conversations/{other}")).status == 200  # no new turn
        strings.open(gate)
        assert (await waiting).expect(200)["response"] == "begun in 1 ended in 1"
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0
    assert await turns_of(database_url, other) == []


async def test_who_waits_on_a_draining_node_for_a_turn_of_another_one_is_sent_there(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving, other = start_node(**environment, DRAIN_SECONDS="60"), start_node(**environment)
    async with rest_to(leaving, user) as rest, rest_to(other, user) as elsewhere:
        id = await elsewhere.create()
        (await elsewhere.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202)
        await eventually(is_running(database_url, id))
        async with rest.events(id, 0) as events:
            await events.until("turn.delta")
            waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))

            async def is_heard() -> bool:
                return (await rest.proceed(id, QUICK)).refusal == (409, "conversation_busy")

            await eventually(is_heard)
            leaving.process.send_signal(signal.SIGTERM)
            assert await events.rest() == []
        assert (await waiting).refusal == (503, "draining")
        strings.open(gate)
        answer = (await elsewhere.proceed(id, gated(gate), message_id=gate)).expect(200)
        assert answer["response"] == "begun in 1 ended in 1"
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0


async def test_who_waits_on_a_node_that_was_frozen_gets_the_answer_of_the_one_that_took_over(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    frozen, other = start_node(**environment), start_node(**environment)
    async with rest_to(frozen, user) as rest, rest_to(other, user) as elsewhere:
        id = await rest.create()
        waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
        await eventually(is_running(database_url, id))
        frozen.pause()
        strings.open(gate)
        answer = await elsewhere.proceed(id, gated(gate), message_id=gate)
        assert answer.expect(200)["response"] == "begun in 2 ended in 2"
        frozen.resume()
        assert (await waiting).body == answer.body
        assert len(await rest.messages(id)) == 2


# Deletions.


@pytest.mark.parametrize("deletes_elsewhere", [False, True])
@pytest.mark.parametrize("is_deaf", [False, True])
async def test_a_conversation_is_deleted_with_its_running_turn_and_those_who_wait_hear_of_it(
    nodes: Nodes,
    module_database_url: str,
    strings: Strings,
    gate: str,
    user: str,
    *,
    deletes_elsewhere: bool,
    is_deaf: bool,
) -> None:
    mark = strings.name()
    last = ("deaf", gate) if is_deaf else ("stuck", mark, 1)
    question = script_of(("text", "begun "), last)
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        waiting = [asyncio.create_task(client.proceed(id, question, message_id=gate)) for client in (rest, elsewhere)]
        await eventually(is_running(module_database_url, id))
        deleting = elsewhere if deletes_elsewhere else rest
        (await deleting.ask("DELETE", f"/conversations/{id}")).expect(204)
        await assert_gone(module_database_url, id)
        for reply in await asyncio.gather(*waiting):
            # Its end came before its deletion, so who is quick has an answer.
            assert reply.refusal == (404, "not_found") if reply.status != 200 else "begun" in reply.json["response"]
        if is_deaf:
            strings.open(gate)
        else:

            async def is_stopped() -> bool:
                return strings.marks(mark) == [1]

            await eventually(is_stopped)
        await eventually(has_no_turns(*nodes))
        await assert_gone(module_database_url, id)
        for client in (rest, elsewhere):
            assert (await client.get(f"/conversations/{id}")).refusal == (404, "not_found")


async def test_a_conversation_is_deleted_under_a_node_that_is_frozen_and_nothing_is_written_when_it_wakes(
    start_node: StartNode, database_url: str, strings: Strings, gate: str, user: str
) -> None:
    settings = {**strings.environment, "LEASE_SECONDS": "300"}  # nobody takes the turn over
    frozen, other = start_node(**settings), start_node(**settings)
    mark = strings.name()
    question = script_of(("text", "begun "), ("gate", gate), ("text", "more "), ("stuck", mark, 1))
    async with rest_to(frozen, user) as rest, rest_to(other, user) as elsewhere:
        id = await rest.create()
        waiting = asyncio.create_task(rest.proceed(id, question))
        await eventually(is_running(database_url, id))
        async with elsewhere.events(id, 0) as events:
            await events.until("turn.delta")
            frozen.pause()
            strings.open(gate)
            (await elsewhere.ask("DELETE", f"/conversations/{id}")).expect(204)
            assert (await events.rest())[-1][1]["code"] == "not_found"
        await assert_gone(database_url, id)
        frozen.resume()
        assert (await waiting).refusal == (404, "not_found")

        async def is_stopped() -> bool:
            return strings.marks(mark) == [1]

        await eventually(has_no_turns(frozen))
        if strings.marks(mark):  # it may have been stopped before it came there
            await eventually(is_stopped)
        await assert_gone(database_url, id)


@pytest.mark.parametrize("lease_seconds", ["1", "300"])
async def test_a_conversation_is_deleted_whose_turn_ran_on_a_node_that_is_dead(
    start_node: StartNode, database_url: str, strings: Strings, gate: str, user: str, lease_seconds: str
) -> None:
    settings = {**strings.environment, "LEASE_SECONDS": lease_seconds}
    dying, other = start_node(**settings), start_node(**settings)
    async with rest_to(other, user) as rest:
        id = await rest.create()
        async with rest_to(dying, user) as there:
            (await there.proceed(id, gated(gate), message_id=gate, wait=False)).expect(202)
        await eventually(is_running(database_url, id))
        waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
        dying.kill()
        (await rest.ask("DELETE", f"/conversations/{id}")).expect(204)
        await assert_gone(database_url, id)
        # It may have been taken over, and cancelled, in between.
        reply = await waiting
        assert reply.refusal == (404, "not_found") if reply.status != 200 else reply.json["response"] != ""
        await eventually(has_no_turns(other))
        await assert_gone(database_url, id)


async def test_whoever_follows_a_conversation_over_a_socket_hears_of_its_deletion_and_stays_connected(
    nodes: Nodes, user: str
) -> None:
    async with AsyncExitStack() as stack:
        rest = await stack.enter_async_context(rest_to(nodes[0], user))
        sockets = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        id, other = await rest.create(), await rest.create()
        for socket in sockets:
            for each in (id, other):
                await socket.follow(each, 0)
        (await rest.ask("DELETE", f"/conversations/{id}")).expect(204)
        for socket in sockets:
            error = await socket.receive()
            assert (error["type"], error["code"], error["conversation_id"]) == ("error", "not_found", id)
        (await rest.append(other, {"role": "user", "content": "x"})).expect(201)
        for socket in sockets:
            assert (await socket.receive())["conversation_id"] == other


async def test_deletions_that_race_with_all_that_writes_leave_nothing_behind(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    question = script_of(("paced", 20, "word ", 0.001))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        for _ in range(8):
            id = await rest.create()
            (await rest.proceed(id, QUICK)).expect(200)
            writing = [
                asyncio.create_task(work)
                for client in (rest, elsewhere)
                for work in (
                    client.proceed(id, question),
                    client.proceed(id, question, wait=False),
                    client.append(id, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}),
                    client.post(f"/conversations/{id}/regenerate"),
                    client.ask("PATCH", f"/conversations/{id}", {"title": "x"}),
                    client.proceed(id, question, if_busy="interrupt"),
                )
            ]
            deleting = [
                asyncio.create_task(client.ask("DELETE", f"/conversations/{id}")) for client in (elsewhere, rest)
            ]
            deletions = await asyncio.gather(*deleting)
            statuses = {reply.status for reply in deletions}
            assert 204 in statuses
            assert statuses <= {204, 404}
            for reply in await asyncio.gather(*writing):
                assert reply.status in (200, 201, 202, 404, 409), reply
            await eventually(has_no_turns(*nodes))
            await assert_gone(module_database_url, id)


# Postgres.


async def test_without_postgres_everything_is_unavailable_and_may_be_repeated(
    start_node: StartNode, database_url: str, environment: dict[str, str], user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **environment)
        async with rest_to(node, user) as rest:
            id = await rest.create()
            proxy.cut()
            replies = await asyncio.gather(
                rest.proceed(id, QUICK, message_id="m-1"),
                rest.post("/conversations", {}),
                rest.get("/conversations"),
                rest.get(f"/conversations/{id}"),
                rest.get(f"/conversations/{id}/messages"),
                rest.append(id, {"role": "user", "content": "x"}),
                rest.post(f"/conversations/{id}/cancel"),
                rest.get(f"/conversations/{id}/events"),
            )
            for reply in replies:
                assert reply.refusal == (503, "database_unavailable")
                assert int(reply.headers["Retry-After"]) >= 1
            proxy.heal()
            assert (await rest.proceed(id, QUICK, message_id="m-1")).expect(200)["response"] == "quick"
            assert len(await rest.messages(id)) == 2


@pytest.mark.parametrize(
    "name",
    ["append", "create_conversation", "delete_conversation", "get_or_create_conversation", "update_conversation"],
)
async def test_a_write_whose_answer_is_lost_is_done_once(
    start_node: StartNode, database_url: str, environment: dict[str, str], user: str, name: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **environment)
        async with rest_to(node, user) as rest:
            id = await rest.create()
            asked = {
                "append": lambda: rest.append(
                    id, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
                ),
                "create_conversation": lambda: rest.post("/conversations", {"title": "once"}),
                "delete_conversation": lambda: rest.ask("DELETE", f"/conversations/{id}"),
                "get_or_create_conversation": lambda: rest.post("/conversations", {"client_id": "once"}),
                "update_conversation": lambda: rest.ask("PATCH", f"/conversations/{id}", {"title": "once"}),
            }
            hold = proxy.hold("after", name)
            asking = asyncio.create_task(asked[name]())
            await hold.reached()
            proxy.cut()
            proxy.heal()
            is_making = name in ("append", "create_conversation", "get_or_create_conversation")
            assert (await asking).status in ((201,) if is_making else (200, 204))
            left = (await rest.get("/conversations")).expect(200)["conversations"]
            assert len(left) == {"append": 1, "update_conversation": 1, "delete_conversation": 0}.get(name, 2)
            if name == "append":
                assert [message["content"] for message in await rest.messages(id)] == ["x", "y"]
                assert left[0]["seq"] == 2


async def test_who_waits_while_postgres_is_away_gets_the_answer_or_may_ask_again(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **{**environment, "LEASE_SECONDS": "60"})
        async with rest_to(node, user) as rest:
            id = await rest.create()
            waiting = asyncio.create_task(rest.proceed(id, gated(gate), message_id=gate))
            await eventually(is_running(database_url, id))
            proxy.cut()
            strings.open(gate)
            proxy.heal()
            reply = await waiting
            assert reply.status == 200 or reply.refusal == (503, "database_unavailable")
            answer = (await rest.proceed(id, gated(gate), message_id=gate)).expect(200)
            assert answer["response"] == "begun in 1 ended in 1"
            assert len(await rest.messages(id)) == 2


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        log = node.log.read_text()
        assert "failed\nTraceback" not in log.replace("the agent failed", "")
        assert "ASGI" not in log
