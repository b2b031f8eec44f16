"""What a node asks of Postgres does not grow with those who follow there; counted between the node and Postgres."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass

import pytest

from anynode.models.queries import statements
from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, text_of
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy
from tests.kit.sockets import narrow_socket
from tests.kit.transcripts import assert_all_was_shown, nothing_has_come, take

CROWD = 50
READS = ("read_events", "snapshot")
QUICK = script_of(("text", "a "), ("text", "b"))


@dataclass
class Counted:
    """A node whose statements are counted."""

    node: NodeProcess
    proxy: PostgresProxy

    def executions(self) -> Counter[str]:
        """How often each statement has been executed so far."""
        return Counter({name: self.proxy.executions(name) for name in statements()})


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def owner(
    module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory, stack: ExitStack
) -> NodeProcess:
    """The node on which all turns run."""
    environment = {**strings.environment, "ANSWER_BYTES_MAX": "67108864"}
    return stack.enter_context(running_node(module_database_url, tmp_path_factory.mktemp("node"), environment))


@pytest.fixture(scope="module")
def counted(
    module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory, stack: ExitStack
) -> Sequence[Counted]:
    """A node for a few followers, to compare with, and one for the crowd."""
    found = []
    for _ in range(2):
        proxy = stack.enter_context(postgres_proxy(module_database_url))
        node = running_node(proxy.url, tmp_path_factory.mktemp("node"), strings.environment)
        found.append(Counted(stack.enter_context(node), proxy))
    return found


def numbered(frames: Sequence[Frame]) -> list[Frame]:
    """The frames of events. A busy machine's Postgres may be late, and followers are told so in between."""
    return [frame for frame in frames if "seq" in frame]


async def follow_quietly(socket: Socket, conversation_id: str, after: int) -> None:
    """Follow from the last event on."""
    await socket.follow(conversation_id, after)
    assert await nothing_has_come(socket)


async def test_a_crowd_that_follows_a_turn_of_another_node_reads_as_much_as_one_follower(
    owner: NodeProcess, counted: Sequence[Counted], module_database_url: str, strings: Strings, user: str
) -> None:
    few, crowd = counted
    gate = strings.name()
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(owner, user))
        frames = await sender.answer(QUICK)
        conversation_id, last_seq = frames[0]["conversation_id"], frames[-1]["seq"]
        followers = [await stack.enter_async_context(socket_to(few.node, user))]
        followers += [await stack.enter_async_context(socket_to(crowd.node, user)) for _ in range(CROWD)]
        for follower in followers:
            await follow_quietly(follower, conversation_id, last_seq)
        before = [node.executions() for node in counted]
        await sender.ask(script_of(("paced", 150, "{number} ", 0.01), ("gate", gate), ("text", "end")), conversation_id)
        seen = list(await asyncio.gather(*(follower.until("turn.delta") for follower in followers)))
        strings.open(gate)
        for shown, rest in zip(
            seen, await asyncio.gather(*(follower.until(*TERMINAL) for follower in followers)), strict=True
        ):
            shown += rest
        frames += await sender.until(*TERMINAL)
        for follower in followers:
            assert await nothing_has_come(follower)
        reads, crowds_reads = [node.executions() - then for node, then in zip(counted, before, strict=True)]
    await assert_all_was_shown(module_database_url, frames)
    for shown in seen:
        assert text_of(shown) == shown[-1]["message"]["content"] == "".join(f"{n} " for n in range(150)) + "end"
    assert reads["read_running"] > 5
    assert crowds_reads["read_running"] <= 1.5 * reads["read_running"] + 5
    assert sum(crowds_reads[name] for name in READS) <= sum(reads[name] for name in READS) + 5


async def test_many_turns_that_are_followed_here_are_read_together(
    owner: NodeProcess, counted: Sequence[Counted], strings: Strings, user: str
) -> None:
    few, crowd = counted
    gate = strings.name()
    question = script_of(("paced", 100, "{number} ", 0.01), ("gate", gate), ("text", "end"))
    turns = 20
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(owner, user))
        one = await stack.enter_async_context(socket_to(few.node, user))
        many = await stack.enter_async_context(socket_to(crowd.node, user))
        begun: list[Frame] = []
        for _ in range(turns):
            await sender.ask(question)
        while len(begun) < turns:
            begun += [frame for frame in [await sender.receive()] if frame["type"] == "turn.started"]
        await one.follow(begun[0]["conversation_id"], 0)
        await one.until("turn.delta")
        for frame in begun:
            await many.follow(frame["conversation_id"], 0)
        shown: dict[str, list[Frame]] = {frame["conversation_id"]: [] for frame in begun}

        async def show_until(count: int) -> None:
            while sum(frames[-1:] != [] and frames[-1]["type"] in kinds for frames in shown.values()) < count:
                frame = await many.receive()
                shown[frame["conversation_id"]].append(frame)

        kinds: frozenset[str] = frozenset({"turn.delta"})
        await show_until(turns)
        before = [node.executions() for node in counted]
        strings.open(gate)
        kinds = TERMINAL
        await show_until(turns)
        await one.until(*TERMINAL)
        reads, crowds_reads = [node.executions() - then for node, then in zip(counted, before, strict=True)]
    for frames in shown.values():
        assert text_of(frames) == frames[-1]["message"]["content"] == "".join(f"{n} " for n in range(100)) + "end"
    assert crowds_reads["read_running"] <= 2 * reads["read_running"] + 10
    assert sum(crowds_reads[name] for name in READS) <= 5


async def test_idle_followers_cost_nothing_also_while_others_talk(
    owner: NodeProcess, counted: Sequence[Counted], user: str
) -> None:
    crowd = counted[1]
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(owner, user))
        ends = [(await sender.answer(QUICK))[-1] for _ in range(20)]
        followers = [await stack.enter_async_context(socket_to(crowd.node, user)) for _ in range(20)]
        for follower in followers:
            for end in ends:
                await follower.follow(end["conversation_id"], end["seq"])
        for follower in followers:
            assert await nothing_has_come(follower)

        async def watch_for_a_while() -> list[Counter[str]]:
            before = [node.executions() for node in counted]

            async def has_watched() -> bool:
                await sender.answer(QUICK)  # in conversations that nobody follows there
                return all((node.executions() - then)["watch"] > 5 for node, then in zip(counted, before, strict=True))

            await eventually(has_watched)
            return [node.executions() - then for node, then in zip(counted, before, strict=True)]

        await watch_for_a_while()  # that the turns which they have seen had begun is news once more
        quiet, crowds = await watch_for_a_while()
        for follower in followers:
            assert await nothing_has_come(follower)
        assert {name: crowds[name] for name in (*READS, "read_running")} == dict.fromkeys((*READS, "read_running"), 0)
        assert sum(crowds.values()) <= 1.5 * sum(quiet.values()) + 5
        # They are not deaf, either.
        frames = await sender.answer(QUICK, ends[7]["conversation_id"])
        for follower in followers:
            assert text_of(await take(follower, frames[-1]["seq"])) == "a b"


async def test_followers_that_do_not_read_hold_up_nobody_and_read_on_later_without_a_gap(
    owner: NodeProcess, counted: Sequence[Counted], module_database_url: str, strings: Strings, user: str
) -> None:
    few, crowd = counted
    pieces, size = 300, 40_000
    gate = strings.name()
    question = script_of(("text", "begun "), ("gate", gate), ("paced", pieces, "{number} ".ljust(size, "x"), 0.003))
    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(socket_to(owner, user))
        await sender.ask(question)
        conversation_id = (await sender.receive())["conversation_id"]
        one = await stack.enter_async_context(socket_to(few.node, user))
        brisk = await stack.enter_async_context(socket_to(crowd.node, user))
        lazy = [await narrow_socket(stack, crowd.node, user) for _ in range(3)]
        seen: list[list[Frame]] = []
        for follower in (one, brisk, *lazy):
            await follower.follow(conversation_id, 0)
            seen.append(await follower.until("turn.delta"))
        before = [node.executions() for node in counted]
        strings.open(gate)
        for shown, follower in zip(seen, (one, brisk), strict=False):
            shown += numbered(await follower.until(*TERMINAL, within_seconds=60))
        # Only now do the others read.
        for shown, follower in zip(seen[2:], lazy, strict=True):
            shown += numbered(await follower.until(*TERMINAL, within_seconds=60))
        reads, crowds_reads = [node.executions() - then for node, then in zip(counted, before, strict=True)]
    for shown in seen:
        await assert_all_was_shown(module_database_url, shown)
    brisk_frames, *lazy_frames = (len(shown) for shown in seen[1:])
    assert all(count < brisk_frames for count in lazy_frames), "the lazy ones were not behind"
    assert crowds_reads["read_running"] <= 1.5 * reads["read_running"] + 5
    assert sum(crowds_reads[name] for name in READS) <= sum(reads[name] for name in READS) + 5
