"""`if_busy: interrupt`: a message stops the turn that runs, on whatever node, and is answered in its place."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT, question
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, Frame, NodeProcess, socket_to, text_of
from tests.kit.sockets import sockets_to
from tests.kit.stored import messages_of, turns_of
from tests.kit.transcripts import assert_all_was_shown, nothing_has_come, seen, take
from tests.kit.turn_requests import interrupt

Nodes = Sequence[NodeProcess]

CHATTER = question([["chatter", "for ever"]])
SILENCE = question([["hang"]])
SEE = question([["see"]])


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory)}


async def test_a_message_to_another_node_stops_the_turn_and_is_answered(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        await here.ask(CHATTER)
        frames = await here.until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        await interrupt(elsewhere, conversation_id, SEE)
        answer = await elsewhere.until(*TERMINAL, "error")
        stopped = frames + await here.until(*TERMINAL)
        assert stopped[-1]["type"] == "turn.cancelled"
        assert text_of(stopped) == stopped[-1]["message"]["content"] != ""
        assert seen(answer) == [["user", CHATTER], ["assistant", text_of(stopped)], ["user", SEE]]
        assert (answer[0]["type"], answer[0]["seq"]) == ("message.created", stopped[-1]["seq"] + 1)
        # The follower of the first turn goes on to the next.
        rest = await take(here, answer[-1]["seq"])
        assert rest[-1] == answer[-1]
    await assert_all_was_shown(module_database_url, stopped + rest)
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["status"] for message in messages] == ["completed", "cancelled", "completed", "completed"]
    assert await turns_of(module_database_url, conversation_id) == ["cancelled", "completed"]


async def test_a_turn_that_has_said_nothing_is_left_out_of_what_the_next_one_sees(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], user) as elsewhere:
        await here.ask(SILENCE)
        conversation_id = (await here.until("turn.started"))[0]["conversation_id"]
        await interrupt(elsewhere, conversation_id, SEE)
        assert seen(await elsewhere.until(*TERMINAL, "error")) == [["user", SEE]]
    assert await turns_of(module_database_url, conversation_id) == ["cancelled", "completed"]


async def test_of_several_at_once_each_is_admitted_and_the_last_one_is_answered(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str
) -> None:
    gate = strings.name()
    async with sockets_to(nodes, user, 6) as sockets:
        await sockets[0].ask(CHATTER)
        frames = await sockets[0].until("turn.delta")
        conversation_id = frames[0]["conversation_id"]
        contents = [question([["words", number], ["gate", gate], ["words", 1]]) for number in range(1, 6)]
        await asyncio.gather(
            *(
                interrupt(socket, conversation_id, content)
                for socket, content in zip(sockets[1:], contents, strict=True)
            )
        )

        async def are_all_admitted() -> bool:
            return len(await turns_of(module_database_url, conversation_id)) == 6

        await eventually(are_all_admitted)
        strings.open(gate)
        while [frame["type"] for frame in frames if frame["type"] in TERMINAL] != [
            *["turn.cancelled"] * 5,
            "turn.completed",
        ]:
            frames.append(await sockets[0].receive())
            assert frames[-1]["type"] != "error", frames[-1]
        for socket in sockets[1:]:
            own = await take(socket, frames[-1]["seq"])
            assert "error" not in {frame["type"] for frame in own}
    await assert_all_was_shown(module_database_url, frames)
    assert await turns_of(module_database_url, conversation_id) == [*["cancelled"] * 5, "completed"]
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 6
    assert sorted(message["content"] for message in messages if message["role"] == "user") == sorted(
        [CHATTER, *contents]
    )


async def test_the_same_message_sent_to_both_nodes_stops_the_turn_once_and_not_itself(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with sockets_to(nodes, user, 8) as sockets:
        await sockets[0].ask(CHATTER)
        conversation_id = (await sockets[0].until("turn.delta"))[0]["conversation_id"]
        message_id = str(uuid.uuid4())
        await asyncio.gather(
            *(interrupt(socket, conversation_id, CHATTER, message_id) for socket in sockets[1:]),
        )
        shown = await asyncio.gather(*(socket.until("turn.delta") for socket in sockets[1:]))
        assert {frames[0]["type"] for frames in shown} == {"message.created"}
        # And once more, while it runs.
        await interrupt(sockets[1], conversation_id, CHATTER, message_id)
        again = await sockets[1].until("message.created")
        assert again[-1] == shown[0][0]
        assert await turns_of(module_database_url, conversation_id) == ["cancelled", "running"]
        await sockets[1].send({"type": "turn.cancel", "conversation_id": conversation_id})
        await asyncio.gather(*(socket.until("turn.cancelled") for socket in sockets))
    assert await turns_of(module_database_url, conversation_id) == ["cancelled", "cancelled"]
    messages = await messages_of(module_database_url, conversation_id)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


async def test_somebody_elses_turn_is_not_found_and_runs_on(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with socket_to(nodes[0], user) as here, socket_to(nodes[1], f"not-{user}") as stranger:
        await here.ask(CHATTER)
        conversation_id = (await here.until("turn.delta"))[0]["conversation_id"]
        await interrupt(stranger, conversation_id, SEE)
        assert (await stranger.receive())["code"] == "not_found"
        assert await turns_of(module_database_url, conversation_id) == ["running"]
        await here.send({"type": "turn.cancel", "conversation_id": conversation_id})
        await here.until("turn.cancelled")
        assert await nothing_has_come(here)


@pytest.mark.parametrize("is_paused", [False, True], ids=["killed", "paused"])
async def test_a_message_waits_for_the_lease_of_a_node_that_cannot_stop_its_turn(
    start_node: StartNode, database_url: str, environment: dict[str, str], user: str, *, is_paused: bool
) -> None:
    gone, other = [start_node(**environment, LEASE_SECONDS="1") for _ in range(2)]
    async with socket_to(gone, user) as here, socket_to(other, user) as elsewhere, socket_to(other, user) as follower:
        await here.ask(CHATTER)
        conversation_id = (await here.until("turn.delta"))[0]["conversation_id"]
        await follower.follow(conversation_id, 0)
        frames = await follower.until("turn.delta")
        if is_paused:
            gone.pause()
        else:
            gone.kill()
        await interrupt(elsewhere, conversation_id, SEE)
        answer = await elsewhere.until(*TERMINAL, "error")
        frames += await take(follower, answer[-1]["seq"])
        if is_paused:
            gone.resume()
            shown: list[Frame] = []  # by the one that was never told that its node was away
            while not shown or shown[-1]["type"] != "turn.completed":
                shown.append(await here.receive())
            assert shown[-1] == answer[-1]
        here.drop()
    types = [frame["type"] for frame in frames]
    assert types.count("turn.restarted") == 1
    assert [type for type in types if type in TERMINAL] == ["turn.cancelled", "turn.completed"]
    (stopped,) = (frame["message"]["content"] for frame in frames if frame["type"] == "turn.cancelled")
    assert stopped != ""
    assert seen(answer) == [["user", CHATTER], ["assistant", stopped], ["user", SEE]]
    await assert_all_was_shown(database_url, frames)
    assert await turns_of(database_url, conversation_id) == ["cancelled", "completed"]
