"""Conversations and messages as the APIs read and write them: what is not found, and a Postgres that is away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from uuid import UUID

import pytest

from anynode.models.client_chats import Chat
from anynode.models.database import Unavailable
from anynode.server.engine.conversations import Conversations
from anynode.server.errors import DatabaseUnavailable, NotFound
from anynode.server.protocol.bodies import UserMessage
from anynode.server.settings import Settings
from tests.kit.statements import Answers
from tests.kit.turns import AT, CONVERSATION, TURN, USER, turn_ref

ROW = {
    "id": CONVERSATION,
    "client_id": "chat-1",
    "title": "A title",
    "system_prompt": None,
    "metadata": '{"a": 1}',
    "last_seq": 7,
    "created_at": AT,
    "updated_at": AT,
    "refused_limit": None,
}
UNLIMITED = {"bytes": 11, "limits": None}  # of the system prompt and the metadata
BEFORE = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c20")
Call = Callable[[Conversations], Awaitable[Any]]

CALLS: dict[str, Call] = {
    "create": lambda known: known.create(USER, title=None, system_prompt=None, metadata=None),
    "get_or_create": lambda known: known.get_or_create(USER, "chat-1", title=None, system_prompt=None, metadata=None),
    "read": lambda known: known.read(USER, CONVERSATION),
    "list": lambda known: known.list(USER, limit=20),
    "update": lambda known: known.update(USER, CONVERSATION, {"title": "Another"}),
    "messages": lambda known: known.messages(USER, CONVERSATION, limit=50, before=None),
    "append": lambda known: known.append(USER, CONVERSATION, [UserMessage("a")], limits=None),
    "find": lambda known: known.find(USER, "chat-1", None),
    "find_chat": lambda known: known.find_chat(USER, "chat-1"),
    "find_chat_end": lambda known: known.find_chat_end(USER, "chat-1"),
    "find_sent": lambda known: known.find_sent(USER, "m-1"),
    "find_turn": lambda known: known.find_turn(USER, TURN),
    "usage": lambda known: known.usage([TURN]),
}


def of(answers: Answers) -> Conversations:
    return Conversations(Settings(), answers.database)


class Away(Answers):
    """A Postgres that does not answer."""

    def answer(self, name: str, arguments: Mapping[str, Any]) -> Any:
        raise Unavailable("OSError: refused")


def test_all_methods_are_tested_here() -> None:
    assert set(CALLS) == {name for name in vars(Conversations) if not name.startswith("_")}


@pytest.mark.parametrize("name", CALLS)
async def test_a_postgres_that_does_not_answer_is_told_as_such(name: str) -> None:
    with pytest.raises(DatabaseUnavailable) as raised:
        await CALLS[name](of(Away()))
    assert isinstance(raised.value.__cause__, Unavailable)


@pytest.mark.parametrize("name", ["read", "update", "messages", "append"])
async def test_what_is_not_the_users_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match="There is no such conversation"):
        await CALLS[name](of(Answers()))


@pytest.mark.parametrize("name", ["find_chat", "find_chat_end", "find_sent", "find_turn"])
async def test_a_search_that_finds_nothing_returns_none(name: str) -> None:
    assert await CALLS[name](of(Answers())) is None


async def test_usage_of_no_turn_asks_nothing() -> None:
    assert await of(Away()).usage([]) == {}
    assert await of(Answers({"read_usage": [{"id": TURN, "usage": "{}"}]})).usage([TURN]) == {TURN: "{}"}


@pytest.mark.parametrize(
    ("name", "statement"),
    [("create", "create_conversation"), ("read", "read_conversation"), ("update", "update_conversation")],
)
async def test_a_conversation_comes_with_all_its_fields(name: str, statement: str) -> None:
    found = await CALLS[name](of(Answers({statement: [ROW]})))
    assert (found.id, found.client_id, found.title, found.system_prompt) == (CONVERSATION, "chat-1", "A title", None)
    assert (bytes(found.metadata), found.seq, found.created_at, found.updated_at) == (b'{"a": 1}', 7, AT, AT)


async def test_a_conversation_is_made_with_an_id_of_its_own_and_empty_metadata() -> None:
    database = Answers({"create_conversation": [ROW]})
    await of(database).create(USER, title="A title", system_prompt="Be brief.", metadata=None)
    ((_, given),) = database.asked
    assert given.pop("conversation_id").version == 7
    assert given.pop("created_at").tzinfo is not None
    assert given == {"user_id": USER, "title": "A title", "system_prompt": "Be brief.", "metadata": "{}", **UNLIMITED}


@pytest.mark.parametrize(("client_id", "wanted_id"), [("chat-1", None), (str(CONVERSATION), CONVERSATION)])
async def test_a_conversation_is_looked_for_by_both_ids_and_made_with_the_clients(
    client_id: str, wanted_id: UUID | None
) -> None:
    database = Answers({"get_or_create_conversation": [{**ROW, "is_new": False, "is_taken": False}]})
    found, is_new = await of(database).get_or_create(
        USER, client_id, title="A title", system_prompt="Be brief.", metadata=None
    )
    assert (found.id, is_new) == (CONVERSATION, False)
    ((_, given),) = database.asked
    assert given.pop("new_id").version == 7
    assert given.pop("created_at").tzinfo is not None
    ids = {"user_id": USER, "client_id": client_id, "wanted_id": wanted_id}
    assert given == {**ids, "title": "A title", "system_prompt": "Be brief.", "metadata": "{}", **UNLIMITED}


async def test_a_conversation_is_found_by_our_id_or_the_clients() -> None:
    database = Answers({"find_conversation": [{"id": CONVERSATION}]})
    assert await of(database).find(USER, "chat-1", BEFORE) == CONVERSATION
    given = {"user_id": USER, "client_id": "chat-1", "conversation_id": BEFORE}
    assert database.asked == [("find_conversation", given)]
    assert await of(Answers({"find_conversation": [{"id": None}]})).find(USER, "chat-1", BEFORE) is None


async def test_conversations_are_listed_from_the_top_or_behind_a_place() -> None:
    database = Answers({"list_conversations": [{**ROW, "is_listed": True, "bytes": 2}]})
    page = await of(database).list(USER, limit=20, skip=3, search="tea")
    assert ([found.id for found in page.conversations], page.next_place) == ([CONVERSATION], None)
    ((name, first),) = database.asked
    assert (name, set(first.values())) == ("list_conversations", {USER, 21, 3, "tea", 5000, 2**21})
    assert (await of(database).list(USER, limit=20, before=(AT, CONVERSATION))).conversations == []
    name, second = database.asked[1]
    assert (name, set(second.values())) == ("list_conversations_before", {USER, 21, 0, None, AT, CONVERSATION, 2**21})


async def test_a_message_that_is_not_in_the_conversation_is_not_found_as_such() -> None:
    database = Answers({"read_conversation": [ROW]})
    with pytest.raises(NotFound, match="There is no such message in this conversation"):
        await of(database).messages(USER, CONVERSATION, limit=50, before=BEFORE)
    with pytest.raises(NotFound, match="There is no such conversation"):
        await of(Answers()).messages(USER, CONVERSATION, limit=50, before=BEFORE)
    with pytest.raises(DatabaseUnavailable):
        await of(Answers({"read_conversation": Unavailable()})).messages(USER, CONVERSATION, limit=50, before=BEFORE)


async def test_a_page_of_messages_comes_oldest_first() -> None:
    rows = [{"id": UUID(int=n), "bytes": 10, "position": n, "system_prompt": None} for n in (3, 2, 1)]
    page = await of(Answers({"read_messages": rows})).messages(USER, CONVERSATION, limit=50, before=None)
    assert ([row["position"] for row in page.messages], page.is_first) == ([1, 2, 3], True)


async def test_a_turn_is_found_with_the_place_of_its_first_event() -> None:
    row = {"conversation_id": CONVERSATION, "first_seq": 7}
    assert await of(Answers({"find_turn": [row]})).find_turn(USER, TURN) == turn_ref()
    chat = {**row, "turn_id": TURN}
    assert await of(Answers({"find_chat": [chat]})).find_chat(USER, "chat-1") == Chat(CONVERSATION, turn_ref())
    assert await of(Answers({"find_chat": [{**chat, "turn_id": None}]})).find_chat(USER, "chat-1") == Chat(
        CONVERSATION, None
    )
