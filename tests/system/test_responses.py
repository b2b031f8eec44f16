"""The Responses API as the stock OpenAI SDK uses it: asked, streamed, left, and gone on with on any node."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, AsyncStream, OpenAI
from openai.types.responses import Response, ResponseStreamEvent

from tests.agents.scripted import DIRECTORY, Strings, eventually, script_of
from tests.agents.stepping import AGENT as STEPPING_AGENT
from tests.agents.waiting_tools import TOOLS
from tests.conftest import StartNode
from tests.kit.harness import NodeProcess, running_node, sql, token_for
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import MISSING, Reply, Rest, rest_to

Nodes = Sequence[NodeProcess]
Stream = AsyncStream[ResponseStreamEvent]
NOBODY = "resp_" + uuid.UUID(MISSING).hex
WORDS = 20
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes whose agent does what a script says."""
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(2)]


@asynccontextmanager
async def client_of(node: NodeProcess, user: str, *, token: str | None = None) -> AsyncIterator[AsyncOpenAI]:
    """The stock client, as a user."""
    url = node.http + "/v1"
    async with AsyncOpenAI(base_url=url, api_key=token or token_for(user), max_retries=0, timeout=30) as client:
        yield client


async def taken(stream: Stream, count: int | None = None) -> list[ResponseStreamEvent]:
    """Return `count` events, or all, of a stream, and close it."""
    events: list[ResponseStreamEvent] = []
    async with stream:
        while count is None or len(events) < count:
            try:
                events.append(await anext(aiter(stream)))
            except StopAsyncIteration:
                assert count is None, events
                break
    return events


async def resumed(client: AsyncOpenAI, id: str, after: int | None = None) -> list[ResponseStreamEvent]:
    """The events of a response from its start or after a number."""
    if after is None:
        return await taken(await client.responses.retrieve(id, stream=True))
    return await taken(await client.responses.retrieve(id, stream=True, starting_after=after))


def response_in(event: ResponseStreamEvent) -> Response:
    """The response that an event shows."""
    response: Response = event.response  # type: ignore[union-attr]
    return response


def assert_whole(events: Sequence[ResponseStreamEvent]) -> Response:
    """Assert that the events are a stream from its start to its end, and return the response at the end."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.type in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    return response_in(events[-1])


def said_in(events: Sequence[ResponseStreamEvent]) -> list[str]:
    """The texts of the deltas."""
    return [event.delta for event in events if event.type == "response.output_text.delta"]


def paced() -> str:
    """A question that is answered word by word, for most of a second."""
    return script_of(("paced", WORDS, "w{number} ", 0.04))


WHOLE = "".join(f"w{number} " for number in range(WORDS))


async def begun(client: AsyncOpenAI, question: str) -> str:
    """Ask in the background; returns the response's id."""
    response = await client.responses.create(input=question, background=True)
    assert response.status == "in_progress"
    return response.id


async def ended(client: AsyncOpenAI, id: str) -> Response:
    """Poll until it is over."""
    found: list[Response] = []

    async def is_over() -> bool:
        found.append(await client.responses.retrieve(id))
        return found[-1].status != "in_progress"

    await eventually(is_over)
    return found[-1]


def question_in(conversation: Any) -> uuid.UUID:
    """The conversation of a response, as the database knows it."""
    return uuid.UUID(conversation.id.removeprefix("conv_"))


# Asking.


@pytest.mark.parametrize(
    "question",
    [
        "How are you?",
        [{"role": "user", "content": "How are you?"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How are you?"}]}],
        [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "How are"}, {"type": "input_text", "text": " you?"}],
            }
        ],
    ],
)
async def test_a_question_is_answered(shared_node: NodeProcess, user: str, question: Any) -> None:
    async with client_of(shared_node, user) as client:
        response = await client.responses.create(input=question, model="gpt-anything")
        assert response.output_text == "[1] How are you?"
        assert (response.status, response.model, response.error) == ("completed", "echo", None)
        assert response.usage is not None
        assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 0
        assert await client.responses.retrieve(response.id) == response
        assert await client.responses.cancel(response.id) == response


def test_a_client_without_a_loop_is_answered_too(shared_node: NodeProcess, user: str) -> None:
    with OpenAI(base_url=shared_node.http + "/v1", api_key=token_for(user), max_retries=0) as client:
        response = client.responses.create(input="one")
        with client.responses.stream(input="two", model="echo", previous_response_id=response.id) as stream:
            said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert stream.get_final_response().output_text == said == "[3] two"


async def test_a_stream_is_the_answer_and_can_be_had_again(shared_node: NodeProcess, user: str) -> None:
    async with client_of(shared_node, user) as client:
        events = await taken(await client.responses.create(input="a b c", stream=True))
        response = assert_whole(events)
        assert "".join(said_in(events)) == response.output_text == "[1] a b c"
        assert await resumed(client, response.id) == events
        assert await client.responses.retrieve(response.id) == response
        async with client.responses.stream(response_id=response.id) as stream:
            assert (await stream.get_final_response()).output_text == "[1] a b c"


async def test_the_stream_has_the_form_of_the_api(shared_node: NodeProcess, user: str) -> None:
    async with client_of(shared_node, user) as client:
        response = await client.responses.create(input="a\n\ndata: b")
        async with rest_to(shared_node, user) as rest:
            reply = await rest.get(f"/v1/responses/{response.id}", stream="true")
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["X-Accel-Buffering"] == "no"
    *pieces, rest_of_it = reply.body.decode().split("\n\n")
    assert rest_of_it == ""
    for number, piece in enumerate(pieces):
        first, second = piece.split("\n")
        data = json.loads(second.removeprefix("data: "))
        assert first == f"event: {data['type']}"
        assert data["sequence_number"] == number


async def test_a_conversation_goes_on_with_its_history(shared_node: NodeProcess, user: str) -> None:
    async with client_of(shared_node, user) as client:
        first = await client.responses.create(input="one")
        assert first.conversation is not None
        id = first.conversation.id
        named: list[Any] = [id, {"id": id}, str(question_in(first.conversation))]
        for number, conversation in enumerate(named):
            response = await client.responses.create(input="more", conversation=conversation)
            assert response.output_text == f"[{3 + 2 * number}] more"
            assert response.conversation == first.conversation
        previous = await client.responses.create(input="last", previous_response_id=response.id)
        assert (previous.output_text, previous.conversation) == ("[9] last", first.conversation)
        async with rest_to(shared_node, user) as rest:
            messages = await rest.messages(str(question_in(first.conversation)))
    assert [message["content"] for message in messages[:2]] == ["one", "[1] one"]
    assert len(messages) == 10


async def test_a_response_that_is_not_the_last_one_cannot_be_gone_on_from(shared_node: NodeProcess, user: str) -> None:
    async with client_of(shared_node, user) as client:
        first = await client.responses.create(input="one")
        second = await client.responses.create(
            input="two", previous_response_id=first.id, extra_headers={"Idempotency-Key": "two"}
        )
        with pytest.raises(openai.ConflictError, match="has gone on"):
            await client.responses.create(input="other", previous_response_id=first.id)
        again = await client.responses.create(
            input="two", previous_response_id=first.id, extra_headers={"Idempotency-Key": "two"}
        )
        assert again == second


async def test_in_the_background_it_is_polled(nodes: Nodes, user: str) -> None:
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        id = await begun(client, paced())
        running = await elsewhere.responses.retrieve(id)
        assert (running.status, running.output, running.background) == ("in_progress", [], True)
        over = await ended(elsewhere, id)
        assert (over.status, over.output_text) == ("completed", WHOLE)


async def test_one_turn_at_a_time(nodes: Nodes, strings: Strings, gate: str, user: str) -> None:
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        response = await client.responses.create(input=script_of(("gate", gate), ("text", "x")), background=True)
        assert response.conversation is not None
        for fields in ({"conversation": response.conversation.id}, {"previous_response_id": response.id}):
            with pytest.raises(openai.ConflictError) as caught:
                await elsewhere.responses.create(input="[]", **fields)  # type: ignore[call-overload]
            assert caught.value.body["code"] == "conversation_busy"  # type: ignore[index]
        strings.open(gate)
        assert (await ended(elsewhere, response.id)).output_text == "x"


async def test_who_asks_and_goes_away_is_answered_all_the_same(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    async with client_of(nodes[0], user) as client:
        question = script_of(("text", "begun "), ("gate", gate), ("text", "ended"))
        with pytest.raises(openai.APITimeoutError):
            await client.responses.create(input=question, timeout=1, extra_headers={"Idempotency-Key": gate})
        strings.open(gate)
        response = await client.responses.create(input=question, extra_headers={"Idempotency-Key": gate})
        assert response.output_text == "begun ended"
    assert len(await sql(module_database_url, "SELECT FROM messages WHERE client_id = $1", gate)) == 1


# A stream that is left.


async def test_a_stream_that_is_dropped_anywhere_is_gone_on_with_on_another_node(nodes: Nodes, user: str) -> None:
    async def cut_after(count: int) -> None:
        user_of_it = f"{user}-{count}"
        async with client_of(nodes[0], user_of_it) as client, client_of(nodes[1], user_of_it) as elsewhere:
            stream = await client.responses.create(input=paced(), background=True, stream=True)
            seen = await taken(stream, count)
            id = response_in(seen[0]).id
            seen += await resumed(elsewhere, id, seen[-1].sequence_number)
            response = assert_whole(seen)
            assert "".join(said_in(seen)) == response.output_text == WHOLE
            assert seen == await resumed(elsewhere, id) == await resumed(client, id)

    async with asyncio.TaskGroup() as group:
        for count in (1, 2, 3, 4, 5, 7, 10, 13, 17, 20, 22):
            group.create_task(cut_after(count))


async def test_of_an_ended_response_there_is_every_rest(nodes: Nodes, user: str) -> None:
    question = script_of(("text", "a "), ("call", "1", "search", {"b": 1, "aa": 1e3}), ("result", "1", "search", "x"))
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        whole = await taken(await client.responses.create(input=question, stream=True))
        id = assert_whole(whole).id
        for after in range(len(whole) + 2):
            assert await resumed(elsewhere, id, after) == whole[after + 1 :]


async def test_a_number_that_is_ahead_waits_for_what_comes(
    nodes: Nodes, strings: Strings, gate: str, user: str
) -> None:
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        id = await begun(client, script_of(("text", "a "), ("gate", gate), ("text", "b")))
        await taken(await client.responses.retrieve(id, stream=True), 5)  # "a " is an event of its own, with number 4
        waiting = asyncio.create_task(resumed(elsewhere, id, 4))
        strings.open(gate)
        events = await waiting
        assert [event.sequence_number for event in events] == [5, 6, 7, 8, 9]
        assert said_in(events) == ["b"]


@asynccontextmanager
async def raw_stream(rest: Rest, id: str) -> AsyncIterator[aiohttp.ClientResponse]:
    """The stream of a response, as it comes."""
    headers = {"Authorization": f"Bearer {rest.token}"}
    async with rest.session.get(f"{rest.node.http}/v1/responses/{id}?stream=true", headers=headers) as response:
        assert response.status == 200
        yield response


async def heartbeats(raw: aiohttp.ClientResponse, count: int) -> None:
    """Read until `count` heartbeats have come."""
    read = b""
    while read.count(b": \n\n") < count:
        read += await raw.content.readany()


async def test_heartbeats_come_while_nothing_else_does(
    start_node: StartNode, strings: Strings, gate: str, user: str
) -> None:
    node = start_node(**strings.environment, HEARTBEAT_SECONDS="0.1")
    async with client_of(node, user) as client, rest_to(node, user) as rest:
        id = await begun(client, script_of(("text", "a "), ("gate", gate), ("text", "b")))
        async with raw_stream(rest, id) as raw:
            await heartbeats(raw, 3)
            strings.open(gate)
            assert (await raw.content.read()).endswith(b"}\n\n")
        assert (await client.responses.retrieve(id)).output_text == "a b"
        assert len(await resumed(client, id)) == 10  # the SDK does not see them


async def test_a_token_that_runs_out_breaks_the_stream(nodes: Nodes, strings: Strings, gate: str, user: str) -> None:
    short = token_for(user, ttl_seconds=1.5)
    async with client_of(nodes[0], user, token=short) as client, client_of(nodes[1], user) as elsewhere:
        stream = await client.responses.create(
            input=script_of(("text", "a "), ("gate", gate), ("text", "b")), stream=True
        )
        seen = await assert_broken(stream)
        with pytest.raises(openai.AuthenticationError):
            await client.responses.retrieve(response_in(seen[0]).id)
        strings.open(gate)
        seen += await resumed(elsewhere, response_in(seen[0]).id, seen[-1].sequence_number)
        assert assert_whole(seen).output_text == "a b"


async def assert_broken(
    stream: Stream, on_event: Callable[[list[ResponseStreamEvent]], object] = len
) -> list[ResponseStreamEvent]:
    """The stream does not end, it breaks off; returns what it had shown, which `on_event` is told of each time."""
    seen: list[ResponseStreamEvent] = []

    async def take_all() -> None:
        async with stream:
            async for event in stream:
                seen.append(event)
                on_event(seen)

    with pytest.raises(openai.APIConnectionError):
        await take_all()
    return seen


async def test_a_deletion_ends_the_stream_with_an_error(nodes: Nodes, gate: str, user: str) -> None:
    async with client_of(nodes[0], user) as client, rest_to(nodes[1], user) as rest:
        stream = await client.responses.create(input=script_of(("text", "a "), ("gate", gate)), stream=True)
        seen = [await anext(aiter(stream)) for _ in range(5)]
        conversation_id = question_in(response_in(seen[0]).conversation)
        (await rest.ask("DELETE", f"/conversations/{conversation_id}")).expect(204)

        async def rest_of_it() -> list[str]:
            types: list[str] = []
            try:
                async with stream:
                    async for event in stream:
                        types.append(event.type)
            except openai.APIConnectionError:
                types.append("broken off")
            return types

        # Its end came before its deletion, so who is quick has an answer.
        assert (await rest_of_it())[-2:] in (["error", "broken off"], ["response.output_item.done", TERMINAL[1]])


# Nodes that go away.


@pytest.fixture
def environment(strings: Strings) -> dict[str, str]:
    """The settings of nodes that die: other nodes wait a second."""
    return {**strings.environment, "LEASE_SECONDS": "1"}


async def seen_until_death(
    client: AsyncOpenAI, node: NodeProcess, question: str, *, last_words: str
) -> list[ResponseStreamEvent]:
    """What is seen of the answer up to some words, after which the node dies."""

    def watch(seen: list[ResponseStreamEvent]) -> None:
        if last_words in "".join(said_in(seen)):
            node.kill()

    return await assert_broken(await client.responses.create(input=question, stream=True), watch)


async def test_a_node_dies_and_what_it_had_said_is_taken_back_and_said_again(
    start_node: StartNode, environment: dict[str, str], gate: str, user: str
) -> None:
    dying, other = start_node(**environment), start_node(**environment)
    question = script_of(("text", "begun in {attempt} "), ("stuck", gate, 1), ("text", "ended in {attempt}"))
    async with client_of(dying, user) as client, client_of(other, user) as elsewhere:
        seen = await seen_until_death(client, dying, question, last_words="begun in 1 ")
        id = response_in(seen[0]).id
        seen += await resumed(elsewhere, id, seen[-1].sequence_number)
        response = assert_whole(seen)
        assert response.output_text == "begun in 2 ended in 2"
        done = [event.item for event in seen if event.type == "response.output_item.done"]
        assert [item.status for item in done] == ["incomplete", "completed"]  # type: ignore[union-attr]
        assert [item.id for item in response.output] == [done[1].id]
        assert seen == await resumed(elsewhere, id)
        stored = await elsewhere.responses.retrieve(id)
        assert (stored.status, stored.output_text) == ("completed", response.output_text)


async def test_a_node_dies_and_an_agent_that_continues_is_heard_as_if_nothing_had_been(
    start_node: StartNode, user: str
) -> None:
    settings = {"LEASE_SECONDS": "1", "ECHO_TOKENS_PER_SECOND": "30", "ECHO_TOKENS": "30"}
    dying, other = start_node(**settings), start_node(**settings)
    async with client_of(dying, user) as client, client_of(other, user) as elsewhere:
        seen = await seen_until_death(client, dying, "go", last_words="w10 ")
        id = response_in(seen[0]).id
        seen += await resumed(elsewhere, id, seen[-1].sequence_number)
        response = assert_whole(seen)
        assert response.output_text == "".join(f"w{number} " for number in range(30))
        assert len(response.output) == sum(event.type == "response.output_item.added" for event in seen) == 1
        assert seen == await resumed(elsewhere, id)


async def test_a_node_dies_and_completed_steps_stand(
    start_node: StartNode, environment: dict[str, str], gate: str, user: str
) -> None:
    settings = {**environment, "AGENT": STEPPING_AGENT}
    dying, other = start_node(**settings), start_node(**settings)
    steps = [
        [("text", "one "), ("call", "1", "search", {"b": 1, "aa": 2}), ("result", "1", "search", "found")],
        [("text", "two in {attempt} "), ("stuck", gate, 1), ("text", "three in {attempt}")],
    ]
    async with client_of(dying, user) as client, client_of(other, user) as elsewhere:
        seen = await seen_until_death(client, dying, json.dumps(steps), last_words="two in 1 ")
        id = response_in(seen[0]).id
        seen += await resumed(elsewhere, id, seen[-1].sequence_number)
        response = assert_whole(seen)
        assert response.output_text == "one two in 2 three in 2"
        assert [item.type for item in response.output] == ["message", "mcp_call", "message"]
        added = [event.item.id for event in seen if event.type == "response.output_item.added"]
        assert [item.id for item in response.output] == [*added[:2], added[3]]
        stored = await elsewhere.responses.retrieve(id)
        assert stored.output_text == response.output_text
        assert [item.type for item in stored.output] == ["message", "mcp_call", "message"]


async def test_a_call_under_way_is_shown_again_when_its_node_dies(
    start_node: StartNode, tmp_path: Path, user: str
) -> None:
    script = json.dumps([[{"name": "look_up", "arguments": {"word": word}} for word in ("apples", "slow")]])
    settings = {"ECHO_TOOL_CALLS": script, "TOOLS": TOOLS, DIRECTORY: str(tmp_path), "LEASE_SECONDS": "1"}
    dying, other = start_node(**settings), start_node(**settings)
    async with client_of(dying, user) as client, client_of(other, user) as elsewhere:

        def watch(seen: list[ResponseStreamEvent]) -> None:
            if seen[-1].type == "response.mcp_call.completed":
                dying.kill()
                (tmp_path / "slow").touch()

        seen = await assert_broken(await client.responses.create(input="go", stream=True), watch)
        id = response_in(seen[0]).id
        seen += await resumed(elsewhere, id, seen[-1].sequence_number)
        response = assert_whole(seen)
        assert response.output_text == "[1] go"
        calls = [item for item in response.output if item.type == "mcp_call"]
        assert [(call.output, call.status) for call in calls] == [
            ("found apples", "completed"),
            ("found slow", "completed"),
        ]
        last = {event.output_index: event.item for event in seen if event.type == "response.output_item.done"}
        assert [item.status for item in last.values()].count("incomplete") == 1  # type: ignore[union-attr]
        assert seen == await resumed(elsewhere, id)


async def test_a_node_that_drains_shows_its_own_turns_to_their_end(
    start_node: StartNode, strings: Strings, gate: str, user: str
) -> None:
    leaving = start_node(**strings.environment, DRAIN_SECONDS="60", HEARTBEAT_SECONDS="0.1")
    question = script_of(("text", "begun "), ("gate", gate), ("text", "ended"))
    async with client_of(leaving, user) as client, rest_to(leaving, user) as rest:
        waiting = asyncio.create_task(client.responses.create(input=question))
        stream = await client.responses.create(input=question, stream=True)
        seen = [await anext(aiter(stream)) for _ in range(5)]
        async with raw_stream(rest, response_in(seen[0]).id) as raw:
            leaving.process.send_signal(signal.SIGTERM)

            async def is_draining() -> bool:
                return (await rest.get("/readyz")).status == 503

            await eventually(is_draining)
            with pytest.raises(openai.InternalServerError) as caught:
                await client.responses.create(input=question)
            assert caught.value.status_code == 503
            await heartbeats(raw, 10)  # for longer than last words may take
            strings.open(gate)
            assert (await raw.content.read()).endswith(b"}\n\n")
        seen += await taken(stream)
        assert assert_whole(seen).output_text == "begun ended"
        assert (await waiting).output_text == "begun ended"
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0


async def test_a_node_that_hands_a_turn_over_breaks_its_streams_off(
    start_node: StartNode, environment: dict[str, str], strings: Strings, gate: str, user: str
) -> None:
    leaving, other = start_node(**environment, DRAIN_SECONDS="0.5"), start_node(**environment)
    question = script_of(("text", "begun "), ("stuck", strings.name(), 1), ("gate", gate), ("text", "ended"))
    async with client_of(leaving, user) as client, client_of(other, user) as elsewhere:
        waiting = asyncio.create_task(client.responses.create(input=question, extra_headers={"Idempotency-Key": gate}))
        stream = await client.responses.create(input=question, stream=True)
        seen = [await anext(aiter(stream)) for _ in range(5)]
        leaving.process.send_signal(signal.SIGTERM)
        seen += await assert_broken(stream)
        strings.open(gate)
        seen += await resumed(elsewhere, response_in(seen[0]).id, seen[-1].sequence_number)
        assert assert_whole(seen).output_text == "begun ended"
        with pytest.raises(openai.InternalServerError, match="resp_") as caught:
            await waiting
        assert caught.value.response.headers["x-should-retry"] == "true"
        again = await elsewhere.responses.create(input=question, extra_headers={"Idempotency-Key": gate})
        assert again.output_text == "begun ended"
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0


# Postgres that goes away.


async def test_without_postgres_nothing_is_asked_twice(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url, **strings.environment)
        async with client_of(node, user) as client:
            question = script_of(("text", "x"))
            proxy.cut()
            for key, is_repeatable in ((None, "false"), ("m-1", "true")):
                with pytest.raises(openai.InternalServerError) as caught:
                    await client.responses.create(
                        input=question, extra_headers={} if key is None else {"Idempotency-Key": key}
                    )
                assert caught.value.status_code == 503
                assert caught.value.response.headers["x-should-retry"] == is_repeatable
            with pytest.raises(openai.InternalServerError):
                await client.responses.retrieve(NOBODY)
            proxy.heal()
            response = await client.responses.create(input=question, extra_headers={"Idempotency-Key": "m-1"})
            assert response.output_text == "x"


async def test_a_stream_outlives_an_absence_of_postgres(
    start_node: StartNode, database_url: str, strings: Strings, gate: str, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node, other = start_node(proxy.url, **strings.environment), start_node(**strings.environment)
        question = script_of(("text", "a "), ("gate", gate), ("text", "b"))
        async with client_of(node, user) as client, client_of(other, user) as elsewhere:
            stream = await elsewhere.responses.create(input=question, stream=True)
            following = asyncio.create_task(taken(stream))
            async with rest_to(other, user) as rest:
                (listed,) = (await rest.get("/conversations")).expect(200)["conversations"]
            rows = await sql(database_url, "SELECT id FROM turns WHERE conversation_id = $1", uuid.UUID(listed["id"]))
            remote = await client.responses.retrieve(f"resp_{rows[0]['id'].hex}", stream=True)
            seen = [await anext(aiter(remote)) for _ in range(5)]
            proxy.cut()
            strings.open(gate)
            whole = await following
            proxy.heal()
            seen += await taken(remote)
            assert assert_whole(seen).output_text == "a b"
            assert seen == whole


# Other ends.


@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_a_cancel_ends_it_from_any_node_and_keeps_what_was_said(
    nodes: Nodes, gate: str, user: str, *, is_elsewhere: bool
) -> None:
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        stream = await client.responses.create(
            input=script_of(("text", "begun "), ("gate", gate)), stream=True, background=True
        )
        seen = [await anext(aiter(stream)) for _ in range(5)]
        id = response_in(seen[0]).id
        cancelled = await (elsewhere if is_elsewhere else client).responses.cancel(id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "begun ")
        seen += await taken(stream)
        assert seen[-1].type == "response.incomplete"
        response = assert_whole(seen)
        assert (response.status, response.output) == ("cancelled", cancelled.output)
        assert await elsewhere.responses.retrieve(id) == await client.responses.cancel(id) == cancelled


async def test_a_turn_that_fails_is_a_response_that_has_failed(nodes: Nodes, user: str) -> None:
    question = script_of(("text", "begun "), ("agent_error", "The provider is away.", True))
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        response = await client.responses.create(input=question)
        assert (response.status, response.output_text) == ("failed", "begun ")
        assert response.error is not None
        assert (response.error.code, response.error.message) == ("server_error", "The provider is away.")
        streamed = await taken(await elsewhere.responses.create(input=question, stream=True))
        assert streamed[-1].type == "response.failed"
        failed = assert_whole(streamed)
        assert (failed.status, failed.error, failed.output_text) == ("failed", response.error, "begun ")


async def test_tools_of_the_server_are_shown(start_node: StartNode, tmp_path: Path, user: str) -> None:
    script = json.dumps([[{"name": "look_up", "arguments": {"word": "pears"}}, {"name": "shout"}]])
    node = start_node(ECHO_TOOL_CALLS=script, TOOLS=TOOLS, **{DIRECTORY: str(tmp_path)})
    async with client_of(node, user) as client:
        async with client.responses.stream(input="go", model="echo") as stream:
            types = [event.type async for event in stream]
            streamed = await stream.get_final_response()
        assert types.count("response.mcp_call.in_progress") == types.count("response.mcp_call_arguments.done") == 2
        assert (types.count("response.mcp_call.completed"), types.count("response.mcp_call.failed")) == (1, 1)
        assert streamed.output_text == "[1] go"
        found, failed, _ = streamed.output
        assert found.type == failed.type == "mcp_call"
        assert (found.name, found.arguments, found.output, found.status, found.server_label) == (
            *("look_up", '{"word":"pears"}', "found pears"),
            *("completed", "anynode"),
        )
        assert (failed.name, failed.status) == ("shout", "failed")
        assert failed.error is not None
        stored = await client.responses.retrieve(streamed.id)
        assert [item.to_dict()["id"] for item in stored.output] == [item.to_dict()["id"] for item in streamed.output]


async def test_when_the_journal_is_gone_the_response_is_not(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node(JOURNAL_RETENTION_MINUTES="0.002")
    async with client_of(node, user) as client:
        fields: dict[str, Any] = {"input": "one two", "stream": True, "extra_headers": {"Idempotency-Key": "m-1"}}
        response = assert_whole(await taken(await client.responses.create(**fields)))

        async def is_gone() -> bool:
            return not await sql(database_url, "SELECT FROM events")

        await eventually(is_gone)
        assert await client.responses.retrieve(response.id) == response
        for events in (await resumed(client, response.id), await taken(await client.responses.create(**fields))):
            assert assert_whole(events) == response
            assert said_in(events) == ["[1] one two"]
        with pytest.raises(openai.UnprocessableEntityError, match="no longer kept"):
            await resumed(client, response.id, 3)


async def test_a_journal_that_goes_while_it_is_asked_for_is_not_missed(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        response = await client.responses.create(input=script_of(("text", "one "), ("text", "two")))
        turn_id = uuid.UUID(response.id.removeprefix("resp_"))
        # As if it were deleted between two statements: the turn still says that it has events.
        await sql(module_database_url, "DELETE FROM events WHERE turn_id = $1", turn_id)
        events = await resumed(elsewhere, response.id)
        assert assert_whole(events) == response
        assert said_in(events) == ["one two"]
        assert await assert_broken(await elsewhere.responses.retrieve(response.id, stream=True, starting_after=3)) == []


# Sent again.


async def test_a_key_that_is_sent_again_is_the_same_response(
    nodes: Nodes, module_database_url: str, strings: Strings, gate: str, user: str
) -> None:
    question = script_of(("text", "begun "), ("gate", gate), ("text", "ended"))
    headers = {"Idempotency-Key": gate}
    async with client_of(nodes[0], user) as client, client_of(nodes[1], user) as elsewhere:
        clients = [client, elsewhere] * 3
        waiting = [
            asyncio.create_task(each.responses.create(input=question, extra_headers=headers)) for each in clients
        ]
        started = await elsewhere.responses.create(input=question, extra_headers=headers, background=True)
        assert started.status == "in_progress"
        stream = await elsewhere.responses.create(input=question, extra_headers=headers, stream=True)
        strings.open(gate)
        streamed = assert_whole(await taken(stream))
        again = assert_whole(
            await taken(await client.responses.create(input=question, extra_headers=headers, stream=True))
        )
        assert again == streamed
        responses = [*await asyncio.gather(*waiting), await client.responses.retrieve(started.id)]
        assert all(response == streamed for response in responses)
        done = await client.responses.create(input=question, extra_headers=headers, background=True)
        assert done == streamed
    rows = await sql(module_database_url, "SELECT FROM messages WHERE user_id = $1 AND role = 'user'", user)
    assert len(rows) == 1


@pytest.mark.parametrize("key", ["", "x" * 129])
async def test_a_key_that_is_none_is_refused(shared_node: NodeProcess, user: str, key: str) -> None:
    async with client_of(shared_node, user) as client:
        with pytest.raises(openai.UnprocessableEntityError, match="Idempotency-Key"):
            await client.responses.create(input="x", extra_headers={"Idempotency-Key": key})


# Refusals.


async def test_somebody_elses_response_is_not_found(nodes: Nodes, strings: Strings, gate: str, user: str) -> None:
    async with client_of(nodes[0], user) as client, rest_to(nodes[1], user + "-2") as stranger:
        response = await client.responses.create(input=script_of(("gate", gate), ("text", "mine")), background=True)
        assert response.conversation is not None

        async def answers(id: str) -> list[Reply]:
            return [
                await stranger.get(f"/v1/responses/{id}"),
                await stranger.get(f"/v1/responses/{id}", stream="true"),
                await stranger.get(f"/v1/responses/{id}", stream="true", starting_after="2"),
                await stranger.post(f"/v1/responses/{id}/cancel"),
                await stranger.post("/v1/responses", {"input": "[]", "previous_response_id": id}),
            ]

        theirs, missing = await answers(response.id), await answers(NOBODY)
        for reply, of_nobody in zip(theirs, missing, strict=True):
            assert reply.refusal == (404, "not_found")
            assert reply.body == of_nobody.body
        into = await stranger.post("/v1/responses", {"input": "[]", "conversation": response.conversation.id})
        assert into.refusal == (404, "not_found")
        strings.open(gate)
        assert (await ended(client, response.id)).output_text == "mine"


@pytest.mark.parametrize("id", ["x", "resp_", "resp_xyz", MISSING, "resp_" + MISSING, NOBODY.upper(), NOBODY + "0"])
async def test_what_is_no_id_is_not_found(shared_node: NodeProcess, user: str, id: str) -> None:
    async with client_of(shared_node, user) as client:
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel(id)


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [USER, USER]}, "input"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "developer", "content": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": "x", "instructions": "Be nice."}, "instructions"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "store": False}, "store"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": "x", "conversation": "x"}, "conversation"),
        ({"input": "x", "conversation": {"id": "conv_1"}}, "conversation.id"),
        ({"input": "x", "conversation": 1}, "conversation"),
        ({"input": "x", "previous_response_id": "x"}, "previous_response_id"),
        ({"input": "x", "previous_response_id": NOBODY, "conversation": MISSING}, "previous_response_id"),
        ({"input": "x", "stream": "yes"}, "stream"),
        ({"input": "x", "background": 1}, "background"),
        ({"input": "x", "model": 1}, "model"),
    ],
)
async def test_a_body_that_would_not_be_heeded_is_refused(
    shared_node: NodeProcess, user: str, body: dict[str, Any], path: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.post("/v1/responses", body)
        assert reply.refusal == (422, "invalid_frame")
        assert reply.paths == [path]
        assert (await rest.get("/conversations")).json["conversations"] == []


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"input": "\\u0000"}', b'{"input": "x", "input": "y"}', b"\xff"])
async def test_what_is_no_body_is_refused(shared_node: NodeProcess, user: str, data: bytes) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.ask("POST", "/v1/responses", data=data)
        assert reply.refusal == (422, "invalid_frame")


async def test_an_empty_or_a_long_question_is_refused(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        assert (await rest.post("/v1/responses", {"input": " \n"})).refusal == (422, "invalid_frame")
        assert (await rest.post("/v1/responses", {"input": "x" * 70_000})).refusal == (413, "message_too_large")


async def test_what_does_not_change_the_answer_is_taken(shared_node: NodeProcess, user: str) -> None:
    async with client_of(shared_node, user) as client:
        response = await client.responses.create(
            input="x",
            model="o3",
            metadata={"a": "b"},
            store=True,
            temperature=0.5,
            max_output_tokens=100,
            user="me",
            include=["reasoning.encrypted_content"],
            reasoning={"effort": "low"},
            text={"format": {"type": "text"}, "verbosity": "low"},
            truncation="auto",
            service_tier="auto",
            top_p=0.5,
            parallel_tool_calls=False,
            tools=[],
            tool_choice="auto",
            safety_identifier="s",
            prompt_cache_key="p",
            instructions="",
            extra_body={"something_newer": {"x": [1]}},
        )
        assert response.output_text == "[1] x"
        assert (await client.responses.retrieve(response.id, include=["message.input_image.image_url"])) == response


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "", "9223372036854775808"])
async def test_a_number_that_is_none_is_refused(shared_node: NodeProcess, user: str, after: str) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.get(f"/v1/responses/{NOBODY}", stream="true", starting_after=after)
        assert (reply.refusal, reply.paths) == ((422, "invalid_frame"), ["query.starting_after"])


@pytest.mark.parametrize("token", ["", "nonsense"])
async def test_without_a_good_token_nothing_is_served(shared_node: NodeProcess, token: str) -> None:
    async with rest_to(shared_node, None, token=token or None) as rest:
        for reply in (
            await rest.post("/v1/responses", {"input": "x"}),
            await rest.get(f"/v1/responses/{NOBODY}"),
            await rest.post(f"/v1/responses/{NOBODY}/cancel"),
            await rest.get("/v1/models"),
        ):
            assert reply.refusal == (401, "unauthorized")


async def test_requests_that_wait_are_bounded(start_node: StartNode, strings: Strings, gate: str, user: str) -> None:
    node = start_node(**strings.environment, CONNECTIONS_MAX="2")
    question = script_of(("text", "a "), ("gate", gate))
    async with client_of(node, user) as client:
        streams = [await client.responses.create(input=question, stream=True) for _ in range(2)]
        id = response_in(await anext(aiter(streams[0]))).id
        for refused in (
            client.responses.create(input=question),
            client.responses.create(input=question, stream=True),
            client.responses.retrieve(id, stream=True),
            client.responses.cancel(id),
        ):
            with pytest.raises(openai.RateLimitError):
                await refused
        await streams[0].close()

        async def has_room() -> bool:
            try:
                await client.responses.cancel(id)
            except openai.RateLimitError:
                return False
            return True

        await eventually(has_room)
        strings.open(gate)
        await taken(streams[1])
        assert (await client.responses.create(input="[]")).status == "completed"
    assert len([line for line in node.log.read_text().splitlines() if "Traceback" in line]) == 0


# Models.


@pytest.mark.parametrize(
    ("settings", "id"),
    [
        ({}, "echo"),
        ({"AGENT": "openai", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "MODEL": "maker/model-1"}, "maker/model-1"),
        ({"AGENT": "tests.agents.scripted:script"}, "script"),
    ],
)
async def test_the_model_is_what_answers(start_node: StartNode, user: str, settings: dict[str, str], id: str) -> None:
    async with client_of(start_node(**settings), user) as client:
        models = (await client.models.list()).data
        assert [(model.id, model.object, model.owned_by) for model in models] == [(id, "model", "anynode")]
        assert await client.models.retrieve(id) == models[0]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-4o")


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes, shared_node: NodeProcess) -> None:
    for node in (*nodes, shared_node):
        log = node.log.read_text()
        assert "Traceback" not in log
        assert "ASGI" not in log
