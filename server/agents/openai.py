"""The openai agent: streams answers from any server of the chat completions API.

Nothing beyond the API's common core is asked for, except `stream_options`: a provider that refuses it is not served.
"""

from __future__ import annotations

import asyncio
import io
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

from server.agents.agent import Agent, AgentError, AgentEvent, HistoryMessage, TextDelta, Turn, Usage, continues
from server.agents.openai_stream import ProviderError, StepDecoder, quote
from server.errors import ConfigurationError
from server.settings import Settings

CONNECT_TIMEOUT_SECONDS = 10
ERROR_BYTES_MAX = 65_536
ERROR_BODY_SECONDS = 5
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
            messages = [*turn.history, *turn.steps]
            if turn.partial:
                messages.append(HistoryMessage("assistant", turn.partial))
            # aclosing: a generator that is left in the middle would keep its connection until it is collected.
            async with aclosing(_stream_step(provider, messages)) as step:
                async for event in step:
                    yield event

        yield continues(answer) if settings.continue_partial else answer


async def _stream_step(provider: _Provider, messages: Iterable[HistoryMessage]) -> AsyncGenerator[AgentEvent, None]:
    """One model request: its text as it comes, one delta for each read, then what it cost. Raises AgentError."""
    response = await _post(provider, _encode(provider.model, messages))
    try:
        if response.status != 200 or response.content_type != "text/event-stream":
            raise await _refused(provider, response)
        decoder = StepDecoder(provider.key)
        while not decoder.ended:
            data = await _read(provider, response, finishing=decoder.finish_reason is not None)
            text = decoder.feed(data) if data else decoder.end()
            yield TextDelta(text)  # an empty one, too: a model that thinks is no silent one
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


async def _refused(provider: _Provider, response: aiohttp.ClientResponse) -> AgentError:
    """What to tell people about a response that is no stream."""
    status = response.status
    said = quote(await _error_message(response), provider.key)
    if status == 200:
        if said and response.content_type == "application/json":
            return AgentError(f"the provider answers without a stream{said}")
        kind = quote(response.content_type, provider.key)
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
        error = parsed.error.message if isinstance(parsed.error, ProviderError) else parsed.error
        if message := error or parsed.message or parsed.detail:
            return message
    return None if "html" in response.content_type else body.decode(errors="replace")


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
