"""The stream of a chat completion: decodes bytes, cut anywhere, into text, calls, usage, and an end or an error."""

from __future__ import annotations

import json

import msgspec

from anynode.server.agents.agent import AgentError
from anynode.server.agents.openai_calls import CallDelta, Calls

LINE_BYTES_MAX = 1_048_576
QUOTE_CHARACTERS_MAX = 300


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[CallDelta] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Tokens(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ProviderError(msgspec.Struct):
    """The error object of a provider."""

    message: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Tokens | None = None
    model: str | None = None
    error: ProviderError | str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _Garbage(AgentError):
    """A line of the stream is not a chunk."""


class StepDecoder:
    """One streamed answer. Feed it bytes, cut anywhere, until it has `ended`; `check` then raises if it is not whole.

    Every `data:` line is an event by itself, also without the empty line that should follow it. Tool calls go to
    `calls`; if that is None, a tool call is an error.
    """

    def __init__(self, key: str | None, calls: Calls | None = None) -> None:
        self.calls = calls
        self.ended = False
        self.finish_reason: str | None = None
        self.usage: _Tokens | None = None
        self.model: str | None = None
        self._key = key
        self._line = bytearray()  # whose end has not come
        self._error: AgentError | None = None
        self._has_text = False

    def feed(self, data: bytes) -> str:
        """Take bytes, and return the text that they complete."""
        pieces: list[str] = []
        try:
            for line in self._lines(data):
                if line.startswith(b"data:"):
                    self._take(line[5:].strip(), pieces)
                if self.ended:
                    break
        except AgentError as error:
            self.ended, self._error = True, error
        text = "".join(pieces)
        self._has_text = self._has_text or bool(text)
        return text

    def end(self) -> str:
        """Take the end of the bytes, and return the text of a last line that lacks its end."""
        text = self.feed(b"\n")
        if not self.ended or isinstance(self._error, _Garbage):
            self.ended = True
            whole = self.finish_reason is not None
            self._error = None if whole else AgentError("the provider's answer was cut off", retryable=True)
        return text

    def check(self) -> None:
        """Raise AgentError if the answer is not whole."""
        if self._error is not None:
            raise self._error
        if self.finish_reason == "content_filter" and not self._has_text:
            raise AgentError("the provider's content filter stopped the answer")
        if self.finish_reason == "tool_calls" and not self.calls:
            raise AgentError("the model asked for a tool, and did not say for which", retryable=True)

    def _lines(self, data: bytes) -> list[bytearray]:
        self._line += data
        lines: list[bytearray] = []
        if b"\n" in data:
            *lines, self._line = self._line.split(b"\n")
        if len(self._line) > LINE_BYTES_MAX:
            raise AgentError(f"the provider sent a line of more than {LINE_BYTES_MAX} bytes")
        return lines

    def _take(self, payload: bytearray, pieces: list[str]) -> None:
        if not payload:
            return
        if payload == b"[DONE]":
            self.ended = True
            return
        chunk = self._decode(payload)
        if chunk.error is not None:
            reason = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            raise AgentError(f"the provider failed during the answer{quote(reason, self._key)}", retryable=True)
        for choice in chunk.choices or ():
            if choice.delta is not None:
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                if choice.delta.refusal:
                    pieces.append(choice.delta.refusal)
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason
            asked = choice.delta.tool_calls if choice.delta is not None else None
            if self.calls is not None:
                self.calls.add(asked or ())
            elif asked or choice.finish_reason == "tool_calls":
                raise AgentError("the model asked for a tool, and this server has none")
        if chunk.usage is not None:
            self.usage = chunk.usage  # the newest: some providers count on in every chunk
        self.model = chunk.model or self.model

    def _decode(self, payload: bytearray) -> _Chunk:
        try:
            return _CHUNK.decode(payload)
        except (ValueError, RecursionError):
            pass
        try:
            # A provider that counts in UTF-16 may cut a surrogate pair in two: msgspec refuses a half, json does not
            # (the turn puts the halves together).
            return msgspec.convert(json.loads(payload), _Chunk)
        except (ValueError, RecursionError) as error:
            quoted = quote(payload.decode(errors="replace"), self._key)
            raise _Garbage(f"the provider sent something else than chat completion chunks{quoted}") from error


def quote(text: str | None, key: str | None) -> str:
    """Return `: "…"` with a provider's text in one short line, without the key; an empty string if there is no text."""
    text = text or ""
    if key:
        text = text.replace(key, "…")
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    if len(text) > QUOTE_CHARACTERS_MAX:
        text = text[: QUOTE_CHARACTERS_MAX - 1] + "…"
    return f': "{text}"' if text else ""
