"""One turn with text and tools, each of whose events comes when the test lets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.agents.scripted import Strings, script_of
from tests.kit.harness import Frame, Socket

# What the agent does, an event a line; a gate before each lets the test decide when it comes.
ACTIONS: Sequence[Sequence[Any]] = (
    ("text", "Let me "),
    ("text", "look "),
    ("text", "that up: "),
    ("call", "call-1", "search", {"query": "föö"}),
    ("result", "call-1", "search", "nothing \u2615"),
    ("text", "No luck; "),
    ("text", "again: "),
    ("call", "call-2", "search", {"query": "bar"}),
    ("result", "call-2", "search", "broken", True),
    ("text", "It is "),
    ("text", "probably "),
    ("text", "42."),
)
STEP_ENDS_AFTER = (4, 8)
ANSWER = "Let me look that up: No luck; again: It is probably 42."
LAST_TEXT = "It is probably 42."
EVENTS = len(ACTIONS) + 3  # message.created and turn.started before, turn.completed after


class Gated:
    """A question that makes the agent take the ACTIONS; from seq 3 on, an event comes when the test lets it."""

    def __init__(self, strings: Strings) -> None:
        self._strings = strings
        self._gates = [strings.name() for _ in range(EVENTS - 2)]
        script: list[Sequence[Any]] = []
        for number, action in enumerate(ACTIONS):
            script += [("gate", self._gates[number]), action]
            if number in STEP_ENDS_AFTER:
                script.append(("step",))
        self.question = script_of(*script, ("gate", self._gates[-1]), ("usage", 3, 4, "scripted"))

    def open(self, seq: int) -> None:
        """Let the event with this seq come."""
        if 3 <= seq <= EVENTS:
            self._strings.open(self._gates[seq - 3])

    def open_all(self) -> None:
        """Let all events come."""
        for gate in self._gates:
            self._strings.open(gate)


async def begin(socket: Socket, gated: Gated) -> tuple[str, list[Frame]]:
    """Send the question; returns the conversation and the first frame."""
    await socket.ask(gated.question)
    frames = await drive(socket, gated, to=1)
    return frames[0]["conversation_id"], frames


async def drive(socket: Socket, gated: Gated, *, to: int, after: int = 0) -> list[Frame]:
    """Take the frames up to the event with seq `to`, letting each come when the one before has been seen."""
    frames: list[Frame] = []
    seq = after
    while seq < to:
        gated.open(seq + 1)
        frame = await socket.receive()
        assert frame.get("seq", 0) > seq, frame
        seq = frame["seq"]
        frames.append(frame)
    return frames
