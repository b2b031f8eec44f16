"""The AI SDK's UI message chunks, made of a turn's events. Pure.

The same events make the same chunks on every node and at every replay, so the chunks have the same numbers. `whole`
shows what stands of a turn so far in as few chunks as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, assert_never

import msgspec

from anynode.models.events import DELTA, Event
from anynode.models.rules import CANCELLED, COMPLETED
from anynode.server.agents.agent import ToolResult
from anynode.server.engine.turn_events import (
    TurnCalled,
    TurnDelta,
    TurnEnded,
    TurnRestarted,
    TurnStarted,
    decode_event,
)
from anynode.server.protocol.encoding import encode
from anynode.server.protocol.frames import Usage

START_STEP: Final = '{"type":"start-step"}'
FINISH_STEP: Final = '{"type":"finish-step"}'
RESET_STEP: Final = '{"type":"reset-step"}'
ABORT: Final = '{"type":"abort"}'
NOT_FINISHED: Final = "The turn ended before the tool had answered."
_DELTA_HEAD: Final = '{"type":"text-delta",'


@dataclass(slots=True)
class _Step:
    """The part of the stream that shows one model request: how many characters of text, and the chunks of each call's
    input and output, by the call's id."""

    said: int = 0
    calls: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_answered(self) -> bool:
        return bool(self.calls) and not self.unanswered

    @property
    def unanswered(self) -> list[str]:
        return [id for id, chunks in self.calls.items() if len(chunks) == 1]


class Chunks:
    """The chunks of one turn.

    `takes_back` says that something that was shown no longer stands. What follows is then right only for a client that
    knows `reset-step`.
    """

    def __init__(self, turn_id: str) -> None:
        self.takes_back = False
        self._turn_id = turn_id
        self._texts = 0  # text parts so far: the number of the last is its id
        self._is_text_open = False
        self._said_before = 0  # characters of the steps before
        self._step = _Step()

    def take(self, event: Event) -> list[str]:
        """Return the chunks that the turn's next event makes, each as JSON."""
        match decode_event(event.type, event.payload):
            case TurnDelta(text):
                return self._text(event, len(text))
            case TurnStarted():
                return [f'{{"type":"start","messageId":"{self._turn_id}"}}', START_STEP]
            case TurnCalled() as call:
                return self._call(call)
            case ToolResult() as result:
                return self._result(result)
            case TurnRestarted(text):
                return self._restart(text)
            case TurnEnded() as ending:
                return self._end(ending)
            case None:
                return []
            case unknown:
                assert_never(unknown)

    def _text(self, event: Event, length: int) -> list[str]:
        chunks = self._next_step()
        self._step.said += length
        if not self._is_text_open:
            chunks.append(self._open_text())
        # The payload is {"text": …}, and JSON already.
        text = event.payload[event.payload.index(":") + 1 :]
        chunks.append(f'{_DELTA_HEAD}"id":"{self._texts}","delta":{text}')
        return chunks

    def _call(self, call: TurnCalled) -> list[str]:
        chunks = [*self._next_step(), *self._close_text()]
        shown = encode(
            {
                "type": "tool-input-available",
                "toolCallId": call.tool_call_id,
                "toolName": call.tool_name,
                "input": harmless(call.decoded_arguments()),
                "dynamic": True,
                "providerExecuted": True,
            }
        )
        self._step.calls[call.tool_call_id] = [shown]
        return [*chunks, shown]

    def _result(self, result: ToolResult) -> list[str]:
        chunks = self._close_text()
        shown = _output(result.tool_call_id, result.content, is_error=result.is_error)
        self._step.calls.setdefault(result.tool_call_id, []).append(shown)
        return [*chunks, shown]

    def _restart(self, text: str) -> list[str]:
        """Reset the step that was cut: a beginning of its text and the calls that were answered still stand."""
        step = self._step
        standing = text[self._said_before :]
        if len(standing) == step.said and not step.unanswered:
            return []
        self.takes_back = True
        self._is_text_open = False
        self._step = _Step(len(standing), {id: shown for id, shown in step.calls.items() if len(shown) > 1})
        chunks = [RESET_STEP]
        if standing:
            chunks.append(self._open_text())
            chunks.append(encode({"type": "text-delta", "id": str(self._texts), "delta": standing}))
            if self._step.calls:
                chunks += self._close_text()
        return [*chunks, *(chunk for shown in self._step.calls.values() for chunk in shown)]

    def _end(self, ending: TurnEnded) -> list[str]:
        chunks = self._close_text()
        chunks += [_output(id, NOT_FINISHED, is_error=True) for id in self._step.unanswered]
        if ending.status == COMPLETED:
            finish = {"type": "finish", "finishReason": "stop", "messageMetadata": metadata_of(ending.usage)}
            return [*chunks, FINISH_STEP, encode(finish)]
        if ending.status == CANCELLED:
            return [*chunks, ABORT]
        assert ending.error is not None
        return [*chunks, encode({"type": "error", "errorText": ending.error.message})]

    def _next_step(self) -> list[str]:
        """Begin the next step if all calls of this one are answered."""
        if not self._step.is_answered:
            return []
        chunks = [*self._close_text(), FINISH_STEP, START_STEP]
        self._said_before += self._step.said
        self._step = _Step()
        return chunks

    def _open_text(self) -> str:
        self._texts += 1
        self._is_text_open = True
        return f'{{"type":"text-start","id":"{self._texts}"}}'

    def _close_text(self) -> list[str]:
        if not self._is_text_open:
            return []
        self._is_text_open = False
        return [f'{{"type":"text-end","id":"{self._texts}"}}']


def whole(chunks: Chunks, events: Sequence[Event]) -> list[str]:
    """Return the chunks that show what stands of a turn after its first `events`; `chunks` goes on from there."""
    shown: list[str] = []
    step_at = 0  # where the current step's parts begin
    deltas: list[str] = []  # JSON strings of one text, to be one

    def merge() -> None:
        if deltas:
            shown[-1] += '"' + "".join(deltas) + '"}'
            deltas.clear()

    for event in events:
        for chunk in chunks.take(event):
            if event.type == DELTA and chunk.startswith(_DELTA_HEAD):
                head, _, text = chunk.partition('"delta":')
                if not deltas:
                    shown.append(head + '"delta":')
                deltas.append(text.strip()[1:-2])
                continue
            merge()
            if chunk == RESET_STEP:
                del shown[step_at:]
                continue
            shown.append(chunk)
            if chunk == START_STEP:
                step_at = len(shown)
    merge()
    chunks.takes_back = False
    return shown


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Return the arguments of a stored call, which holds them as the text of a JSON object."""
    try:
        return msgspec.json.decode(call["function"]["arguments"])
    except msgspec.DecodeError:  # what a client has appended may be anything
        return {}


def harmless(value: Any) -> Any:
    """Return a JSON value without the keys that make the AI SDK refuse all of it.

    Such keys could change the prototypes of JavaScript's objects. A value that is nested too deeply to be checked
    becomes null.
    """
    try:
        return _harmless(value)
    except RecursionError:
        return None


def _harmless(value: Any) -> Any:
    if isinstance(value, dict):
        constructor = value.get("constructor")
        is_refused = isinstance(constructor, dict) and "prototype" in constructor
        refused = ("__proto__", "constructor") if is_refused else ("__proto__",)
        return {name: _harmless(item) for name, item in value.items() if name not in refused}
    return [_harmless(item) for item in value] if isinstance(value, list) else value


def metadata_of(usage: Usage | None) -> dict[str, Any]:
    """Return the metadata of an answer, such as its tokens, under the AI SDK's names."""
    if usage is None:
        return {}
    known = {"inputTokens": usage.input_tokens, "outputTokens": usage.output_tokens}
    tokens = {name: number for name, number in known.items() if number is not None}
    if len(tokens) == len(known):
        tokens["totalTokens"] = sum(tokens.values())
    metadata: dict[str, Any] = {"usage": tokens, "seconds": usage.seconds}
    return metadata if usage.model is None else {**metadata, "model": usage.model}


def _output(id: str, content: str, *, is_error: bool) -> str:
    said = ("tool-output-error", "errorText") if is_error else ("tool-output-available", "output")
    return encode({"type": said[0], "toolCallId": id, said[1]: content, "dynamic": True, "providerExecuted": True})
