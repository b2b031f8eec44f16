"""REST: questions that were appended first. They are answered once, on any node, and give a conversation its title."""

from __future__ import annotations

import asyncio
import json
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from tests.agents import recalling
from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, NodeProcess, running_node, sql
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import MISSING, Reply, Rest, rest_to
from tests.kit.stored import turns_of

Nodes = Sequence[NodeProcess]
QUICK = script_of(("text", "quick"))
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NO_QUESTION = "The last message is not a question without an answer; send content to ask one."


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(3)]


def user_says(content: str = QUICK) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str = "x", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


async def answer(rest: Rest, id: str, **fields: Any) -> Reply:
    """Have the appended question answered."""
    return await rest.post(f"/conversations/{id}/continue", fields)


async def shown(rest: Rest, id: str) -> list[tuple[str, str, str]]:
    return [(each["role"], each["content"], each["status"]) for each in await rest.messages(id)]


# Answered where they are.


@pytest.mark.parametrize("before", [[], [user_says("a"), assistant("b")], [{"role": "system", "content": "a"}]])
async def test_an_appended_question_is_answered_on_any_node(
    nodes: Nodes, module_database_url: str, user: str, before: list[dict[str, Any]]
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        (await rest.append(id, *before, user_says())).expect(201)
        question = (await rest.messages(id))[-1]
        told = (await answer(elsewhere, id)).expect(200)
        assert (told["conversation_id"], told["response"], told["tool_calls"]) == (id, "quick", [])
        messages = await rest.messages(id)
        assert len(messages) == len(before) + 2
        assert messages[-1] == told["message"]
        assert messages[-2] == {**question, "turn_id": told["turn_id"]}
        turn = (await rest.get(f"/conversations/{id}/turns/{told['turn_id']}")).expect(200)
        assert (turn["status"], turn["messages"]) == ("completed", [told["message"]])
        assert (await rest.proceed(id, QUICK)).expect(200)["response"] == "quick"
    assert await turns_of(module_database_url, id) == ["completed"] * 2


@pytest.mark.parametrize("data", [b"", b"{}", b'{"content": null, "message_id": null}'])
async def test_no_content_may_be_said_in_any_way(nodes: Nodes, user: str, data: bytes) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        await rest.append(id, user_says())
        reply = await rest.ask("POST", f"/conversations/{id}/continue", data=data)
        assert reply.expect(200)["response"] == "quick"


async def test_an_answer_that_is_not_waited_for_is_followed_from_its_cursor(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        question = (await rest.append(id, user_says())).expect(201)
        started = (await answer(rest, id, wait=False)).expect(202)
        assert started == {"conversation_id": id, "turn_id": started["turn_id"], "after": 1}
        async with elsewhere.events(id, started["after"]) as events:
            frames = [frame for _, frame in await events.until(*TERMINAL)]
        assert [frame["type"] for frame in frames] == ["turn.started", "turn.delta", "turn.completed"]
        assert {frame["turn_id"] for frame in frames} == {started["turn_id"]}
        assert frames[0]["message_id"] == question["id"]


async def test_the_agent_is_given_what_a_regenerated_answer_is_given(start_node: StartNode, user: str) -> None:
    recall = json.dumps([["recall"]])
    async with rest_to(start_node(AGENT=recalling.AGENT), user) as rest:
        told = []
        for _ in range(2):
            id = await rest.create(system_prompt="Be kind.")
            await rest.append(id, user_says("a"), assistant("b"), user_says(recall))
            told.append((await answer(rest, id)).expect(200)["response"])
            told.append((await rest.post(f"/conversations/{id}/regenerate")).expect(200)["response"])
        assert len(set(told)) == 1
        assert json.loads(told[0]) == [
            *(["system", "Be kind.", None], ["user", "a", None], ["assistant", "b", None]),
            ["user", recall, None],
        ]


@pytest.mark.parametrize(
    "before",
    [
        [],
        [{"role": "system", "content": "x"}],
        [user_says(), assistant()],
        [user_says(), assistant(tool_calls=[CALL])],
        [user_says(), assistant(tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c", "content": "x"}],
    ],
)
async def test_where_the_last_message_is_no_question_there_is_nothing_to_answer(
    nodes: Nodes, module_database_url: str, user: str, before: list[dict[str, Any]]
) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        if before:
            (await rest.append(id, *before)).expect(201)
        for fields in ({}, {"wait": False}, {"if_busy": "interrupt"}):
            reply = await answer(rest, id, **fields)
            assert (reply.refusal, reply.message) == ((409, "role_order"), NO_QUESTION)
        assert len(await rest.messages(id)) == len(before)
    assert await turns_of(module_database_url, id) == []


async def test_a_question_that_was_answered_is_not_answered_again_however_its_turn_ended(
    nodes: Nodes, strings: Strings, gate: str, user: str
) -> None:
    failing = script_of(("raise", "no"))
    async with rest_to(nodes[0], user) as rest:
        for content, status in ((QUICK, "completed"), (failing, "failed"), (script_of(("gate", gate)), "cancelled")):
            id = await rest.create()
            await rest.append(id, user_says(content))
            started = (await answer(rest, id, wait=False)).expect(202)
            if status == "cancelled":
                (await rest.post(f"/conversations/{id}/cancel")).expect(200)
            async with rest.events(id, 0) as events:
                await events.until(*TERMINAL)
            turn = (await rest.get(f"/conversations/{id}/turns/{started['turn_id']}")).expect(200)
            assert turn["status"] == status
            before = await shown(rest, id)
            assert (await answer(rest, id)).refusal == (409, "role_order")
            (await rest.post(f"/conversations/{id}/regenerate", {"wait": False})).expect(202)
            (await rest.post(f"/conversations/{id}/cancel")).expect(200)
            assert len(before) == 2


async def test_an_id_of_a_message_needs_a_content(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        question = (await rest.append(id, user_says())).expect(201)
        for message_id in ("m-1", question["id"]):
            reply = await answer(rest, id, message_id=message_id)
            assert reply.refusal == (422, "invalid_frame")
            assert reply.paths == ["message_id"]
        assert len(await rest.messages(id)) == 1


async def test_somebody_elses_appended_question_is_answered_by_its_owner_alone(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[0], user + "-stranger") as stranger:
        id = await rest.create(client_id="chat")
        await rest.append(id, user_says())
        theirs, missing = await answer(stranger, id), await answer(stranger, MISSING)
        assert theirs.refusal == (404, "not_found")
        assert {theirs.body, missing.body, (await answer(stranger, "chat")).body} == {theirs.body}
        assert (await answer(rest, "chat")).expect(200)["response"] == "quick"


# Once.


async def test_of_many_on_three_nodes_who_have_a_question_answered_one_begins_its_turn(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as a, rest_to(nodes[1], user) as b, rest_to(nodes[2], user) as c:
        id = await a.create()
        await a.append(id, user_says(script_of(("gate", gate), ("text", "once"))))
        asked = [answer(client, id, wait=False) for client in (a, b, c) for _ in range(6)]
        replies = await asyncio.gather(*asked)
        assert Counter(reply.status for reply in replies) == {202: 1, 409: 17}
        assert {reply.refusal for reply in replies if reply.status == 409} == {(409, "conversation_busy")}
        (begun,) = [reply.json for reply in replies if reply.status == 202]
        for fields in ({}, {"if_busy": "interrupt"}):  # as if the answer had been lost: nothing is interrupted
            assert (await answer(b, id, **fields)).refusal == (409, "conversation_busy")
        strings.open(gate)
        async with c.events(id, begun["after"]) as events:
            await events.until(*TERMINAL)
        assert [each[1:] for each in await shown(a, id)][1:] == [("once", "completed")]
        assert (await answer(b, id)).refusal == (409, "role_order")
    assert await turns_of(module_database_url, id) == ["completed"]


async def test_answers_questions_and_appends_that_race_leave_an_orderly_conversation(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as a, rest_to(nodes[1], user) as b, rest_to(nodes[2], user) as c:
        id = await a.create()
        for number in range(12):
            work = [client.append(id, user_says()) for client in (a, b)]
            work += [answer(client, id) for client in (a, b, c) * 2]
            work += [client.proceed(id, QUICK, message_id=f"{user}-{number}-{n}") for n, client in enumerate((b, c))]
            work += [b.append(id, assistant(), user_says())]
            for reply in await asyncio.gather(*work):
                assert reply.status in (200, 201) or reply.refusal[0] == 409
            if (await a.messages(id, limit=1))[0]["role"] == "user":
                assert (await answer(c, id)).expect(200)["response"] == "quick"
        roles = [message["role"] for message in await a.messages(id, limit=1000)]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        begun = await turns_of(module_database_url, id)
        assert set(begun) == {"completed"}
    answered = "SELECT count(DISTINCT turn_id) FROM messages WHERE conversation_id = $1 AND role = 'assistant'"
    (row,) = await sql(module_database_url, answered, uuid.UUID(id))
    assert row["count"] == len(begun)


async def test_a_turn_whose_beginning_was_not_heard_of_is_begun_once(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **strings.environment)
        async with rest_to(node, user) as rest:
            id = await rest.create()
            await rest.append(id, user_says())
            hold = proxy.hold("after", "answer")
            asking = asyncio.create_task(answer(rest, id))
            await hold.reached()
            proxy.cut()
            proxy.heal()
            assert (await asking).expect(200)["response"] == "quick"
            assert await shown(rest, id) == [("user", QUICK, "completed"), ("assistant", "quick", "completed")]
        assert await turns_of(database_url, id) == ["completed"]


async def test_a_node_that_drains_or_is_full_answers_no_appended_question(
    start_node: StartNode, strings: Strings, gate: str, user: str
) -> None:
    node = start_node(**strings.environment, TURNS_MAX="1")
    async with rest_to(node, user) as rest:
        id, other = await rest.create(), await rest.create()
        await rest.append(id, user_says())
        (await rest.proceed(other, script_of(("gate", gate)), wait=False)).expect(202)
        assert (await answer(rest, id)).refusal == (429, "rate_limited")
        strings.open(gate)

        async def is_answered() -> object:
            return (await answer(rest, id)).status == 200

        await eventually(is_answered)


# Titles.

SPACES = "".join(chr(code) for code in range(0x11_0000) if chr(code).isspace())
NO_SPACES = "\u180e\u200b\u200c\u2060\ufeff"  # which other languages take for spaces


@pytest.mark.parametrize(
    "content",
    [
        "Tea",
        "  Tea,\n\n  two\tcups ",
        "x" * 81,
        "x" * 79 + " y",
        "ö" * 79 + "\U0001f600z",
        SPACES.join("abc") + SPACES,
        SPACES + "a" + NO_SPACES + "b",
        "$1 \\1 & %s ' \"",
        "e\u0301" * 60,
        f"{SPACES}x" * 100,
    ],
)
async def test_a_conversation_without_a_title_gets_that_of_its_appended_question_as_of_an_asked_one(
    nodes: Nodes, user: str, content: str
) -> None:
    expected = " ".join(content.split())[:80]
    assert not unicodedata.combining(expected[0])
    async with rest_to(nodes[0], user) as rest:
        appended, asked = await rest.create(), await rest.create()
        (await rest.append(appended, user_says(content))).expect(201)
        started = (await rest.proceed(asked, content, wait=False)).expect(202)
        assert started["conversation_id"] == asked
        titles = [(await rest.get(f"/conversations/{id}")).expect(200)["title"] for id in (appended, asked)]
        assert titles == [expected] * 2


async def test_every_space_of_python_is_one_in_a_title(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        for space in SPACES:
            id = await rest.create()
            (await rest.append(id, user_says(f"{space}a{space}{space}b{space}"))).expect(201)
            assert (await rest.get(f"/conversations/{id}")).expect(200)["title"] == "a b", hex(ord(space))


async def test_a_title_comes_from_the_first_question_of_many_and_then_stays(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()

        async def title() -> Any:
            return (await rest.get(f"/conversations/{id}")).expect(200)["title"]

        await rest.append(id, {"role": "system", "content": "system"})
        assert await title() is None
        parts = [{"type": "text", "text": "Te"}, {"type": "text", "text": "a"}]
        await rest.append(id, {"role": "user", "content": parts}, assistant("two"), user_says("three"))
        assert await title() == "Tea"
        await rest.append(id, assistant("four"), user_says("five"))
        assert await title() == "Tea"
        (await rest.ask("PATCH", f"/conversations/{id}", {"title": None})).expect(200)
        await rest.append(id, assistant("six"))
        assert await title() is None
        await rest.append(id, user_says("seven"))
        assert await title() == "seven"


async def test_a_title_that_was_given_stays(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create(title="Given")
        await rest.append(id, user_says("one"))
        (await rest.ask("PATCH", f"/conversations/{id}", {"title": "Changed"})).expect(200)
        await rest.append(id, assistant("two"), user_says("three"))
        assert (await rest.get(f"/conversations/{id}")).expect(200)["title"] == "Changed"


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        log = node.log.read_text()
        assert "failed\nTraceback" not in log.replace("the agent failed", "")
        assert "ASGI" not in log
