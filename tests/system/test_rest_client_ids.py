"""REST: conversations under the clients' own ids. They are made once, on any node, and found by either id."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from tests.agents.scripted import Strings
from tests.kit.harness import NodeProcess, running_node
from tests.kit.rest import rest_to

Nodes = Sequence[NodeProcess]


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(3)]


# Made once.


async def test_a_conversation_is_made_once_under_the_clients_id_and_found_on_every_node(
    nodes: Nodes, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        fields = {"client_id": "chat 1/ö", "title": "Tea", "system_prompt": "Be kind.", "metadata": {"a": 1}}
        reply = await rest.post("/conversations", fields)
        made = reply.expect(201)
        assert {name: made[name] for name in fields} == fields
        assert reply.headers["Location"] == f"/conversations/{made['id']}"
        assert uuid.UUID(made["id"])
        for client in (rest, elsewhere):
            for other in ({}, {"title": "Other", "system_prompt": "Other", "metadata": {"b": 2}}):
                again = await client.post("/conversations", {"client_id": "chat 1/ö", **other})
                assert again.expect(200) == made
                assert again.headers["Location"] == reply.headers["Location"]
        assert len((await rest.get("/conversations")).expect(200)["conversations"]) == 1


async def test_our_own_id_of_a_conversation_finds_it_too(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create(title="Tea")
        for text in (id, id.upper()):
            found = (await rest.post("/conversations", {"client_id": text, "title": "Other"})).expect(200)
            assert (found["id"], found["client_id"], found["title"]) == (id, None, "Tea")


@pytest.mark.parametrize("body", [{}, {"client_id": None}])
async def test_without_a_clients_id_every_request_makes_a_conversation(
    nodes: Nodes, user: str, body: dict[str, Any]
) -> None:
    async with rest_to(nodes[0], user) as rest:
        made = [(await rest.post("/conversations", body)).expect(201) for _ in range(2)]
        assert {each["client_id"] for each in made} == {None}
        assert len({each["id"] for each in made}) == 2


@pytest.mark.parametrize(
    "client_id", ["x", "x" * 128, "ö" * 128, "../../..", "?#%2F", "null", "\U0001f600", "conversations"]
)
async def test_a_clients_id_is_any_printable_text(nodes: Nodes, user: str, client_id: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        made = (await rest.post("/conversations", {"client_id": client_id})).expect(201)
        assert made["client_id"] == client_id
        assert (await rest.post("/conversations", {"client_id": client_id})).expect(200) == made


@pytest.mark.parametrize("client_id", ["", "x" * 129, "a\nb", "\x7f", 1, [], {}])
async def test_what_is_no_clients_id_is_refused_and_named(nodes: Nodes, user: str, client_id: object) -> None:
    async with rest_to(nodes[0], user) as rest:
        reply = await rest.post("/conversations", {"client_id": client_id})
        assert reply.refusal == (422, "invalid_frame")
        assert reply.paths == ["client_id"]
        assert (await rest.get("/conversations")).expect(200)["conversations"] == []


async def test_of_many_requests_at_once_on_three_nodes_one_makes_the_conversation_and_all_get_it(
    nodes: Nodes, user: str
) -> None:
    async with rest_to(nodes[0], user) as a, rest_to(nodes[1], user) as b, rest_to(nodes[2], user) as c:
        for number in range(8):
            asking = [
                client.post("/conversations", {"client_id": f"chat {number}", "title": f"{name}{nth}"})
                for name, client in {"a": a, "b": b, "c": c}.items()
                for nth in range(6)
            ]
            replies = await asyncio.gather(*asking)
            assert Counter(reply.status for reply in replies) == {201: 1, 200: 17}
            assert len({reply.body for reply in replies}) == 1
        assert len((await a.get("/conversations")).expect(200)["conversations"]) == 8


async def test_somebody_elses_ids_are_free_to_be_used(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as owner, rest_to(nodes[0], user + "-stranger") as stranger:
        theirs = (await owner.post("/conversations", {"client_id": "chat", "title": "secret"})).expect(201)
        for client_id in ("chat", theirs["id"]):
            made = (await stranger.post("/conversations", {"client_id": client_id})).expect(201)
            assert (made["client_id"], made["title"]) == (client_id, None)
            assert made["id"] != theirs["id"]
            assert (await stranger.post("/conversations", {"client_id": client_id})).expect(200) == made
        assert (await owner.post("/conversations", {"client_id": "chat"})).expect(200) == theirs
