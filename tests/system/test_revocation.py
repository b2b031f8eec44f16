"""`anynode revoke`, and deleted users: no older token is good on any node, what is open ends, turns go on or stop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from anynode.models.revocations import user_hash
from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.ai_sdk import chat_socket, ticket_of
from tests.kit.command_line import anynode, assert_refused_in_one_line
from tests.kit.harness import TERMINAL, NodeProcess, running_node, socket_to, sql, token_for
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import rest_to

Nodes = Sequence[NodeProcess]


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(3)]


async def revoked(database_url: str, *arguments: str) -> list[str]:
    """The lines that a `revoke` that succeeds prints."""
    result = await asyncio.to_thread(anynode, "revoke", *arguments, DATABASE_URL=database_url)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


async def refusal(node: NodeProcess, token: str) -> tuple[int, int]:
    """The close code and the status with which a node refuses a token."""
    async with socket_to(node, ready=False, headers={"Authorization": f"Bearer {token}"}) as socket:
        code = await socket.closed()
    async with rest_to(node, None, token=token) as rest:
        return code, (await rest.get("/conversations")).status


async def test_everything_that_is_open_ends_on_every_node_and_the_turn_goes_on(
    nodes: Nodes, module_database_url: str, tmp_path: Path, strings: Strings, gate: str, user: str
) -> None:
    token = token_for(user)
    async with rest_to(nodes[0], user, token=token) as rest:
        id = await rest.create()
        ticket = await ticket_of(rest)
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(socket_to(node, token=token)) for node in nodes]
        other = await stack.enter_async_context(socket_to(nodes[0], f"{user}-2"))
        await sockets[0].ask(script_of(("text", "begun "), ("gate", gate), ("text", "over")), id)
        await sockets[0].until("turn.delta")
        async with (
            chat_socket(nodes[0], None, headers={"Authorization": f"Bearer {token}"}) as chat,
            rest_to(nodes[1], user, token=token) as rest,
            rest.events(id, 0) as events,
        ):
            await chat.sync()
            await events.until("turn.delta")
            asked = {"content": script_of(("gate", gate)), "message_id": "waiting"}
            waiting = asyncio.create_task(rest.post(f"/conversations/{await rest.create()}/continue", asked))

            async def both_run() -> bool:
                return sum(node.metric("anynode_turns_running") for node in nodes) == 2

            await eventually(both_run)
            (line,) = await revoked(module_database_url, "--user", user)
            assert line.startswith(f"tokens of the user {user} that were issued before 2")
            assert [await socket.closed() for socket in sockets] == [3000] * 3
            assert await chat.closed() == (3000, "the token was revoked")
            assert await events.rest() == []
            assert (await waiting).refusal == (401, "unauthorized")
        await other.send({"type": "ping"})
        assert (await other.receive())["type"] == "pong"

    assert [await refusal(node, token) for node in nodes] == [(3000, 401)] * 3
    async with chat_socket(nodes[1], None, query=f"?ticket={ticket}") as chat:
        assert (await chat.closed())[0] == 3000
    with running_node(module_database_url, tmp_path) as later:
        assert await refusal(later, token) == (3000, 401)
    async with socket_to(nodes[2], user) as again:  # with a new token
        await again.follow(id, 0)
        strings.open(gate)
        frames = await again.until(*TERMINAL)
    assert frames[-1]["message"]["content"] == "begun over"


async def test_turns_are_stopped_where_that_is_asked_for(
    nodes: Nodes, module_database_url: str, gate: str, user: str
) -> None:
    async with socket_to(nodes[0], user) as socket, socket_to(nodes[1], f"{user}-2") as other:
        for each in (socket, other):
            await each.ask(script_of(("text", "begun "), ("gate", gate)))
        conversation_id = (await socket.until("turn.delta"))[0]["conversation_id"]
        await other.until("turn.delta")
        _, line = await revoked(module_database_url, "--user", user, "--stop-turns")
        assert line == "1 running turn asked to stop"
        assert await socket.closed() == 3000
        async with socket_to(nodes[2], user) as again:
            await again.follow(conversation_id, 0)
            assert (await again.until(*TERMINAL))[-1]["type"] == "turn.cancelled"
        (row,) = await sql(
            module_database_url,
            "SELECT array_agg(status) AS statuses FROM turns t JOIN conversations c ON c.id = t.conversation_id"
            " WHERE user_id = $1",
            f"{user}-2",
        )
        assert row["statuses"] == ["running"]


async def test_all_users_are_revoked_at_once(nodes: Nodes, module_database_url: str, user: str) -> None:
    tokens = [token_for(f"{user}-{number}") for number in range(3)]
    async with (
        socket_to(nodes[0], token=tokens[0]) as first,
        socket_to(nodes[1], token=tokens[1]) as second,
        socket_to(nodes[2], token=tokens[2]) as third,
    ):
        (line,) = await revoked(module_database_url, "--all")
        assert line.startswith("tokens of all users that were issued before ")
        assert [await socket.closed() for socket in (first, second, third)] == [3000] * 3
    assert [await refusal(node, tokens[0]) for node in nodes] == [(3000, 401)] * 3
    async with socket_to(nodes[0], user):
        pass


async def test_a_user_who_is_deleted_by_hand_is_not_made_again_by_an_old_token(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    token = token_for(user, email=f"{user}@example.org")
    async with socket_to(nodes[0], token=token) as socket:
        await socket.answer("hello")
        await sql(module_database_url, "DELETE FROM conversations WHERE user_id = $1", user)
        await sql(module_database_url, "DELETE FROM users WHERE id = $1", user)
        assert await socket.closed() == 3000
    assert [await refusal(node, token) for node in nodes] == [(3000, 401)] * 3
    assert await sql(module_database_url, "SELECT FROM users WHERE id = $1", user) == []
    (row,) = await sql(
        module_database_url, "SELECT r::text AS text FROM revocations r WHERE user_hash = $1", user_hash(user)
    )
    assert user not in row["text"]
    async with socket_to(nodes[0], user) as socket:
        assert (await socket.answer(script_of(("text", "hello"))))[-1]["type"] == "turn.completed"


async def test_a_node_that_was_cut_off_hears_when_it_is_back(
    database_url: str, start_node: StartNode, user: str
) -> None:
    token = token_for(user)
    with postgres_proxy(database_url) as proxy:
        node = start_node(proxy.url)
        async with socket_to(node, token=token) as socket:
            proxy.cut()
            await revoked(database_url, "--user", user)
            proxy.heal()
            assert await socket.closed() == 3000
        assert await refusal(node, token) == (3000, 401)


async def test_a_node_that_is_frozen_hears_when_it_wakes(nodes: Nodes, module_database_url: str, user: str) -> None:
    token = token_for(user)
    async with socket_to(nodes[0], token=token) as socket:
        nodes[0].pause()
        try:
            await revoked(module_database_url, "--user", user)
        finally:
            nodes[0].resume()
        assert await socket.closed() == 3000
    assert await refusal(nodes[0], token) == (3000, 401)


async def test_a_connection_from_before_postgres_was_there_ends_with_the_first_word_of_it(
    database_url: str, tmp_path: Path, user: str
) -> None:
    token = token_for(user)
    await revoked(database_url, "--user", user)
    with postgres_proxy(database_url) as proxy:
        proxy.cut()
        with running_node(proxy.url, tmp_path, until="/livez") as node:
            async with socket_to(node, token=token) as socket:  # nobody can know yet
                proxy.heal()
                assert await socket.closed() == 3000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either --user ID or --all"),
        (["--user", "ada", "--all"], "either --user ID or --all"),
        (["--user", ""], "--user takes from 1"),
        (["--all"], "DATABASE_URL"),
    ],
)
async def test_a_wrong_use_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    url = "postgresql://127.0.0.1:9/nowhere"
    assert_refused_in_one_line(await asyncio.to_thread(anynode, "revoke", *arguments, DATABASE_URL=url), words)
