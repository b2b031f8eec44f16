"""A node dies in mid-turn and another goes on: one end, one text, no step twice, whatever the agent says each time."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT, question
from tests.conftest import StartNode
from tests.kit.exactness import Client
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql, text_of, token_for
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.provider import Reply, answer, delta, openai_environment, serve_provider
from tests.kit.stored import messages_of
from tests.kit.takeovers import assert_right, epoch_of, has, has_text_after_result
from tests.kit.transcripts import assert_all_was_shown, seen
from tests.kit.turn_requests import cancel, regenerate

SHORT_LEASE = {"LEASE_SECONDS": "1"}
LONG_LEASE = {"LEASE_SECONDS": "300"}


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), "MAX_ATTEMPTS": "100"}


@pytest.fixture(scope="module")
def other(
    module_database_url: str, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """The node that goes on."""
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), {**environment, **SHORT_LEASE}) as node:
        yield node


@pytest.fixture
def dying(module_database_url: str, environment: dict[str, str], tmp_path: Path) -> Iterator[NodeProcess]:
    """The node that does not."""
    with running_node(module_database_url, tmp_path, {**environment, **SHORT_LEASE}) as node:
        yield node


async def node_id_of(node: NodeProcess) -> str:
    """What it calls itself."""
    headers = {"Authorization": f"Bearer {token_for('operator')}"}
    async with socket_to(node, ready=False, headers=headers) as socket:
        return str((await socket.receive())["node_id"])


async def owner_of(database_url: str, nodes: Sequence[NodeProcess]) -> NodeProcess:
    """The node that runs the only turn that runs."""
    (row,) = await sql(database_url, "SELECT node FROM turns WHERE status = 'running'")
    (owner,) = [node for node in nodes if await node_id_of(node) == row["node"]]
    return owner


# Crowds.


@pytest.mark.parametrize("kills", [1, 2])
async def test_60_turns_go_on_when_nodes_are_killed(
    start_node: StartNode,
    database_url: str,
    environment: dict[str, str],
    strings: Strings,
    gate: str,
    user: str,
    kills: int,
) -> None:
    nodes = [start_node(**environment, LEASE_SECONDS="2") for _ in range(3)]
    names = [strings.name() for _ in range(60)]
    clients, followers = [], []
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            tool = [["words", 2], ["call", "1", "search", {}], ["mark", name], ["result", "1", "search", "found"]]
            client = Client(user, question(tool, [["chatter", gate], ["words", 1]]))
            follower = client.another()
            clients.append(client)
            followers.append(follower)
            rotated = [*nodes[number % 3 :], *nodes[: number % 3]] * 2
            # Both ask, and the one that comes first has the turn on its node.
            group.create_task(client.watch(*rotated))
            group.create_task(follower.watch(*rotated[1:]))

        async def are_all_in_their_last_step() -> bool:
            return all(has_text_after_result(client) for client in (*clients, *followers))

        await eventually(are_all_in_their_last_step)
        dead: list[str] = []

        async def is_nothing_left_to_the_dead() -> bool:
            rows = await sql(database_url, "SELECT FROM turns WHERE node = ANY ($1) AND status = 'running'", dead)
            return not rows

        for node in nodes[:kills]:
            dead.append(await node_id_of(node))
            node.kill()
            if node is not nodes[kills - 1]:

                async def is_one_taken_over() -> bool:
                    return bool(await sql(database_url, "SELECT FROM turns WHERE epoch > 1"))

                await eventually(is_one_taken_over)
        await eventually(is_nothing_left_to_the_dead)

        async def have_all_come_on() -> bool:
            """Everybody has seen the epoch that his turn is in by now."""
            rows = await sql(database_url, "SELECT conversation_id::text AS id, epoch FROM turns")
            epochs = {row["id"]: row["epoch"] for row in rows}
            return all(
                epochs[str(client.conversation_id)] == epoch_of(client) and has_text_after_result(client)
                for client in (*clients, *followers)
            )

        await eventually(have_all_come_on)
        strings.open(gate)
    restarted = 0
    for client, follower, name in zip(clients, followers, names, strict=True):
        messages = await assert_right(database_url, [client, follower])
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        assert strings.marks(name) == [1], "a tool that had answered was run again"
        restarted += epoch_of(client) > 1
    assert restarted >= 5 * kills
    assert len({client.text for client in clients}) == 60


# Steps.


async def killed(
    dying: NodeProcess, other: NodeProcess, strings: Strings, gate: str, client: Client, until: Sequence[str]
) -> Client:
    """Kill the client's node when the last frames are of these types; then open the gate, when another node goes on.
    Returns somebody who has followed the turn there from its beginning."""
    follower = client.another()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.watch(dying, other))
        await eventually(has(client, *until))
        group.create_task(follower.watch(other))
        await eventually(has(follower, *until))
        dying.kill()

        async def is_restarted() -> bool:
            return epoch_of(follower) == 2

        await eventually(is_restarted)
        strings.open(gate)
    return follower


async def test_completed_steps_are_given_to_the_next_attempt_and_not_done_again(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    names = [strings.name() for _ in range(3)]
    steps: list[list[Sequence[Any]]] = []
    for number, name in enumerate(names):
        id = str(number)
        call, result = ("call", id, "search", {"query": name}), ("result", id, "search", f"found {name}", number == 1)
        steps.append([("words", 2), call, ("mark", name), result])
    cut = strings.name()
    client = Client(user, question(*steps, [("words", 1), ("mark", cut), ("gate", gate), ("see",)]))
    follower = await killed(dying, other, strings, gate, client, ["turn.tool_result", "turn.delta"])
    messages = await assert_right(module_database_url, [client, follower], epoch=2)
    assert [strings.marks(name) for name in names] == [[1]] * 3
    assert strings.marks(cut) == [1, 2]
    roles = ["user", *["assistant", "tool"] * 3, "assistant"]
    assert [message["role"] for message in messages] == roles
    # What stood, and what the agent has been given of it.
    first = client.frames[: [frame["type"] for frame in client.frames].index("turn.restarted")]
    restarted = client.frames[len(first)]
    assert restarted["text"] == "".join(message["content"] for message in messages[1:6:2])
    assert text_of(first).startswith(restarted["text"])
    assert text_of(first) != restarted["text"]
    last = messages[-1]["content"]
    given = json.loads(last[last.index("{") :])
    assert given["attempt"] == 2
    assert given["partial"] == ""
    assert given["history"] == [["user", client.content]]
    expected: list[list[Any]] = []
    for number, name in enumerate(names):
        arguments = json.dumps({"query": name}, separators=(",", ":"))
        calls = [{"id": str(number), "type": "function", "function": {"name": "search", "arguments": arguments}}]
        expected.append(["assistant", messages[1 + 2 * number]["content"], calls, None, None])
        expected.append(["tool", f"found {name}", None, "search", str(number)])
    assert given["steps"] == expected


async def test_of_a_step_that_was_cut_between_two_results_the_first_one_stands(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    name = strings.name()
    step: list[Sequence[Any]] = [
        *(("words", 2), ("call", "1", "search", {}), ("call", "2", "search", {})),
        *(("mark", name), ("result", "2", "search", "found"), ("gate", gate), ("result", "1", "search", "late")),
    ]
    client = Client(user, question(step, [("see",)]))
    until = ["turn.tool_call", "turn.tool_call", "turn.tool_result"]
    follower = await killed(dying, other, strings, gate, client, until)
    messages = await assert_right(module_database_url, [client, follower], epoch=2)
    assert strings.marks(name) == [1]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    said, found = messages[1], messages[2]
    assert said["content"] != ""
    assert found["content"] == "found"
    assert next(frame["text"] for frame in client.frames if frame["type"] == "turn.restarted") == said["content"]
    steps = json.loads(messages[-1]["content"])["steps"]
    function = {"name": "search", "arguments": "{}"}
    assert steps == [
        ["assistant", said["content"], [{"id": "2", "type": "function", "function": function}], None, None],
        ["tool", "found", None, "search", "2"],
    ]
    stored = await sql(
        module_database_url,
        "SELECT tool_calls::text, tool_name, tool_call_id FROM messages WHERE conversation_id = $1 AND role <> 'user' "
        "ORDER BY position",
        uuid.UUID(str(client.conversation_id)),
    )
    assert json.loads(stored[0]["tool_calls"]) == steps[0][2]
    assert (stored[1]["tool_name"], stored[1]["tool_call_id"]) == ("search", "2")


async def test_a_call_that_was_not_answered_is_made_again(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    name = strings.name()
    step: list[Sequence[Any]] = [("words", 1), ("call", "1", "search", {}), ("mark", name), ("gate", gate)]
    step.append(("result", "1", "search", "x"))
    client = Client(user, question(step, [("see",)]))
    follower = await killed(dying, other, strings, gate, client, ["turn.delta", "turn.tool_call"])
    messages = await assert_right(module_database_url, [client, follower], epoch=2)
    assert strings.marks(name) == [1, 2]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    types = [frame["type"] for frame in client.frames]
    assert client.frames[types.index("turn.restarted")]["text"] == ""
    assert types.count("turn.tool_call") == 2
    assert types.count("turn.tool_result") == 1
    assert json.loads(messages[-1]["content"])["steps"] == []


async def test_an_answer_that_is_regenerated_goes_on_with_its_question_seen_once(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with socket_to(dying, user) as socket, socket_to(other, user) as elsewhere:
        asked = question([("see",), ("gate", gate)])
        strings.open(gate)
        frames = await socket.answer(asked)
        conversation_id = frames[0]["conversation_id"]
        (strings.directory / gate).unlink()
        await elsewhere.follow(conversation_id, 0)
        await elsewhere.until(*TERMINAL)
        await socket.send(regenerate(conversation_id))
        again = await elsewhere.until("turn.delta")
        dying.kill()
        again += await elsewhere.until("turn.restarted")
        strings.open(gate)
        again += await elsewhere.until(*TERMINAL)
        assert seen(again) == [["user", asked]]
        await assert_all_was_shown(module_database_url, frames + again)
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["status"] for message in messages] == ["completed", "superseded", "completed"]
    assert text_of(again) == messages[-1]["content"] != messages[1]["content"]


# Agents that continue.


async def test_the_echo_agent_goes_on_in_the_middle_of_a_sentence_also_when_two_nodes_die(
    start_node: StartNode, database_url: str, user: str
) -> None:
    tokens = 150
    settings = {"ECHO_TOKENS": str(tokens), "ECHO_TOKENS_PER_SECOND": "60", **SHORT_LEASE}
    nodes = [start_node(**settings) for _ in range(3)]
    client = Client(user, "go")
    followers = [client.another() for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for number, each in enumerate((client, *followers)):
            group.create_task(each.watch(*nodes[number:], *nodes * 2))
        alive = list(nodes)
        for said in (20, 70):

            async def has_said(said: int = said) -> bool:
                return all(f"w{said} " in each.text for each in (client, *followers))

            await eventually(has_said)
            owner = await owner_of(database_url, alive)
            owner.kill()
            alive.remove(owner)
    expected = "".join(f"w{number} " for number in range(tokens))
    assert client.text == expected
    await assert_right(database_url, [client, *followers], epoch=3)
    for each in (client, *followers):
        restarts = [number for number, frame in enumerate(each.frames) if frame["type"] == "turn.restarted"]
        assert len(restarts) == 2
        for number in restarts:
            assert each.frames[number]["text"] == text_of(each.frames[:number])
            assert expected.startswith(each.frames[number]["text"])


@pytest.mark.parametrize("continues", [True, False], ids=["continues", "begins again"])
async def test_a_model_is_given_what_it_had_said_if_the_settings_ask_for_it(
    start_node: StartNode, database_url: str, user: str, *, continues: bool
) -> None:
    async with serve_provider() as provider:
        settings = {**openai_environment(provider), "CONTINUE_PARTIAL": str(continues).lower()}
        dying, other = [start_node(**settings, **SHORT_LEASE) for _ in range(2)]
        provider.replies.append(Reply((delta(content="It is "), delta(content="not ")), then="hang"))
        provider.replies.append(answer("known ", "to me."))
        client = Client(user, "Why?")
        async with asyncio.TaskGroup() as group:
            group.create_task(client.watch(dying, other))

            async def has_begun() -> bool:
                return client.text == "It is not "

            await eventually(has_begun)
            dying.kill()
        await assert_right(database_url, [client], epoch=2)
        asked = [request.body["messages"] for request in provider.requests]
        the_question = {"role": "user", "content": "Why?"}
        prefix = {"role": "assistant", "content": "It is not "}
        assert asked == [[the_question], [the_question, prefix] if continues else [the_question]]
        assert client.text == ("It is not known to me." if continues else "known to me.")
        (restarted,) = (frame["text"] for frame in client.frames if frame["type"] == "turn.restarted")
        assert restarted == ("It is not " if continues else "")


# Turns that are not to go on.


async def test_a_cancel_that_a_node_did_not_live_to_see_is_honoured(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    name = strings.name()
    tool: list[Sequence[Any]] = [("words", 1), ("call", "1", "search", {}), ("result", "1", "search", "found")]
    asked = question(tool, [("mark", name), ("words", 3), ("gate", gate), ("words", 1)])
    async with socket_to(dying, user) as socket, socket_to(other, user) as elsewhere:
        await socket.ask(asked)
        frames = await socket.until("turn.tool_result")
        frames += await socket.until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        await elsewhere.follow(conversation_id, frames[-1]["seq"])
        dying.pause()
        await elsewhere.send(cancel(conversation_id))
        await elsewhere.send({"type": "ping"})
        frames += [frame for frame in await elsewhere.until("pong") if "seq" in frame]
        dying.kill()
        frames += await elsewhere.until(*TERMINAL)
        socket.drop()
    assert [frame["type"] for frame in frames][-2:] == ["turn.restarted", "turn.cancelled"]
    assert strings.marks(name) == [1]
    await assert_ended_as_it_was(module_database_url, frames, "cancelled")


async def assert_ended_as_it_was(database_url: str, frames: Sequence[Frame], status: str) -> None:
    """The turn was ended by its next node without another word: what it had said is kept, its step with a tool, too."""
    *before, restarted, end = frames
    await assert_all_was_shown(database_url, frames)
    messages = await messages_of(database_url, end["conversation_id"])
    assert [(message["role"], message["status"]) for message in messages] == [
        *(("user", "completed"), ("assistant", "completed"), ("tool", "completed"), ("assistant", status))
    ]
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert text_of(before) == restarted["text"] == text_of(frames) == "".join(said)
    assert end["message"]["content"] == said[-1] != ""
    assert end["message"]["status"] == status


async def test_a_turn_whose_nodes_die_too_often_fails_and_says_so(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    name = strings.name()
    settings = {**environment, **SHORT_LEASE, "MAX_ATTEMPTS": "1"}
    dying, other = start_node(**settings), start_node(**settings)
    tool: list[Sequence[Any]] = [("words", 1), ("call", "1", "search", {}), ("result", "1", "search", "found")]
    asked = question(tool, [("mark", name), ("words", 3), ("gate", gate), ("words", 1)])
    async with socket_to(dying, user) as socket, socket_to(other, user) as elsewhere:
        await socket.ask(asked)
        frames = await socket.until("turn.tool_result")
        frames += await socket.until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        dying.kill()
        await elsewhere.follow(conversation_id, frames[-1]["seq"])
        frames += await elsewhere.until(*TERMINAL)
        assert [frame["type"] for frame in frames][-2:] == ["turn.restarted", "turn.failed"]
        assert frames[-1]["error"]["code"] == "agent_failed"
        assert frames[-1]["error"]["retryable"] is True
        assert "interrupted" in frames[-1]["error"]["message"]
        assert strings.marks(name) == [1]
        await assert_ended_as_it_was(database_url, frames, "failed")
        # It may be asked for again.
        strings.open(gate)
        await elsewhere.send(regenerate(conversation_id))
        assert (await elsewhere.until(*TERMINAL))[-1]["type"] == "turn.completed"


# When.


async def test_the_node_of_a_follower_takes_a_lapsed_turn_over_before_its_next_beat(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    dying = start_node(**environment, **LONG_LEASE)
    with postgres_proxy(database_url) as proxy:
        other = start_node(proxy.url, **environment, **LONG_LEASE)
        client = Client(user, question([("words", 1), ("gate", gate), ("words", 1)]))
        follower = client.another()
        async with asyncio.TaskGroup() as group:
            group.create_task(client.watch(dying, other))
            await eventually(has(client, "turn.delta"))
            group.create_task(follower.watch(other))
            await eventually(has(follower, "turn.delta"))
            dying.kill()
            beats = proxy.executions("take_over")

            async def has_just_beaten() -> bool:
                return proxy.executions("take_over") > beats

            await eventually(has_just_beaten)
            watches = proxy.executions("watch")
            await sql(database_url, "UPDATE turns SET lease_expires_at = clock_timestamp()")
            await eventually(has(follower, "turn.restarted", "turn.delta"))
            # A node watches four times between two beats.
            assert proxy.executions("watch") - watches < 3
            strings.open(gate)
    await assert_right(database_url, [client, follower], epoch=2)


async def test_the_clients_of_a_node_that_was_frozen_for_longer_than_its_leases_miss_nothing(
    dying: NodeProcess, other: NodeProcess, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    """The clients never leave the node. One turn ends elsewhere while it is frozen; another runs on when it thaws."""
    soon = strings.name()
    ended, running = [Client(user, question([("chatter", name), ("words", 1)])) for name in (soon, gate)]
    theirs = {client: [client, client.another(), client.another()] for client in (ended, running)}
    elsewhere = {client: client.another() for client in (ended, running)}
    async with asyncio.TaskGroup() as group:
        for client in (ended, running):
            group.create_task(client.watch(dying))
            await eventually(has(client, "turn.delta"))
            for another in theirs[client][1:]:
                group.create_task(another.watch(dying))
            following = group.create_task(elsewhere[client].watch(other))
            for another in (*theirs[client], elsewhere[client]):
                await eventually(has(another, "turn.delta"))
            if client is ended:
                following_ended = following
        dying.pause()

        async def go_on_elsewhere() -> bool:
            return all(
                epoch_of(client) == 2 and client.frames[-1]["type"] == "turn.delta" for client in elsewhere.values()
            )

        await eventually(go_on_elsewhere)
        strings.open(soon)
        await following_ended
        assert {epoch_of(client) for clients in theirs.values() for client in clients} == {1}
        dying.resume()

        async def have_caught_up() -> bool:
            return all(client.frames[-1]["type"] in TERMINAL for client in theirs[ended]) and all(
                epoch_of(client) == 2 for client in theirs[running]
            )

        await eventually(have_caught_up)
        strings.open(gate)
    for client in (ended, running):
        await assert_right(module_database_url, [*theirs[client], elsewhere[client]], epoch=2)
