"""REST: conversations and their lists, whose they are, and everything that is refused before anything is done."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest

from anynode.server.api.operations import OPERATIONS, REST
from anynode.server.protocol.bodies import MESSAGES_AT_ONCE_MAX
from tests.conftest import StartNode
from tests.kit.harness import NodeProcess, socket_to, sql, token_for
from tests.kit.rest import MISSING, Reply, Rest, rest_to

UUID = uuid.UUID
FIELDS = {"id", "client_id", "title", "system_prompt", "metadata", "seq", "created_at", "updated_at"}

# What each operation on a conversation is asked for here, in all the ways that name something: query, then body.
ASKED: dict[str, Sequence[tuple[str, Any]]] = {
    "readConversation": [("", None)],
    "updateConversation": [("", {"title": "mine now"}), ("", {"metadata": {}, "system_prompt": None}), ("", {})],
    "deleteConversation": [("", None)],
    "readMessages": [("", None), ("?before={message}", None), ("?format=openai", None), ("?limit=1", None)],
    "appendMessages": [
        ("", {"role": "user", "content": "x"}),
        ("", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
        ("", {"role": "tool", "tool_call_id": "nothing", "content": "x"}),
    ],
    "continueConversation": [
        ("", {"content": "x"}),
        ("", {"content": "x", "wait": False, "if_busy": "interrupt"}),
        ("", {"content": "x", "message_id": "{client}"}),
    ],
    "regenerateAnswer": [("", {}), ("", {"message_id": "{client}"}), ("", {"wait": False})],
    "cancelTurn": [("", {}), ("", {"turn_id": "{turn}"}), ("", {"turn_id": MISSING})],
    "readTurn": [("", None)],
    "followConversation": [("", None), ("?after=0", None), ("?after=9999", None)],
    "chat": [("", {"message": "x", "conversation_id": "{conversation}"})],
}
IDS_OF_NOTHING = [
    "nothing",
    "%00",
    "a%0Ab",
    "%ff",
    "%EF%BF%BD",
    "a%2Fmessages",
    "x" * 129,
    MISSING[:-1] + "g",
    "null",
    "%",
]
# Those of others' clients have tests of their own.
ON_A_CONVERSATION = [each for each in REST if each.name not in ("createConversation", "listConversations")]
OF_OTHERS = {"chat_id": "a-chat", "response_id": "resp_" + "0" * 32, "model": "none"}  # what their paths name
IN_NO_CONVERSATION = [("POST", "/conversations"), ("GET", "/conversations")]


def conversation(id: str, *, prefix: str = "/conversations/") -> str:
    return prefix + id


async def everything(database_url: str) -> list[list[Any]]:
    """All rows of all tables."""
    return [
        await sql(database_url, f"SELECT * FROM {table} ORDER BY 1, 2")
        for table in ("users", "conversations", "messages", "turns", "events")
    ]


async def listed(rest: Rest, **query: Any) -> list[str]:
    return [each["id"] for each in (await rest.get("/conversations", **query)).expect(200)["conversations"]]


async def raw(node: NodeProcess, *pieces: bytes) -> tuple[int, Any]:
    """Send pieces of a request as they are, and take the answer when it comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    try:
        for piece in pieces:
            writer.write(piece)
        async with asyncio.timeout(15):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length: ")[1].split("\r\n")[0])
            return int(head.split()[1]), json.loads(await reader.readexactly(length))
    finally:
        writer.transport.abort()


def head_of(user: str, path: str, *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: node", f"Authorization: Bearer {token_for(user)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


# Conversations.


async def test_a_conversation_is_made_with_what_is_given(shared_node: NodeProcess, user: str) -> None:
    metadata = {"tags": ["a", "ö \u2615", None], "nested": {"n": 1.5, "big": 2**70, "yes": True}, "": ""}
    async with rest_to(shared_node, user) as rest:
        reply = await rest.post("/conversations", {"title": "Tea", "system_prompt": "Be kind.", "metadata": metadata})
        made = reply.expect(201)
        read = (await rest.get(reply.headers["Location"])).expect(200)
    assert made == read
    assert made.keys() == FIELDS
    assert (made["title"], made["system_prompt"], made["metadata"], made["seq"]) == ("Tea", "Be kind.", metadata, 0)
    assert made["created_at"] == made["updated_at"]
    assert abs(datetime.fromisoformat(made["created_at"]) - datetime.now(UTC)).total_seconds() < 60
    assert str(UUID(made["id"])) == made["id"]


@pytest.mark.parametrize("data", [b"{}", b"", b" { } ", b'{"title": null, "system_prompt": null}'])
async def test_everything_about_a_new_conversation_is_optional(
    shared_node: NodeProcess, user: str, data: bytes
) -> None:
    async with rest_to(shared_node, user) as rest:
        made = (await rest.ask("POST", "/conversations", data=data)).expect(201)
    assert (made["title"], made["system_prompt"], made["metadata"]) == (None, None, {})


async def test_a_patch_changes_what_it_names_and_nothing_else(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create(title="a", system_prompt="b", metadata={"c": 1})
        before = (await rest.get(conversation(id))).expect(200)
        changes: list[dict[str, Any]] = [
            {"title": "A"},
            {"title": None},
            {"system_prompt": "B"},
            {"system_prompt": None},
            {"metadata": {"d": [2]}},
            {"metadata": {}},
            {},
            {"title": "x", "system_prompt": "y", "metadata": {"z": {}}},
        ]
        for change in changes:
            after = (await rest.ask("PATCH", conversation(id), change)).expect(200)
            assert after == {**before, **change}
            assert (await rest.get(conversation(id))).expect(200) == after
            before = after


async def test_a_conversation_without_a_title_gets_one_from_its_question_and_others_keep_theirs(
    shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        untitled, titled = await rest.create(), await rest.create(title="Mine")
        for id in (untitled, titled):
            (await rest.proceed(id, "  Why is\nthe sky   blue? ")).expect(200)
        assert (await rest.get(conversation(untitled))).expect(200)["title"] == "Why is the sky blue?"
        assert (await rest.get(conversation(titled))).expect(200)["title"] == "Mine"


async def test_the_system_prompt_counts_from_the_next_turn_on(shared_node: NodeProcess, user: str) -> None:
    # The echo agent says how many messages it was given.
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        assert (await rest.proceed(id, "one")).expect(200)["response"] == "[1] one"
        (await rest.ask("PATCH", conversation(id), {"system_prompt": "Be kind."})).expect(200)
        assert (await rest.proceed(id, "two")).expect(200)["response"] == "[4] two"
        (await rest.ask("PATCH", conversation(id), {"system_prompt": None})).expect(200)
        assert (await rest.proceed(id, "three")).expect(200)["response"] == "[5] three"


async def test_a_deletion_leaves_nothing_behind(shared_node: NodeProcess, module_database_url: str, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id, other = await rest.create(title="a"), await rest.create(title="b")
        for each in (id, other):
            (await rest.proceed(each, "x")).expect(200)
            (await rest.append(each, {"role": "user", "content": "y"})).expect(201)
        gone = await rest.ask("DELETE", conversation(id))
        assert (gone.status, gone.body) == (204, b"")
        again = await rest.ask("DELETE", conversation(id))
        assert again.refusal == (404, "not_found")
        assert await listed(rest) == [other]
        assert len(await rest.messages(other)) == 3
    for table in ("messages", "turns", "events"):
        assert await sql(module_database_url, f"SELECT FROM {table} WHERE conversation_id = $1", UUID(id)) == []
        assert await sql(module_database_url, f"SELECT FROM {table} WHERE conversation_id = $1", UUID(other)) != []


# The list.


async def test_the_list_has_the_newest_activity_first_whatever_it_was(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest, socket_to(shared_node, user) as socket:
        first, second, third = [await rest.create() for _ in range(3)]
        assert await listed(rest) == [third, second, first]
        (await rest.append(first, {"role": "user", "content": "x"})).expect(201)
        assert await listed(rest) == [first, third, second]
        (await rest.proceed(second, "x")).expect(200)
        assert await listed(rest) == [second, first, third]
        await socket.answer("x", third)
        assert await listed(rest) == [third, second, first]
        (await rest.post(conversation(second) + "/regenerate")).expect(200)
        assert await listed(rest) == [second, third, first]
        (await rest.ask("PATCH", conversation(first), {"title": "no activity"})).expect(200)
        assert await listed(rest) == [second, third, first]
        made = (await rest.post(f"/api/{user}/chat", {"message": "x"})).expect(200)["conversation_id"]
        assert await listed(rest) == [made, second, third, first]


async def test_a_page_has_20_conversations_unless_it_is_told_otherwise(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        made = [await rest.create() for _ in range(21)][::-1]
        page = (await rest.get("/conversations")).expect(200)
        assert [each["id"] for each in page["conversations"]] == made[:20]
        assert (page["next_skip"], page["next_before"] is None) == (20, False)
        assert all(each.keys() == FIELDS for each in page["conversations"])
        last = (await rest.get("/conversations", before=page["next_before"])).expect(200)
        assert [each["id"] for each in last["conversations"]] == made[20:]
        assert (last["next_skip"], last["next_before"]) == (None, None)
        whole = (await rest.get("/conversations", limit=21)).expect(200)
        assert [each["id"] for each in whole["conversations"]] == made
        assert (whole["next_skip"], whole["next_before"]) == (None, None)
        beyond = (await rest.get("/conversations", skip=21)).expect(200)
        assert beyond == {"conversations": [], "next_skip": None, "next_before": None}


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_have_every_conversation_once_also_where_they_were_active_at_the_same_instant(
    shared_node: NodeProcess, module_database_url: str, user: str, limit: int
) -> None:
    async with rest_to(shared_node, user) as rest:
        made = [await rest.create() for _ in range(7)]
        for ids, day in ((made[0:3], 1), (made[3:4], 2), (made[4:7], 3)):
            statement = "UPDATE conversations SET updated_at = $1 WHERE id = ANY ($2)"
            await sql(module_database_url, statement, datetime(2026, 1, day, 1, 2, 3, 456789, UTC), [*map(UUID, ids)])
        by_skip: list[str] = []
        by_mark: list[str] = []
        query: dict[str, Any] = {}
        while True:
            page = (await rest.get("/conversations", limit=limit, **query)).expect(200)
            by_skip += [each["id"] for each in page["conversations"]]
            if page["next_skip"] is None:
                break
            query = {"skip": page["next_skip"]}
        query = {}
        while True:
            page = (await rest.get("/conversations", limit=limit, **query)).expect(200)
            by_mark += [each["id"] for each in page["conversations"]]
            if page["next_before"] is None:
                break
            query = {"before": page["next_before"]}
    days = [max(made[4:7]), sorted(made[4:7])[1], min(made[4:7]), made[3], *sorted(made[:3], reverse=True)]
    assert by_skip == by_mark == days


async def test_a_mark_misses_nothing_and_repeats_nothing_while_conversations_move(
    shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        made = [await rest.create() for _ in range(6)][::-1]
        page = (await rest.get("/conversations", limit=3)).expect(200)
        # Of those that were shown one goes and one moves; the mark's own is the one that moves. And a new one comes.
        (await rest.ask("DELETE", conversation(made[0]))).expect(204)
        (await rest.append(made[2], {"role": "user", "content": "x"})).expect(201)
        await rest.create()
        rest_of_them = (await rest.get("/conversations", limit=3, before=page["next_before"])).expect(200)
    assert [each["id"] for each in rest_of_them["conversations"]] == made[3:]
    assert rest_of_them["next_before"] is None


async def test_a_search_finds_titles_that_contain_it_in_whatever_case(shared_node: NodeProcess, user: str) -> None:
    titles = [
        "Why is the sky blue?",
        "100 % of it",
        "100 of it",
        "a_b",
        "aXb",
        "a\\b",
        "SKY DIVING",
        "Ärger in Köln",
        None,
    ]

    async def found(rest: Rest, search: str) -> list[str]:
        page = (await rest.get("/conversations", search=search)).expect(200)
        return [each["title"] for each in page["conversations"]]

    async with rest_to(shared_node, user) as rest, rest_to(shared_node, user + "-2") as stranger:
        for title in reversed(titles):
            await rest.create(title=title)
        await stranger.create(title="Another sky")
        for search, expected in {
            "sky": ["Why is the sky blue?", "SKY DIVING"],
            "Sky d": ["SKY DIVING"],
            "%": ["100 % of it"],
            "_": ["a_b"],
            "\\": ["a\\b"],
            "ÄRGER IN kö": ["Ärger in Köln"],
            " ": ["Why is the sky blue?", "100 % of it", "100 of it", "SKY DIVING", "Ärger in Köln"],
            "sky.*": [],
            "x" * 100: [],
        }.items():
            assert await found(rest, search) == expected, search
        assert await found(stranger, "SKY") == ["Another sky"]


async def test_what_a_search_finds_comes_in_pages(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        made: list[str] = []
        for number in range(5):
            made.insert(0, await rest.create(title=f"One of these: {number}"))
            await rest.create(title="another")
        by_mark: list[str] = []
        by_skip: list[str] = []
        for name, ids in (("before", by_mark), ("skip", by_skip)):
            query: dict[str, Any] = {"search": "ONE OF", "limit": 2, "skip": 0}
            while query.get(name, 0) is not None:
                page = (await rest.get("/conversations", **query)).expect(200)
                ids += [each["id"] for each in page["conversations"]]
                query = {"search": "ONE OF", "limit": 2, name: page[f"next_{name}"]}
        assert by_mark == by_skip == made


# Yours only.


async def asked(rest: Rest, user: str, id: str, method: str, path: str, query: str, body: Any, **names: str) -> Reply:
    names = {**names, "conversation": id}
    for name, value in names.items():
        query = query.replace(f"{{{name}}}", value)
    text = None if body is None else json.dumps(body)
    for name, value in names.items():
        text = None if text is None else text.replace(f"{{{name}}}", value)
    where = path.format(conversation_id=id, turn_id=names["turn"], user_id=user)
    return await rest.ask(method, where + query, data=None if text is None else text.encode())


def test_every_operation_is_in_the_matrix() -> None:
    assert ASKED.keys() == {operation.name for operation in ON_A_CONVERSATION}


@pytest.mark.parametrize("operation", ON_A_CONVERSATION, ids=lambda operation: operation.name)
async def test_somebody_elses_conversation_and_none_are_answered_alike_byte_for_byte(
    shared_node: NodeProcess, module_database_url: str, user: str, operation: Any
) -> None:
    stranger = user + "-stranger"
    async with rest_to(shared_node, user) as owner, rest_to(shared_node, stranger) as rest:
        chat = f"chat-{user}"
        id = await owner.create(title="secret", client_id=chat)
        client = f"client-{user}"
        answer = (await owner.proceed(id, "x", message_id=client)).expect(200)
        await rest.create()  # a user whom the database knows
        before = await everything(module_database_url)
        names = {"turn": answer["turn_id"], "message": answer["message"]["id"], "client": client}
        for query, body in ASKED[operation.name]:
            at = (operation.method, operation.path, query, body)
            ids = [id, MISSING] if operation.name == "chat" else [id, chat, MISSING, *IDS_OF_NOTHING]
            replies = [await asked(rest, stranger, each, *at, **names) for each in ids]
            assert replies[0].refusal == (404, "not_found"), at
            for each, reply in zip(ids, replies, strict=True):
                assert reply.body == replies[0].body, each
                assert {**reply.headers, "Date": ""} == {**replies[0].headers, "Date": ""}, each
            if operation.method == "GET":
                heads = [await asked(rest, stranger, each, "HEAD", *at[1:], **names) for each in ids]
                assert {(head.status, head.body, head.headers["Content-Length"]) for head in heads} == {
                    (404, b"", str(len(replies[0].body)))
                }
        assert await everything(module_database_url) == before
        assert not [each for each in await listed(rest) if each == id]


async def test_a_turn_and_a_message_of_another_conversation_are_not_found_in_this_one(
    shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest, rest_to(shared_node, user + "-2") as stranger:
        mine, other, theirs = await rest.create(), await rest.create(), await stranger.create()
        replies = {}
        for client, id in ((rest, other), (stranger, theirs)):
            answer = (await client.proceed(id, "x")).expect(200)
            message, turn = answer["message"]["id"], answer["turn_id"]
            replies[id] = [
                await rest.get(conversation(mine) + f"/turns/{turn}"),
                await rest.get(conversation(mine) + "/messages", before=message),
                await rest.get(conversation(mine) + "/messages", before=message, format="openai"),
                await rest.post(conversation(mine) + "/cancel", {"turn_id": turn}),
            ]
        for one, two in zip(*replies.values(), strict=True):
            assert one.refusal == (404, "not_found")
            assert one.body == two.body


async def test_the_same_message_id_of_two_users_is_two_messages(shared_node: NodeProcess, user: str) -> None:
    answers = []
    for name in (user, user + "-2"):
        async with rest_to(shared_node, name) as rest:
            reply = await rest.post(f"/api/{name}/chat", {"message": "to " + name, "message_id": "m-1"})
            answers.append(reply.expect(200))
    assert answers[0]["conversation_id"] != answers[1]["conversation_id"]
    assert [answer["response"] for answer in answers] == [f"[1] to {user}", f"[1] to {user}-2"]


@pytest.mark.parametrize("body", [{"message": "x"}, {"message": "x", "conversation_id": MISSING}, {"nonsense": 1}])
async def test_a_user_id_that_is_not_the_tokens_is_forbidden(
    shared_node: NodeProcess, user: str, body: dict[str, Any]
) -> None:
    async with rest_to(shared_node, user) as rest:
        replies = [await rest.post(f"/api/{name}/chat", body) for name in (user + "-2", "x", user[:-1], user.upper())]
    assert {reply.refusal for reply in replies} == {(403, "forbidden")}
    assert len({reply.body for reply in replies}) == 1


@pytest.mark.parametrize(
    "name",
    [
        *("auth0|5f7c", "ada@example.com", "ada?x=1", "a#b", "50%", "a%2Fb", "å 中\u2615", "..", "a+b", "a:b;c,d"),
        *("google/5f7c", "https://issuer.example.com/users/5f7c/", "/chat/chat", "a//b"),
    ],
)
async def test_a_user_chats_whatever_the_id_is_made_of(shared_node: NodeProcess, user: str, name: str) -> None:
    name = f"{name}{user}"
    async with rest_to(shared_node, name) as rest:
        reply = await rest.post(f"/api/{quote(name, safe='')}/chat", {"message": "x"})
        answer = reply.expect(200)
        assert answer.keys() == {"conversation_id", "response", "tool_calls"}
        assert await listed(rest) == [answer["conversation_id"]]


# Who asks.


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
async def test_without_a_good_token_nothing_is_done(shared_node: NodeProcess, user: str, operation: Any) -> None:
    async with rest_to(shared_node, user) as owner:
        id = await owner.create()
        where = operation.path.format(conversation_id=id, turn_id=MISSING, user_id=user, **OF_OTHERS)
        for token in (
            None,
            "",
            "nonsense",
            "ä.ö.ü",
            "x" * 20_000,
            token_for(user, ttl_seconds=-1),
            token_for(user, secret="x" * 48),
            token_for(user)[:-2],
            token_for(user).replace(".", "..", 1),
        ):
            async with rest_to(shared_node, None) as rest:
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                reply = await rest.ask(operation.method, where, data=b"{", headers=headers)
                assert reply.refusal == (401, "unauthorized"), token
                assert reply.headers["WWW-Authenticate"].startswith("Bearer")
        assert await listed(owner) == [id]


@pytest.mark.parametrize("scheme", ["Basic", "Token", "Bearer:", "JWT"])
async def test_a_token_of_another_scheme_is_none(shared_node: NodeProcess, user: str, scheme: str) -> None:
    async with rest_to(shared_node, None) as rest:
        headers = {"Authorization": f"{scheme} {token_for(user)}"}
        assert (await rest.ask("GET", "/conversations", headers=headers)).refusal == (401, "unauthorized")


async def test_the_scheme_is_read_in_any_case(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, None) as rest:
        headers = {"Authorization": f"bEARER {token_for(user)}"}
        assert (await rest.ask("GET", "/conversations", headers=headers)).status == 200


async def test_a_token_in_the_query_is_not_read(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, None) as rest:
        for name in ("token", "access_token", "authorization"):
            reply = await rest.get("/conversations", **{name: token_for(user)})
            assert reply.refusal == (401, "unauthorized")
    assert token_for(user)[:40] not in shared_node.log.read_text()


# Methods and routes.


@pytest.mark.parametrize("path", sorted({operation.path for operation in OPERATIONS}))
async def test_another_method_is_not_allowed_and_the_answer_says_which_are(
    shared_node: NodeProcess, user: str, path: str
) -> None:
    methods = {operation.method for operation in OPERATIONS if operation.path == path}
    methods |= {"HEAD"} if "GET" in methods else set()
    async with rest_to(shared_node, user) as rest:
        where = path.format(conversation_id=MISSING, turn_id=MISSING, user_id=user, **OF_OTHERS)
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
            reply = await rest.ask(method, where)
            assert reply.refusal == (405, "invalid_frame")
            assert {name.strip() for name in reply.headers["Allow"].split(",")} == methods


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/conversation",
        f"/conversations/{MISSING}/nope",
        f"/conversations/{MISSING}/turns",
        f"/conversations/{MISSING}/turns/{MISSING}/nope",
        "/api",
        "/api/ada",
        "//conversations",
        "/Conversations",
        "/conversations/",
        f"/conversations/{MISSING}/",
        f"/conversations/{MISSING}/messages/",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_route_is_not_found_in_the_same_shape(
    shared_node: NodeProcess, user: str, path: str, method: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        assert (await rest.ask(method, path)).refusal == (404, "not_found")


@pytest.mark.parametrize("text", ["x", "1", "%00", "%ff", "null", MISSING + "0", MISSING[:-1] + "g", "%E2%98%95"])
async def test_a_turns_id_that_is_no_uuid_is_refused_and_named(shared_node: NodeProcess, user: str, text: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        for conversation_id in (id, MISSING, "chat"):
            reply = await rest.get(f"/conversations/{conversation_id}/turns/{text}")
            assert reply.refusal == (422, "invalid_frame")
            assert reply.paths == ["turn_id"]


async def test_head_says_what_get_would_without_a_body(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        turn_id = (await rest.proceed(id, "x")).expect(200)["turn_id"]
        for path in (
            "/conversations",
            conversation(id),
            conversation(id) + "/messages?limit=1",
            conversation(id) + f"/turns/{turn_id}",
        ):
            head, get = await rest.ask("HEAD", path), await rest.ask("GET", path)
            assert (head.status, head.body) == (200, b"")
            for name in ("Content-Length", "Content-Type", "Link"):
                assert head.headers.get(name) == get.headers.get(name)
        events = await rest.ask("HEAD", conversation(id) + "/events")
        assert (events.status, events.body) == (200, b"")
        assert events.headers["Content-Type"].startswith("text/event-stream")


# Bodies.

DEEP = 100_000
NOT_JSON = {
    "nothing but a space": b" ",
    "cut": b'{"title": "a"',
    "two": b"{} {}",
    "single quotes": b"{'title': 'a'}",
    "a comma too many": b'{"title": "a",}',
    "a comment": b"{} // x",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"title": "a"}'.encode("utf-16"),
    "not UTF-8": b'{"title": "\xff"}',
    "an encoded surrogate": b'{"title": "\xed\xa0\x80"}',
    "overlong UTF-8": b'{"title": "\xc0\x80"}',
    "a control character": b'{"title": "a\x01b"}',
    "NaN": b'{"metadata": {"a": NaN}}',
    "Infinity": b'{"metadata": {"a": Infinity}}',
    "-Infinity": b'{"metadata": {"a": [-Infinity]}}',
    "a number without an end": b'{"metadata": {"a": 1e999}}',
    "an integer without an end": b'{"metadata": {"a": ' + b"1" * 5000 + b"}}",
    "a key twice": b'{"title": "a", "title": "a"}',
    "a key twice inside": b'{"metadata": {"a": {"b": 1, "b": 1}}}',
    "a key twice, escaped": b'{"metadata": {"a": 1, "\\u0061": 1}}',
    "NUL": b'{"title": "a\\u0000b"}',
    "NUL in a key": b'{"metadata": {"\\u0000": 1}}',
    "NUL deep inside": b'{"metadata": {"a": [[{"b": ["\\u0000"]}]]}}',
    "half a surrogate pair": b'{"title": "\\ud83d"}',
    "half a surrogate pair in a list": b'{"metadata": {"a": [["\\ude00"]]}}',
    "the halves the wrong way round": b'{"title": "\\ude00\\ud83d"}',
    "too deep": b'{"metadata": {"a": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "a list too deep": b"[" * DEEP + b"]" * DEEP,
    "a list": b"[]",
    "a list of bodies": b'[{"title": "a"}]',
    "null": b"null",
    "a string": b'"title"',
    "a number": b"1",
    "a form": b"title=a",
    "compressed": b"\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("name", NOT_JSON)
async def test_what_is_not_a_strict_json_object_is_refused(shared_node: NodeProcess, user: str, name: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        for method, path in (
            ("POST", "/conversations"),
            ("PATCH", conversation(id)),
            ("POST", conversation(id) + "/messages"),
            ("POST", conversation(id) + "/continue"),
            ("POST", conversation(id) + "/cancel"),
        ):
            assert (await rest.ask(method, path, data=NOT_JSON[name])).refusal == (422, "invalid_frame")
        assert await listed(rest) == [id]


@pytest.mark.parametrize("padding", [0, 70_000])
async def test_metadata_of_any_depth_is_stored_or_refused(shared_node: NodeProcess, user: str, padding: int) -> None:
    # A long body is decoded in a thread, whose stack is not as full.
    async with rest_to(shared_node, user) as rest:
        statuses = {}
        for depth in (*range(90, 110), *range(900, 1010, 5)):
            data = b'{"metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}" + b" " * padding
            reply = await rest.ask("POST", "/conversations", data=data)
            statuses[depth] = reply.status
            if reply.status == 201:
                assert (await rest.get(reply.headers["Location"])).status == 200
        assert set(statuses.values()) == {201, 422}, statuses


@pytest.mark.parametrize(
    ("method", "path", "body", "paths"),
    [
        ("POST", "/conversations", {"title": 1, "system_prompt": [], "metadata": "x", "nope": 1}, None),
        ("POST", "/conversations", {"title": ""}, ["title"]),
        ("POST", "/conversations", {"title": "x" * 201}, ["title"]),
        ("POST", "/conversations", {"metadata": None}, ["metadata"]),
        ("POST", "/conversations", {"metadata": []}, ["metadata"]),
        ("POST", "/conversations", {"user_id": "ada"}, ["user_id"]),
        ("POST", "/conversations", {"id": MISSING}, ["id"]),
        ("PATCH", "/conversations/{id}", {"title": True, "metadata": None}, ["metadata", "title"]),
        ("PATCH", "/conversations/{id}", {"updated_at": "2026-01-01T00:00:00Z", "seq": 0}, ["seq", "updated_at"]),
        ("POST", "/conversations/{id}/continue", {"message_id": "m"}, ["message_id"]),
        ("POST", "/conversations/{id}/continue", {"content": None, "message_id": "m"}, ["message_id"]),
        ("POST", "/conversations/{id}/continue", {"content": ""}, ["content"]),
        ("POST", "/conversations/{id}/continue", {"content": " \n\t\u2003\ufeff"}, ["content"]),
        ("POST", "/conversations/{id}/continue", {"content": ["x"]}, ["content"]),
        (
            "POST",
            "/conversations/{id}/continue",
            {"content": 1, "message_id": "", "if_busy": "wait", "wait": "no", "model": "x"},
            ["content", "if_busy", "message_id", "model", "wait"],
        ),
        ("POST", "/conversations/{id}/continue", {"content": "x", "message_id": "a\nb"}, ["message_id"]),
        ("POST", "/conversations/{id}/continue", {"content": "x", "message_id": "x" * 129}, ["message_id"]),
        ("POST", "/conversations/{id}/continue", {"content": "x", "wait": None}, ["wait"]),
        ("POST", "/conversations/{id}/regenerate", {"message_id": 1, "wait": 0}, ["message_id", "wait"]),
        ("POST", "/conversations/{id}/cancel", {"turn_id": "x"}, ["turn_id"]),
        ("POST", "/conversations/{id}/cancel", {"turn": MISSING}, ["turn"]),
        ("POST", "/api/{user}/chat", {"content": "x"}, ["content", "message"]),
        ("POST", "/api/{user}/chat", {"message": "x", "conversation_id": "x"}, ["conversation_id"]),
        ("POST", "/conversations/{id}/messages", {}, ["role"]),
        ("POST", "/conversations/{id}/messages", {"role": "user"}, ["content"]),
        ("POST", "/conversations/{id}/messages", {"role": "robot", "content": "x"}, ["role"]),
        ("POST", "/conversations/{id}/messages", {"role": "user", "content": "x", "name": "Ada"}, ["name"]),
        ("POST", "/conversations/{id}/messages", {"role": "user", "content": "x", "tool_calls": []}, ["tool_calls"]),
        ("POST", "/conversations/{id}/messages", {"role": "tool", "content": "x"}, ["tool_call_id"]),
        ("POST", "/conversations/{id}/messages", {"role": "user", "content": None}, ["content"]),
        ("POST", "/conversations/{id}/messages", {"messages": []}, ["messages"]),
        ("POST", "/conversations/{id}/messages", {"messages": {}}, ["messages"]),
        ("POST", "/conversations/{id}/messages", {"messages": [], "role": "user"}, ["messages", "role"]),
        (
            "POST",
            "/conversations/{id}/messages",
            {
                "messages": [
                    {"role": "user", "content": "fine"},
                    {"role": "user", "content": " "},
                    {"role": "user", "content": 1, "extra": 1},
                    "text",
                    {"role": "assistant", "tool_calls": [{"id": "", "function": {"name": "f"}}, {"id": "b"}]},
                ]
            },
            None,
        ),
    ],
)
async def test_a_refusal_names_every_problem_and_its_place(
    shared_node: NodeProcess, user: str, method: str, path: str, body: Any, paths: list[str] | None
) -> None:
    if paths is None and path == "/conversations":
        paths = ["metadata", "nope", "system_prompt", "title"]
    elif paths is None:
        paths = [
            "messages[2].content",
            "messages[2].extra",
            "messages[3]",
            "messages[4].tool_calls[0].function.arguments",
            "messages[4].tool_calls[0].id",
            "messages[4].tool_calls[1].function",
        ]
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        reply = await rest.ask(method, path.format(id=id, user=user), body)
        assert reply.refusal == (422, "invalid_frame")
        assert sorted(reply.paths) == paths
        assert all(detail["message"] for detail in reply.json["error"]["details"])
        assert await rest.messages(id) == []
        assert await listed(rest) == [id]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=101", "limit=-1", "limit=x", "limit=", "limit=1.5", "limit=null", "limit=%D9%A3"),
        *("skip=-1", "skip=10001", "skip=x", "before=", "before=x", "before=1", "before=1.x", "after=1", "nope=1"),
        *("before=99999999999999999." + MISSING, "before=%D9%A3." + MISSING, "before=-1." + MISSING),
        *("limit=1&limit=1", "limit", "limit=%00", "limit=%ff", "%ff=1", "limit=9" * 200),
        *("limit=1.0", "limit=1e1", "skip=1e3", "skip=0.0"),
        *("search=", "search=a%00", "search=%ed%a0%80", "search=a&search=b", "search=" + "x" * 101),
    ],
)
async def test_a_query_of_the_list_is_read_strictly(shared_node: NodeProcess, user: str, query: str) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.ask("GET", "/conversations?" + query)
        assert reply.refusal == (422, "invalid_frame")
        assert all(path == "query" or path.startswith("query.") for path in reply.paths)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "before=x", "before=1", "format=xml", "format=", "after=1", "skip=1"]
)
async def test_a_query_of_messages_is_read_strictly(shared_node: NodeProcess, user: str, query: str) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.ask("GET", conversation(await rest.create()) + "/messages?" + query)
        assert reply.refusal == (422, "invalid_frame")
        assert reply.paths == ["query." + query.split("=")[0]]


async def test_every_problem_of_a_query_is_named(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        reply = await rest.ask("GET", "/conversations?limit=0&skip=x&nope=1")
        assert sorted(reply.paths) == ["query.limit", "query.nope", "query.skip"]


# Bounds.

BYTES_MAX = 65_536
ANSWER_BYTES_MAX = 1_048_576
BODY_BYTES_MAX = 6 * BYTES_MAX + 16_384
APPENDED_BYTES_MAX = 4_194_304


@pytest.mark.parametrize("letter", ["a", "ö", "\u2615"])
async def test_a_text_may_have_exactly_as_many_bytes_as_it_may(
    shared_node: NodeProcess, user: str, letter: str
) -> None:
    size = len(letter.encode())
    most = letter * (BYTES_MAX // size) + "a" * (BYTES_MAX % size)
    async with rest_to(shared_node, user) as rest:
        for text, is_refused in ((most, False), (most + "a", True)):
            id = await rest.create()
            replies = [
                await rest.post("/conversations", {"system_prompt": text}),
                await rest.ask("PATCH", conversation(id), {"system_prompt": text}),
                await rest.append(id, {"role": "user", "content": text}),
                await rest.append(await rest.create(), {"role": "user", "content": [{"text": text}]}),
                await rest.proceed(await rest.create(), text),
                await rest.post(f"/api/{user}/chat", {"message": text}),
            ]
            for reply in replies:
                if is_refused:
                    assert reply.refusal == (413, "message_too_large")
                else:
                    assert reply.status in (200, 201), reply


async def test_a_message_is_bounded_with_its_calls(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "x" * ANSWER_BYTES_MAX}}
        question = {"role": "user", "content": "x"}
        reply = await rest.append(id, question, {"role": "assistant", "content": None, "tool_calls": [call]})
        assert reply.refusal == (413, "message_too_large")
        assert await rest.messages(id) == []


async def test_metadata_is_bounded(shared_node: NodeProcess, user: str) -> None:
    most = {"a": "x" * (16_384 - 8)}
    async with rest_to(shared_node, user) as rest:
        assert (await rest.post("/conversations", {"metadata": most})).status == 201
        more = {"a": "x" * (16_384 - 7)}
        assert (await rest.post("/conversations", {"metadata": more})).refusal == (413, "message_too_large")
        id = await rest.create()
        assert (await rest.ask("PATCH", conversation(id), {"metadata": more})).refusal == (413, "message_too_large")


@pytest.mark.parametrize(
    ("path", "bytes_max"), [("/conversations", BODY_BYTES_MAX), ("/conversations/{}/messages", APPENDED_BYTES_MAX)]
)
async def test_a_body_is_refused_for_its_announced_length_before_it_comes(
    shared_node: NodeProcess, user: str, path: str, bytes_max: int
) -> None:
    for length in (bytes_max + 1, 10**15, 10**18):
        head = head_of(user, path.format(MISSING), f"Content-Length: {length}")
        status, body = await raw(shared_node, head, b'{"title')
        assert (status, body["error"]["code"]) == (413, "message_too_large")


@pytest.mark.parametrize(
    ("path", "bytes_max"), [("/conversations", BODY_BYTES_MAX), ("/conversations/{}/messages", APPENDED_BYTES_MAX)]
)
async def test_a_body_without_a_length_is_refused_when_too_much_has_come(
    shared_node: NodeProcess, user: str, path: str, bytes_max: int
) -> None:
    # The last chunk never comes.
    head = head_of(user, path.format(MISSING), "Transfer-Encoding: chunked")
    piece = b"%x\r\n" % 65_536 + b" " * 65_536 + b"\r\n"
    status, body = await raw(shared_node, head, piece * (bytes_max // 65_536 + 1))
    assert (status, body["error"]["code"]) == (413, "message_too_large")


async def test_a_body_in_chunks_is_taken(shared_node: NodeProcess, user: str) -> None:
    head = head_of(user, "/conversations", "Transfer-Encoding: chunked")
    chunks = [b"1\r\n%c\r\n" % byte for byte in b'{"title": "in pieces"}']
    status, body = await raw(shared_node, head, *chunks, b"0\r\n\r\n")
    assert (status, body["title"]) == (201, "in pieces")


async def test_after_a_refusal_with_its_body_unread_the_connection_still_serves(
    shared_node: NodeProcess, user: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_node.port)
    try:
        body = b" " * (BODY_BYTES_MAX + 1)
        writer.write(head_of(user, "/conversations", f"Content-Length: {len(body)}") + body)
        writer.write(head_of(user, "/conversations", method="GET"))
        async with asyncio.timeout(15):
            assert b" 413 " in await reader.readline()
            await reader.readuntil(b'bytes."}}')
            assert b" 200 " in await reader.readline()
    finally:
        writer.transport.abort()


async def test_after_a_refusal_that_came_before_the_body_the_connection_still_serves(
    shared_node: NodeProcess, user: str
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_node.port)
    try:
        for head, status in (
            (head_of(user, "/conversations", "Content-Length: 30").replace(b"Bearer", b"Basic"), 401),
            (head_of(user, "/conversations", "Content-Length: 30", method="PUT"), 405),
            (head_of(user, "/conversations?nope=1", "Content-Length: 30"), 422),
            (head_of(user, "/nope", "Content-Length: 30"), 404),
            (head_of(user, f"/conversations/{MISSING}", "Content-Length: 30", method="DELETE"), 404),
        ):
            writer.write(head)
            async with asyncio.timeout(15):
                answer = await reader.readuntil(b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 %d " % status)
                await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            writer.write(b"GET /conversations HTTP/1.1   ")  # what came late is no request
        writer.write(head_of(user, "/conversations", method="GET"))
        async with asyncio.timeout(15):
            assert b" 200 " in await reader.readline()
    finally:
        writer.transport.abort()


async def test_pages_of_allowed_origins_may_ask_and_read_also_what_is_refused(start_node: StartNode, user: str) -> None:
    ours, app = "https://chat.example.com", "capacitor://localhost"
    async with rest_to(start_node(ALLOWED_ORIGINS=f"https://*.example.com, {app}"), user) as rest:
        id = await rest.create()
        for method, path in (
            ("GET", "/conversations"),
            ("PATCH", conversation(id)),
            ("POST", conversation(id) + "/messages"),
            ("GET", conversation(MISSING)),
            ("GET", conversation(id) + "/events?after=x"),
            ("GET", "/nope"),
            ("PUT", "/conversations"),
        ):
            for origin, expected in ((ours, ours), (app, app), ("https://evil-example.com", None)):
                reply = await rest.ask(method, path, headers={"Origin": origin})
                assert reply.headers.get("Access-Control-Allow-Origin") == expected, (method, path)
        for origin, expected in ((ours, ours), (app, app), ("https://evil-example.com", None)):
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "PATCH",
                "Access-Control-Request-Headers": "authorization, content-type",
            }
            reply = await rest.ask("OPTIONS", conversation(id), headers=asked)
            assert reply.headers.get("Access-Control-Allow-Origin") == expected
            assert (reply.status == 200) == (expected is not None)
            assert reply.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("framing", ["Content-Length: 300000", "Transfer-Encoding: chunked"])
async def test_those_who_are_slow_with_their_bodies_hold_up_nobody_else(
    start_node: StartNode, user: str, framing: str
) -> None:
    node = start_node()
    writers = []
    try:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", node.port)
            writers.append(writer)
            writer.write(head_of(user, "/conversations", framing))
        async with rest_to(node, user + "-2") as rest:
            id = await rest.create()
            async with asyncio.timeout(5):
                assert (await rest.append(id, {"role": "user", "content": "x" * 40_000})).status == 201
    finally:
        for writer in writers:
            writer.transport.abort()


async def test_what_is_beyond_a_list_of_messages_or_calls_is_refused(shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        id = await rest.create()
        many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * (
            MESSAGES_AT_ONCE_MAX // 2 + 1
        )
        reply = await rest.append(id, *many[: MESSAGES_AT_ONCE_MAX + 1])
        assert (reply.refusal, reply.paths) == ((422, "invalid_frame"), ["messages"])
        calls = [{"id": str(number), "function": {"name": "f", "arguments": "{}"}} for number in range(129)]
        reply = await rest.append(id, {"role": "assistant", "content": "x", "tool_calls": calls})
        assert (reply.refusal, reply.paths) == ((422, "invalid_frame"), ["tool_calls"])
        assert await rest.messages(id) == []
        assert (await rest.append(id, *many[:MESSAGES_AT_ONCE_MAX])).status == 201


async def test_nothing_of_all_this_was_an_error_of_the_node(shared_node: NodeProcess) -> None:
    assert "Traceback" not in shared_node.log.read_text()
