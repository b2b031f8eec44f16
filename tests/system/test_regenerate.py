"""The last question answered again, from any node: the old answer stays readable, and no agent sees it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT, question
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql, text_of
from tests.kit.sockets import sockets_to
from tests.kit.stored import messages_of, turns_of
from tests.kit.transcripts import assert_all_was_shown, merged_types, nothing_has_come, seen, take
from tests.kit.turn_requests import regenerate

Nodes = Sequence[NodeProcess]


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory)}


WORDS = question([["words", 3]])
SEE = question([["see"]])


async def regenerated(socket: Socket, conversation_id: str, **fields: Any) -> list[Frame]:
    """Regenerate, and take the frames up to the end of the new turn, or an error."""
    await socket.send(regenerate(conversation_id, **fields))
    return await socket.until(*TERMINAL, "error")


async def test_another_node_answers_the_question_again_in_a_turn_of_its_own(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        message_id = await here.ask(WORDS)
        first = await here.until(*TERMINAL)
        conversation_id = first[0]["conversation_id"]
        second = await regenerated(elsewhere, conversation_id)
        assert merged_types(second) == ["turn.started", "turn.delta", "turn.completed"]
        assert second[0]["message_id"] == message_id
        assert second[0]["seq"] == first[-1]["seq"] + 1
        assert second[0]["turn_id"] != first[1]["turn_id"]
        assert text_of(second) == second[-1]["message"]["content"] != text_of(first)
        # The client that asked first hears of it too.
        assert await take(here, second[-1]["seq"]) != []
        await elsewhere.follow(conversation_id)
        snapshot = await elsewhere.receive()
    shown = [(message["role"], message["content"], message["status"]) for message in snapshot["messages"]]
    assert shown == [
        ("user", WORDS, "completed"),
        ("assistant", text_of(first), "superseded"),
        ("assistant", text_of(second), "completed"),
    ]
    turn_ids = [message["turn_id"] for message in snapshot["messages"]]
    assert turn_ids == [second[0]["turn_id"], first[1]["turn_id"], second[0]["turn_id"]]
    await messages_of(module_database_url, conversation_id)
    await assert_all_was_shown(module_database_url, first + second)
    assert await turns_of(module_database_url, conversation_id) == ["completed", "completed"]


async def test_the_agent_sees_the_question_once_and_none_of_the_old_answers(nodes: Nodes, user: str) -> None:
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        before = await sockets[0].answer(WORDS)
        conversation_id = before[0]["conversation_id"]
        await sockets[0].answer(SEE, conversation_id)
        expected = [["user", WORDS], ["assistant", text_of(before)], ["user", SEE]]
        for number in range(3):
            async with socket_to(nodes[number % 2], user) as socket:
                last = await regenerated(socket, conversation_id)
                assert seen(last) == expected
        async with socket_to(nodes[1], user) as socket:
            after = await socket.answer(SEE, conversation_id)
            assert seen(after) == [*expected, ["assistant", text_of(last)], ["user", SEE]]


async def test_an_answer_with_tools_is_superseded_as_a_whole(nodes: Nodes, module_database_url: str, user: str) -> None:
    tools = question(
        [["words", 1], ["call", "1", "search", {}], ["result", "1", "search", "found"]],
        [["see"]],
    )
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        first = await here.answer(tools)
        conversation_id = first[0]["conversation_id"]
        second = await regenerated(elsewhere, conversation_id)
        after = await elsewhere.answer(SEE, conversation_id)
    messages = await messages_of(module_database_url, conversation_id)
    assert [(message["role"], message["status"]) for message in messages] == [
        ("user", "completed"),
        *[(role, "superseded") for role in ("assistant", "tool", "assistant")],
        *[(role, "completed") for role in ("assistant", "tool", "assistant")],
        ("user", "completed"),
        ("assistant", "completed"),
    ]
    assert json.loads(second[-1]["message"]["content"])["history"] == [["user", tools]]
    assert [role for role, _ in seen(after)] == ["user", "assistant", "tool", "assistant", "user"]


# Which question.


async def test_the_question_may_be_named(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        old_id = await here.ask(WORDS)
        conversation_id = (await here.until(*TERMINAL))[0]["conversation_id"]
        last_id = await here.ask(WORDS, conversation_id)
        await here.until(*TERMINAL)
        assert (await regenerated(elsewhere, conversation_id, message_id=last_id))[-1]["type"] == "turn.completed"
        for wrong_id in (old_id, "unknown", str(uuid.uuid4())):
            (error,) = await regenerated(elsewhere, conversation_id, message_id=wrong_id, request_id="r-1")
            assert (error["code"], error["retryable"]) == ("role_order", False)
            assert (error["request_id"], error["conversation_id"]) == ("r-1", conversation_id)
        assert await nothing_has_come(elsewhere)
    assert await turns_of(module_database_url, conversation_id) == ["completed"] * 3


async def test_the_question_of_another_conversation_is_not_the_last_of_this_one(nodes: Nodes, user: str) -> None:
    async with socket_to(nodes[0], user) as socket:
        other_id = await socket.ask(WORDS)
        await socket.until(*TERMINAL)
        conversation_id = (await socket.answer(WORDS))[0]["conversation_id"]
        (error,) = await regenerated(socket, conversation_id, message_id=other_id)
        assert error["code"] == "role_order"


async def test_where_there_is_no_question_nothing_is_answered(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    conversation_id = str(uuid.uuid4())
    await sql(module_database_url, "INSERT INTO users (id) VALUES ($1)", user)
    statement = "INSERT INTO conversations (id, user_id) VALUES ($1, $2)"
    await sql(module_database_url, statement, uuid.UUID(conversation_id), user)
    async with socket_to(nodes[0], user) as socket:
        for fields in ({}, {"message_id": "m"}):
            (error,) = await regenerated(socket, conversation_id, **fields)
            assert (error["code"], error["retryable"]) == ("role_order", False)
    assert await turns_of(module_database_url, conversation_id) == []


async def test_somebody_elses_conversation_is_like_one_that_does_not_exist(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], f"not-{user}") as stranger:
        message_id = await here.ask(WORDS)
        conversation_id = (await here.until(*TERMINAL))[0]["conversation_id"]
        unknown_id = str(uuid.uuid4())
        for fields in ({}, {"message_id": message_id}):
            (theirs,) = await regenerated(stranger, conversation_id, **fields)
            (unknown,) = await regenerated(stranger, unknown_id, **fields)
            assert theirs == {**unknown, "conversation_id": conversation_id}
            assert unknown["code"] == "not_found"
        assert await nothing_has_come(here)
        assert await nothing_has_come(stranger)
    assert await turns_of(module_database_url, conversation_id) == ["completed"]


# At the same time.


async def test_while_a_turn_runs_on_another_node_it_is_busy(nodes: Nodes, strings: Strings, user: str) -> None:
    gate = strings.name()
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        message_id = await here.ask(question([["words", 1], ["gate", gate]]))
        conversation_id = (await here.until("turn.delta"))[0]["conversation_id"]
        for fields in ({}, {"message_id": message_id}, {"message_id": "another"}):
            (error,) = await regenerated(elsewhere, conversation_id, **fields)
            assert (error["code"], error["retryable"]) == ("conversation_busy", True)
        strings.open(gate)
        end = (await here.until(*TERMINAL))[-1]
        assert end["type"] == "turn.completed"
        assert (await regenerated(elsewhere, conversation_id))[-1]["type"] == "turn.completed"


async def test_of_20_at_once_one_begins_a_turn(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str
) -> None:
    gate = strings.name()
    async with sockets_to(nodes, user, 20) as sockets:
        strings.open(gate)
        frames = await sockets[0].answer(question([["gate", gate], ["words", 2]]))
        (strings.directory / gate).unlink()
        conversation_id = frames[0]["conversation_id"]
        await sockets[0].send({"type": "conversation.unfollow", "conversation_id": conversation_id})
        await asyncio.gather(*(socket.send(regenerate(conversation_id)) for socket in sockets))
        first = await asyncio.gather(*(socket.receive() for socket in sockets))
        assert sorted(str(frame.get("code", frame["type"])) for frame in first) == [
            *["conversation_busy"] * 19,
            "turn.started",
        ]
        strings.open(gate)
        (winner,) = (number for number, frame in enumerate(first) if frame["type"] == "turn.started")
        frames += [first[winner], *await sockets[winner].until(*TERMINAL)]
    await assert_all_was_shown(module_database_url, frames)
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["status"] for message in messages] == ["completed", "superseded", "completed"]
    assert await turns_of(module_database_url, conversation_id) == ["completed", "completed"]


async def test_20_that_insist_are_done_one_after_another(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with sockets_to(nodes, user, 20) as sockets:
        conversation_id = (await sockets[0].answer(WORDS))[0]["conversation_id"]

        async def insist(socket: Socket) -> None:
            while True:
                await socket.send(regenerate(conversation_id, request_id="mine"))
                await socket.send({"type": "ping", "request_id": "mine"})
                answers = await socket.until("pong")
                errors = [frame["code"] for frame in answers if frame["type"] == "error"]
                if not errors:
                    return
                assert errors == ["conversation_busy"]

        await asyncio.gather(*(insist(socket) for socket in sockets))

        async def is_over() -> bool:
            return "running" not in await turns_of(module_database_url, conversation_id)

        await eventually(is_over)
        async with socket_to(nodes[0], user) as socket:
            await socket.follow(conversation_id, 0)
            frames: list[Frame] = []
            while merged_types(frames).count("turn.completed") < 21:
                frames.append(await socket.receive())
    await assert_all_was_shown(module_database_url, frames)
    assert await turns_of(module_database_url, conversation_id) == ["completed"] * 21
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["status"] for message in messages] == ["completed", *["superseded"] * 20, "completed"]
    assert messages[0]["turn_id"] == messages[-1]["turn_id"]
    assert len({message["content"] for message in messages}) == 22


# After a turn that said nothing.


async def test_a_question_whose_turn_failed_without_a_word_is_seen_again(nodes: Nodes, user: str) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        asked = question([["raise", "as the question asks"]])
        first = await here.answer(asked)
        conversation_id = first[0]["conversation_id"]
        assert (first[-1]["type"], first[-1]["message"]["content"]) == ("turn.failed", "")
        second = await regenerated(elsewhere, conversation_id)
        assert (second[0]["type"], second[-1]["type"]) == ("turn.started", "turn.failed")
        # It is left out with its question, both times; and then both answers are shown to people.
        assert seen(await elsewhere.answer(SEE, conversation_id)) == [["user", SEE]]
        await elsewhere.follow(conversation_id)
        snapshot = (await elsewhere.until("conversation.snapshot"))[-1]
        statuses = [message["status"] for message in snapshot["messages"]]
        assert statuses == ["completed", "superseded", "failed", "completed", "completed"]


async def test_a_question_whose_turn_was_cancelled_before_its_first_word_is_answered_by_the_next(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str
) -> None:
    gate = strings.name()
    asked = question([["gate", gate], ["see"]])
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        await here.ask(asked)
        conversation_id = (await here.until("turn.started"))[0]["conversation_id"]
        await elsewhere.send({"type": "turn.cancel", "conversation_id": conversation_id})
        end = (await here.until(*TERMINAL))[-1]
        assert (end["type"], end["message"]["content"]) == ("turn.cancelled", "")
        strings.open(gate)
        answer = await regenerated(elsewhere, conversation_id)
        assert seen(answer) == [["user", asked]]
        await take(here, answer[-1]["seq"])
        after = await here.answer(SEE, conversation_id)
        assert seen(after) == [["user", asked], ["assistant", text_of(answer)], ["user", SEE]]
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["status"] for message in messages] == [
        *("completed", "superseded", "completed", "completed", "completed")
    ]


# What the others notice, and what comes next.


async def test_followers_on_all_nodes_hear_of_it(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(socket_to(node, user)) for node in (*nodes, *nodes)]
        async with socket_to(nodes[0], user) as sender:
            frames = await sender.answer(WORDS)
        conversation_id, last_seq = frames[0]["conversation_id"], frames[-1]["seq"]
        for follower in followers:
            await follower.follow(conversation_id, last_seq)
            assert await nothing_has_come(follower)
        for number in range(4):
            async with socket_to(nodes[number % 2], user) as sender:
                again = await regenerated(sender, conversation_id)
            heard = [await take(follower, again[-1]["seq"]) for follower in followers]
            assert [frames[-1] for frames in heard] == [again[-1]] * 4
            assert {text_of(frames) for frames in heard} == {text_of(again)}
            assert {frames[0]["type"] for frames in heard} == {"turn.started"}
            frames += again
        for follower in followers:
            assert await nothing_has_come(follower)
    await assert_all_was_shown(module_database_url, frames)


async def test_the_question_that_is_sent_again_afterwards_is_followed_from_its_newest_turn_on(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str
) -> None:
    gate = strings.name()
    strings.open(gate)
    asked = question([["words", 1], ["gate", gate], ["words", 1]])
    async with socket_to(nodes[0], user) as here:
        message_id = await here.ask(asked)
        conversation_id = (await here.until(*TERMINAL))[0]["conversation_id"]
        (strings.directory / gate).unlink()
        async with socket_to(nodes[1], user) as elsewhere:
            await elsewhere.send(regenerate(conversation_id))
            begun = await elsewhere.until("turn.delta")
        for again_id, node in ((None, nodes[0]), (conversation_id, nodes[1])):
            async with socket_to(node, user) as socket:
                await socket.ask(asked, again_id, message_id)
                assert merged_types(await socket.until("turn.delta")) == ["turn.started", "turn.delta"]
        strings.open(gate)
        async with socket_to(nodes[0], user) as socket:
            frames = await socket.answer(asked, None, message_id)
    assert (frames[0]["type"], frames[0]["turn_id"]) == ("turn.started", begun[0]["turn_id"])
    assert frames[-1]["type"] == "turn.completed"
    assert text_of(frames).startswith(text_of(begun))
    assert await turns_of(module_database_url, conversation_id) == ["completed", "completed"]


async def test_the_next_message_continues_the_newest_answer(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        conversation_id = (await here.answer(WORDS))[0]["conversation_id"]
        again = await regenerated(elsewhere, conversation_id)
        after = await elsewhere.answer(SEE, conversation_id)
        assert merged_types(after)[:2] == ["message.created", "turn.started"]
        assert after[0]["seq"] == again[-1]["seq"] + 1
        assert seen(after) == [["user", WORDS], ["assistant", text_of(again)], ["user", SEE]]
    # Another socket: `here` may still be sent the last two turns, which its node hears of a moment later.
    async with socket_to(nodes[0], user) as late:
        await late.follow(conversation_id, 0)
        frames: list[Frame] = []
        while merged_types(frames).count("turn.completed") < 3:
            frames.append(await late.receive())
    await assert_all_was_shown(module_database_url, frames)


async def test_superseded_answers_leave_room_for_the_question(
    start_node: StartNode, environment: dict[str, str], user: str
) -> None:
    """HISTORY_MESSAGES_MAX bounds what an agent gets to see; it does not see them, so they must not count."""
    node = start_node(**environment, HISTORY_MESSAGES_MAX="3")
    async with socket_to(node, user) as socket:
        conversation_id = (await socket.answer(SEE))[0]["conversation_id"]
        for _ in range(6):
            again = await regenerated(socket, conversation_id)
            assert seen(again) == [["user", SEE]]
        after = await socket.answer(SEE, conversation_id)
    assert seen(after) == [["user", SEE], ["assistant", text_of(again)], ["user", SEE]]
