"""Whatever clients, operators and faults do, in whatever order: everybody sees what the database holds, once.

What is tried is the same in every run. To try something else, and more of it (each example takes some 5 seconds):

    STATE_MACHINE_EXAMPLES=200 uv run --dev pytest -n 0 tests/system/test_state_machine.py
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from anynode.models.queries import bind
from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.device import Device, Request, Transcript
from tests.kit.exactness import assert_shown
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql, token_for

Answer = TypeVar("Answer")

EXAMPLES: Final = int(os.environ.get("STATE_MACHINE_EXAMPLES", "0"))
SETTINGS: Final = settings(
    max_examples=EXAMPLES or 4,
    stateful_step_count=20 if EXAMPLES else 14,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # a run is never the same twice, so that there is nothing to shrink
    suppress_health_check=list(HealthCheck),
)
NODES: Final = 3
DEVICES: Final = 3
TOKEN_SECONDS: Final = 0.02
ENVIRONMENT: Final = {"LEASE_SECONDS": "1", "MAX_ATTEMPTS": "100", "DRAIN_SECONDS": "0.3"}
REFUSALS: Final = {"conversation_busy"}  # all that a user need ever hear here

DEVICE = st.integers(0, DEVICES - 1)
SLOT = st.integers(0, NODES - 1)
WHICH = st.sampled_from([0, 0, 1, 2])  # of those there are, from the newest on
PERCENT = st.integers(0, 100)
TOKENS = st.sampled_from([40, 15, 80, 1])
SECONDS = st.sampled_from([1.5, 0.1, 0.5])
PAUSES = st.sampled_from([0.0, 0.02, 0.1, 0.3])
IF_BUSY = st.sampled_from(["interrupt", "reject"])
ASKS = st.sampled_from(["cursor", "snapshot", "ahead"])

# The steps, as names of methods with their arguments. They are not a rule each: hypothesis leaves most rules out of an
# example ("swarm testing"), which pays in thousands of examples, not in a handful.
STEPS: Final = st.one_of(
    *(
        st.tuples(st.just(name), *arguments)
        for name, arguments in {
            "ask": (DEVICE, WHICH, TOKENS, IF_BUSY),
            "begin": (DEVICE, TOKENS),
            "begin_everywhere": (TOKENS,),
            "ask_everywhere": (WHICH, TOKENS),
            "ask_again": (DEVICE, SLOT, WHICH),
            "regenerate": (DEVICE, WHICH),
            "cancel": (DEVICE, WHICH),
            "follow": (DEVICE, SLOT, WHICH, ASKS, PERCENT),
            "hop": (DEVICE, SLOT),
            "drop": (DEVICE,),
            "kill": (WHICH,),
            "replace": (WHICH,),
            "freeze": (WHICH, SECONDS),
            "expire": (WHICH,),
        }.items()
    )
)


class World:
    """The nodes, and a loop for their clients that runs beside the test; examples share them, as users of their own."""

    def __init__(self, database_url: str, directory: Path, environment: dict[str, str], stack: ExitStack) -> None:
        self.database_url = database_url
        self._directory = directory
        self._environment = environment
        self._stack = stack
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        stack.callback(self._loop.close)
        stack.callback(thread.join)
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        self.nodes: list[NodeProcess] = []
        self.node_ids: list[str] = []
        for slot in range(NODES):
            self._start(slot)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Do it on the loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def kill(self, slot: int) -> None:
        """kill -9, and another node in its place."""
        self.nodes[slot].kill()
        self._start(slot)

    def replace(self, slot: int) -> None:
        """SIGTERM, and another node in its place."""
        self.nodes[slot].resume()
        assert self.nodes[slot].stop() == 0
        self._start(slot)

    async def freeze(self, slot: int, seconds: float) -> None:
        """SIGSTOP, and SIGCONT so much later."""
        node = self.nodes[slot]
        node.pause()
        asyncio.get_running_loop().call_later(seconds, node.resume)

    def _start(self, slot: int) -> None:
        node = self._stack.enter_context(running_node(self.database_url, self._directory, self._environment))
        self.nodes[slot : slot + 1] = [node]
        self.node_ids[slot : slot + 1] = [self.run(node_id_of(node))]


async def node_id_of(node: NodeProcess) -> str:
    """What it calls itself."""
    headers = {"Authorization": f"Bearer {token_for('operator')}"}
    async with socket_to(node, ready=False, headers=headers) as socket:
        return str((await socket.receive())["node_id"])


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    environment = {**Strings(tmp_path / "strings").environment, **ENVIRONMENT}
    with ExitStack() as stack:
        yield World(database_url, tmp_path, environment, stack)


@pytest.mark.slow
def test_everybody_sees_what_the_database_holds_whatever_happens(world: World) -> None:
    run_state_machine_as_test(lambda: Chat(world), settings=SETTINGS)  # type: ignore[arg-type]


@dataclass
class Conversation:
    """What a user has asked for in one conversation."""

    id: str
    regenerations: list[Request] = field(default_factory=list)
    expired: dict[int, asyncpg.Record] = field(default_factory=dict)  # events that the journal no longer has


@dataclass
class Message:
    """A message, in whatever conversation, and the attempts to send it."""

    frame: Frame
    conversation_id: str
    attempts: list[Request] = field(default_factory=list)

    def said_in(self, epoch: int) -> str:
        """What the agent says to it in its nth attempt, unless it is stopped."""
        ((_, tokens, text, _),) = json.loads(self.frame["content"])
        return "".join(text.format(number=number, attempt=epoch) for number in range(tokens))


class Chat(RuleBasedStateMachine):
    """One user's devices; rules never wait for a turn to end, so that the next one finds it running."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.user, self.stranger = f"user-{uuid.uuid4().hex}", f"stranger-{uuid.uuid4().hex}"
        self.conversations: list[Conversation] = []
        self.messages: list[Message] = []
        self.expired: set[str] = set()
        self.devices = [Device(world.nodes, slot, self.user, self.expired) for slot in range(DEVICES)]
        self.began_at = time.monotonic()
        self.history: list[str] = []
        self.waits_for = ""
        self.has_failed = False

    @initialize(device=DEVICE, tokens=TOKENS)
    def it_begins(self, device: int, tokens: int) -> None:
        self.begin(device, tokens)

    @rule(pause=PAUSES, step=STEPS)
    def happens(self, pause: float, step: tuple[Any, ...]) -> None:
        time.sleep(pause)
        name, *arguments = step
        getattr(self, name)(*arguments)

    # What the user does.

    def begin(self, device: int, tokens: int) -> None:
        self.do(f"device {device} begins a conversation", self.start([self.devices[device]], tokens))

    def begin_everywhere(self, tokens: int) -> None:
        self.do("all devices begin one conversation", self.start(self.devices, tokens))

    async def start(self, devices: Sequence[Device], tokens: int) -> None:
        message = self.new_message(tokens)
        message.attempts += [await device.ask(message.frame) for device in devices]
        message_id = message.frame["message_id"]

        async def is_known() -> bool:
            return all(message_id in device.conversation_of for device in devices)

        await eventually(is_known)
        (conversation_id,) = {device.conversation_of[message_id] for device in devices}
        message.conversation_id = conversation_id
        self.conversations.append(Conversation(conversation_id))

    def ask(self, device: int, which: int, tokens: int, if_busy: str) -> None:
        message = self.new_message(tokens, self.conversation(which).id, if_busy)
        self.do(f"device {device} asks {message.frame}", self.send(message, [self.devices[device]]))

    def ask_everywhere(self, which: int, tokens: int) -> None:
        message = self.new_message(tokens, self.conversation(which).id)
        self.do(f"all devices ask {message.frame}", self.send(message, self.devices))

    def ask_again(self, device: int, slot: int, which: int) -> None:
        message = self.messages[-1 - which % len(self.messages)]
        self.do(
            f"device {device} asks at {slot} again {message.frame}", self.repeat(self.devices[device], slot, message)
        )

    async def repeat(self, device: Device, slot: int, message: Message) -> None:
        for other in self.devices:
            # What it has sent, and what is under way, may find the message admitted by this attempt.
            if any(request in message.attempts for request in other.unanswered.values()):
                await other.go()
        for request in message.attempts:
            request.may_be_known = True
        await device.leave()
        device.conversation_of[message.frame["message_id"]] = message.conversation_id
        device.transcripts.pop(message.conversation_id, None)
        await device.go(slot)
        await self.send(message, [device])

    def regenerate(self, device: int, which: int) -> None:
        conversation = self.conversation(which)

        async def work() -> None:
            frame = {"type": "turn.regenerate", "conversation_id": conversation.id}
            conversation.regenerations.append(await self.devices[device].ask(frame))

        self.do(f"device {device} regenerates {which}", work())

    def cancel(self, device: int, which: int) -> None:
        frame = {"type": "turn.cancel", "conversation_id": self.conversation(which).id}
        self.do(f"device {device} cancels {which}", self.devices[device].ask(frame))

    def follow(self, device: int, slot: int, which: int, asks: str, kept: int) -> None:
        what = f"device {device} follows {which} at {slot} by {asks}, keeping {kept} %"
        self.do(what, self.come_back(self.devices[device], slot, self.conversation(which).id, asks, kept))

    async def come_back(self, device: Device, slot: int, conversation_id: str, asks: str, kept: int) -> None:
        await device.leave()
        transcript = device.transcripts.setdefault(conversation_id, Transcript())
        del transcript.frames[len(transcript.frames) * kept // 100 :]
        transcript.asks = asks
        await device.go(slot)

    def hop(self, device: int, slot: int) -> None:
        self.do(f"device {device} hops to {slot}", self.devices[device].go(slot))

    def drop(self, device: int) -> None:
        self.do(f"device {device} vanishes", self.devices[device].leave())

    # What happens to nodes and to the journal.

    def kill(self, which: int) -> None:
        slot = self.node_of(which)
        self.world.kill(slot)
        self.do(f"node {slot} has been killed", asyncio.sleep(0))

    def replace(self, which: int) -> None:
        slot = self.node_of(which)
        self.world.replace(slot)
        self.do(f"node {slot} has been replaced", asyncio.sleep(0))

    def freeze(self, which: int, seconds: float) -> None:
        slot = self.node_of(which)
        self.do(f"node {slot} is frozen for {seconds} s", self.world.freeze(slot, seconds))

    def expire(self, which: int) -> None:
        self.do(f"the journal of {which} expires", self.forget_events(self.conversation(which)))

    async def forget_events(self, conversation: Conversation) -> None:
        self.expired.add(conversation.id)
        connection = await asyncpg.connect(self.world.database_url)
        try:
            ended = await connection.fetchval(
                "SELECT array_agg(id) FROM turns "
                "WHERE conversation_id = $1 AND first_seq IS NOT NULL AND finished_at IS NOT NULL",
                uuid.UUID(conversation.id),
            )
            events = await connection.fetch(f"{EVENTS} AND e.turn_id = ANY ($2)", [uuid.UUID(conversation.id)], ended)
            conversation.expired |= {event["seq"]: event for event in events}
            await connection.execute(
                "UPDATE turns SET finished_at = finished_at - interval '1 day' WHERE id = ANY ($1)", ended
            )
            expired = bind("delete_expired_events", retention_seconds=3600.0, turns_max=100)
            await connection.fetch(expired.sql, *expired.arguments)
        finally:
            await connection.close()

    # What must hold.

    def teardown(self) -> None:
        try:
            if not self.has_failed:
                self.do("the end", self.come_to_the_end())
        finally:
            self.world.run(self.leave())

    async def come_to_the_end(self) -> None:
        await self.settle()
        await self.add_fresh_devices()
        await self.judge()
        await self.probe()

    async def leave(self) -> None:
        await asyncio.gather(*(device.leave() for device in self.devices), return_exceptions=True)

    async def settle(self) -> None:
        """Wait until everything asked for is answered, no turn runs, and all devices are back."""
        for node in self.world.nodes:
            node.resume()
        for device in self.devices:
            if not device.is_online:
                await device.go()

        connection = await asyncpg.connect(self.world.database_url)
        try:
            await eventually(self.is_quiet(connection))
        finally:
            await connection.close()

    def is_quiet(self, connection: asyncpg.Connection) -> Callable[[], Awaitable[object]]:
        async def condition() -> bool:
            for device in self.devices:
                device.raise_failure()
            running = await connection.fetch(
                "SELECT t.id, t.node, t.epoch, t.lease_expires_at < clock_timestamp() AS has_lapsed "
                "FROM turns t JOIN conversations c ON c.id = conversation_id WHERE user_id = $1 AND status = 'running'",
                self.user,
            )
            unanswered = [device.unanswered for device in self.devices]
            self.waits_for = f"waiting for {running} and {unanswered}"
            return not running and not any(unanswered)

        return condition

    async def add_fresh_devices(self) -> None:
        """Add two devices to each node: one reads every conversation from the start, and one by snapshot."""
        for slot in range(NODES):
            for asks in ("cursor", "snapshot"):
                device = Device(self.world.nodes, slot, self.user, self.expired)
                for conversation in self.conversations:
                    device.transcripts[conversation.id] = Transcript(asks=asks)
                await device.go()
                self.devices.append(device)

    async def judge(self) -> None:
        ids = [uuid.UUID(conversation.id) for conversation in self.conversations]
        connection = await asyncpg.connect(self.world.database_url)
        try:
            async with connection.transaction(isolation="repeatable_read"):
                users = await connection.fetch("SELECT id, last_seq FROM conversations WHERE user_id = $1", self.user)
                turns = await connection.fetch("SELECT * FROM turns WHERE conversation_id = ANY ($1)", ids)
                said = "SELECT * FROM messages WHERE conversation_id = ANY ($1) ORDER BY position"
                messages = await connection.fetch(said, ids)
                events = await connection.fetch(EVENTS, ids)
        finally:
            await connection.close()
        assert {row["id"] for row in users} == set(ids)
        self.judge_messages(messages)
        last_seqs = {str(row["id"]): row["last_seq"] for row in users}
        for conversation in self.conversations:
            id = uuid.UUID(conversation.id)
            kept = {event["seq"]: event for event in events if event["conversation_id"] == id}
            journal = sorted((conversation.expired | kept).items())
            assert [seq for seq, _ in journal] == list(range(1, last_seqs[conversation.id] + 1))
            verdict = Verdict(
                conversation,
                [event for _, event in journal],
                {str(turn["id"]): turn for turn in turns if turn["conversation_id"] == id},
                [message for message in messages if message["conversation_id"] == id],
                {message.frame["message_id"]: message for message in self.messages},
            )
            verdict.judge_messages()
            verdict.judge_turns()
            for device in self.devices:
                if conversation.id in device.transcripts:
                    await self.has_seen(device, conversation.id, last_seqs[conversation.id])
                    verdict.judge_transcript(device.transcripts[conversation.id])

    def judge_messages(self, rows: Sequence[asyncpg.Record]) -> None:
        """A message that was sent any number of times is there once, and one that was refused is not."""
        admitted = Counter(row["client_id"] for row in rows if row["role"] == "user")
        for message in self.messages:
            outcomes = {request.outcome for request in message.attempts}
            assert outcomes <= {"done", *REFUSALS}
            assert admitted[message.frame["message_id"]] == ("done" in outcomes), message

    async def has_seen(self, device: Device, conversation_id: str, seq: int) -> None:
        async def is_there() -> bool:
            device.raise_failure()
            transcript = device.transcripts[conversation_id]
            return transcript.cursor == seq and transcript.asks == "cursor"

        await eventually(is_there)

    async def probe(self) -> None:
        """Somebody else gets the same answer to everything, which is no."""
        for node in self.world.nodes:
            async with socket_to(node, self.stranger) as socket:
                for conversation in self.conversations:
                    message = {"message_id": str(uuid.uuid4()), "content": script_of(("text", "mine"))}
                    for frame in (
                        {"type": "conversation.follow"},
                        {"type": "conversation.follow", "after": 0},
                        {"type": "turn.cancel"},
                        {"type": "turn.regenerate"},
                        {"type": "message.send", **message},
                    ):
                        await socket.send({**frame, "conversation_id": conversation.id})
                        error = await socket.receive()
                        assert (error["type"], error.get("code")) == ("error", "not_found"), error

    # How it is done.

    def conversation(self, which: int) -> Conversation:
        return self.conversations[-1 - which % len(self.conversations)]

    def node_of(self, which: int) -> int:
        """Where the last turn of a conversation runs, or ran."""
        statement = "SELECT node FROM turns WHERE conversation_id = $1 ORDER BY id DESC LIMIT 1"
        found = self.world.run(sql(self.world.database_url, statement, uuid.UUID(self.conversation(which).id)))
        node_id = found[0]["node"]
        return self.world.node_ids.index(node_id) if node_id in self.world.node_ids else which % NODES

    def new_message(self, tokens: int, conversation_id: str | None = None, if_busy: str = "reject") -> Message:
        text = f"m{len(self.messages)}.{{number}}.{{attempt}} "
        frame = {
            "type": "message.send",
            "message_id": str(uuid.uuid4()),
            "content": script_of(("paced", tokens, text, TOKEN_SECONDS)),
            "if_busy": if_busy,
        }
        if conversation_id is not None:
            frame["conversation_id"] = conversation_id
        self.messages.append(Message(frame, conversation_id or ""))
        return self.messages[-1]

    async def send(self, message: Message, devices: Sequence[Device]) -> None:
        may_be_known = bool(message.attempts) or len(devices) > 1
        for device in devices:
            message.attempts.append(await device.ask(message.frame, may_be_known=may_be_known))

    def do(self, what: str, work: Coroutine[Any, Any, object]) -> None:
        self.history.append(f"{time.monotonic() - self.began_at:.3f} {what}")
        try:
            self.world.run(work)
            for device in self.devices:
                device.raise_failure()
        except BaseException as error:
            self.has_failed = True
            error.add_note("\n".join([*self.history, self.waits_for]))
            raise


EVENTS: Final = (
    "SELECT e.conversation_id, e.seq, e.type, e.epoch, e.turn_id::text AS turn_id, e.payload::text AS payload "
    "FROM events e WHERE e.conversation_id = ANY ($1)"
)


@dataclass
class Verdict:
    """All that there is of one conversation, when nothing more comes: the whole journal, and what the tables hold."""

    conversation: Conversation
    journal: Sequence[asyncpg.Record]
    turns: dict[str, asyncpg.Record]
    messages: Sequence[asyncpg.Record]
    sent: dict[str, Message]

    def judge_messages(self) -> None:
        """Positions are gapless, and of what is not superseded each question has one answer."""
        assert [message["position"] for message in self.messages] == list(range(1, len(self.messages) + 1))
        roles = [message["role"] for message in self.messages if message["status"] != "superseded"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)

    def judge_turns(self) -> None:
        """Every message has one turn, and one for each regeneration; each turn one end, which is its status, and text
        that one attempt has said."""
        starts = [event for event in self.journal if event["type"] == "turn.started"]
        assert Counter(event["turn_id"] for event in starts) == dict.fromkeys(self.turns, 1)
        created = [event for event in self.journal if event["type"] == "message.created"]
        questions = [message for message in self.messages if message["role"] == "user"]
        assert [json.loads(event["payload"])["message"]["id"] for event in created] == [
            str(message["id"]) for message in questions
        ]
        asked = Counter(request.outcome for request in self.conversation.regenerations)
        assert set(asked) <= {"done", "lost", *REFUSALS}
        assert asked["done"] <= len(starts) - len(questions) <= asked["done"] + asked["lost"]
        for start in starts:
            self.judge_turn(start["turn_id"], self.sent[json.loads(start["payload"])["message_id"]])

    def judge_turn(self, turn_id: str, question: Message) -> None:
        events = [event for event in self.journal if event["turn_id"] == turn_id]
        turn = self.turns[turn_id]
        (answer,) = [
            message for message in self.messages if str(message["turn_id"]) == turn_id and message["role"] != "user"
        ]
        ends = [event for event in events if event["type"] in TERMINAL]
        assert ends == events[-1:]
        assert ends[0]["type"] == f"turn.{turn['status']}"
        epochs = [event["epoch"] for event in events if event["type"] == "turn.restarted"]
        assert epochs == list(range(2, turn["epoch"] + 1))
        assert [event["epoch"] for event in events] == sorted(event["epoch"] for event in events)
        assert json.loads(ends[0]["payload"])["message"]["content"] == answer["content"]
        if turn["status"] == "completed":
            assert answer["content"] == question.said_in(turn["epoch"])
        else:
            assert turn["status"] == "cancelled"
            assert turn["cancel_requested_at"] is not None
            assert any(question.said_in(epoch).startswith(answer["content"]) for epoch in range(1, turn["epoch"] + 1))

    def judge_transcript(self, transcript: Transcript) -> None:
        """Assert that a transcript is the journal from its beginning on, and shows the messages of its ended turns."""
        frames, begin = transcript.frames, transcript.start
        if frames and frames[0]["type"] == "conversation.snapshot":
            snapshot, begin = frames[0], frames[0]["seq"]
            frames = frames[1:]
            shown = [(message["id"], message["content"]) for message in snapshot["messages"]]
            assert shown == [(str(message["id"]), message["content"]) for message in self.messages[: len(shown)]]
        assert_shown(self.journal, [*map(frame_of, self.journal[:begin]), *frames])
        answers = {
            str(message["turn_id"]): message["content"] for message in self.messages if message["role"] == "assistant"
        }
        for turn_id, text in transcript.texts().items():
            assert text == answers[turn_id]


def frame_of(event: asyncpg.Record) -> Frame:
    """An event as a client is shown it."""
    frame = {"type": event["type"], "seq": event["seq"], **json.loads(event["payload"])}
    return frame if event["type"] == "message.created" else {**frame, "turn_id": event["turn_id"]}
