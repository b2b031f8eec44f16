"""REST: conversations under the clients' own ids. They are made once, on any node, and found by either id."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import pytest

from anynode.server.api.operations import REST
from tests.agents.scripted import Strings, script_of
from tests.kit.harness import TERMINAL, NodeProcess, running_node, sql
from tests.kit.rest import frames_of, rest_to

Nodes = Sequence[NodeProcess]
QUICK = script_of(("text", "quick"))


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


# Found by either id.


@pytest.mark.parametrize(
    "client_id",
    [
        *("chat", "100%", "%2F", "a/b", "a/messages", "../..", "chat?limit=1#x", "ö \U0001f600", "x" * 128, "+ &;=@:"),
        *("null", "0199AA10-5F3E-7C51-9B1D-2F5B6F0A7C11", "0199aa105f3e7c519b1d2f5b6f0a7c12"),
    ],
)
async def test_every_operation_on_a_conversation_takes_the_clients_own_id_on_any_node(
    nodes: Nodes, user: str, client_id: str
) -> None:
    at = "/conversations/" + quote(client_id, safe="")
    done = set()
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        made = (await rest.post("/conversations", {"client_id": client_id})).expect(201)
        id = made["id"]

        async def ask(name: str, method: str, path: str, body: Any = None) -> Any:
            done.add(name)
            reply = await elsewhere.ask(method, at + path, body)
            assert 200 <= reply.status < 300, reply
            return reply

        assert (await ask("readConversation", "GET", "")).json == made
        patched = (await ask("updateConversation", "PATCH", "", {"title": "Tea"})).json
        assert patched == {**made, "title": "Tea"}
        await ask("appendMessages", "POST", "/messages", {"role": "system", "content": "Be kind."})
        answer = (await ask("continueConversation", "POST", "/continue", {"content": QUICK})).json
        assert (answer["conversation_id"], answer["response"]) == (id, "quick")
        answer = (await ask("regenerateAnswer", "POST", "/regenerate", {})).json
        assert (answer["conversation_id"], answer["response"]) == (id, "quick")
        turn = (await ask("readTurn", "GET", f"/turns/{answer['turn_id']}")).json
        assert (turn["conversation_id"], turn["status"]) == (id, "completed")
        assert (await ask("cancelTurn", "POST", "/cancel", {})).json == {"conversation_id": id, "turn_id": None}

        page = await ask("readMessages", "GET", "/messages?limit=1")
        assert page.json["messages"] == [answer["message"]]
        assert page.headers["Link"].startswith(f"</conversations/{id}/messages?")
        older = await rest.get(page.headers["Link"].split(">")[0].removeprefix("<"))
        assert len(older.expect(200)["messages"]) == 1

        done.add("followConversation")
        async with elsewhere.events(quote(client_id, safe=""), 0) as events:
            started = (await rest.proceed(quote(client_id, safe=""), QUICK, wait=False)).expect(202)
            frames: list[Any] = []
            while not frames or frames[-1].get("turn_id") != started["turn_id"] or frames[-1]["type"] not in TERMINAL:
                event = await events.next()
                assert event is not None
                frames += frames_of([event])
            assert {frame["conversation_id"] for frame in frames} == {id}
        assert (await ask("deleteConversation", "DELETE", "")).status == 204
        assert (await rest.get(f"/conversations/{id}")).refusal == (404, "not_found")
        assert (await rest.get(at)).refusal == (404, "not_found")
    assert done == {operation.name for operation in REST if "{conversation_id}" in operation.path}


async def test_the_chats_of_the_ai_sdks_clients_are_found_by_their_ids(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        made = (await rest.post("/conversations", {"client_id": "chat"})).expect(201)
        message = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": QUICK}]}
        (await rest.ask("POST", "/api/chat", {"id": "chat", "messages": [message], "trigger": "submit-message"}))
        assert [each["content"] for each in await rest.messages(made["id"])] == [QUICK, "quick"]
        (await rest.ask("POST", "/api/chat", {"id": "other", "messages": [{**message, "id": "m2"}]}))
        other = (await rest.get("/conversations/other")).expect(200)
        assert other["client_id"] == "other"
        assert (await rest.post("/conversations", {"client_id": "other"})).expect(200) == other


async def test_a_uuid_is_ours_before_it_is_a_clients(nodes: Nodes, module_database_url: str, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        clients = str(uuid.uuid4())
        theirs = (await rest.post("/conversations", {"client_id": clients, "title": "client's"})).expect(201)
        assert (await rest.get(f"/conversations/{clients}")).expect(200) == theirs
        await rest.append(clients, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
        assert len(await rest.messages(clients)) == len(await rest.messages(theirs["id"])) == 2
        assert (await rest.get(f"/conversations/{clients}/turns/{uuid.uuid4()}")).message == "There is no such turn."
        page = await rest.get(f"/conversations/{clients}/messages", before=uuid.uuid4())
        assert page.message == "There is no such message in this conversation."

        ours = await rest.create(title="ours")
        statement = "UPDATE conversations SET client_id = $1 WHERE id = $2"
        await sql(module_database_url, statement, ours, uuid.UUID(theirs["id"]))
        assert (await rest.get(f"/conversations/{ours}")).expect(200)["title"] == "ours"
        turn_id = (await rest.proceed(theirs["id"], QUICK)).expect(200)["turn_id"]
        assert (await rest.get(f"/conversations/{ours}/turns/{turn_id}")).refusal == (404, "not_found")
        assert await rest.messages(ours) == []


async def test_two_users_with_the_same_clients_id_have_their_own_conversations(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as one, rest_to(nodes[0], user + "-2") as two:
        made = [(await each.post("/conversations", {"client_id": "chat"})).expect(201) for each in (one, two)]
        assert [(await each.get("/conversations/chat")).expect(200) for each in (one, two)] == made
        assert (await one.ask("DELETE", "/conversations/chat")).status == 204
        assert (await two.get("/conversations/chat")).expect(200) == made[1]
