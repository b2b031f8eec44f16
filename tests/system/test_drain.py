"""A node is sent away under load: nothing new begins there, what runs ends or goes on elsewhere, and it exits."""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT, question
from tests.conftest import StartNode
from tests.kit.device import Device
from tests.kit.exactness import Client
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.sockets import narrow_socket
from tests.kit.stored import assert_cancelled, messages_of, turns_of
from tests.kit.takeovers import assert_right, epoch_of, has, has_text_after_result
from tests.kit.transcripts import assert_all_was_shown
from tests.kit.turn_requests import cancel, interrupt, regenerate

# What goes on within a test's time has not waited for a lease to run out.
LEASE = {"LEASE_SECONDS": "300"}


@pytest.fixture
def strings(tmp_path: Path) -> Strings:
    return Strings(tmp_path / "strings")


@pytest.fixture
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), **LEASE}


def terminate(node: NodeProcess, number: int = signal.SIGTERM) -> None:
    """Ask the node to go."""
    node.process.send_signal(number)


async def exit_status(node: NodeProcess) -> int:
    """Wait for the node to have gone."""
    return await asyncio.to_thread(node.process.wait, 30)


def is_draining(node: NodeProcess) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return (await asyncio.to_thread(node.get, "/readyz"))[0] == 503

    return condition


def is_in_last_step(client: Client) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        return has_text_after_result(client)

    return condition


def has_come_on(client: Client, nodes: int) -> Callable[[], Awaitable[object]]:
    """Return a condition: the client has left `nodes` nodes, and has seen more since."""

    async def condition() -> bool:
        return len(client.cursors) == nodes and client.cursor > client.cursors[-1]

    return condition


def chatter(gate: str, name: str) -> str:
    """A question with a step that calls a tool, and one that talks up to a gate."""
    tool: list[Sequence[Any]] = [("words", 1), ("call", "1", "search", {}), ("mark", name)]
    return question([*tool, ("result", "1", "search", "found")], [("chatter", gate), ("words", 1)])


async def error_of(socket: Socket) -> Frame:
    """The next frame, which is an error."""
    frame = await socket.receive()
    assert frame["type"] == "error", frame
    return frame


async def test_turns_end_on_the_node_that_goes_while_their_clients_follow_them_elsewhere(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving, other = [start_node(**environment, DRAIN_SECONDS="120") for _ in range(2)]
    names = [strings.name() for _ in range(16)]
    clients = [Client(user, chatter(gate, name)) for name in names]
    async with asyncio.TaskGroup() as group:
        for number, client in enumerate(clients):
            group.create_task(client.watch(*(leaving, other) if number % 4 else (other,)))
        for client in clients:
            await eventually(is_in_last_step(client))
        cancelled = Client(user, question([("chatter", "never")]))
        watching = asyncio.create_task(cancelled.watch(leaving))
        await eventually(has(cancelled, "turn.delta"))
        async with socket_to(leaving, user) as socket, socket_to(other, user) as elsewhere:
            terminate(leaving)
            goaway = await socket.receive()
            assert (goaway["type"], goaway["reason"]) == ("goaway", "restarting")
            # Nothing new, of any kind, while the connection lasts.
            await socket.ask("one more", clients[0].conversation_id)
            await socket.send(regenerate(str(clients[0].conversation_id)))
            for error in (await error_of(socket), await error_of(socket)):
                assert (error["code"], error["retryable"]) == ("draining", True)
            assert await socket.closed() == 1012
            assert (await asyncio.to_thread(leaving.get, "/readyz"))[0] == 503
            assert (await asyncio.to_thread(leaving.get, "/livez"))[0] == 200
            assert (await asyncio.to_thread(other.get, "/readyz"))[0] == 200
            async with socket_to(leaving, user, ready=False) as refused:
                assert await refused.closed() == 1012
            # It still hears of what is asked of its turns elsewhere.
            with pytest.raises(AssertionError, match="nowhere to go"):
                await watching
            await elsewhere.send(cancel(str(cancelled.conversation_id)))
            await elsewhere.follow(str(cancelled.conversation_id), cancelled.cursor)
            cancelled.frames += await elsewhere.until(*TERMINAL)
        assert await assert_cancelled(database_url, cancelled.frames) != ""
        for number, client in enumerate(clients):
            await eventually(has_come_on(client, 1) if number % 4 else has(client, "turn.delta"))
        assert leaving.process.poll() is None
        strings.open(gate)
    assert await exit_status(leaving) == 0
    for client, name in zip(clients, names, strict=True):
        await assert_right(database_url, [client], epoch=1)
        assert strings.marks(name) == [1]
    assert other.metric("anynode_turns_taken_over_total") == 0
    assert await sql(database_url, "SELECT FROM messages WHERE content = 'one more'") == []


async def test_turns_that_outlast_the_drain_are_handed_over_at_once_and_the_others_are_not(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    # Nobody has died of them: that is no attempt.
    settings = {**environment, "MAX_ATTEMPTS": "1"}
    leaving, other = start_node(**settings, DRAIN_SECONDS="3"), start_node(**settings)
    soon = strings.name()
    names = [strings.name() for _ in range(12)]
    clients = [Client(user, chatter(gate if number % 2 else soon, name)) for number, name in enumerate(names)]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.watch(leaving, other))
        for client in clients:
            await eventually(is_in_last_step(client))
        terminate(leaving)
        strings.open(soon)

        async def are_handed_over() -> bool:
            return all(epoch_of(client) == 2 and client.frames[-1]["type"] == "turn.delta" for client in clients[1::2])

        await eventually(are_handed_over)
        strings.open(gate)
    assert await exit_status(leaving) == 0
    for number, (client, name) in enumerate(zip(clients, names, strict=True)):
        await assert_right(database_url, [client], epoch=1 + number % 2)
        assert strings.marks(name) == [1]
    assert other.metric("anynode_turns_taken_over_total") == 6


async def test_neither_a_client_that_never_reads_nor_an_agent_that_does_not_stop_holds_up_the_exit(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    settings = {**environment, "ANSWER_BYTES_MAX": "67108864"}
    leaving, other = start_node(**settings, DRAIN_SECONDS="1"), start_node(**settings)
    stubborn = Client(user, question([("words", 1), ("hold", "never", 1), ("words", 1)]))
    async with AsyncExitStack() as stack:
        lazy = await narrow_socket(stack, leaving, user)
        await lazy.ask(question([("repeat", 1500, "x" * 5000), ("gate", gate), ("words", 1)]))
        async with asyncio.TaskGroup() as group:
            group.create_task(stubborn.watch(leaving, other))
            await eventually(has(stubborn, "turn.delta"))

            async def has_said_much() -> object:
                said = "SELECT FROM events GROUP BY turn_id HAVING sum(length(payload::text)) > 7500000"
                return await sql(database_url, said)

            await eventually(has_said_much)
            terminate(leaving)
            assert await exit_status(leaving) == 0
            strings.open(gate)
        lazy.drop()
    await assert_right(database_url, [stubborn], epoch=2)

    async def are_over() -> bool:
        rows = await sql(database_url, "SELECT status, epoch FROM turns")
        return sorted(tuple(row) for row in rows) == [("completed", 2)] * 2

    await eventually(are_over)


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
async def test_a_second_signal_ends_the_drain_and_hands_over_at_once(
    start_node: StartNode,
    database_url: str,
    environment: dict[str, str],
    strings: Strings,
    gate: str,
    user: str,
    numbers: Sequence[signal.Signals],
) -> None:
    leaving, other = start_node(**environment, DRAIN_SECONDS="3600"), start_node(**environment)
    clients = [Client(user, chatter(gate, strings.name())) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.watch(leaving, other))
        for client in clients:
            await eventually(is_in_last_step(client))
        terminate(leaving, numbers[0])
        for client in clients:
            await eventually(has_come_on(client, 1))
        assert {epoch_of(client) for client in clients} == {1}
        terminate(leaving, numbers[1])
        assert await exit_status(leaving) == 0

        async def are_handed_over() -> bool:
            return all(epoch_of(client) == 2 for client in clients)

        await eventually(are_handed_over)
        strings.open(gate)
    for client in clients:
        await assert_right(database_url, [client], epoch=2)


# What is under way when the node is sent away.


@pytest.mark.parametrize("is_late", [False, True], ids=["while its client is there", "after its client has gone"])
async def test_a_message_that_is_just_being_admitted_is_not_left_to_a_lease(
    start_node: StartNode,
    database_url: str,
    environment: dict[str, str],
    strings: Strings,
    gate: str,
    user: str,
    *,
    is_late: bool,
) -> None:
    """The node hears of an admission only after it has been sent away."""
    with postgres_proxy(database_url) as proxy:
        leaving, other = start_node(proxy.url, **environment, DRAIN_SECONDS="2"), start_node(**environment)
        client = Client(user, question([("words", 3), ("gate", gate), ("words", 1)]))
        hold = proxy.hold("after", "admit")
        async with asyncio.TaskGroup() as group:
            group.create_task(client.watch(leaving, other))
            await hold.reached()
            terminate(leaving)
            await eventually(is_draining(leaving))
            if is_late:

                async def has_left() -> bool:
                    return len(client.cursors) == 1

                await eventually(has_left)
            hold.release()
            assert await exit_status(leaving) == 0
            strings.open(gate)
        await assert_right(database_url, [client])


async def test_a_message_that_waits_to_interrupt_does_not_begin_on_a_node_that_goes(
    start_node: StartNode, database_url: str, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving, other = start_node(**environment, DRAIN_SECONDS="2"), start_node(**environment)
    asked = question([("gate", gate), ("words", 1)])
    async with socket_to(other, user) as elsewhere:
        await elsewhere.ask(question([("chatter", "never")]))
        conversation_id = (await elsewhere.until("turn.delta"))[0]["conversation_id"]
        async with socket_to(leaving, user) as socket:
            other.pause()
            message_id = await interrupt(socket, conversation_id, asked)

            async def is_asked_to_stop() -> object:
                return await sql(database_url, "SELECT FROM turns WHERE cancel_requested_at IS NOT NULL")

            await eventually(is_asked_to_stop)
            terminate(leaving)
            await socket.until("goaway")
            assert await socket.closed() == 1012
        other.resume()
        await elsewhere.until("turn.cancelled")
        assert await exit_status(leaving) == 0
        strings.open(gate)
        await interrupt(elsewhere, conversation_id, asked, message_id)
        frames = await elsewhere.until(*TERMINAL, "error")
    assert frames[-1]["type"] == "turn.completed", frames[-1]
    messages = await messages_of(database_url, conversation_id)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert await turns_of(database_url, conversation_id) == ["cancelled", "completed"]


# A deploy.


async def test_a_rolling_restart_of_three_nodes_is_not_noticed(
    database_url: str, environment: dict[str, str], tmp_path: Path, user: str
) -> None:
    settings = {**environment, "DRAIN_SECONDS": "120"}
    with ExitStack() as stack:

        def start() -> NodeProcess:
            return stack.enter_context(running_node(database_url, tmp_path, settings))

        nodes = [start() for _ in range(3)]
        gone: list[NodeProcess] = []
        devices = [Device(nodes, number % 3, f"{user}-{number}", ()) for number in range(12)]
        async with asyncio.TaskGroup() as group:
            talking = [group.create_task(talk(device, lambda: len(gone) == 3)) for device in devices]
            for slot in range(3):

                async def are_all_talking(so_far: Sequence[int] = tuple(len(turns_in(d)) for d in devices)) -> bool:
                    for task in talking:
                        assert not task.done() or task.exception() is None
                    return all(len(turns_in(device)) > before for device, before in zip(devices, so_far, strict=True))

                await eventually(are_all_talking)
                leaving = nodes[slot]
                terminate(leaving)
                await eventually(is_draining_or_gone(leaving))
                assert await exit_status(leaving) == 0
                nodes[slot] = await asyncio.to_thread(start)
                gone.append(leaving)
        asked = {device.user: task.result() for device, task in zip(devices, talking, strict=True)}
        for device in devices:
            await device.leave()
            await assert_nothing_was_noticed(database_url, device, asked[device.user])


def is_draining_or_gone(node: NodeProcess) -> Callable[[], Awaitable[object]]:
    async def condition() -> bool:
        try:
            return (await asyncio.to_thread(node.get, "/readyz"))[0] == 503
        except OSError:
            return True

    return condition


def turns_in(device: Device) -> list[Frame]:
    """The ends of turns that the device has been shown."""
    return [
        frame for transcript in device.transcripts.values() for frame in transcript.frames if frame["type"] in TERMINAL
    ]


async def talk(device: Device, is_over: Callable[[], bool]) -> list[str]:
    """Ask one question after another in a conversation, until it is over; returns them."""
    asked: list[str] = []
    conversation_id = None
    while not is_over():
        content = question([("paced", 20, f"{uuid.uuid4().hex} {{number}} ", 0.03)])
        frame = {"type": "message.send", "message_id": str(uuid.uuid4()), "content": content}
        await device.ask(frame if conversation_id is None else {**frame, "conversation_id": conversation_id})
        asked.append(content)

        async def is_answered() -> bool:
            device.raise_failure()
            return len(turns_in(device)) == len(asked) and not device.unanswered

        await eventually(is_answered, 60)
        (conversation_id,) = device.transcripts
    return asked


async def assert_nothing_was_noticed(database_url: str, device: Device, asked: Sequence[str]) -> None:
    """Each question was answered once, in one attempt; the device was shown the journal, each event once."""
    ((conversation_id, transcript),) = device.transcripts.items()
    await assert_all_was_shown(database_url, transcript.frames)
    messages = await messages_of(database_url, conversation_id)
    assert [message["content"] for message in messages if message["role"] == "user"] == list(asked)
    assert {message["status"] for message in messages} == {"completed"}
    turns = await sql(
        database_url,
        "SELECT status, epoch FROM turns WHERE conversation_id = $1",
        uuid.UUID(conversation_id),
    )
    assert [tuple(turn) for turn in turns] == [("completed", 1)] * len(asked)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    assert list(transcript.texts().values()) == said
