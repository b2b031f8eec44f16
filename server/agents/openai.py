"""The openai agent: streams answers from any server of the chat completions API.

Nothing beyond the API's common core is asked for, except `stream_options`: a provider that refuses it is not served.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from server.agents.agent import Agent, AgentError, AgentEvent, HistoryMessage, TextDelta, Turn, Usage
from server.errors import ConfigurationError
from server.settings import Settings

CONNECT_TIMEOUT_SECONDS = 10
LINE_BYTES_MAX = 1_048_576
ERROR_BYTES_MAX = 65_536
ERROR_BODY_SECONDS = 5
QUOTE_CHARACTERS_MAX = 300
FINISHING_SECONDS = 5  # for the usage and [DONE] after the finish_reason: the answer is whole without them
END_OF_STREAM_SECONDS = 0.1  # for the last bytes after [DONE]: only a body that was read to its end leaves a connection


class _Message(msgspec.Struct, omit_defaults=True, gc=False):
    role: str
    content: str
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool


class _Request(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool
    stream_options: _StreamOptions


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Tokens(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Error(msgspec.Struct):
    message: str | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Tokens | None = None
    model: str | None = None
    error: _Error | str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error | str | None = None
    message: str | None = None
    detail: str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_ERROR_BODY = msgspec.json.Decoder(_ErrorBody)
_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class _Provider:
    session: aiohttp.ClientSession
    url: URL
    model: str
    key: str | None
    timeout_seconds: float


@asynccontextmanager
async def open_openai(settings: Settings) -> AsyncIterator[Agent]:
    """The agent over the connections that it holds; one serves all turns of a node. Raises ConfigurationError."""
    base = URL(settings.openai_base_url)
    # Compressed streams come late: a compressor waits for more to compress.
    headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Content-Type": "application/json"}
    if settings.openai_api_key is not None:
        if not settings.openai_api_key.isascii() or not settings.openai_api_key.isprintable():
            raise ConfigurationError("OPENAI_API_KEY holds what no key holds, such as a line break: set it again")
        if base.user is not None or base.password is not None:
            raise ConfigurationError("OPENAI_BASE_URL holds a user or password beside OPENAI_API_KEY: unset one")
        headers["Authorization"] = f"Bearer {settings.openai_api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=settings.turns_max),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(
            total=None, connect=CONNECT_TIMEOUT_SECONDS, sock_read=settings.agent_timeout_seconds
        ),
    ) as session:
        provider = _Provider(
            session=session,
            url=(base / "chat" / "completions").with_query(base.query),
            model=settings.model,
            key=settings.openai_api_key,
            timeout_seconds=settings.agent_timeout_seconds,
        )

        async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
            # aclosing: a generator that is left in the middle would keep its connection until it is collected.
            async with aclosing(_stream_step(provider, [*turn.history, *turn.steps])) as step:
                async for event in step:
                    yield event

        yield answer


async def _stream_step(provider: _Provider, messages: Iterable[HistoryMessage]) -> AsyncGenerator[AgentEvent, None]:
    """One model request: its text as it comes, one delta for each read, then what it cost. Raises AgentError."""
    response = await _post(provider, _encode(provider.model, messages))
    try:
        if response.status != 200 or response.content_type != "text/event-stream":
            raise await _refused(provider, response)
        decoder = _StepDecoder(provider.key)
        while not decoder.ended:
            data = await _read(provider, response, finishing=decoder.finish_reason is not None)
            text = decoder.feed(data) if data else decoder.end()
            if text:
                yield TextDelta(text)
        decoder.check()
        if decoder.usage is not None:
            yield Usage(
                input_tokens=decoder.usage.prompt_tokens or 0,
                output_tokens=decoder.usage.completion_tokens or 0,
                model=decoder.model or provider.model,
            )
        await _read_to_end(response)
    finally:
        # Close, not release: what is not at its end must stop now, and what is has given its connection back already.
        response.close()


def _encode(model: str, messages: Iterable[HistoryMessage]) -> bytes:
    return _ENCODER.encode(
        _Request(
            model=model,
            messages=[_Message(m.role, m.content, m.tool_calls, m.tool_call_id) for m in messages],
            stream=True,
            stream_options=_StreamOptions(include_usage=True),
        )
    )


async def _post(provider: _Provider, body: bytes) -> aiohttp.ClientResponse:
    try:
        # BytesIO: aiohttp warns of bytes above 1 MiB, and writes these in pieces. A redirect would carry the key away.
        return await provider.session.post(provider.url, data=io.BytesIO(body), allow_redirects=False)
    except aiohttp.SocketTimeoutError as error:
        raise _silent(provider) from error
    except aiohttp.ConnectionTimeoutError as error:
        raise AgentError(
            f"the provider could not be reached within {CONNECT_TIMEOUT_SECONDS} s: check OPENAI_BASE_URL or try again",
            retryable=True,
        ) from error
    except (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError) as error:
        raise AgentError("no secure connection to the provider: check OPENAI_BASE_URL and its certificate") from error
    except aiohttp.ClientConnectorDNSError as error:
        raise AgentError(
            "the provider's name cannot be resolved: check OPENAI_BASE_URL or try again", retryable=True
        ) from error
    except aiohttp.ClientConnectorError as error:
        raise AgentError(
            "the provider cannot be reached: check OPENAI_BASE_URL or try again", retryable=True
        ) from error
    except aiohttp.ClientResponseError as error:
        raise AgentError("the provider does not speak HTTP: check OPENAI_BASE_URL") from error
    except aiohttp.ClientError as error:
        raise AgentError("the provider closed the connection without an answer", retryable=True) from error


def _silent(provider: _Provider) -> AgentError:
    return AgentError(f"the provider sent nothing for {provider.timeout_seconds:g} s", retryable=True)


async def _read(provider: _Provider, response: aiohttp.ClientResponse, *, finishing: bool) -> bytes:
    """The next bytes; none at the end of the stream, however it came."""
    try:
        async with asyncio.timeout(FINISHING_SECONDS if finishing else None):
            return await response.content.readany()
    except aiohttp.SocketTimeoutError as error:
        if not finishing:
            raise _silent(provider) from error
    except (TimeoutError, aiohttp.ClientError):
        pass
    return b""


async def _read_to_end(response: aiohttp.ClientResponse) -> None:
    try:
        async with asyncio.timeout(END_OF_STREAM_SECONDS):
            await response.content.readany()
    except (TimeoutError, aiohttp.ClientError):
        pass


class _Garbage(AgentError):
    """A line of the stream is no chunk."""


class _StepDecoder:
    """One streamed answer, fed in bytes cut anywhere, until it has `ended`; `check` then says whether it is whole.

    Every `data:` line is an event by itself, also without the empty line that should follow it.
    """

    def __init__(self, key: str | None) -> None:
        self.ended = False
        self.finish_reason: str | None = None
        self.usage: _Tokens | None = None
        self.model: str | None = None
        self._key = key
        self._line = bytearray()  # whose end has not come
        self._error: AgentError | None = None
        self._said = False
        self._lone_surrogates = False
        self._high_surrogate = ""  # whose other half has not come

    def feed(self, data: bytes) -> str:
        """The text that `data` completes."""
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
        if self._lone_surrogates:
            text = self._mend(text)
        self._said = self._said or bool(text)
        return text

    def end(self) -> str:
        """The text of a last line that lacks its end; nothing comes after it."""
        text = self.feed(b"\n")
        if not self.ended or isinstance(self._error, _Garbage):
            self.ended = True
            whole = self.finish_reason is not None
            self._error = None if whole else AgentError("the provider's answer was cut off", retryable=True)
        return text + self._mend("")

    def check(self) -> None:
        """Raise the AgentError of an answer that is not whole."""
        if self._error is not None:
            raise self._error
        if self.finish_reason == "content_filter" and not self._said:
            raise AgentError("the provider's content filter stopped the answer")

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
            said = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            raise AgentError(f"the provider failed during the answer{_quote(said, self._key)}", retryable=True)
        for choice in chunk.choices or ():
            if choice.delta is not None:
                if choice.delta.content:
                    pieces.append(choice.delta.content)
                if choice.delta.refusal:
                    pieces.append(choice.delta.refusal)
            if choice.finish_reason:
                self.finish_reason = choice.finish_reason
            if choice.finish_reason == "tool_calls" or (choice.delta is not None and choice.delta.tool_calls):
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
            # A provider that counts in UTF-16 may cut a surrogate pair in two: msgspec refuses a half, json does not.
            chunk = msgspec.convert(json.loads(payload), _Chunk)
        except (ValueError, RecursionError) as error:
            said = _quote(payload.decode(errors="replace"), self._key)
            raise _Garbage(f"the provider sent something else than chat completion chunks{said}") from error
        self._lone_surrogates = True
        return chunk

    def _mend(self, text: str) -> str:
        text = self._high_surrogate + text
        self._high_surrogate = ""
        if not self.ended and "\ud800" <= text[-1:] <= "\udbff":
            text, self._high_surrogate = text[:-1], text[-1]
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


async def _refused(provider: _Provider, response: aiohttp.ClientResponse) -> AgentError:
    """What to tell people about a response that is no stream."""
    status = response.status
    said = _quote(await _error_message(response), provider.key)
    if status == 200:
        if said and response.content_type == "application/json":
            return AgentError(f"the provider answers without a stream{said}")
        kind = _quote(response.content_type, provider.key)
        return AgentError(f"the provider answers with no event stream, check OPENAI_BASE_URL{kind}")
    if 300 <= status < 400:
        return AgentError(f"the provider redirects (status {status}): set OPENAI_BASE_URL to where it leads")
    if status in (401, 403):
        return AgentError(f"the provider refuses access (status {status}), check OPENAI_API_KEY{said}")
    if status == 404:
        return AgentError(f"the provider knows no such address or model, check OPENAI_BASE_URL and MODEL{said}")
    wait = _wait_seconds(response.headers, time.time())
    again = "try again later" if wait is None else f"try again in {wait} s"
    if status == 429:
        return AgentError(f"the provider limits requests, {again}{said}", retryable=True)
    if status >= 500 or status == 408:
        return AgentError(f"the provider failed (status {status}), {again}{said}", retryable=True)
    return AgentError(f"the provider refuses the request (status {status}){said}")


async def _error_message(response: aiohttp.ClientResponse) -> str | None:
    body = b""
    try:
        async with asyncio.timeout(ERROR_BODY_SECONDS):
            while len(body) < ERROR_BYTES_MAX and (data := await response.content.readany()):
                body += data
    except (TimeoutError, aiohttp.ClientError):
        pass  # what has come may say enough
    try:
        parsed = _ERROR_BODY.decode(body)
    except (ValueError, RecursionError):
        pass
    else:
        error = parsed.error.message if isinstance(parsed.error, _Error) else parsed.error
        if message := error or parsed.message or parsed.detail:
            return message
    return None if "html" in response.content_type else body.decode(errors="replace")


def _quote(said: str | None, key: str | None) -> str:
    """`: "…"` with what a provider said, without the key, on one line and not too long; empty if it said nothing."""
    text = said or ""
    if key:
        text = text.replace(key, "…")
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    if len(text) > QUOTE_CHARACTERS_MAX:
        text = text[: QUOTE_CHARACTERS_MAX - 1] + "…"
    return f': "{text}"' if text else ""


def _wait_seconds(headers: Mapping[str, str], now: float) -> int | None:
    """How long a provider asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif headers.get("retry-after", "").strip()[:1].isdigit():
            seconds = float(headers["retry-after"])
        else:
            seconds = parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now
        return max(1, math.ceil(seconds))
    except (ValueError, OverflowError):
        return None
