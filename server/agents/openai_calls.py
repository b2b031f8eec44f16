"""The tool calls in the stream of a chat completion, put together from the pieces that a provider sends.

Providers differ: the index may be missing or always 0; the id missing, empty or repeated; a call whole in one chunk.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from anynode.models.text import clean, is_storable
from anynode.server.agents.agent import AgentError, ToolCall
from anynode.server.protocol.encoding import encode
from anynode.server.settings import CALLS_AT_ONCE_MAX

ID_CHARACTERS_MAX: Final = 256
_NOT_OF_A_NAME: Final = re.compile(r"[^a-zA-Z0-9_-]")


class _FunctionDelta(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None  # an object where a provider does not stream them


class CallDelta(msgspec.Struct, gc=False):
    """One piece of a call."""

    index: int | None = None
    id: str | None = None
    function: _FunctionDelta | None = None


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class Calls:
    """The calls of one step, in the order in which they begin. `bytes_max` bounds all names and arguments together."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_left = bytes_max
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, deltas: Iterable[CallDelta]) -> None:
        """Take pieces of calls. Raises AgentError where there are too many calls, or they are too long."""
        for delta in deltas:
            function = delta.function or _FunctionDelta()
            given, name = function.arguments, function.name or ""
            arguments = given if isinstance(given, str) else "" if given is None else encode(given)
            if not (delta.id or name or arguments):
                continue
            call = self._call(delta, name)
            call.id = call.id or delta.id or ""
            if name != call.name:  # some repeat the whole name in each piece
                call.name += name
            call.arguments.append(arguments)
            self._bytes_left -= len(name) + len(arguments.encode(errors="replace"))
            if self._bytes_left < 0:
                raise AgentError("the model's calls are longer than an answer may be (ANSWER_BYTES_MAX)")

    def _call(self, delta: CallDelta, name: str) -> _Call:
        """Return the call that a piece belongs to."""
        if delta.index is None:
            known = [call for call in self._calls if delta.id and call.id == delta.id]
            if not known and not name and not delta.id:
                known = self._calls[-1:]
        else:
            known = [self._by_index[delta.index]] if delta.index in self._by_index else []
        if known and not _is_another(known[0], delta.id, name):
            return known[0]
        if len(self._calls) == CALLS_AT_ONCE_MAX:
            raise AgentError(f"the model makes more than {CALLS_AT_ONCE_MAX} calls at once")
        call = _Call()
        self._calls.append(call)
        if delta.index is not None:
            self._by_index[delta.index] = call
        return call

    def finish(self, ids: Collection[str]) -> tuple[list[ToolCall], dict[str, str]]:
        """Return the calls, and for the ids of some why they cannot be run.

        A call gets a new id if it has none, or one that is in `ids` or belongs to another call.
        """
        taken = set(ids)
        finished: list[ToolCall] = []
        errors: dict[str, str] = {}
        for call in self._calls:
            id = call.id
            if not id or id in taken or len(id) > ID_CHARACTERS_MAX or not is_storable(id):
                id = f"call_{secrets.token_hex(12)}"
            taken.add(id)
            # The provider would refuse an invalid name when it is sent back with the result.
            name = _NOT_OF_A_NAME.sub("_", call.name)[:64] or "unnamed"
            try:
                arguments = _decode("".join(call.arguments))
            except ValueError as error:
                arguments, errors[id] = {}, f"the arguments must be a JSON object, and are not: {error}"
            finished.append(ToolCall(id, name, arguments))
        return finished, errors


def _is_another(call: _Call, id: str | None, name: str) -> bool:
    """Return whether a piece begins another call, although its index is that of `call`."""
    if id and call.id:
        return id != call.id
    return bool(name and not id and name != call.name and any(call.arguments))


def _decode(text: str) -> Mapping[str, Any]:
    """Return the arguments. Raises ValueError where they are not a JSON object."""
    if not text.strip():
        return {}  # of a tool without parameters
    try:
        decoded = msgspec.json.decode(clean(text))
    except RecursionError as error:
        raise ValueError("they are nested too deep") from error
    if not isinstance(decoded, dict):
        raise ValueError(f"they are of type {type(decoded).__name__}")
    return decoded
