"""The openai agent: streams answers from any server of the chat completions API, and runs the tools that it asks for.

Nothing beyond the API's common core is asked for, except `stream_options`: a provider that refuses it is not served.
"""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from anynode.models.text import clean
from anynode.server.agents.agent import (
    Agent,
    AgentError,
    AgentEvent,
    HistoryMessage,
    StepEnd,
    TextDelta,
    ToolCall,
    ToolResult,
    Turn,
    Usage,
    continues,
    resumes_calls,
)
from anynode.server.agents.openai_calls import Calls
from anynode.server.agents.openai_stream import ProviderError, StepDecoder, quote
from anynode.server.agents.tool_calls import NO_ERRORS, ToolRunner, messages_of
from anynode.server.agents.tools import Tool
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings

CONNECT_TIMEOUT_SECONDS = 10
ERROR_BYTES_MAX = 65_536
ERROR_BODY_SECONDS = 5
FINISHING_SECONDS = 5  # for the usage and [DONE] after the finish_reason: the answer is whole without them
END_OF_STREAM_SECONDS = 0.1  # for the last bytes after [DONE]: only a body that was read to its end leaves a connection


class _Message(msgspec.Struct, omit_defaults=True, gc=False):
    role: str
    content: str  # empty beside calls, not null, which more servers refuse
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool


class _Request(msgspec.Struct, omit_defaults=True):
    model: str
    messages: list[_Message]
    stream: bool
    stream_options: _StreamOptions
    tools: msgspec.Raw | None = None
    tool_choice: str | None = None


class _ErrorBody(msgspec.Struct):
    error: ProviderError | str | None = None
    message: str | None = None
    detail: str | None = None


_ERROR_BODY = msgspec.json.Decoder(_ErrorBody)
_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class _Provider:
    session: aiohttp.ClientSession
    url: URL
    model: str
    key: str | None
    timeout_seconds: float
    tools: msgspec.Raw | None  # as a request has them; None: no tools
    calls_bytes_max: int


@asynccontextmanager
async def open_openai(settings: Settings, tools: Sequence[Tool] = ()) -> AsyncIterator[Agent]:
    """Open the agent, with the connections that all turns of a node share. Raises ConfigurationError."""
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
        auto_decompress=False,  # a few kilobytes may unpack to hours of the processor's time
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
            tools=_tools(tools) if tools else None,
            calls_bytes_max=settings.answer_bytes_max,
        )
        runner = ToolRunner(tools, settings)

        @resumes_calls
        async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
            answering = _answer(provider, runner, turn, requests_max=settings.tool_steps_max)
            # aclosing: a generator that is left in the middle would keep its connection until it is collected.
            async with aclosing(answering) as events:
                async for event in events:
                    yield event

        yield continues(answer) if settings.continue_partial else answer


def _tools(tools: Sequence[Tool]) -> msgspec.Raw:
    functions = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
    return msgspec.Raw(_ENCODER.encode([{"type": "function", "function": function} for function in functions]))


async def _answer(
    provider: _Provider, runner: ToolRunner, turn: Turn, *, requests_max: int
) -> AsyncGenerator[AgentEvent, None]:
    """Ask the model, run the tools that it calls, and ask it again with the results, until it calls none."""
    messages = [*turn.history, *turn.steps]
    requests = sum(message.role == "assistant" for message in turn.steps)  # those of earlier attempts
    text = turn.partial
    calls: Sequence[ToolCall] = turn.pending
    errors = NO_ERRORS
    while True:
        if not calls:
            requests += 1
            request = _ModelRequest(provider, [*messages, HistoryMessage("assistant", text)] if text else messages)
            async with aclosing(request.stream(may_call=requests < requests_max)) as events:
                async for event in events:
                    yield event
            text += clean("".join(request.texts))
            calls, errors = request.calls, request.errors
            if not calls:
                return
            if requests >= requests_max:
                raise AgentError(f"the model asks for tools after {requests_max} requests (TOOL_STEPS_MAX)")
        else:
            requests += 1  # which the attempt before has made
        results: dict[str, ToolResult] = {}
        async with aclosing(runner.run(turn, calls, errors)) as events:
            async for event in events:
                if isinstance(event, ToolResult):
                    results[event.tool_call_id] = event
                yield event
        yield StepEnd()
        messages += messages_of(text, calls, [results[call.tool_call_id] for call in calls])
        text, calls = "", ()


class _ModelRequest:
    """One request to the model. After `stream` has ended, `texts` and `calls` are the model's answer, and `errors` says
    for the ids of some calls why they cannot be run."""

    def __init__(self, provider: _Provider, messages: Sequence[HistoryMessage]) -> None:
        self.texts: list[str] = []
        self.calls: Sequence[ToolCall] = ()
        self.errors: Mapping[str, str] = NO_ERRORS
        self._provider = provider
        self._messages = messages

    async def stream(self, *, may_call: bool) -> AsyncGenerator[AgentEvent, None]:
        """Yield the text as it comes, one delta for each read, then the usage. Raises AgentError."""
        provider = self._provider
        response = await _post(provider, _encode(provider, self._messages, may_call=may_call))
        try:
            is_stream = response.content_type == "text/event-stream" and _encoding(response) is None
            if response.status != 200 or not is_stream:
                raise await _refused(provider, response)
            calls = None if provider.tools is None else Calls(provider.calls_bytes_max)
            decoder = StepDecoder(provider.key, calls)
            while not decoder.ended:
                data = await _read(provider, response, finishing=decoder.finish_reason is not None)
                text = decoder.feed(data) if data else decoder.end()
                self.texts.append(text)
                yield TextDelta(text)  # also an empty one: a model that thinks is not silent
            decoder.check()
            if decoder.usage is not None:
                yield Usage(
                    input_tokens=decoder.usage.prompt_tokens or 0,
                    output_tokens=decoder.usage.completion_tokens or 0,
                    model=decoder.model or provider.model,
                )
            if calls:
                self.calls, self.errors = calls.finish(_ids(self._messages))
            await _read_to_end(response)
        finally:
            # Close, not release: what is not at its end must stop now, and what is has given its connection back.
            response.close()


def _ids(messages: Iterable[HistoryMessage]) -> set[str]:
    """Return the ids of the calls that have results in the messages."""
    return {message.tool_call_id for message in messages if message.tool_call_id is not None}


def _encode(provider: _Provider, messages: Iterable[HistoryMessage], *, may_call: bool) -> bytes:
    return _ENCODER.encode(
        _Request(
            model=provider.model,
            messages=[_Message(m.role, m.content, m.tool_calls, m.tool_call_id) for m in messages],
            stream=True,
            stream_options=_StreamOptions(include_usage=True),
            tools=provider.tools,
            tool_choice=None if may_call or provider.tools is None else "none",
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
    """Return the next bytes, or none at the end of the stream, however it ended."""
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


async def _refused(provider: _Provider, response: aiohttp.ClientResponse) -> AgentError:
    """Return the error that explains a response that is not a stream of an answer."""
    status = response.status
    encoding = _encoding(response)
    reason = quote(await _error_message(response), provider.key) if encoding is None else ""
    if status == 200:
        if encoding is not None:
            kind = quote(encoding, provider.key)
            return AgentError(f"the provider compresses its answer, although `identity` was asked for{kind}")
        if reason and response.content_type == "application/json":
            return AgentError(f"the provider answers without a stream{reason}")
        kind = quote(response.content_type, provider.key)
        return AgentError(f"the provider answers with no event stream, check OPENAI_BASE_URL{kind}")
    if 300 <= status < 400:
        return AgentError(f"the provider redirects (status {status}): set OPENAI_BASE_URL to where it leads")
    if status in (401, 403):
        return AgentError(f"the provider refuses access (status {status}), check OPENAI_API_KEY{reason}")
    if status == 404:
        return AgentError(f"the provider knows no such address or model, check OPENAI_BASE_URL and MODEL{reason}")
    wait = _wait_seconds(response.headers, time.time())
    again = "try again later" if wait is None else f"try again in {wait} s"
    if status == 429:
        return AgentError(f"the provider limits requests, {again}{reason}", retryable=True)
    if status >= 500 or status == 408:
        return AgentError(f"the provider failed (status {status}), {again}{reason}", retryable=True)
    return AgentError(f"the provider refuses the request (status {status}){reason}")


def _encoding(response: aiohttp.ClientResponse) -> str | None:
    """Return the `Content-Encoding`, None where the body is as it is."""
    encoding = ", ".join(response.headers.getall("Content-Encoding", ()))
    return None if encoding.strip().lower() in ("", "identity") else encoding


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
        error = parsed.error.message if isinstance(parsed.error, ProviderError) else parsed.error
        if message := error or parsed.message or parsed.detail:
            return message
    return None if "html" in response.content_type else body.decode(errors="replace")


def _wait_seconds(headers: Mapping[str, str], now: float) -> int | None:
    """Return the seconds that a provider asks to wait: `retry-after-ms`, or `Retry-After` as seconds or a date."""
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
