"""What a `Store` refuses, and in which words; what is another user's is as what does not exist."""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import pytest
import pytest_asyncio

from anynode import InvalidFrame, MessageTooLarge, NotFound, Store

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALL: Final = {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
QUESTION: Final = {"role": "user", "content": "hello"}
TOO_LONG: Final = "x" * 129


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(module_database_url: str) -> AsyncIterator[Store]:
    async with Store(module_database_url) as store:
        yield store


@pytest.fixture
def stranger(user: str) -> str:
    return f"{user}-stranger"


async def answering(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """An agent that repeats the question."""
    return f"You said: {messages[-1]['content']}", []


Ask = Callable[[Any, Any, Any], Awaitable[Any]]


async def all_of(store: Store, id: Any, user: str) -> list[Any]:
    return [message async for message in store.get_messages(id, user)]


RAISING: Final[dict[str, Ask]] = {
    "update": lambda store, id, user: store.update_conversation(id, user, title="mine"),
    "update nothing": lambda store, id, user: store.update_conversation(id, user),
    "add_message": lambda store, id, user: store.add_message(id, user, "user", "hello"),
    "save_conversation_messages": lambda store, id, user: store.save_conversation_messages(id, user, [QUESTION]),
    "get_messages": all_of,
    "get_conversation_history": lambda store, id, user: store.get_conversation_history(id, user),
    "get_conversation_context": lambda store, id, user: store.get_conversation_context(id, user),
}
MAKING: Final[dict[str, Ask]] = {
    "get_or_create_conversation": lambda store, id, user: store.get_or_create_conversation(id, user),
    "load_conversation_history": lambda store, id, user: store.load_conversation_history(user, id),
    "chat": lambda store, id, user: store.chat(user, "hello", id, answering),
}


@pytest.mark.parametrize("form", ["uuid", "text", "upper", "own"])
async def test_somebody_elses_conversation_is_as_one_that_does_not_exist(
    store: Store, user: str, stranger: str, form: str
) -> None:
    own_id = f"own id {uuid.uuid4()}"
    theirs = await store.get_or_create_conversation(own_id, user, "secret")
    await store.save_conversation_messages(theirs.id, user, [QUESTION])
    before = await store.get_conversation(theirs.id, user)
    forms: dict[str, Any] = {"uuid": theirs.id, "text": str(theirs.id), "upper": str(theirs.id).upper(), "own": own_id}
    id = forms[form]
    for absent in (id, uuid.uuid4(), str(uuid.uuid4()), "no id"):
        assert await store.get_conversation(absent, stranger) is None
        assert await store.delete_conversation(absent, stranger) is False
        refusals = set()
        for ask in RAISING.values():
            with pytest.raises(NotFound) as refused:
                await ask(store, absent, stranger)
            refusals.add(str(refused.value))
        assert refusals == {"There is no such conversation."}
    assert await store.list_conversations(stranger) == []
    for ask in MAKING.values():
        await ask(store, id, stranger)
    (made,) = await store.list_conversations(stranger)
    assert made.id != theirs.id
    assert [each.content for each in await all_of(store, made.id, stranger)] == ["hello", "You said: hello"]
    assert [message.content for message in await all_of(store, theirs.id, user)] == ["hello"]
    after = await store.get_conversation(theirs.id, user)
    assert before is not None
    assert after is not None
    assert (after.title, after.updated_at, after.last_seq) == (before.title, before.updated_at, before.last_seq)


async def test_a_message_id_of_somebody_else_is_free_to_be_used(store: Store, user: str, stranger: str) -> None:
    answers = [
        await store.chat(each, f"hello from {each}", agent=answering, message_id="m-1") for each in (user, stranger)
    ]
    assert [answer["response"] for answer in answers] == [f"You said: hello from {each}" for each in (user, stranger)]


# What is refused, and in which words.

NUL: Final = "a\0b"
HALF: Final = "a\ud800"
NUMBERED: Final = "must be a whole number from {} to {}, not {!r}"
REFUSED: Final[list[tuple[str, Callable[[Any, str], Any], type[Exception], str]]] = [
    ("title NUL", lambda s, u: s.create_conversation(u, NUL), InvalidFrame, "NUL"),
    ("title half", lambda s, u: s.create_conversation(u, HALF), InvalidFrame, "surrogate|UTF-8|utf-8"),
    ("title empty", lambda s, u: s.create_conversation(u, ""), InvalidFrame, "^title: "),
    ("title long", lambda s, u: s.create_conversation(u, "x" * 201), InvalidFrame, "^title: .*200"),
    ("title type", lambda s, u: s.create_conversation(u, 1), InvalidFrame, "^title: .*int"),
    ("title bytes", lambda s, u: s.create_conversation(u, {1}), InvalidFrame, "^title: "),
    ("prompt NUL", lambda s, u: s.create_conversation(u, None, NUL), InvalidFrame, "NUL"),
    ("prompt type", lambda s, u: s.create_conversation(u, None, 1), InvalidFrame, "^system_prompt: "),
    ("prompt", lambda s, u: s.create_conversation(u, None, "x" * 10_000_000), MessageTooLarge, "^system_prompt is "),
    ("metadata NUL", lambda s, u: s.create_conversation(u, metadata={"a": NUL}), InvalidFrame, "NUL"),
    ("metadata key", lambda s, u: s.create_conversation(u, metadata={NUL: 1}), InvalidFrame, "NUL"),
    ("metadata list", lambda s, u: s.create_conversation(u, metadata=[1]), InvalidFrame, "^metadata: "),
    ("metadata object", lambda s, u: s.create_conversation(u, metadata={"a": object()}), InvalidFrame, "JSON"),
    ("metadata large", lambda s, u: s.create_conversation(u, metadata={"a": "x" * 17_000}), MessageTooLarge, "16384"),
    ("user empty", lambda s, u: s.create_conversation(""), InvalidFrame, "^user_id must be a text of 1 to 255"),
    ("user long", lambda s, u: s.create_conversation("x" * 256), InvalidFrame, "^user_id "),
    ("user NUL", lambda s, u: s.create_conversation(NUL), InvalidFrame, "^user_id .*without NUL$"),
    ("user half", lambda s, u: s.create_conversation(HALF), InvalidFrame, "^user_id "),
    ("user None", lambda s, u: s.create_conversation(None), InvalidFrame, "^user_id "),
    ("user int", lambda s, u: s.create_conversation(1), InvalidFrame, "^user_id "),
    ("id empty", lambda s, u: s.get_or_create_conversation("", u), InvalidFrame, "^client_id: "),
    ("id long", lambda s, u: s.get_or_create_conversation(TOO_LONG, u), InvalidFrame, "^client_id: .*128"),
    ("id NUL", lambda s, u: s.get_or_create_conversation(NUL, u), InvalidFrame, "client_id"),
    ("id half", lambda s, u: s.get_or_create_conversation(HALF, u), InvalidFrame, "surrogate|UTF-8|utf-8"),
    ("id unprintable", lambda s, u: s.get_or_create_conversation("a\nb", u), InvalidFrame, "^client_id: .*unprintable"),
    (
        "id int",
        lambda s, u: s.get_conversation(1, u),
        InvalidFrame,
        "^conversation_id must be a UUID or a text, not int",
    ),
    ("id None", lambda s, u: s.delete_conversation(None, u), InvalidFrame, "^conversation_id must .*NoneType$"),
    ("id bytes", lambda s, u: s.get_conversation_history(b"x", u), InvalidFrame, "^conversation_id must .*bytes$"),
    ("role", lambda s, u: s.add_message("chat", u, "robot", "x"), InvalidFrame, r"^messages\[0\]\.role: .*'robot'"),
    ("role type", lambda s, u: s.add_message("chat", u, 1, "x"), InvalidFrame, r"^messages\[0\]\.role: "),
    ("role None", lambda s, u: s.add_message("chat", u, None, "x"), InvalidFrame, r"^messages\[0\]\.role: is missing"),
    ("content blank", lambda s, u: s.add_message("chat", u, "user", " \n"), InvalidFrame, r"content: is empty$"),
    ("content NUL", lambda s, u: s.add_message("chat", u, "user", NUL), InvalidFrame, "NUL"),
    ("content half", lambda s, u: s.add_message("chat", u, "user", HALF), InvalidFrame, "surrogate|UTF-8|utf-8"),
    ("content type", lambda s, u: s.add_message("chat", u, "user", 1), InvalidFrame, r"^messages\[0\]\.content: .*int"),
    (
        "content long",
        lambda s, u: s.add_message("chat", u, "user", "x" * 10_000_000),
        MessageTooLarge,
        r"^messages\[0\]",
    ),
    (
        "calls of a user",
        lambda s, u: s.add_message("chat", u, "user", "x", tool_calls=[CALL]),
        InvalidFrame,
        "tool_calls: is not known",
    ),
    (
        "call",
        lambda s, u: s.add_message("chat", u, "assistant", "x", tool_calls=[{}]),
        InvalidFrame,
        r"tool_calls\[0\]\.id: is missing",
    ),
    (
        "name of a user",
        lambda s, u: s.add_message("chat", u, "user", "x", "name"),
        InvalidFrame,
        "tool_name: is not known",
    ),
    ("no call id", lambda s, u: s.add_message("chat", u, "tool", "x"), InvalidFrame, "tool_call_id: is missing"),
    ("no messages", lambda s, u: s.save_conversation_messages("chat", u, []), InvalidFrame, "^messages: .* >= 1"),
    (
        "many",
        lambda s, u: s.save_conversation_messages("chat", u, [QUESTION] * 2001),
        InvalidFrame,
        "^messages: .* <= 2000",
    ),
    ("a number", lambda s, u: s.save_conversation_messages("chat", u, [1]), InvalidFrame, r"^messages\[0\]"),
    (
        "a field",
        lambda s, u: s.save_conversation_messages("chat", u, [{**QUESTION, "x": 1}]),
        InvalidFrame,
        r"\.x: is not known",
    ),
    ("skip", lambda s, u: s.list_conversations(u, -1), InvalidFrame, "^skip " + NUMBERED.format(0, 1_000_000, -1)),
    ("skip far", lambda s, u: s.list_conversations(u, 1_000_001), InvalidFrame, "^skip must"),
    ("skip type", lambda s, u: s.list_conversations(u, "1"), InvalidFrame, "^skip .*'1'$"),
    ("limit 0", lambda s, u: s.list_conversations(u, limit=0), InvalidFrame, "^limit " + NUMBERED.format(1, 1000, 0)),
    ("limit 1001", lambda s, u: s.list_conversations(u, limit=1001), InvalidFrame, "^limit must"),
    ("limit bool", lambda s, u: s.list_conversations(u, limit=True), InvalidFrame, "^limit .*True$"),
    ("limit float", lambda s, u: s.list_conversations(u, limit=1.0), InvalidFrame, r"^limit .*1\.0$"),
    ("limit None", lambda s, u: s.list_conversations(u, limit=None), InvalidFrame, "^limit .*None$"),
    ("history 0", lambda s, u: s.get_conversation_history("chat", u, 0), InvalidFrame, "^limit must"),
    ("history", lambda s, u: s.get_conversation_history("chat", u, 100_001), InvalidFrame, "^limit .*1 to 100000,"),
    ("context 0", lambda s, u: s.get_conversation_context("chat", u, 0), InvalidFrame, "^limit must"),
    ("context", lambda s, u: s.get_conversation_context("chat", u, 100_001), InvalidFrame, "^limit must"),
    ("update title", lambda s, u: s.update_conversation("chat", u, title=""), InvalidFrame, "^title: "),
    ("update metadata", lambda s, u: s.update_conversation("chat", u, metadata=None), InvalidFrame, "^metadata: "),
    ("update prompt", lambda s, u: s.update_conversation("chat", u, system_prompt=NUL), InvalidFrame, "NUL"),
    ("question blank", lambda s, u: s.chat(u, " ", "chat", answering), InvalidFrame, "^message: is empty"),
    ("question NUL", lambda s, u: s.chat(u, NUL, "chat", answering), InvalidFrame, "NUL"),
    ("question type", lambda s, u: s.chat(u, None, "chat", answering), InvalidFrame, "^message: "),
    ("question long", lambda s, u: s.chat(u, "x" * 10_000_000, "chat", answering), MessageTooLarge, "bytes"),
    ("message id", lambda s, u: s.chat(u, "x", "chat", answering, message_id=""), InvalidFrame, "^message_id: "),
    (
        "message id long",
        lambda s, u: s.chat(u, "x", "chat", answering, message_id=TOO_LONG),
        InvalidFrame,
        "^message_id",
    ),
    ("message id \\n", lambda s, u: s.chat(u, "x", "chat", answering, message_id="\n"), InvalidFrame, "^message_id: "),
    ("chat's user", lambda s, u: s.chat("", "x", None, answering), InvalidFrame, "^user_id "),
    ("chat's id", lambda s, u: s.chat(u, "x", 1, answering), InvalidFrame, "^conversation_id must"),
    ("no agent", lambda s, u: s.chat(u, "x", "chat"), TypeError, "^chat needs an agent"),
]


@pytest.mark.parametrize(("ask", "error", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_what_cannot_be_stored_is_refused_in_words_that_name_it(
    store: Store, user: str, ask: Callable[[Any, str], Any], error: type[Exception], words: str
) -> None:
    await store.get_or_create_conversation("chat", user)
    with pytest.raises(error) as refused:
        await ask(store, user)
    assert re.search(words, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)
    (only,) = await store.list_conversations(user)
    assert only.client_id == "chat"
    assert (only.title or "", only.last_seq) == ("", 0)


NOBODY: Final[Sequence[str]] = ("", "x" * 256, "x" * 10_000, NUL, HALF)


@pytest.mark.parametrize("nobody", NOBODY, ids=ascii)
async def test_a_user_who_cannot_be_has_nothing(store: Store, user: str, nobody: str) -> None:
    made = await store.create_conversation(user)
    assert await store.get_conversation(made.id, nobody) is None
    assert await store.delete_conversation(made.id, nobody) is False
    assert await store.list_conversations(nobody) == []
    for ask in RAISING.values():
        with pytest.raises(NotFound):
            await ask(store, made.id, nobody)
    for ask in MAKING.values():
        with pytest.raises(InvalidFrame, match=r"^user_id "):
            await ask(store, made.id, nobody)


@pytest.mark.parametrize("nobody", [None, 1, b"user"])
async def test_a_user_who_is_no_text_is_refused_by_every_method(store: Store, nobody: Any) -> None:
    asks: list[Ask] = [
        *RAISING.values(),
        *MAKING.values(),
        lambda store, id, user: store.get_conversation(id, user),
        lambda store, id, user: store.delete_conversation(id, user),
        lambda store, id, user: store.list_conversations(user),
        lambda store, id, user: store.create_conversation(user),
    ]
    for ask in asks:
        with pytest.raises(InvalidFrame, match=f"^user_id must be a text, not {type(nobody).__name__}$"):
            await ask(store, "chat", nobody)


@pytest.mark.parametrize("id", ["", TOO_LONG, "x" * 100_000, NUL, HALF, "a\nb", "-" * 36], ids=ascii)
async def test_an_id_that_no_conversation_can_have_finds_nothing(store: Store, user: str, id: str) -> None:
    assert await store.get_conversation(id, user) is None
    assert await store.delete_conversation(id, user) is False
    for ask in RAISING.values():
        with pytest.raises(NotFound):
            await ask(store, id, user)
