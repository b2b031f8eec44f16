"""The AI SDK's WebSocket transport while nothing runs: who waits is told of what others begin, and misses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from anynode.server.transport.allowance import FRAMES_BURST, FRAMES_PER_SECOND
from anynode.server.transport.connection import FOLLOWS_MAX
from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stepping import AGENT
from tests.conftest import StartNode
from tests.kit.ai_sdk import (
    ChatSocket,
    answered,
    asking_once,
    chat_path,
    chat_socket,
    chunks_of,
    messages_of,
    new_id,
    news,
    shown,
)
from tests.kit.harness import NodeProcess, sql
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import Rest, rest_to

Nodes = Sequence[NodeProcess]
A = asking_once(("text", "a"))


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {"AGENT": AGENT, DIRECTORY: str(strings.directory), "HEARTBEAT_SECONDS": "0.1"}


@pytest.fixture
async def socket(nodes: Nodes, user: str) -> AsyncIterator[ChatSocket]:
    async with chat_socket(nodes[0], user) as socket:
        yield socket


@pytest.fixture
async def elsewhere(nodes: Nodes, user: str) -> AsyncIterator[ChatSocket]:
    async with chat_socket(nodes[1], user) as socket:
        yield socket


@pytest.fixture
async def rest(nodes: Nodes, user: str) -> AsyncIterator[Rest]:
    async with rest_to(nodes[0], user) as rest:
        yield rest


async def last_of(rest: Rest, chat: str) -> str:
    """The id of the last message, as a page shows it."""
    return str((await messages_of(rest, chat))[-1]["id"])


async def conversation_of(database_url: str, chat: str) -> str:
    (row,) = await sql(database_url, "SELECT id::text FROM conversations WHERE client_id = $1", chat)
    return str(row["id"])


async def waiting(socket: ChatSocket, chat: str, last_id: str) -> str:
    """A request that waits, and whose node should have read what there was: it has answered another one since."""
    request = await socket.wait(chat, last_id)
    assert shown(await socket.answer(new_id(), A)).text == "a"
    assert not socket.left(request)
    return request


# What is waited for.


@pytest.mark.parametrize("number", [0, 1])
async def test_who_waits_is_told_of_a_turn_as_soon_as_it_runs(
    nodes: Nodes, strings: Strings, socket: ChatSocket, rest: Rest, user: str, chat: str, gate: str, number: int
) -> None:
    answer = shown(await socket.answer(chat, A))
    async with chat_socket(nodes[number], user) as watching:
        request = await waiting(watching, chat, str(answer.id))
        asked = await socket.ask(chat, asking_once(("gate", gate), ("text", "b")))
        assert await watching.rest(request) == news(request)
        resumed = await watching.resume(chat)
        strings.open(gate)
        assert shown(chunks_of((await watching.rest(resumed))[1:])).text == "b"
        await socket.rest(asked)
        # Of an answer that is made again the question is the old one.
        request = await waiting(watching, chat, await last_of(rest, chat))
        message_id = (await messages_of(rest, chat))[-2]["id"]
        text = asking_once(("gate", gate), ("text", "b"))
        asked = await socket.ask(chat, text, message_id=message_id, trigger="regenerate-message")
        assert await watching.rest(request) == news(request)
        await socket.rest(asked)
        request = await waiting(watching, chat, await last_of(rest, chat))
        await answered(rest, chat, A)
        assert await watching.rest(request) == news(request)


@pytest.mark.parametrize("number", [0, 1])
async def test_who_waits_is_told_of_a_message_that_nobody_answers(
    nodes: Nodes, module_database_url: str, socket: ChatSocket, rest: Rest, user: str, chat: str, number: int
) -> None:
    await socket.answer(chat, A)
    conversation_id = await conversation_of(module_database_url, chat)
    async with chat_socket(nodes[number], user) as watching:
        for role in ("user", "assistant"):
            request = await waiting(watching, chat, await last_of(rest, chat))
            message = (await rest.append(conversation_id, {"role": role, "content": "x"})).expect(201)
            assert await watching.rest(request) == news(request)
            assert await last_of(rest, chat) == message["id"]
        # A conversation that began elsewhere goes by its UUID, also here.
        request = await waiting(watching, conversation_id.upper(), message["id"])
        await answered(rest, conversation_id, A)
        assert await watching.rest(request) == news(request)


async def test_what_is_newer_already_is_told_at_once(
    strings: Strings, socket: ChatSocket, elsewhere: ChatSocket, rest: Rest, chat: str, gate: str
) -> None:
    message_id = new_id()
    old = shown(await socket.answer(chat, A, message_id=message_id))
    await socket.answer(chat, A, message_id=message_id, trigger="regenerate-message")
    running = await socket.ask(chat, asking_once(("gate", gate), ("text", "b")))
    turn = (await socket.until(running, "start"))[0]["chunk"]["messageId"]
    for last_id in (str(old.id), message_id, await last_of(rest, chat), turn, "what is not there"):
        request = await elsewhere.wait(chat, last_id)
        assert await elsewhere.rest(request) == news(request)
    strings.open(gate)
    await socket.rest(running)
    for last_id in (str(old.id), message_id, "what is not there"):
        request = await elsewhere.wait(chat, last_id)
        assert await elsewhere.rest(request) == news(request)
    assert turn == await last_of(rest, chat)
    await waiting(elsewhere, chat, turn)


async def test_the_last_message_is_the_one_that_a_page_shows_whatever_became_of_it(
    module_database_url: str, socket: ChatSocket, elsewhere: ChatSocket, rest: Rest, chat: str, gate: str
) -> None:
    tools = asking_once(("call", "c", "search", {}), ("result", "c", "search", "found"), ("text", "There."))
    message_id = new_id()

    async def is_last(id: str) -> None:
        assert await last_of(rest, chat) == id
        await waiting(elsewhere, chat, id)

    await is_last(str(shown(await socket.answer(chat, tools)).id))
    await is_last(str(shown(await socket.answer(chat, asking_once(("agent_error", "No.", False)))).id))
    await is_last(str(shown(await socket.answer(chat, asking_once(("words", 1)), message_id=message_id)).id))
    again = await socket.answer(chat, asking_once(("words", 1)), message_id=message_id, trigger="regenerate-message")
    await is_last(str(shown(again).id))
    stopped = await socket.ask(chat, asking_once(("gate", gate)))
    begun = await socket.until(stopped, "start")
    await socket.abort(stopped)
    (await rest.ask("POST", chat_path(chat, "stop"))).expect(200)
    turn = begun[0]["chunk"]["messageId"]
    await is_last(turn)
    # A question whose answer was superseded, and whose next one was lost with a failover.
    statement = "UPDATE messages SET status = $2 WHERE turn_id = $1 AND role = 'assistant'"
    await sql(module_database_url, statement, turn, "superseded")
    await is_last((await messages_of(rest, chat))[-1]["id"])
    await sql(module_database_url, statement, turn, "cancelled")
    conversation_id = await conversation_of(module_database_url, chat)
    calls = [{"id": "c", "function": {"name": "search", "arguments": "{}"}}]
    for message in (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "found"},
        {"role": "assistant", "content": "y"},
    ):
        await is_last((await rest.append(conversation_id, message)).expect(201)["id"])


async def test_what_comes_between_the_look_and_the_waiting_is_not_missed(
    start_node: StartNode, environment: dict[str, str], database_url: str, user: str, chat: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        looking, other = start_node(proxy.url, **environment), start_node(**environment)
        async with chat_socket(looking, user) as socket, chat_socket(other, user) as elsewhere:
            last = shown(await elsewhere.answer(chat, A))
            look = proxy.hold("after", "find_chat_end")
            request = await socket.wait(chat, str(last.id))
            await look.reached()
            last = shown(await elsewhere.answer(chat, A))
            look.release()
            assert await socket.rest(request) == news(request)
            # Nor what comes while Postgres is away, which only who asks then is told of.
            reading = proxy.hold("before", "read_events")
            request = await socket.wait(chat, str(last.id))
            await reading.reached()
            proxy.cut()
            await elsewhere.answer(chat, A)
            assert await socket.refused(await socket.wait(chat, str(last.id)))
            assert not socket.left(request)
            proxy.heal()
            assert await socket.rest(request) == news(request)


async def test_who_waits_does_so_also_where_the_journal_is_gone(
    start_node: StartNode, environment: dict[str, str], database_url: str, user: str, chat: str
) -> None:
    node = start_node(**environment, JOURNAL_RETENTION_MINUTES="0.001")
    async with chat_socket(node, user) as socket, rest_to(node, user) as rest:
        last = shown(await socket.answer(chat, A))

        async def is_gone() -> bool:
            return not await sql(database_url, "SELECT FROM events")

        await eventually(is_gone)
        request = await waiting(socket, chat, str(last.id))
        await answered(rest, chat, A)
        assert await socket.rest(request) == news(request)


# Its end.


async def test_an_abort_ends_the_waiting_and_stops_no_turn(
    strings: Strings, socket: ChatSocket, elsewhere: ChatSocket, rest: Rest, chat: str, gate: str
) -> None:
    last = shown(await socket.answer(chat, A))
    request = await waiting(elsewhere, chat, str(last.id))
    await elsewhere.abort(request)
    running = await socket.ask(chat, asking_once(("text", "b"), ("gate", gate)))
    await socket.until(running, "text-delta")
    told = await elsewhere.wait(chat, str(last.id))
    assert await elsewhere.rest(told) == news(told)
    for id in (told, request):  # they are over
        await elsewhere.abort(id)
    shows = await elsewhere.resume(chat)
    await elsewhere.until(shows, "text-delta")
    strings.open(gate)
    assert (await elsewhere.rest(shows))[-2]["chunk"]["type"] == "finish"
    assert not elsewhere.left(request)
    request = await waiting(elsewhere, chat, await last_of(rest, chat))
    await elsewhere.connection.close()
    await socket.rest(running)
    assert shown(await socket.answer(chat, A)).finish_reason == "stop"


async def test_who_stops_an_answer_and_waits_has_stopped(
    socket: ChatSocket, elsewhere: ChatSocket, chat: str, gate: str
) -> None:
    """Also where he is told at once, as the turn still runs, and resumes it before a stop would be one."""
    running = await socket.ask(chat, asking_once(("text", "b"), ("gate", gate)))
    turn = (await socket.until(running, "text-delta"))[0]["chunk"]["messageId"]
    resumed = await elsewhere.resume(chat)
    await elsewhere.until(resumed, "text-delta")
    await elsewhere.abort(resumed)
    await elsewhere.wait(chat, turn)
    again = await elsewhere.resume(chat)
    assert (await elsewhere.rest(again))[-2]["chunk"] == {"type": "abort"}
    assert (await socket.rest(running))[-2]["chunk"] == {"type": "abort"}


async def test_a_connection_waits_in_one_chat_and_shows_others(
    strings: Strings, socket: ChatSocket, elsewhere: ChatSocket, chat: str, gate: str
) -> None:
    last = shown(await socket.answer(chat, A))
    requests = [await waiting(elsewhere, chat, str(last.id)) for _ in range(3)]
    shows = await elsewhere.ask(new_id(), asking_once(("text", "c"), ("gate", gate), ("text", "d")))
    begun = await elsewhere.until(shows, "text-delta")
    await socket.answer(chat, A)
    for request in requests:
        assert await elsewhere.rest(request) == news(request)
    strings.open(gate)
    assert shown(chunks_of([*begun, *await elsewhere.rest(shows)])).text == "cd"


async def test_a_request_that_takes_the_id_of_one_that_waits_takes_its_place(socket: ChatSocket, chat: str) -> None:
    live = await socket.answer(chat, A)
    request = await socket.wait(chat, live[0]["messageId"])
    await socket.resume(chat, request_id=request)
    assert chunks_of((await socket.rest(request))[1:]) == live
    for _ in range(2):
        await socket.wait(chat, live[0]["messageId"], request_id=request)
    await socket.answer(chat, A)
    assert await socket.rest(request) == news(request)
    await socket.sync()
    assert not socket.left(request)


async def test_those_that_wait_count_among_the_requests_of_a_connection(socket: ChatSocket, chat: str) -> None:
    last = str(shown(await socket.answer(chat, A)).id)
    requests = []
    for number in range(FOLLOWS_MAX):
        requests.append(await socket.wait(chat, last))
        if number > FRAMES_BURST - 10:  # more may not come at once
            await asyncio.sleep(1 / FRAMES_PER_SECOND)
    too_many = f"A connection shows at most {FOLLOWS_MAX} turns at once."
    assert await socket.refused(await socket.wait(chat, last)) == too_many
    assert not socket.left()
    await socket.abort(requests[0])
    assert shown(await socket.answer(chat, A)).text == "a"
    for request in requests[1:]:
        assert await socket.rest(request) == news(request)


async def test_there_is_nothing_to_wait_for_where_there_is_no_chat(
    nodes: Nodes, module_database_url: str, socket: ChatSocket, user: str, chat: str
) -> None:
    request = await socket.wait(chat, "m")
    assert await socket.rest(request) == [{"type": "no-active", "requestId": request}]
    last = shown(await socket.answer(chat, A))
    conversation_id = await conversation_of(module_database_url, chat)
    async with chat_socket(nodes[0], user + "-2") as stranger:
        for id in (chat, conversation_id):
            request = await stranger.wait(id, str(last.id))
            assert await stranger.rest(request) == [{"type": "no-active", "requestId": request}]


@pytest.mark.parametrize("number", [0, 1])
async def test_a_conversation_is_deleted_while_it_is_waited_for(
    nodes: Nodes, module_database_url: str, socket: ChatSocket, rest: Rest, user: str, chat: str, number: int
) -> None:
    last = shown(await socket.answer(chat, A))
    async with chat_socket(nodes[number], user) as watching:
        request = await waiting(watching, chat, str(last.id))
        (await rest.ask("DELETE", f"/conversations/{await conversation_of(module_database_url, chat)}")).expect(204)
        assert await watching.refused(request) == "There is no such conversation."
        request = await watching.wait(chat, str(last.id))
        assert (await watching.next(request))["type"] == "no-active"


@pytest.mark.parametrize("body", [{"wait_after": ""}, {"wait_after": 5}, {"wait_after": "a\nb"}])
async def test_what_no_message_is_called_is_refused(socket: ChatSocket, chat: str, body: dict[str, Any]) -> None:
    live = await socket.answer(chat, A)
    assert "wait_after" in await socket.refused(await socket.resume(chat, body=body))
    resumed = await socket.resume(chat, body={"wait_after": None, "if_busy": 7})
    assert chunks_of((await socket.rest(resumed))[1:]) == live


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        assert "Traceback" not in node.log.read_text()
