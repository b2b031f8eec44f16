"""The openai agent against a real HTTP server."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from email.utils import formatdate
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.server.agents import openai, openai_stream
from anynode.server.agents.agent import Agent, AgentError, AgentEvent, HistoryMessage, TextDelta, Turn, Usage
from anynode.server.agents.openai import open_openai
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings
from tests.kit.provider import DONE, Provider, Reply, answer, delta, event, serve_provider, usage

KEY = "key-for-tests-0123456789"


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    async with serve_provider() as provider:
        yield provider


@pytest.fixture
async def agent(provider: Provider) -> AsyncIterator[Agent]:
    async with open_openai(settings(provider)) as agent:
        yield agent


def settings(provider: Provider, **others: Any) -> Settings:
    values: dict[str, Any] = {"openai_base_url": provider.url, "openai_api_key": KEY, "model": "gpt-test", **others}
    return Settings(**values)


def ask(*history: HistoryMessage, steps: tuple[HistoryMessage, ...] = ()) -> Turn:
    return Turn(
        turn_id=UUID(int=1),
        conversation_id=UUID(int=2),
        user_id="ada",
        history=history or (HistoryMessage("user", "Hi"),),
        steps=steps,
    )


async def collect(agent: Agent, turn: Turn | None = None) -> list[AgentEvent]:
    """What the agent says, less the signs of life."""
    return [event async for event in agent(turn or ask()) if event != TextDelta("")]


def text_of(events: list[AgentEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def failure(agent: Agent, text: str = "") -> AgentError:
    """The error that ends the answer, which streams `text` first."""
    said: list[AgentEvent] = []

    async def listen() -> None:
        async for happening in agent(ask()):
            said.append(happening)

    with pytest.raises(AgentError) as raised:
        await listen()
    assert text_of(said) == text
    assert KEY not in str(raised.value)
    assert raised.value.message.isprintable()
    return raised.value


# What is asked


async def test_the_provider_gets_the_whole_history_in_order(provider: Provider, agent: Agent) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}]
    history = (
        HistoryMessage("system", "Be brief."),
        HistoryMessage("user", "Grüße 👋"),
        HistoryMessage("assistant", "Hello."),
        HistoryMessage("user", "What time is it?"),
    )
    steps = (
        HistoryMessage("assistant", "", tool_calls=calls),
        HistoryMessage("tool", "noon", tool_name="time", tool_call_id="c1"),
    )
    await collect(agent, ask(*history, steps=steps))
    assert provider.requests[0].body == {
        "model": "gpt-test",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße 👋"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_the_key_is_sent_as_a_bearer_token(provider: Provider, agent: Agent) -> None:
    await collect(agent)
    assert provider.requests[0].headers["Authorization"] == f"Bearer {KEY}"


async def test_without_a_key_there_is_no_authorization(provider: Provider) -> None:
    async with open_openai(settings(provider, openai_api_key=None)) as agent:
        await collect(agent)
    assert "Authorization" not in provider.requests[0].headers


async def test_the_query_of_the_base_url_is_kept(provider: Provider) -> None:
    async with open_openai(settings(provider, openai_base_url=f"{provider.url}?api-version=1")) as agent:
        assert text_of(await collect(agent)) == "Hello world."


async def test_a_history_of_several_megabytes_is_sent(provider: Provider, agent: Agent) -> None:
    history = [HistoryMessage("user", "x" * 65_536)] * 50
    assert text_of(await collect(agent, ask(*history))) == "Hello world."
    assert len(provider.requests[0].body["messages"]) == 50


@pytest.mark.parametrize("key", ["with-newline\n", "größe"])
async def test_a_key_that_no_header_can_carry_is_refused_at_the_start(provider: Provider, key: str) -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY") as refusal:
        async with open_openai(settings(provider, openai_api_key=key)):
            pass
    assert key.strip() not in str(refusal.value)


async def test_a_password_in_the_url_beside_a_key_is_refused_at_the_start(provider: Provider) -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_BASE_URL"):
        async with open_openai(settings(provider, openai_base_url="http://user:password@localhost/v1")):
            pass


# What is streamed


async def test_an_answer_is_streamed_with_its_usage_last(provider: Provider, agent: Agent) -> None:
    provider.replies.append(answer("Hello ", "world."))
    assert await collect(agent) == [
        TextDelta("Hello "),
        TextDelta("world."),
        Usage(input_tokens=7, output_tokens=2, model="fake-1"),
    ]


async def test_text_is_yielded_before_more_of_it_has_come(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Now"),), then="hang"))
    events = cast(Any, agent(ask()))
    assert await anext(events) == TextDelta("Now")
    await events.aclose()


async def test_deltas_that_come_together_are_yielded_as_one(provider: Provider, agent: Agent) -> None:
    deltas = b"".join(delta(content=text) for text in ("a", "b", "c"))
    provider.replies.append(Reply((deltas, delta("stop") + DONE)))
    assert await collect(agent) == [TextDelta("abc")]


TEXT = "Grüße, 世界 👋🏽!"
WHOLE = delta(content=TEXT) + delta("stop") + usage(1, 2) + DONE


def test_a_stream_may_be_cut_at_every_byte() -> None:
    for cut in range(1, len(WHOLE)):
        decoder = openai_stream.StepDecoder(None)
        text = decoder.feed(WHOLE[:cut])
        assert decoder.ended == (cut >= len(WHOLE) - 1)
        text += "" if decoder.ended else decoder.feed(WHOLE[cut:])
        decoder.check()
        assert (decoder.ended, text) == (True, TEXT)


async def test_a_stream_may_come_cut_at_every_byte_of_its_text(provider: Provider, agent: Agent) -> None:
    start = WHOLE.index(TEXT.encode())
    for cut in range(start, start + len(TEXT.encode()) + 1):
        provider.replies.append(Reply((WHOLE[:cut], WHOLE[cut:])))
        assert text_of(await collect(agent)) == TEXT


async def test_a_stream_may_come_byte_by_byte(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply([WHOLE[i : i + 1] for i in range(len(WHOLE))]))
    assert text_of(await collect(agent)) == TEXT


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(WHOLE.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(WHOLE.replace(b"data: ", b"data:"), id="no space after data:"),
        pytest.param(WHOLE.replace(b"\n\n", b"\n"), id="no empty lines"),
        pytest.param(WHOLE.removesuffix(b"\n\n"), id="no end of line after [DONE]"),
        pytest.param(WHOLE.removesuffix(DONE), id="no [DONE]"),
        pytest.param(WHOLE.removesuffix(DONE) + b'data: {"choi', id="cut after finish_reason"),
        pytest.param(WHOLE.replace(delta("stop"), b""), id="no finish_reason"),
        pytest.param(WHOLE.replace(b'"stop"', b'"length"'), id="stopped by its length"),
        pytest.param(
            b": hello\n\n:\n\n" + WHOLE.replace(b"data", b": keep-alive\n\nevent: x\nid: 1\ndata"), id="comments"
        ),
        pytest.param(b"data:\n\n" + WHOLE, id="empty data"),
        pytest.param(event({"choices": None, "usage": None, "error": None}) + WHOLE, id="nulls"),
        pytest.param(event({"choices": [{"delta": None}, {}]}) + event({}) + WHOLE, id="nothing in it"),
        pytest.param(delta(content=None, refusal=None, tool_calls=[]) + WHOLE, id="null content"),
        pytest.param(delta(reasoning="hm", reasoning_content="hm", other={"x": [1]}) + WHOLE, id="unknown fields"),
        pytest.param(WHOLE.replace(b'"content"', b'"refusal"'), id="a refusal"),
    ],
)
async def test_an_unusual_stream_is_understood(provider: Provider, agent: Agent, stream: bytes) -> None:
    provider.replies.append(Reply((stream,)))
    assert text_of(await collect(agent)) == TEXT


async def test_a_provider_that_never_sends_usage_is_fine(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Hi"), delta("stop"), DONE)))
    assert await collect(agent) == [TextDelta("Hi")]


async def test_of_usage_in_every_chunk_the_last_counts(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Hi"), usage(3, 1), usage(3, 2), delta("stop"), DONE)))
    assert (await collect(agent))[1:] == [Usage(input_tokens=3, output_tokens=2, model="fake-1")]


async def test_halves_of_surrogate_pairs_are_left_to_the_turn_to_join(provider: Provider, agent: Agent) -> None:
    high, low = (delta(content="X").replace(b"X", half) for half in (rb"a\ud83d", rb"\ude00b"))
    provider.replies.append(Reply((high, low, delta("stop"), DONE)))
    assert text_of(await collect(agent)) == "a\ud83d\ude00b"


async def test_a_chunk_without_text_is_a_sign_of_life(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((event({"choices": [{"delta": {"reasoning": "hm"}}]}),), then="hang"))
    thinking = cast(Any, agent(ask()))
    assert await asyncio.wait_for(anext(thinking), 10) == TextDelta("")
    await thinking.aclose()


async def test_a_connection_is_used_again_after_a_whole_answer(provider: Provider, agent: Agent) -> None:
    await collect(agent)
    await collect(agent)
    assert provider.requests[0].peer == provider.requests[1].peer


async def test_a_provider_that_neither_says_done_nor_ends_is_left(
    provider: Provider, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "FINISHING_SECONDS", 0.01)
    provider.replies.append(Reply((delta(content="Hi"), delta("stop")), then="hang"))
    assert await asyncio.wait_for(collect(agent), 10) == [TextDelta("Hi")]
    await asyncio.wait_for(provider.left.wait(), 10)


async def test_two_answers_stream_at_once(provider: Provider, agent: Agent) -> None:
    provider.replies += [Reply((delta(content="held"),), then="hang"), answer("free")]
    held = cast(Any, agent(ask()))
    assert await anext(held) == TextDelta("held")
    assert text_of(await collect(agent)) == "free"
    await held.aclose()


# Cancellation


async def test_cancelling_the_task_closes_the_connection(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Hi"),), then="hang"))
    task = asyncio.create_task(collect(agent))
    await asyncio.wait_for(provider.hanging.wait(), 10)
    assert not provider.left.is_set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(provider.left.wait(), 10)


async def test_closing_the_generator_closes_the_connection(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Hi"),), then="hang"))
    async with aclosing(cast(Any, agent(ask()))) as events:
        assert await anext(events) == TextDelta("Hi")
        assert not provider.left.is_set()
    await asyncio.wait_for(provider.left.wait(), 10)


async def test_cancelling_before_the_first_byte_closes_the_connection(provider: Provider) -> None:
    connected, left = asyncio.Event(), asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        connected.set()
        await reader.read()
        left.set()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_openai(settings(provider, openai_base_url=f"http://127.0.0.1:{port}")) as agent:
            task = asyncio.create_task(collect(agent))
            await asyncio.wait_for(connected.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(left.wait(), 10)


# Errors


def refusal(status: int, message: str = "Because.", **headers: str) -> Reply:
    body = event({"error": {"message": message, "type": "x", "code": None}}).removeprefix(b"data: ")
    return Reply(
        (body,), status, {name.replace("_", "-"): value for name, value in headers.items()}, "application/json"
    )


@pytest.mark.parametrize(
    ("status", "says", "retryable"),
    [
        (400, ["refuses the request (status 400)"], False),
        (401, ["OPENAI_API_KEY"], False),
        (403, ["OPENAI_API_KEY"], False),
        (404, ["OPENAI_BASE_URL", "MODEL"], False),
        (408, ["try again"], True),
        (422, ["refuses the request (status 422)"], False),
        (429, ["limits requests, try again later"], True),
        (500, ["failed (status 500)"], True),
        (503, ["failed (status 503)"], True),
    ],
)
async def test_a_status_is_explained_in_the_providers_words(
    provider: Provider, agent: Agent, status: int, says: list[str], retryable: bool
) -> None:
    provider.replies.append(refusal(status, "Because of that."))
    error = await failure(agent)
    assert all(part in error.message for part in says)
    assert error.message.endswith(': "Because of that."')
    assert error.retryable is retryable


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry_After": "12"}, "try again in 12 s"),
        ({"Retry_After": "0.2"}, "try again in 1 s"),
        ({"Retry_After_Ms": "2500", "Retry_After": "99"}, "try again in 3 s"),
        ({"Retry_After": formatdate(time.time() - 100, usegmt=True)}, "try again in 1 s"),
        ({"Retry_After": "soon"}, "try again later"),
        ({"Retry_After": "1e999"}, "try again later"),
        ({"Retry_After_Ms": "nan"}, "try again later"),
        ({}, "try again later"),
    ],
)
async def test_a_limit_says_how_long_to_wait(
    provider: Provider, agent: Agent, headers: dict[str, str], wait: str
) -> None:
    provider.replies.append(refusal(429, **headers))
    assert wait in (await failure(agent)).message


def test_a_wait_may_be_a_date() -> None:
    assert openai._wait_seconds({"retry-after": formatdate(1_700_000_012, usegmt=True)}, 1_700_000_000.0) == 12


@pytest.mark.parametrize(
    ("body", "content_type", "quote"),
    [
        (b'{"error": "plain"}', "application/json", ': "plain"'),
        (b'{"message": "top"}', "application/json", ': "top"'),
        (b'{"detail": "fastapi"}', "application/json", ': "fastapi"'),
        (b'{"detail": [1]}', "application/json", ': "{"detail": [1]}"'),
        (b"in  plain\n\x00\x1b[31mwords", "text/plain", ': "in plain [31mwords"'),
        (b"\xff", "text/plain", ': "�"'),
        (b"<html>no</html>", "text/html", "(status 400)"),
        (b"", "application/json", "(status 400)"),
        (b"x" * 1_000_000, "text/plain", ': "' + "x" * 299 + '…"'),
        (f"bad key {KEY}".encode() + b"y" * 300, "text/plain", ': "bad key …' + "y" * 290 + '…"'),
    ],
)
async def test_what_a_provider_says_is_quoted_safely(
    provider: Provider, agent: Agent, body: bytes, content_type: str, quote: str
) -> None:
    provider.replies.append(Reply((body,), 400, content_type=content_type))
    assert (await failure(agent)).message.endswith(quote)


async def test_an_answer_that_is_cut_off_fails_after_its_text(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Half an"),), then="cut"))
    error = await failure(agent, "Half an")
    assert (error.message, error.retryable) == ("the provider's answer was cut off", True)


@pytest.mark.parametrize("rest", [b"", b'data: {"choices": [{"del', b": bye\n"])
async def test_a_stream_that_ends_too_early_was_cut_off(provider: Provider, agent: Agent, rest: bytes) -> None:
    provider.replies.append(Reply((delta(content="Half an"), rest or b"\n")))
    error = await failure(agent, "Half an")
    assert (error.message, error.retryable) == ("the provider's answer was cut off", True)


async def test_a_connection_cut_after_the_finish_reason_is_a_whole_answer(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Hi"), delta("stop")), then="cut"))
    assert await collect(agent) == [TextDelta("Hi")]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"data: garbage\n\n", 'something else than chat completion chunks: "garbage"'),
        (b"data: [1]\n\n", "something else"),
        (b'data: {"choices": 3}\n\n', "something else"),
        (b'data: "\xff"\n\n', "something else"),
        (b"data: " + b"[" * 200_000 + b"\n\n", "something else"),
        (b'data: {"x": ' + b"[" * 200_000 + b"\n\n", "something else"),
        (event({"error": {"message": "Overloaded.", "code": 529}}), 'failed during the answer: "Overloaded."'),
        (event({"error": "Overloaded."}), 'failed during the answer: "Overloaded."'),
        (event({"error": {}}), "failed during the answer"),
        (b"data: " + b"x" * (openai_stream.LINE_BYTES_MAX + 1), "a line of more than 1048576 bytes"),
        (delta(tool_calls=[{"index": 0, "id": "c"}]), "the model asked for a tool, and this server has none"),
        (delta("tool_calls"), "the model asked for a tool, and this server has none"),
    ],
)
async def test_a_bad_event_fails_after_the_text_before_it(
    provider: Provider, agent: Agent, bad: bytes, says: str
) -> None:
    provider.replies.append(Reply((delta(content="So ") + delta(content="far") + bad,), then="hang"))
    assert says in (await failure(agent, "So far")).message
    await asyncio.wait_for(provider.left.wait(), 10)


async def test_a_filtered_answer_without_text_fails(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta("content_filter"), DONE)))
    assert "content filter" in (await failure(agent)).message


async def test_a_filtered_answer_with_text_is_an_answer(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta(content="Well"), delta("content_filter"), DONE)))
    assert await collect(agent) == [TextDelta("Well")]


@pytest.mark.parametrize(
    ("body", "content_type", "says"),
    [
        (b"<html>Welcome</html>", "text/html", 'no event stream, check OPENAI_BASE_URL: "text/html"'),
        (b'{"error": {"message": "Nope."}}', "application/json", 'without a stream: "Nope."'),
    ],
)
async def test_what_is_no_event_stream_is_refused(
    provider: Provider, agent: Agent, body: bytes, content_type: str, says: str
) -> None:
    provider.replies.append(Reply((body,), content_type=content_type))
    assert says in (await failure(agent)).message


@pytest.mark.parametrize("encoding", ["gzip", "identity, GZIP", "x-unknown"])
async def test_an_answer_that_is_compressed_is_refused_and_not_unpacked(
    provider: Provider, agent: Agent, encoding: str
) -> None:
    provider.replies.append(Reply((gzip.compress(delta(content="Hi")),), headers={"Content-Encoding": encoding}))
    error = await failure(agent)
    assert (error.message, error.retryable) == (
        f'the provider compresses its answer, although `identity` was asked for: "{encoding}"',
        False,
    )


async def test_an_error_that_is_compressed_is_told_without_the_providers_words(
    provider: Provider, agent: Agent
) -> None:
    body = gzip.compress(b'{"error": "Because."}')
    provider.replies.append(Reply((body,), 400, {"Content-Encoding": "gzip"}, "application/json"))
    assert (await failure(agent)).message == "the provider refuses the request (status 400)"


async def test_an_answer_that_says_it_is_not_compressed_is_taken(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply((delta("stop", content="Hi"), DONE), headers={"Content-Encoding": "Identity"}))
    assert await collect(agent) == [TextDelta("Hi")]


async def test_a_redirect_is_not_followed(provider: Provider, agent: Agent) -> None:
    provider.replies.append(Reply(status=307, headers={"Location": f"{provider.url}/chat/completions"}))
    assert "OPENAI_BASE_URL" in (await failure(agent)).message
    assert len(provider.requests) == 1


async def test_a_refused_connection_may_be_tried_again(provider: Provider) -> None:
    with socket.socket() as unheard:  # bound, and nobody listens
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/v1"
        async with open_openai(settings(provider, openai_base_url=url)) as agent:
            error = await failure(agent)
    assert "cannot be reached" in error.message
    assert error.retryable


async def test_a_name_that_does_not_resolve_may_be_tried_again(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with open_openai(settings(provider, openai_base_url="http://nobody.invalid/v1")) as agent:
        error = await failure(agent)
    assert "cannot be resolved" in error.message
    assert error.retryable


async def test_a_silent_provider_fails_after_the_timeout_of_agents(provider: Provider) -> None:
    provider.replies.append(Reply((delta(content="Hm"),), then="hang"))
    async with open_openai(settings(provider, agent_timeout_seconds=0.1)) as agent:
        error = await failure(agent, "Hm")
    assert (error.message, error.retryable) == ("the provider sent nothing for 0.1 s", True)


@pytest.mark.parametrize(
    ("sent", "says", "retryable"),
    [(b"", "closed the connection without an answer", True), (b"SSH-2.0-x\r\n\r\n", "does not speak HTTP", False)],
)
async def test_a_server_that_is_no_provider_is_told_apart(
    provider: Provider, sent: bytes, says: str, retryable: bool
) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]")
        writer.write(sent)
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_openai(settings(provider, openai_base_url=f"http://127.0.0.1:{port}")) as agent:
            error = await failure(agent)
    assert says in error.message
    assert error.retryable is retryable
