"""`users.email` is what the tokens of a user tell, whatever they come over, and costs the requests nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.agents.scripted import eventually
from tests.kit.ai_sdk import chat_socket, new_id, ticket_of
from tests.kit.harness import NodeProcess, running_node, socket_to, sql, token_for
from tests.kit.postgres_proxy import PostgresProxy, postgres_proxy
from tests.kit.rest import rest_to

EMAIL = "ada@example.org"


def has_email(database_url: str, user: str, email: str) -> Callable[[], Awaitable[object]]:
    """Whether an address is stored for a user."""
    return lambda: sql(database_url, "SELECT FROM users WHERE id = $1 AND email = $2", user, email)


async def is_stored(database_url: str, user: str, email: str = EMAIL) -> None:
    """Wait until an address is stored for a user."""
    await eventually(has_email(database_url, user, email))


@pytest.mark.parametrize("way", ["header", "subprotocol", "first frame"])
async def test_the_address_of_a_sockets_token_is_stored(
    shared_node: NodeProcess, module_database_url: str, user: str, way: str
) -> None:
    token = token_for(user, email=EMAIL)
    headers = {"Authorization": f"Bearer {token}"} if way == "header" else {}
    subprotocols = ["anynode.v1", *([f"bearer.{token}"] if way == "subprotocol" else [])]
    async with socket_to(shared_node, ready=False, headers=headers, subprotocols=subprotocols) as socket:
        if way == "first frame":
            await socket.send({"type": "auth", "token": token})
        assert (await socket.receive())["type"] == "ready"
        await is_stored(module_database_url, user)
        assert (await socket.answer("hello"))[-1]["type"] == "turn.completed"


async def test_the_address_of_a_renewed_token_takes_the_place_of_the_older_one(
    shared_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(shared_node, token=token_for(user, email=EMAIL)) as socket:
        await is_stored(module_database_url, user)
        await socket.send({"type": "auth", "token": token_for(user, email="new@example.org")})
        assert (await socket.receive())["type"] == "ready"
        await is_stored(module_database_url, user, "new@example.org")
        await socket.send({"type": "auth", "token": token_for(user)})
        assert (await socket.receive())["type"] == "ready"
    async with socket_to(shared_node, f"{user}-other", token=token_for(f"{user}-other", email=EMAIL)):
        await is_stored(module_database_url, f"{user}-other")  # what was noted later is written by now
    assert await has_email(module_database_url, user, "new@example.org")()


async def test_the_address_of_a_request_over_http_is_stored(
    shared_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with rest_to(shared_node, user, token=token_for(user, email=EMAIL)) as rest:
        (await rest.get("/conversations")).expect(200)
        await is_stored(module_database_url, user)


async def test_the_address_of_an_ai_sdk_clients_token_is_stored(
    shared_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with chat_socket(shared_node, token=token_for(user, email=EMAIL)) as socket:
        await socket.sync()
        await is_stored(module_database_url, user)


async def test_a_ticket_tells_no_address(shared_node: NodeProcess, module_database_url: str, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        ticket = await ticket_of(rest)
    async with chat_socket(shared_node, None, query=f"?ticket={quote(ticket)}") as socket:
        await socket.answer(new_id(), "hello")
    (row,) = await sql(module_database_url, "SELECT email FROM users WHERE id = $1", user)
    assert row["email"] is None


async def test_a_token_whose_address_cannot_be_stored_is_good(
    shared_node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(shared_node, token=token_for(user, email="no address\0")) as socket:
        await socket.answer("hello")
    (row,) = await sql(module_database_url, "SELECT email FROM users WHERE id = $1", user)
    assert row["email"] is None


@pytest.fixture
def proxy(database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(database_url) as running:
        yield running


@pytest.fixture
def behind(proxy: PostgresProxy, tmp_path: Path) -> Iterator[NodeProcess]:
    """A node that reaches Postgres through the proxy."""
    with running_node(proxy.url, tmp_path) as node:
        yield node


async def test_an_address_that_comes_again_and_again_is_written_once(
    proxy: PostgresProxy, behind: NodeProcess, database_url: str, user: str
) -> None:
    async with rest_to(behind, user, token=token_for(user, email=EMAIL)) as rest:
        for _ in range(10):
            (await rest.get("/conversations")).expect(200)
        await is_stored(database_url, user)
        for number in range(10):
            (await rest.proceed(await rest.create(), f"question {number}")).expect(200)
        other = f"{user}-other"
        async with socket_to(behind, token=token_for(other, email=EMAIL)):
            await is_stored(database_url, other)
    assert proxy.executions("write_emails") == 2


async def test_many_users_who_come_at_once_are_written_in_few_statements(
    proxy: PostgresProxy, behind: NodeProcess, database_url: str, user: str
) -> None:
    async def come(number: int) -> None:
        async with rest_to(behind, None, token=token_for(f"{user}-{number}", email=EMAIL)) as rest:
            (await rest.get("/conversations")).expect(200)

    await asyncio.gather(*(come(number) for number in range(50)))
    for number in range(50):
        await is_stored(database_url, f"{user}-{number}")
    assert proxy.executions("write_emails") <= 10


async def test_an_address_that_comes_while_postgres_is_away_is_stored_when_it_is_back(
    proxy: PostgresProxy, behind: NodeProcess, database_url: str, user: str
) -> None:
    proxy.cut()
    async with socket_to(behind, token=token_for(user, email=EMAIL)):
        proxy.heal()
        await is_stored(database_url, user)
    assert "Traceback" not in behind.log.read_text()


async def test_an_admission_has_no_part_in_it(
    proxy: PostgresProxy, behind: NodeProcess, database_url: str, user: str
) -> None:
    hold = proxy.hold("before", "write_emails")
    async with socket_to(behind, token=token_for(user, email=EMAIL)) as socket:
        await hold.reached()
        assert (await socket.answer("hello"))[-1]["type"] == "turn.completed"
        assert not await has_email(database_url, user, EMAIL)()
        hold.release()
        await is_stored(database_url, user)
