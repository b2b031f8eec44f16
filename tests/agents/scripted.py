"""An agent whose question is its script, as JSON, and what a test needs to pull its strings from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from anynode import AgentError, AgentEvent, StepEnd, TextDelta, ToolCall, ToolResult, Turn, Usage

AGENT: Final = "tests.agents.scripted:script"
DIRECTORY: Final = "SCRIPT_DIRECTORY"  # the environment variable that says where gates and marks are
GATE_SECONDS_MAX: Final = 60.0
POLL_SECONDS: Final = 0.002


async def script(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Do what the question says, action by action. Text may hold `{attempt}`."""
    for action, *arguments in json.loads(turn.history[-1].content):
        match action:
            case "text":
                yield TextDelta(arguments[0].replace("{attempt}", str(turn.attempt)))
            case "repeat":  # without a single await in between
                for number in range(arguments[0]):
                    yield TextDelta(arguments[1].replace("{number}", str(number)))
            case "huge":
                yield TextDelta(arguments[0] * arguments[1])
            case "paced":
                text = arguments[1].replace("{attempt}", str(turn.attempt))
                for number in range(arguments[0]):
                    yield TextDelta(text.replace("{number}", str(number)))
                    await asyncio.sleep(arguments[2])
            case "call":
                yield ToolCall(*arguments)
            case "result":
                yield ToolResult(*arguments)
            case "results":  # a number of calls, and the result of each
                for number in range(arguments[0]):
                    yield ToolCall(f"call-{number}", "tool", {})
                    yield ToolResult(f"call-{number}", "tool", arguments[1])
            case "step":
                yield StepEnd()
            case "usage":
                yield Usage(*arguments)
            case "gate":
                await _wait_for(_directory() / arguments[0])
            case "mark":
                _mark(arguments[0], turn)
            case "raise":
                raise ValueError(arguments[0])
            case "agent_error":
                raise AgentError(arguments[0], retryable=arguments[1])
            case "hang":
                await asyncio.Event().wait()
            case "stuck":  # in these attempts: hang, and mark that it is cancelled
                if turn.attempt in arguments[1:]:
                    try:
                        await asyncio.Event().wait()
                    finally:
                        _mark(arguments[0], turn)
            case "hold":  # in these attempts: hang up to a gate, and do not let go when cancelled
                while turn.attempt in arguments[1:] and not (_directory() / arguments[0]).exists():
                    try:
                        await asyncio.sleep(POLL_SECONDS)
                    except asyncio.CancelledError:
                        pass
            case "deaf":  # go on talking up to a gate, also when cancelled
                while not (_directory() / arguments[0]).exists():
                    try:
                        await asyncio.sleep(0.005)
                    except asyncio.CancelledError:
                        pass
                    yield TextDelta("still here ")
            case "cancel_itself":
                raise asyncio.CancelledError
            case "kill":  # in these attempts: take the whole node along
                if turn.attempt in arguments:
                    os.kill(os.getpid(), signal.SIGKILL)
            case "nonsense":
                yield arguments[0]
            case _:
                raise AssertionError(f"the script has an unknown action: {action}")


def _directory() -> Path:
    return Path(os.environ[DIRECTORY])


def _mark(name: str, turn: Turn) -> None:
    with (_directory() / name).open("a") as file:
        file.write(f"{turn.attempt}\n")


async def _wait_for(path: Path) -> None:
    async with asyncio.timeout(GATE_SECONDS_MAX):
        while not path.exists():  # noqa: ASYNC110, ASYNC240 (only a file reaches into another process)
            await asyncio.sleep(POLL_SECONDS)


class Strings:
    """The directory of gates and marks, seen from the test; names are the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a node needs in order to run scripts."""
        return {"AGENT": AGENT, DIRECTORY: str(self.directory)}

    def name(self) -> str:
        """A name that nobody else uses."""
        return uuid.uuid4().hex

    def open(self, gate: str) -> None:
        """Let the agent pass a gate."""
        (self.directory / gate).touch()

    def marks(self, name: str) -> list[int]:
        """The attempts in which agents have come past a mark."""
        path = self.directory / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def script_of(*actions: Sequence[Any]) -> str:
    """The question that is this script; ASCII, so that it may hold what no message may."""
    return json.dumps(actions)


async def eventually(condition: Callable[[], Awaitable[object]], within_seconds: float = 20.0) -> None:
    """Wait until a condition that only the outside can show holds."""
    deadline = time.monotonic() + within_seconds
    while not await condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.01)
