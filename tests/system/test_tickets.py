"""Tickets: each lets one connection in, once and soon, on any node, and is good for nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import pytest

from tests.agents.scripted import eventually
from tests.conftest import StartNode
from tests.kit.ai_sdk import PATH, chat_path, chat_socket, new_id, request_of, shown, ticket_of
from tests.kit.harness import NodeProcess, running_node, socket_to, sql, token_for
from tests.kit.rest import rest_to

Nodes = Sequence[NodeProcess]


@pytest.fixture(scope="module")
def nodes(
    module_database_url: str, shared_node: NodeProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nodes]:
    with running_node(module_database_url, tmp_path_factory.mktemp("other")) as other:
        yield [shared_node, other]


async def refused(node: NodeProcess, ticket: str) -> str:
    """Why nobody is let in with this ticket."""
    async with chat_socket(node, None, query=f"?ticket={quote(ticket)}") as socket:
        code, reason = await socket.closed()
    assert code == 3000
    return reason


async def is_let_in(node: NodeProcess, ticket: str) -> bool:
    """Whether a ticket lets somebody in."""
    async with chat_socket(node, None, query=f"?ticket={quote(ticket)}") as socket:
        try:
            await socket.sync()
        except EOFError:
            return False
    return True


@pytest.mark.parametrize("number", [0, 1])
async def test_a_ticket_lets_its_user_in_on_any_node(nodes: Nodes, user: str, number: int) -> None:
    chat = new_id()
    async with rest_to(nodes[0], user) as rest:
        asked_at = time.time()
        ticket = (await rest.ask("POST", "/auth/ticket")).expect(201)
    assert ticket.keys() == {"ticket", "expires_at"}
    assert 25 < ticket["expires_at"] - asked_at < 35
    query = f"?chat=1&ticket={ticket['ticket']}&x="
    async with chat_socket(nodes[number], None, query=query) as socket, chat_socket(nodes[0], user) as known:
        live = await socket.answer(chat, "Hello")
        assert shown(live).finish_reason == "stop"
        assert await known.replay(chat) == live


async def test_a_ticket_lets_in_once(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        ticket = await ticket_of(rest)
    assert await is_let_in(nodes[1], ticket)
    reasons = [await refused(node, ticket) for node in nodes]
    assert reasons == [await refused(nodes[0], "never seen")] * 2


async def test_of_many_who_come_with_one_ticket_at_once_one_is_let_in(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        ticket = await ticket_of(rest)
    let_in = await asyncio.gather(*(is_let_in(nodes[number % 2], ticket) for number in range(12)))
    assert sum(let_in) == 1


async def test_an_old_ticket_lets_nobody_in_and_is_forgotten(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        ticket = await ticket_of(rest)
        await sql(
            module_database_url, "UPDATE tickets SET expires_at = now() - interval '1 ms' WHERE user_id = $1", user
        )
        assert await refused(nodes[1], ticket)
        assert not await sql(module_database_url, "SELECT FROM tickets WHERE user_id = $1", user)


async def test_tickets_that_nobody_came_with_are_forgotten(start_node: StartNode, database_url: str, user: str) -> None:
    node = start_node(JOURNAL_RETENTION_MINUTES="0.001")
    async with rest_to(node, user) as rest:
        old, new = await ticket_of(rest), await ticket_of(rest)
        hashed = hashlib.sha256(old.encode()).hexdigest()
        await sql(database_url, "UPDATE tickets SET expires_at = now() WHERE hash = $1", hashed)

    async def is_forgotten() -> bool:
        return len(await sql(database_url, "SELECT FROM tickets")) == 1

    await eventually(is_forgotten)
    assert await is_let_in(node, new)


async def test_a_ticket_is_worth_no_more_than_the_token_it_was_had_for(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], None, token=token_for(user, ttl_seconds=3)) as rest:
        first, second = await ticket_of(rest), await ticket_of(rest)
    async with chat_socket(nodes[1], None, query=f"?ticket={first}") as socket:
        await socket.sync()
        assert (await socket.closed())[0] == 3000
    assert await refused(nodes[1], second)


async def test_a_frame_renews_a_connection_that_came_with_a_ticket(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], None, token=token_for(user, ttl_seconds=3)) as rest:
        tickets = [await ticket_of(rest) for _ in range(2)]
    async with (
        chat_socket(nodes[0], None, query=f"?ticket={tickets[0]}") as socket,
        chat_socket(nodes[0], None, query=f"?ticket={tickets[1]}") as lapsing,
    ):
        await socket.rest(await socket.resume("x", headers={"authorization": f"Bearer {token_for(user)}"}))
        await lapsing.sync()
        assert (await lapsing.closed())[0] == 3000
        await socket.sync()


async def test_a_ticket_is_good_for_nothing_else(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        ticket = await ticket_of(rest)
    async with rest_to(nodes[0], None) as nobody, rest_to(nodes[0], None, token=ticket) as bearer:
        for client in (nobody, bearer):
            for method, path, body in (
                ("POST", PATH, request_of(new_id(), "x")),
                ("GET", chat_path("x", "stream"), None),
                ("POST", "/auth/ticket", None),
                ("GET", "/conversations", None),
            ):
                reply = await client.ask(method, f"{path}?ticket={ticket}", body)
                assert reply.refusal == (401, "unauthorized")
    for subprotocols in (("anynode.v1", f"bearer.{ticket}"), ("anynode.ai-sdk", f"bearer.{ticket}")):
        path_headers = {"Authorization": f"Bearer {ticket}"}
        async with socket_to(nodes[0], ready=False, subprotocols=subprotocols, headers=path_headers) as native:
            assert await native.closed() == 3000
    async with chat_socket(nodes[0], None, headers={"Authorization": f"Bearer {ticket}"}) as socket:
        assert (await socket.closed())[0] == 3000
    assert await is_let_in(nodes[0], ticket)  # none of that has used it up


@pytest.mark.parametrize("ticket", ["x", " ", "a" * 5000, "\N{HOT BEVERAGE}", "'", "%00"])
async def test_what_is_no_ticket_lets_nobody_in(nodes: Nodes, ticket: str) -> None:
    assert await refused(nodes[0], ticket)


async def test_a_user_has_so_many_tickets_and_no_more(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user + "-2") as other:
        tickets = [await ticket_of(rest) for _ in range(100)]
        assert len(set(tickets)) == 100
        reply = await rest.ask("POST", "/auth/ticket")
        assert reply.refusal == (429, "rate_limited")
        assert reply.headers["Retry-After"]
        await ticket_of(other)
        assert await is_let_in(nodes[1], tickets[0])
        await ticket_of(rest)
        assert (await rest.ask("POST", "/auth/ticket")).status == 429
        await sql(module_database_url, "UPDATE tickets SET expires_at = now() WHERE user_id = $1", user)
        await ticket_of(rest)


async def test_only_who_proves_who_he_is_gets_a_ticket(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], None) as nobody, rest_to(nodes[0], None, token="x.y.z") as wrong:
        for client in (nobody, wrong):
            assert (await client.ask("POST", "/auth/ticket")).refusal == (401, "unauthorized")
    async with rest_to(nodes[0], user) as rest:
        assert (await rest.ask("GET", "/auth/ticket")).status == 405
        assert (await rest.ask("POST", "/auth/ticket")).headers["Cache-Control"] == "no-store"


async def test_nobody_who_reads_the_database_or_the_logs_finds_a_ticket(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest:
        used, unused = await ticket_of(rest), await ticket_of(rest)
    assert await is_let_in(nodes[0], used)
    (row,) = await sql(module_database_url, "SELECT t::text AS row FROM tickets t WHERE user_id = $1", user)
    assert unused not in row["row"]
    assert hashlib.sha256(unused.encode()).hexdigest() in row["row"]
    for node in nodes:
        log = node.log.read_text()
        assert used not in log
        assert unused not in log
