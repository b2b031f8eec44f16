"""A turn is stopped from any node, by its user alone, and what was said up to then is kept."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack

import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT, question
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.provider import Reply, delta, openai_environment, serve_provider
from tests.kit.sockets import sockets_to
from tests.kit.stored import assert_cancelled, messages_of, turns_of
from tests.kit.transcripts import assert_all_was_shown, nothing_has_come
from tests.kit.turn_requests import cancel

Nodes = Sequence[NodeProcess]

CHATTER = question([["chatter", "for ever"]])
SILENCE = question([["hang"]])
WORDS = question([["words", 3]])


@pytest.fixture(scope="module")
def nodes(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    strings = Strings(tmp_path_factory.mktemp("strings"))
    environment = {"AGENT": AGENT, DIRECTORY: str(strings.directory)}
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, environment)) for _ in range(3)]


async def begin(socket: Socket, content: str, until: str = "turn.delta") -> list[Frame]:
    """Start a turn in a new conversation; the frames up to the first of this type."""
    await socket.ask(content)
    return await socket.until(until)


@pytest.mark.parametrize("names_the_turn", [False, True])
async def test_a_turn_is_stopped_from_another_node_in_mid_stream_and_keeps_exactly_what_was_shown(
    nodes: Nodes, module_database_url: str, user: str, *, names_the_turn: bool
) -> None:
    async with AsyncExitStack() as stack:
        here, elsewhere, third = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        frames = await begin(here, CHATTER)
        conversation_id, turn_id = frames[0]["conversation_id"], frames[-1]["turn_id"]
        await elsewhere.follow(conversation_id, 0)
        followed = await elsewhere.until("turn.delta")
        followed += await elsewhere.until("turn.delta")
        await third.send(cancel(conversation_id, turn_id=turn_id if names_the_turn else None))
        followed += await elsewhere.until(*TERMINAL)
        frames += await here.until(*TERMINAL)
        for socket in (here, elsewhere, third):
            assert await nothing_has_come(socket)  # who cancels need not follow
    assert await assert_cancelled(module_database_url, frames, followed) != ""


async def test_a_turn_is_stopped_from_another_node_before_its_first_word(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        frames = await begin(here, SILENCE, "turn.started")
        conversation_id = frames[0]["conversation_id"]
        await elsewhere.send(cancel(conversation_id))
        frames += await here.until(*TERMINAL)
        assert await assert_cancelled(module_database_url, frames) == ""
        assert (await elsewhere.answer(WORDS, conversation_id))[-1]["type"] == "turn.completed"


async def test_what_was_said_before_a_tool_that_does_not_answer_is_kept(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    asked = question([["words", 2], ["call", "1", "search", {}], ["hang"]])
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        frames = await begin(here, asked, "turn.tool_call")
        await elsewhere.send(cancel(frames[0]["conversation_id"]))
        frames += await here.until(*TERMINAL)
    assert await assert_cancelled(module_database_url, frames) != ""
    messages = await messages_of(module_database_url, frames[0]["conversation_id"])
    assert [message["role"] for message in messages] == ["user", "assistant"]


async def test_completed_steps_are_kept_with_their_tools(nodes: Nodes, module_database_url: str, user: str) -> None:
    asked = question(
        [["words", 2], ["call", "1", "search", {}], ["result", "1", "search", "found"]],
        [["words", 1], ["hang"]],
    )
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        frames = await begin(here, asked, "turn.tool_result")
        before = text_of(frames)
        frames += await here.until("turn.delta")
        await elsewhere.send(cancel(frames[0]["conversation_id"]))
        frames += await here.until(*TERMINAL)
    await assert_all_was_shown(module_database_url, frames)
    messages = await messages_of(module_database_url, frames[0]["conversation_id"])
    assert [(message["role"], message["status"]) for message in messages] == [
        ("user", "completed"),
        ("assistant", "completed"),
        ("tool", "completed"),
        ("assistant", "cancelled"),
    ]
    assert messages[1]["content"] == before
    assert messages[1]["content"] + messages[3]["content"] == text_of(frames)
    assert messages[3]["content"] == frames[-1]["message"]["content"] != ""


async def test_30_that_cancel_one_turn_from_all_nodes_at_once_cancel_it_once(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, sockets_to(nodes, user, 30) as sockets:
        frames = await begin(here, CHATTER)
        conversation_id = frames[0]["conversation_id"]
        await asyncio.gather(*(socket.send(cancel(conversation_id)) for socket in sockets))
        frames += await here.until(*TERMINAL)
        for socket in sockets:
            assert await nothing_has_come(socket)
        assert await nothing_has_come(here)
    await assert_cancelled(module_database_url, frames)


async def test_a_cancel_that_meets_the_end_leaves_one_end(nodes: Nodes, module_database_url: str, user: str) -> None:
    """The turns end by themselves at about the time at which the cancel arrives: whatever came first counts."""
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        for number in range(15):
            frames = await begin(here, question([["paced", 1 + number, "{number} ", 0.003]]), "turn.started")
            await elsewhere.send(cancel(frames[0]["conversation_id"]))
            frames += await here.until(*TERMINAL)
            assert await nothing_has_come(here)
            await assert_all_was_shown(module_database_url, frames)
            end = frames[-1]
            assert end["type"] in ("turn.cancelled", "turn.completed")
            assert text_of(frames) == end["message"]["content"]
            statuses = await turns_of(module_database_url, end["conversation_id"])
            messages = await messages_of(module_database_url, end["conversation_id"])
            assert [messages[-1]["status"]] == statuses == [end["type"].removeprefix("turn.")]
            assert messages[-1]["content"] == text_of(frames)


# What is not there to be cancelled.


@pytest.mark.parametrize("names_the_turn", [False, True])
async def test_a_cancel_after_the_end_changes_nothing(
    nodes: Nodes, module_database_url: str, user: str, *, names_the_turn: bool
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        frames = await here.answer(WORDS)
        conversation_id, turn_id = frames[0]["conversation_id"], frames[-1]["turn_id"]
        await elsewhere.send(cancel(conversation_id, turn_id=turn_id if names_the_turn else None))
        assert await nothing_has_come(elsewhere)
        frames += await here.answer(WORDS, conversation_id)
        assert frames[-1]["type"] == "turn.completed"
    await assert_all_was_shown(module_database_url, frames)
    assert await turns_of(module_database_url, conversation_id) == ["completed", "completed"]


async def test_a_turn_that_is_over_is_not_taken_for_the_one_that_runs(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        frames = await here.answer(WORDS)
        conversation_id, over_id = frames[0]["conversation_id"], frames[-1]["turn_id"]
        await here.ask(CHATTER, conversation_id)
        running_id = (await here.until("turn.delta"))[-1]["turn_id"]
        await elsewhere.send(cancel(conversation_id, turn_id=over_id))
        assert await nothing_has_come(elsewhere)
        rows = await sql(
            module_database_url,
            "SELECT cancel_requested_at FROM turns WHERE id = ANY ($1)",
            [uuid.UUID(over_id), uuid.UUID(running_id)],
        )
        assert [row["cancel_requested_at"] for row in rows] == [None, None]
        await elsewhere.send(cancel(conversation_id, turn_id=running_id))
        assert (await here.until(*TERMINAL))[-1]["type"] == "turn.cancelled"
    assert await turns_of(module_database_url, conversation_id) == ["completed", "cancelled"]


async def test_what_does_not_exist_or_is_somebody_elses_is_not_found_and_runs_on(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with (
        socket_to(nodes[0], user) as here,
        socket_to(nodes[1], user) as elsewhere,
        socket_to(nodes[1], f"not-{user}") as stranger,
    ):
        frames = await begin(here, CHATTER)
        conversation_id, turn_id = frames[0]["conversation_id"], frames[-1]["turn_id"]
        other = (await elsewhere.answer(WORDS))[0]["conversation_id"]
        unknown_id = str(uuid.uuid4())

        async def refusal(socket: Socket, id: str, **fields: str | None) -> Frame:
            await socket.send(cancel(id, request_id="r-1", **fields))
            error = await socket.receive()
            assert (error.pop("code"), error.pop("conversation_id")) == ("not_found", id)
            assert (error.pop("request_id"), error.pop("retryable")) == ("r-1", False)
            return error

        # A turn that is not this conversation's, and conversations that are not this user's.
        await refusal(elsewhere, conversation_id, turn_id=unknown_id)
        await refusal(elsewhere, other, turn_id=turn_id)
        unknown = await refusal(elsewhere, unknown_id)
        assert await refusal(elsewhere, unknown_id, turn_id=turn_id) == unknown
        for named in (None, turn_id, unknown_id):
            assert await refusal(stranger, conversation_id, turn_id=named) == unknown
        rows = await sql(
            module_database_url, "SELECT status, cancel_requested_at FROM turns WHERE id = $1", uuid.UUID(turn_id)
        )
        assert [tuple(row) for row in rows] == [("running", None)]
        await elsewhere.send(cancel(conversation_id))
        assert (await here.until(*TERMINAL))[-1]["type"] == "turn.cancelled"


# The provider.


async def test_a_cancel_from_another_node_closes_the_request_to_the_provider(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with serve_provider() as provider:
        here, elsewhere = start_node(**openai_environment(provider)), start_node()
        for chunks, said in (((delta(content="It is "), delta(content="not")), "It is not"), ((), "")):
            provider.replies.append(Reply(chunks, then="hang"))
            provider.hanging.clear()
            provider.left.clear()
            async with socket_to(here, user) as socket, socket_to(elsewhere, user) as canceller:
                frames = await begin(socket, "Why?", "turn.started")
                await provider.hanging.wait()
                while text_of(frames) != said:
                    frames.append(await socket.receive())
                await canceller.send(cancel(frames[0]["conversation_id"]))
                frames += await socket.until(*TERMINAL)
                async with asyncio.timeout(15):
                    await provider.left.wait()
            assert await assert_cancelled(database_url, frames) == said
        assert len(provider.requests) == 2

        async def runs_nothing() -> bool:
            return await asyncio.to_thread(here.metric, "anynode_turns_running") == 0

        await eventually(runs_nothing)
