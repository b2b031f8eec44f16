"""Tools of real nodes: what is shown and stored of their calls, and what becomes of them when a node dies."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.agents.scripted import DIRECTORY, eventually
from tests.agents.waiting_tools import LET_GO, TOOLS, runs_of
from tests.conftest import StartNode
from tests.kit.command_line import GOOD, anynode, assert_refused_in_one_line
from tests.kit.exactness import Client
from tests.kit.harness import TERMINAL, Frame, NodeProcess, socket_to, sql, text_of
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.provider import Provider, answer, call_of, calling, openai_environment, serve_provider
from tests.kit.takeovers import assert_right, epoch_of

Steps = Sequence[Sequence[tuple[str, str]]]  # the calls (tool, word) of each step
StartWith = Callable[..., NodeProcess]
QUESTION = "apples or pears?"
ANSWER = "[1] apples or pears?"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with serve_provider() as provider:
        yield provider


@pytest.fixture(params=["echo", "openai"])
def start_with(request: pytest.FixtureRequest, start_node: StartNode, provider: Provider, tmp_path: Path) -> StartWith:
    """Starts nodes whose agent makes these calls, with the ids call_1, call_2 …, and then gives the ANSWER."""

    def start(steps: Steps, **settings: str) -> NodeProcess:
        environment = {"TOOLS": TOOLS, DIRECTORY: str(tmp_path), "LEASE_SECONDS": "1", **settings}
        if request.param == "echo":
            script = [[{"name": name, "arguments": {"word": word}} for name, word in step] for step in steps]
            return start_node(AGENT="echo", ECHO_TOOL_CALLS=json.dumps(script), **environment)
        if not provider.replies:
            provider.replies.extend(replies(steps))
        return start_node(**openai_environment(provider), **environment)

    return start


def replies(steps: Steps, *texts: str) -> list[Any]:
    """What a provider says, whose model makes these calls."""
    number = 0
    said = []
    for step, text in zip(steps, [*texts, *[""] * len(steps)], strict=False):
        calls = []
        for name, word in step:
            number += 1
            calls.append(call_of(f"call_{number}", name, word=word))
        said.append(calling(*calls, text=text))
    return [*said, answer("[1] ", "apples or pears?")]


async def stored_in(database_url: str, conversation_id: str | None) -> list[tuple[str, str, list[str] | str | None]]:
    """What the database has of each message behind the question: role, content, the ids of its calls or of the call
    that it answers."""
    rows = await sql(
        database_url,
        "SELECT role, content, tool_calls::text, tool_name, tool_call_id FROM messages WHERE conversation_id = $1 "
        "AND role <> 'user' ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert all((row["tool_name"] is None) == (row["role"] != "tool") for row in rows)
    return [(row["role"], row["content"], ids_of(row)) for row in rows]


def ids_of(row: asyncpg.Record) -> list[str] | str | None:
    if row["tool_calls"] is None:
        tool_call_id: str | None = row["tool_call_id"]
        return tool_call_id
    return [call["id"] for call in json.loads(row["tool_calls"])]


def types_of(frames: Sequence[Frame]) -> list[str]:
    return [frame["type"].removeprefix("turn.") for frame in frames]


async def test_calls_are_shown_and_stored_step_by_step(start_with: StartWith, database_url: str, user: str) -> None:
    node = start_with([[("look_up", "apples"), ("block", "pears")], [("look_up", "figs")]])
    async with socket_to(node, user) as socket:
        frames = await socket.answer(QUESTION)
    shown = [type for type in types_of(frames) if type != "delta"]
    assert shown == [
        *("message.created", "started", "tool_call", "tool_call", "tool_result", "tool_result"),
        *("tool_call", "tool_result", "completed"),
    ]
    called = [frame for frame in frames if frame["type"] == "turn.tool_call"]
    assert [(frame["tool_call_id"], frame["tool_name"], frame["arguments"]) for frame in called] == [
        ("call_1", "look_up", {"word": "apples"}),
        ("call_2", "block", {"word": "pears"}),
        ("call_3", "look_up", {"word": "figs"}),
    ]
    first, one, other, *rest = await stored_in(database_url, frames[0]["conversation_id"])
    assert first == ("assistant", "", ["call_1", "call_2"])
    assert sorted([one, other]) == [("tool", "found apples", "call_1"), ("tool", "found pears", "call_2")]
    assert rest == [("assistant", "", ["call_3"]), ("tool", "found figs", "call_3"), ("assistant", ANSWER, None)]
    assert text_of(frames) == frames[-1]["message"]["content"] == ANSWER


async def test_a_tool_may_take_longer_than_an_agent_may_be_silent(
    start_node: StartNode, tmp_path: Path, user: str
) -> None:
    script = json.dumps([[{"name": "rest", "arguments": {"seconds": 1}}]])
    settings = {"TOOLS": TOOLS, DIRECTORY: str(tmp_path), "AGENT_TIMEOUT_SECONDS": "0.3"}
    async with socket_to(start_node(ECHO_TOOL_CALLS=script, **settings), user) as socket:
        frames = await socket.answer(QUESTION)
    assert types_of(frames)[-1] == "completed"
    assert [frame["content"] for frame in frames if frame["type"] == "turn.tool_result"] == ["rested"]


async def test_a_tool_that_takes_too_long_is_an_error_and_the_turn_goes_on(
    start_with: StartWith, database_url: str, user: str
) -> None:
    node = start_with([[("block", "slow"), ("look_up", "slower")]], TOOL_TIMEOUT_SECONDS="0.2")
    async with socket_to(node, user) as socket:
        frames = await socket.answer(QUESTION)
    results = [frame for frame in frames if frame["type"] == "turn.tool_result"]
    assert [(frame["content"], frame["is_error"]) for frame in results] == [
        ("block has not answered within 0.2 s", True),
        ("look_up has not answered within 0.2 s", True),
    ]
    assert frames[-1]["message"]["content"] == ANSWER
    # A thread that is stuck does not keep the node from stopping.
    assert await asyncio.to_thread(node.stop) == 0


async def test_a_cancel_stops_a_tool_and_keeps_what_others_have_found(
    start_with: StartWith, database_url: str, tmp_path: Path, user: str
) -> None:
    node = start_with([[("look_up", "quick"), ("look_up", "slow")]])
    async with socket_to(node, user) as socket:
        await socket.ask(QUESTION)
        frames = await socket.until("turn.tool_result")
        conversation_id = frames[0]["conversation_id"]
        await socket.send({"type": "turn.cancel", "conversation_id": conversation_id})
        frames += await socket.until(*TERMINAL)
    assert types_of(frames)[-1] == "cancelled"

    async def has_let_go() -> bool:
        return runs_of(tmp_path, LET_GO) == [["slow"]]

    await eventually(has_let_go)
    assert await stored_in(database_url, conversation_id) == [
        ("assistant", "", ["call_1"]),
        ("tool", "found quick", "call_1"),
        ("assistant", "", None),
    ]


async def test_without_tools_the_echo_agent_has_one_that_echoes(start_node: StartNode, user: str) -> None:
    script = json.dumps([[{"name": "echo", "arguments": {"text": "ü"}}, {"name": "shout"}]])
    async with socket_to(start_node(ECHO_TOOL_CALLS=script), user) as socket:
        frames = await socket.answer(QUESTION)
    results = {frame["tool_call_id"]: frame for frame in frames if frame["type"] == "turn.tool_result"}
    assert (results["call_1"]["content"], results["call_1"]["is_error"]) == ("ü", False)
    assert (results["call_2"]["content"], results["call_2"]["is_error"]) == (
        "there is no tool 'shout'; there is: echo",
        True,
    )
    assert frames[-1]["message"]["content"] == ANSWER


# When nodes die.


def called(client: Client) -> list[tuple[str, str]]:
    """The calls and results that it has seen, in order: what it was, and the id."""
    return [
        (frame["type"].removeprefix("turn.tool_"), frame["tool_call_id"])
        for frame in client.frames
        if frame["type"].startswith("turn.tool_")
    ]


def has_run(directory: Path, word: str, attempt: int) -> Callable[[], Any]:
    """Whether a tool has been called with the word in this attempt."""

    async def condition() -> bool:
        return any(run[1] == str(attempt) for run in runs_of(directory, word))

    return condition


async def watched(
    clients: Sequence[Client],
    nodes: Sequence[NodeProcess],
    until: Sequence[Callable[[], Any]],
    then: Callable[[], None],
) -> None:
    """Watch a turn to its end on all nodes, the first of which runs it; kill the one that does as often as a condition
    comes true."""
    first, *followers = clients
    async with asyncio.TaskGroup() as group:
        group.create_task(first.watch(*nodes))

        async def has_begun() -> bool:
            return bool(first.frames)

        await eventually(has_begun)
        for follower in followers:
            group.create_task(follower.watch(*nodes[1:]))
        alive = list(nodes)
        for condition in until:
            await eventually(condition)
            alive.pop(0).kill()
        then()


async def test_a_call_that_was_under_way_is_made_again_with_its_id_and_finished_ones_are_not(
    start_with: StartWith, database_url: str, tmp_path: Path, user: str
) -> None:
    steps = [[("look_up", "apples")], [("look_up", "pears"), ("block", "slow")], [("look_up", "figs")]]
    nodes = [start_with(steps) for _ in range(2)]
    clients = [Client(user, QUESTION)]
    clients.append(clients[0].another())

    async def is_in_the_middle() -> bool:
        return ("result", "call_2") in called(clients[0]) and bool(runs_of(tmp_path, "slow"))

    await watched(clients, nodes, [is_in_the_middle], (tmp_path / "slow").touch)
    await assert_right(database_url, clients, epoch=2)
    runs = {word: runs_of(tmp_path, word) for word in ("apples", "pears", "slow", "figs")}
    assert runs == {
        "apples": [["call_1", "1", user]],
        "pears": [["call_2", "1", user]],
        "slow": [["call_3", "1", user], ["call_3", "2", user]],
        "figs": [["call_4", "2", user]],
    }
    assert called(clients[0]) == [
        *(("call", "call_1"), ("result", "call_1"), ("call", "call_2"), ("call", "call_3"), ("result", "call_2")),
        *(("call", "call_3"), ("result", "call_3"), ("call", "call_4"), ("result", "call_4")),
    ]
    assert await stored_in(database_url, clients[0].conversation_id) == [
        ("assistant", "", ["call_1"]),
        ("tool", "found apples", "call_1"),
        ("assistant", "", ["call_2"]),
        ("tool", "found pears", "call_2"),
        ("assistant", "", ["call_3"]),
        ("tool", "found slow", "call_3"),
        ("assistant", "", ["call_4"]),
        ("tool", "found figs", "call_4"),
        ("assistant", ANSWER, None),
    ]
    assert clients[0].text == ANSWER


async def test_a_call_is_made_again_by_the_third_node_when_the_second_dies_of_it_too(
    start_with: StartWith, database_url: str, tmp_path: Path, user: str
) -> None:
    steps = [[("look_up", "slow"), ("look_up", "slow-too")]]
    nodes = [start_with(steps, LEASE_SECONDS="300")]
    nodes.append(start_with(steps))
    clients = [Client(user, QUESTION)]
    third: list[NodeProcess] = []
    first = clients[0]
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(first.watch(nodes[0], nodes[1]))
        await eventually(has_run(tmp_path, "slow-too", 1))
        await eventually(has_called(first, 2))
        nodes[0].kill()
        await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")
        await eventually(has_run(tmp_path, "slow-too", 2))
        await eventually(has_called(first, 4))
        third.append(await asyncio.to_thread(start_with, steps))
        watching.cancel()
        nodes[1].kill()
        group.create_task(first.watch(third[0]))
        await eventually(has_run(tmp_path, "slow-too", 3))
        for word in ("slow", "slow-too"):
            (tmp_path / word).touch()
    await assert_right(database_url, clients, epoch=3)
    for number, word in enumerate(("slow", "slow-too"), 1):
        assert runs_of(tmp_path, word) == [[f"call_{number}", attempt, user] for attempt in "123"]
    restarted = [frame["text"] for frame in first.frames if frame["type"] == "turn.restarted"]
    assert restarted == ["", ""]
    head, *results, last = await stored_in(database_url, first.conversation_id)
    assert (head, last) == (("assistant", "", ["call_1", "call_2"]), ("assistant", ANSWER, None))
    assert sorted(results) == [("tool", "found slow", "call_1"), ("tool", "found slow-too", "call_2")]


def has_called(client: Client, calls: int) -> Callable[[], Any]:
    """Return a condition: the client has seen `calls` calls."""

    async def condition() -> bool:
        return sum(what == "call" for what, _ in called(client)) == calls

    return condition


async def test_what_a_model_said_before_its_calls_stands_and_is_not_said_again(
    start_node: StartNode, provider: Provider, database_url: str, tmp_path: Path, user: str
) -> None:
    settings = {**openai_environment(provider), "TOOLS": TOOLS, DIRECTORY: str(tmp_path), "LEASE_SECONDS": "1"}
    nodes = [start_node(**settings) for _ in range(2)]
    provider.replies.extend(replies([[("look_up", "slow")]], "Let me see. "))
    client = Client(user, QUESTION)

    async def is_in_the_middle() -> bool:
        return called(client) == [("call", "call_1")] and bool(runs_of(tmp_path, "slow"))

    await watched([client], nodes, [is_in_the_middle], (tmp_path / "slow").touch)
    await assert_right(database_url, [client], epoch=epoch_of(client))
    assert [frame["text"] for frame in client.frames if frame["type"] == "turn.restarted"] == ["Let me see. "]
    assert client.text == f"Let me see. {ANSWER}"
    assert await stored_in(database_url, client.conversation_id) == [
        ("assistant", "Let me see. ", ["call_1"]),
        ("tool", "found slow", "call_1"),
        ("assistant", ANSWER, None),
    ]
    assert len(provider.requests) == 2, "the model was asked again for what it had said"
    assert [message["role"] for message in provider.requests[1].body["messages"]] == ["user", "assistant", "tool"]


async def test_a_cancel_that_comes_while_nobody_runs_the_calls_ends_the_turn_without_them(
    start_with: StartWith, database_url: str, tmp_path: Path, user: str
) -> None:
    steps = [[("look_up", "apples")], [("look_up", "slow")]]
    dying, other = [start_with(steps, LEASE_SECONDS="300") for _ in range(2)]
    async with socket_to(dying, user) as socket, socket_to(other, user) as elsewhere:
        await socket.ask(QUESTION)
        frames = await socket.until("turn.tool_result")
        frames += await socket.until("turn.tool_call")
        conversation_id = frames[0]["conversation_id"]
        dying.kill()
        await sql(database_url, "UPDATE turns SET cancel_requested_at = now(), lease_expires_at = clock_timestamp()")
        await elsewhere.follow(conversation_id, frames[-1]["seq"])
        frames += await elsewhere.until(*TERMINAL)
    assert types_of(frames)[-2:] == ["restarted", "cancelled"]
    assert await stored_in(database_url, conversation_id) == [
        ("assistant", "", ["call_1"]),
        ("tool", "found apples", "call_1"),
        ("assistant", "", None),
    ]


@pytest.mark.parametrize(("agent", "pending"), [("forgetful", "[]"), ("attentive", '["2"]')])
async def test_only_an_agent_that_resumes_calls_is_given_those_that_are_pending(
    start_node: StartNode, database_url: str, user: str, agent: str, pending: str
) -> None:
    nodes = [start_node(AGENT=f"tests.agents.waiting_tools:{agent}", LEASE_SECONDS="1") for _ in range(2)]
    client = Client(user, QUESTION)

    async def is_in_the_middle() -> bool:
        return ("result", "1") in called(client)

    await watched([client], nodes, [is_in_the_middle], lambda: None)
    await assert_right(database_url, [client], epoch=2)
    assert client.text == pending


# At the start.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"TOOLS": "no_such_module:tools"}, ("TOOLS", "no_such_module")),
        ({"TOOLS": "tests.agents.waiting_tools:runs_of"}, ("TOOLS", "must be a list of functions")),
        ({"TOOLS": "tests.agents.waiting_tools:tools", "TOOL_STEPS_MAX": "0"}, ("TOOL_STEPS_MAX",)),
        ({"ECHO_TOOL_CALLS": "[{}]"}, ("ECHO_TOOL_CALLS", "must be a JSON list of steps")),
    ],
)
def test_serve_refuses_what_is_no_tool_in_one_line(
    database_url: str, settings: dict[str, str], words: tuple[str, ...]
) -> None:
    result = anynode("serve", **{**GOOD, "DATABASE_URL": database_url, **settings})
    assert_refused_in_one_line(result, *words)


async def test_a_tool_does_not_begin_before_its_call_is_committed(
    start_node: StartNode, database_url: str, user: str, tmp_path: Path
) -> None:
    """Else a node could die of it, and nobody would know under which id it has run."""
    script = [[{"name": name, "arguments": {"word": name}} for name in ("look_up", "block")]]
    settings = {"TOOLS": TOOLS, DIRECTORY: str(tmp_path), "ECHO_TOOL_CALLS": json.dumps(script), "LEASE_SECONDS": "60"}
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **settings)
        async with socket_to(node, user) as socket:
            hold = proxy.hold("before", "flush")
            await socket.ask(QUESTION)
            await hold.reached()
            watches = proxy.executions("watch")

            async def has_had_time() -> bool:
                assert not runs_of(tmp_path, "look_up")
                assert not runs_of(tmp_path, "block")
                return proxy.executions("watch") > watches + 3

            await eventually(has_had_time)
            hold.release()
            frames = await socket.until(*TERMINAL)
    assert frames[-1]["type"] == "turn.completed"
    assert [len(runs_of(tmp_path, word)) for word in ("look_up", "block")] == [1, 1]
