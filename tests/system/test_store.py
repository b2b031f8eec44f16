"""`anynode.Store` against Postgres: conversations and messages."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from itertools import permutations
from typing import Any, Final

import pytest
import pytest_asyncio

from anynode import InvalidFrame, MessageTooLarge, NotFound, RoleOrder, Store, message_to_dict
from tests.kit.harness import sql
from tests.kit.soundness import assert_sound

CALL: Final = {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
TALK: Final[tuple[dict[str, Any], ...]] = (
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Find it."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "found", "tool_call_id": "call-1"},
    {"role": "assistant", "content": "It is there."},
)


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(module_database_url: str) -> AsyncIterator[Store]:
    async with Store(module_database_url) as store:
        yield store


@pytest.fixture
def stranger(user: str) -> str:
    return f"{user}-stranger"


async def contents(store: Store, id: Any, user: str) -> list[str]:
    """The contents of all messages."""
    return [message.content async for message in store.get_messages(id, user)]


def fields(row: Any, *names: str) -> list[Any]:
    """Fields of a row."""
    return [getattr(row, name) for name in names]


async def answering(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """An agent that repeats the question."""
    return f"You said: {messages[-1]['content']}", []


# Conversations.


async def test_a_conversation_is_made_with_what_is_given_and_found_by_its_uuid_and_its_text(
    store: Store, user: str
) -> None:
    made = await store.create_conversation(user, "Tea", "Be kind.", {"a": [1, {"b": "ö"}]})
    for id in (made.id, str(made.id), str(made.id).upper()):
        found = await store.get_conversation(id, user)
        assert found is not None
        assert fields(found, "id", "user_id", "client_id") == [made.id, user, None]
        assert fields(found, "title", "system_prompt", "metadata") == ["Tea", "Be kind.", {"a": [1, {"b": "ö"}]}]
        assert found.created_at == found.updated_at == made.created_at
        assert found.created_at.tzinfo is not None
    bare = await store.create_conversation(user)
    assert fields(bare, "title", "system_prompt", "metadata", "last_seq") == [None, None, {}, 0]


async def test_a_conversation_without_a_title_gets_one_from_its_first_question(store: Store, user: str) -> None:
    made = await store.create_conversation(user)
    named = await store.create_conversation(user, "Tea")
    for id in (made.id, named.id):
        await store.chat(user, "  What is\n tea? ", id, answering)
    titles = [(await store.get_conversation(id, user)).title for id in (made.id, named.id)]  # type: ignore[union-attr]
    assert titles == ["What is tea?", "Tea"]


async def test_get_or_create_makes_a_conversation_once_under_the_given_id(store: Store, user: str) -> None:
    for given in ("chat 1/ö", "x" * 128, "null"):
        made = await store.get_or_create_conversation(given, user, "Tea")
        assert fields(made, "client_id", "title") == [given, "Tea"]
        again = await store.get_or_create_conversation(given, user, "Other")
        assert fields(again, "id", "client_id", "title") == [made.id, given, "Tea"]
        found = await store.get_conversation(given, user)
        assert found is not None
        assert found.id == made.id
    for uuid_given in (uuid.uuid4(), str(uuid.uuid4())):
        made = await store.get_or_create_conversation(uuid_given, user)
        assert fields(made, "id", "client_id") == [uuid.UUID(str(uuid_given)), None]
        assert (await store.get_or_create_conversation(uuid_given, user)).id == made.id
    one, other = [await store.get_or_create_conversation(None, user, "Tea") for _ in range(2)]
    assert one.id != other.id
    assert fields(one, "client_id", "title") == [None, "Tea"]
    assert len(await store.list_conversations(user)) == 7


@pytest.mark.parametrize("spellings", list(permutations(("uuid", "text", "upper"))), ids=" ".join)
async def test_get_or_create_under_the_id_of_somebody_elses_conversation_makes_an_own_one_once(
    store: Store, user: str, stranger: str, spellings: tuple[str, ...]
) -> None:
    theirs = await store.create_conversation(user, "secret")
    ids: dict[str, Any] = {"uuid": theirs.id, "text": str(theirs.id), "upper": str(theirs.id).upper()}
    for spelling in spellings:
        made = await store.get_or_create_conversation(ids[spelling], stranger)
        assert fields(made, "client_id", "user_id", "title") == [str(theirs.id), stranger, None]
        assert made.id != theirs.id
        for id in ids.values():
            found = await store.get_conversation(id, stranger)
            assert found is not None
            assert found.id == made.id
    assert len(await store.list_conversations(stranger)) == 1
    assert (await store.get_conversation(theirs.id, user)).title == "secret"  # type: ignore[union-attr]


async def test_the_same_client_id_is_another_conversation_for_another_user(
    store: Store, user: str, stranger: str
) -> None:
    one, other = [await store.get_or_create_conversation("chat", each) for each in (user, stranger)]
    assert one.id != other.id
    assert await store.delete_conversation("chat", stranger)
    assert await store.get_conversation("chat", user) is not None


async def test_conversations_are_listed_by_their_last_activity_in_pages(store: Store, user: str, stranger: str) -> None:
    made = [await store.create_conversation(user, f"{number}") for number in range(5)]
    await store.create_conversation(stranger, "theirs")
    await store.add_message(made[1].id, user, "user", "hello")
    order = ["1", "4", "3", "2", "0"]
    assert [each.title for each in await store.list_conversations(user)] == order
    pages = [await store.list_conversations(user, skip, 2) for skip in (0, 2, 4, 5, 1_000_000)]
    assert [[each.title for each in page] for page in pages] == [["1", "4"], ["3", "2"], ["0"], [], []]
    assert len(await store.list_conversations(user, limit=1000)) == 5
    assert await store.list_conversations("nobody") == []


async def test_an_update_sets_what_is_given_and_only_that_and_is_no_activity(store: Store, user: str) -> None:
    made = await store.get_or_create_conversation("chat", user, "Tea")
    for changes, wanted in (
        ({"system_prompt": "Be kind."}, ("Tea", "Be kind.", {})),
        ({"metadata": {"a": 1}}, ("Tea", "Be kind.", {"a": 1})),
        ({"title": "Coffee", "system_prompt": None}, ("Coffee", None, {"a": 1})),
        ({}, ("Coffee", None, {"a": 1})),
        ({"title": None, "metadata": {}}, (None, None, {})),
    ):
        for id in ("chat", made.id):
            updated = await store.update_conversation(id, user, **changes)
            assert (updated.title, updated.system_prompt, updated.metadata) == wanted
            assert fields(updated, "id", "updated_at") == [made.id, made.updated_at]


async def test_a_deleted_conversation_is_gone_with_its_messages(
    store: Store, user: str, module_database_url: str
) -> None:
    made = await store.get_or_create_conversation("chat", user)
    await store.save_conversation_messages(made.id, user, TALK)
    assert await store.delete_conversation("chat", user) is True
    assert [await store.delete_conversation(id, user) for id in ("chat", made.id)] == [False, False]
    assert await store.get_conversation(made.id, user) is None
    with pytest.raises(NotFound):
        await contents(store, made.id, user)
    for table in ("messages", "events"):
        assert await sql(module_database_url, f"SELECT 1 FROM {table} WHERE conversation_id = $1", made.id) == []
    again = await store.get_or_create_conversation("chat", user)
    assert again.id != made.id


# Messages.


async def test_messages_of_all_roles_come_back_as_they_were_given(
    store: Store, user: str, module_database_url: str
) -> None:
    made = await store.get_or_create_conversation("chat", user)
    one_by_one = [await store.add_message("chat", user, **message) for message in TALK]
    at_once = await store.save_conversation_messages((await store.create_conversation(user)).id, user, [*TALK])
    for added in (one_by_one, at_once):
        shown = [message_to_dict(message) for message in added]
        assert [{name: each[name] for name in given} for each, given in zip(shown, TALK, strict=True)] == [*TALK]
        assert [message.position for message in added] == [1, 2, 3, 4, 5]
        assert [message.tool_name for message in added] == [None, None, None, "search", None]
        assert {message.status for message in added} == {"completed"}
        assert {message.user_id for message in added} == {user}
        assert {message.turn_id for message in added} == {None}
    assert [message.id for message in one_by_one] == [message.id async for message in store.get_messages("chat", user)]
    assert {message.conversation_id for message in one_by_one} == {made.id}
    await assert_sound(module_database_url, made.id)


async def test_rows_of_one_conversation_can_be_saved_in_another_one(store: Store, user: str, stranger: str) -> None:
    one, other = await store.create_conversation(user), await store.create_conversation(stranger)
    saved = await store.save_conversation_messages(one.id, user, TALK)
    await store.chat(user, "And now?", one.id, answering)
    copied = await store.save_conversation_messages(
        other.id, stranger, [message async for message in store.get_messages(one.id, user)]
    )
    assert [message.content for message in copied[:5]] == [message.content for message in saved]
    assert [message.content for message in copied[5:]] == ["And now?", "You said: And now?"]
    assert {message.user_id for message in copied} == {stranger}
    assert not {message.id for message in copied} & {message.id for message in saved}


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ({"role": "user", "content": "again"}, RoleOrder),
        ({"role": "tool", "content": "", "tool_call_id": "call-1"}, RoleOrder),
        ({"role": "assistant", "content": "x", "tool_call_id": "call-1"}, InvalidFrame),
        ({"role": "assistant", "content": "x" * 10_000_000}, MessageTooLarge),
        ({"role": "nobody", "content": ""}, InvalidFrame),
    ],
)
async def test_of_messages_of_which_one_is_refused_none_is_saved(
    store: Store, user: str, last: dict[str, Any], error: type[Exception]
) -> None:
    made = await store.create_conversation(user)
    before = await store.add_message(made.id, user, "user", "hello")
    answer, question = {"role": "assistant", "content": "hi"}, {"role": "user", "content": "how?"}
    with pytest.raises(error, match=r"messages\[4\]"):
        await store.save_conversation_messages(made.id, user, [answer, question, answer, question, last, last])
    assert [message.id async for message in store.get_messages(made.id, user)] == [before.id]
    found = await store.get_conversation(made.id, user)
    assert found is not None
    assert found.last_seq == 1


async def test_messages_are_activity_and_move_the_conversation_up(store: Store, user: str) -> None:
    one, other = [await store.create_conversation(user, title) for title in ("one", "other")]
    before = (await store.list_conversations(user))[-1]
    assert before.id == one.id
    await store.save_conversation_messages(one.id, user, TALK)
    after = (await store.list_conversations(user))[0]
    assert after.id == one.id
    assert after.updated_at > max(before.updated_at, other.updated_at)
    added = await store.add_message(one.id, user, "user", "more")
    found = await store.get_conversation(one.id, user)
    assert found is not None
    assert timedelta(0) <= found.updated_at - added.created_at < timedelta(seconds=1)


async def test_the_history_is_the_newest_messages_oldest_first(store: Store, user: str) -> None:
    made = await store.create_conversation(user)
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"{number}"} for number in range(120)]
    await store.save_conversation_messages(made.id, user, turns)
    for limit, wanted in ((1, 1), (2, 2), (119, 119), (120, 120), (121, 120), (100_000, 120)):
        history = await store.get_conversation_history(made.id, user, limit)
        assert [message.content for message in history] == [f"{number}" for number in range(120 - wanted, 120)]
    assert len(await store.get_conversation_history(made.id, user)) == 50
    conversation, loaded = await store.load_conversation_history(user, made.id)
    assert conversation.id == made.id
    assert len(loaded) == 120
    async with Store(store._url, history_messages_max=7) as short:
        _, loaded = await short.load_conversation_history(user, str(made.id))
        assert [message.content for message in loaded] == [f"{number}" for number in range(113, 120)]


async def test_loading_the_history_of_a_conversation_that_is_not_there_makes_it(store: Store, user: str) -> None:
    made, history = await store.load_conversation_history(user, "chat")
    assert (fields(made, "client_id"), history) == (["chat"], [])
    new, history = await store.load_conversation_history(user)
    assert (fields(new, "client_id"), history) == ([None], [])
    assert len(await store.list_conversations(user)) == 2


async def test_superseded_answers_are_in_all_messages_and_not_in_the_history(
    store: Store, user: str, module_database_url: str
) -> None:
    made = await store.create_conversation(user)
    await store.chat(user, "hello", made.id, answering)
    await sql(
        module_database_url,
        "UPDATE messages SET status = 'superseded' WHERE conversation_id = $1 AND role = 'assistant'",
        made.id,
    )
    statuses = [message.status async for message in store.get_messages(made.id, user)]
    assert statuses == ["completed", "superseded"]
    for limit in (1, 2, 50):
        assert [each.content for each in await store.get_conversation_history(made.id, user, limit)] == ["hello"]
        assert await store.get_conversation_context(made.id, user, limit) == [{"role": "user", "content": "hello"}]
    assert [each.content for each in (await store.load_conversation_history(user, made.id))[1]] == ["hello"]
