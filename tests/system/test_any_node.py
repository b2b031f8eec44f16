"""Any node will do: a client that goes from one to another in mid-turn gets every event exactly once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.gated_turn import ANSWER, EVENTS, LAST_TEXT, Gated, begin, drive
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.transcripts import assert_all_was_shown, merged, nothing_has_come, take, whole

StartNode = Callable[..., NodeProcess]
Nodes = Sequence[NodeProcess]


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("nodes")
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(3)]


# A client goes on at another node.


@pytest.mark.parametrize("cut", range(1, EVENTS + 1))
async def test_a_client_that_goes_on_at_another_node_while_the_turn_runs_sees_each_event_once(
    nodes: Nodes, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(nodes[0], user) as watcher:
        async with socket_to(nodes[0], user) as socket:
            conversation_id, frames = await begin(socket, gated)
            await watcher.follow(conversation_id, 0)
            frames += await drive(socket, gated, to=cut, after=1)
            socket.drop()
        async with socket_to(nodes[1], user) as socket:
            await socket.follow(conversation_id, cut)
            frames += await drive(socket, gated, to=EVENTS, after=cut)
            assert await nothing_has_come(socket)
        uninterrupted = await watcher.until(*TERMINAL, "error", "conversation.snapshot")
    assert merged(frames) == merged(uninterrupted)
    assert text_of(frames) == ANSWER


@pytest.mark.parametrize("cut", range(1, EVENTS))
async def test_a_client_that_goes_on_at_another_node_while_the_agent_goes_on_sees_each_event_once(
    nodes: Nodes, gated: Gated, user: str, cut: int
) -> None:
    async with socket_to(nodes[0], user) as socket:
        conversation_id, frames = await begin(socket, gated)
        frames += await drive(socket, gated, to=cut, after=1)
        gated.open_all()
        socket.drop()
    async with socket_to(nodes[1], user) as socket:
        await socket.follow(conversation_id, cut)
        frames += await socket.until(*TERMINAL, "error", "conversation.snapshot")
        assert await nothing_has_come(socket)
    assert merged(frames) == merged(await whole(nodes[0], user, conversation_id))
    assert text_of(frames) == ANSWER


async def test_a_client_that_comes_to_another_node_after_the_end_gets_exactly_what_it_lacks(
    nodes: Nodes, module_database_url: str, gated: Gated, user: str
) -> None:
    gated.open_all()
    async with socket_to(nodes[0], user) as socket:
        uninterrupted = await socket.answer(gated.question)
    conversation_id, last_seq = uninterrupted[0]["conversation_id"], uninterrupted[-1]["seq"]
    await assert_all_was_shown(module_database_url, uninterrupted)
    for node in nodes[1:]:
        for cut in range(last_seq):
            async with socket_to(node, user) as socket:
                await socket.follow(conversation_id, cut)
                rest = await take(socket, last_seq)
                assert await nothing_has_come(socket)
            seen = [frame for frame in uninterrupted if frame["seq"] <= cut]
            if [frame["seq"] for frame in seen[-1:]] in ([cut], []):  # else it lies within a merged frame
                assert merged([*seen, *rest]) == merged(uninterrupted)
            assert text_of([*seen, *rest]).endswith(LAST_TEXT)


async def test_a_client_may_go_to_the_next_node_after_every_single_event(
    nodes: Nodes, module_database_url: str, gated: Gated, user: str
) -> None:
    async with socket_to(nodes[0], user) as socket:
        conversation_id, frames = await begin(socket, gated)
        socket.drop()
    for cut in range(1, EVENTS):
        async with socket_to(nodes[cut % 3], user) as socket:
            await socket.follow(conversation_id, cut)
            frames += await drive(socket, gated, to=cut + 1, after=cut)
            socket.drop()
    assert [frame["seq"] for frame in frames] == list(range(1, EVENTS + 1))
    await assert_all_was_shown(module_database_url, frames)


async def test_a_snapshot_at_another_node_and_what_comes_after_it_make_the_whole_answer_at_every_event(
    nodes: Nodes, gated: Gated, user: str
) -> None:
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(nodes[0], user))
        conversation_id, seen = await begin(sender, gated)
        seen += await drive(sender, gated, to=2, after=1)
        late: list[tuple[Socket, Frame]] = []
        for cut in range(2, EVENTS + 1):
            socket = await stack.enter_async_context(socket_to(nodes[1 + cut % 2], user))
            await socket.follow(conversation_id)
            snapshot = await socket.receive()
            assert snapshot["type"] == "conversation.snapshot"
            assert snapshot["seq"] == cut
            if cut < EVENTS:
                assert snapshot["turn"]["text"] == text_of(seen)
                late.append((socket, snapshot))
                seen += await drive(sender, gated, to=cut + 1, after=cut)
            else:
                assert snapshot["turn"] is None
                assert snapshot["messages"][-1] == seen[-1]["message"]
        for socket, snapshot in late:
            frames = [snapshot, *await take(socket, EVENTS)]
            assert text_of(frames) == ANSWER
            assert frames[-1] == seen[-1]


# Before the first event.


async def test_a_message_that_is_repeated_at_another_node_is_shown_from_its_turns_start(
    nodes: Nodes, module_database_url: str, gated: Gated, user: str
) -> None:
    message_id = str(uuid.uuid4())
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(nodes[0], user))
        await sender.ask(gated.question, message_id=message_id)
        seen = await drive(sender, gated, to=1)
        repeated = []
        for cut in range(1, EVENTS + 1):
            socket = await stack.enter_async_context(socket_to(nodes[1 + cut % 2], user))
            await socket.ask(gated.question, message_id=message_id)
            repeated.append((socket, await take(socket, cut)))
            if cut < EVENTS:
                seen += await drive(sender, gated, to=cut + 1, after=cut)
        for socket, frames in repeated:
            while frames[-1]["seq"] < EVENTS:
                frames.append(await socket.receive())
            assert merged(frames) == merged(seen)
    await assert_all_was_shown(module_database_url, seen)
    assert len(await sql(module_database_url, "SELECT FROM conversations WHERE user_id = $1", user)) == 1


async def test_a_message_whose_sender_vanishes_at_once_is_one_turn_wherever_it_is_sent_again(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    question = script_of(("text", "one "), ("text", "two "), ("text", "three"))
    for attempt in range(12):
        message_id = str(uuid.uuid4())
        async with socket_to(nodes[attempt % 3], user) as socket:
            await socket.ask(question, message_id=message_id)
            socket.drop()
        async with socket_to(nodes[(attempt + 1) % 3], user) as one, socket_to(nodes[(attempt + 2) % 3], user) as two:
            await asyncio.gather(one.ask(question, message_id=message_id), two.ask(question, message_id=message_id))
            for frames in await asyncio.gather(one.until(*TERMINAL, "error"), two.until(*TERMINAL, "error")):
                assert text_of(frames) == frames[-1]["message"]["content"] == "one two three"
                await assert_all_was_shown(module_database_url, frames)
        turns = await sql(
            module_database_url,
            "SELECT t.status, t.epoch FROM messages m JOIN turns t USING (conversation_id) WHERE m.client_id = $1",
            message_id,
        )
        assert [tuple(turn) for turn in turns] == [("completed", 1)]


# After the journal's retention.


@pytest.fixture
def forgetful_nodes(start_node: StartNode, strings: Strings) -> Nodes:
    return [start_node(**strings.environment, JOURNAL_RETENTION_MINUTES="0.02") for _ in range(2)]


async def test_what_the_journal_has_forgotten_another_node_shows_by_snapshot(
    forgetful_nodes: Nodes, database_url: str, gated: Gated, user: str
) -> None:
    here, elsewhere = forgetful_nodes
    gated.open_all()

    async def is_forgotten() -> bool:
        return not await sql(database_url, "SELECT FROM events")

    async with socket_to(here, user) as sender, socket_to(elsewhere, user) as idle:
        end = (await sender.answer(gated.question))[-1]
        conversation_id, last_seq = end["conversation_id"], end["seq"]
        await eventually(is_forgotten)
        await idle.follow(conversation_id, last_seq)
        assert await nothing_has_come(idle)
        for after in (0, 1, 7, last_seq - 1, last_seq + 1, None):
            async with socket_to(elsewhere, user) as socket:
                await socket.follow(conversation_id, after)
                snapshot = await socket.receive()
            assert snapshot["type"] == "conversation.snapshot"
            assert snapshot["seq"] == last_seq
            assert snapshot["turn"] is None
            assert snapshot["messages"][-1] == end["message"]
            said = [message["content"] for message in snapshot["messages"] if message["role"] == "assistant"]
            assert "".join(said) == ANSWER
        # A repeated message, too: its turn's events are gone.
        async with socket_to(elsewhere, user) as socket:
            message_id = (await sql(database_url, "SELECT client_id FROM messages WHERE role = 'user'"))[0]["client_id"]
            await socket.ask(gated.question, message_id=message_id)
            again = await socket.receive()
            assert (again["type"], again["seq"]) == ("conversation.snapshot", last_seq)
        # A cursor at the end is as good as ever: what comes next comes live.
        await sender.ask(gated.question, conversation_id)
        frames = await idle.until(*TERMINAL, "error", "conversation.snapshot")
    assert (frames[0]["type"], frames[0]["seq"]) == ("message.created", last_seq + 1)
    assert text_of(frames) == ANSWER


# A device that follows on another node.


async def test_an_idle_follower_at_another_node_hears_of_every_turn_and_others_hear_nothing(
    nodes: Nodes, module_database_url: str, strings: Strings, user: str
) -> None:
    def question(number: int) -> str:
        return script_of(("text", f"turn {number}: "), ("text", "a "), ("text", "b"))

    async with AsyncExitStack() as stack:
        here, first, second = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        strangers = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        frames = await here.answer(question(0))
        conversation_id = frames[0]["conversation_id"]
        for stranger in strangers:
            other = (await stranger.answer(question(0)))[-1]
            await stranger.send({"type": "conversation.unfollow", "conversation_id": other["conversation_id"]})
            await stranger.follow(other["conversation_id"], other["seq"])
        for follower in (first, second):
            await follower.follow(conversation_id, frames[-1]["seq"])
            assert await nothing_has_come(follower)
        for number in range(1, 6):
            if number in (3, 5):
                await here.send({"type": "turn.regenerate", "conversation_id": conversation_id})
                sent = await here.until(*TERMINAL, "error")
                assert sent[0]["type"] == "turn.started"
            else:
                sent = await here.answer(question(number), conversation_id)
                assert [frame["type"] for frame in sent][:2] == ["message.created", "turn.started"]
            for follower in (first, second):
                heard = await take(follower, sent[-1]["seq"])
                assert merged(heard) == merged(sent)
            frames += sent
        for socket in (here, first, second, *strangers):
            assert await nothing_has_come(socket)
    await assert_all_was_shown(module_database_url, frames)


async def test_turns_that_run_here_and_there_one_after_another_are_followed_without_a_break(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    question = script_of(
        ("text", "a "), ("call", "1", "tool", {}), ("result", "1", "tool", "r"), ("step",), ("text", "b")
    )
    turns = 16
    async with AsyncExitStack() as stack:
        senders = [await stack.enter_async_context(socket_to(node, user)) for node in nodes[:2]]
        followers = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        conversation_id = (await senders[0].answer(question))[0]["conversation_id"]

        async def follow(socket: Socket) -> list[Frame]:
            await socket.follow(conversation_id, 0)
            frames: list[Frame] = []
            while [frame["type"] for frame in frames].count("turn.completed") < turns:
                frames.append(await socket.receive())
            assert await nothing_has_come(socket)
            return frames

        following = [asyncio.create_task(follow(socket)) for socket in followers]
        last_seq = 0
        for number in range(1, turns):
            sender = senders[number % 2]
            message_id = await sender.ask(question, conversation_id)
            turn_id = None
            # As soon as one turn is over the next begins, on the other node.
            while True:
                frame = await sender.receive()
                assert frame["type"] != "error", frame
                if frame["type"] == "turn.started" and frame["message_id"] == message_id:
                    turn_id = frame["turn_id"]
                if frame["type"] in TERMINAL and frame["turn_id"] == turn_id:
                    break
            last_seq = frame["seq"]
        for frames in await asyncio.gather(*following):
            assert frames[-1]["seq"] == last_seq
            await assert_all_was_shown(module_database_url, frames)


async def test_a_turn_that_begins_elsewhere_before_a_node_hears_of_the_end_of_its_own_is_followed(
    nodes: Nodes, module_database_url: str, strings: Strings, tmp_path: Path, user: str
) -> None:
    """The news of the second turn comes to that node before the outcome of the first one's last commit does."""
    gate = strings.name()
    with postgres_proxy(module_database_url) as proxy, running_node(proxy.url, tmp_path, strings.environment) as late:
        async with socket_to(late, user) as follower, socket_to(nodes[0], user) as sender:
            await follower.ask(script_of(("text", "one "), ("gate", gate)))
            frames = await follower.until("turn.delta")
            conversation_id = frames[0]["conversation_id"]
            hold = proxy.hold("after", "flush_with_endings")
            strings.open(gate)
            await hold.reached()
            last = (await sender.answer(script_of(("text", "two")), conversation_id))[-1]
            watches = proxy.executions("watch")

            async def has_heard() -> bool:
                return proxy.executions("watch") > watches + 2

            await eventually(has_heard)
            hold.release()
            frames += await take(follower, last["seq"])
    await assert_all_was_shown(module_database_url, frames)


async def test_a_conversation_goes_on_whichever_node_answers(nodes: Nodes, module_database_url: str, user: str) -> None:
    conversation_id: str | None = None
    for number in range(6):
        async with socket_to(nodes[number % 3], user) as socket:
            frames = await socket.answer(script_of(("text", f"answer {number}")), conversation_id)
            conversation_id = frames[0]["conversation_id"]
    assert conversation_id is not None
    messages = await sql(
        module_database_url,
        "SELECT position, role, content FROM messages WHERE conversation_id = $1 ORDER BY position",
        uuid.UUID(conversation_id),
    )
    assert [message["position"] for message in messages] == list(range(1, 13))
    assert [message["content"] for message in messages if message["role"] == "assistant"] == [
        f"answer {number}" for number in range(6)
    ]


async def test_events_come_to_followers_on_all_nodes_in_mid_turn(
    nodes: Nodes, module_database_url: str, gated: Gated, user: str
) -> None:
    """Each event is shown on every node before the next one comes: nobody waits for the end."""
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(nodes[0], user))
        conversation_id, _ = await begin(sender, gated)
        followers = [await stack.enter_async_context(socket_to(node, user)) for node in nodes for _ in range(3)]
        seen: list[list[Frame]] = [[] for _ in followers]
        for follower in followers:
            await follower.follow(conversation_id, 0)
        for seq in range(2, EVENTS + 1):
            gated.open(seq)
            for frames, follower in zip(seen, followers, strict=True):
                frames += await take(follower, seq)
        for frames in seen:
            await assert_all_was_shown(module_database_url, frames)
            assert frames[-1] == seen[0][-1]
