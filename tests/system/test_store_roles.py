"""Whatever is appended in whatever order, a conversation is what the rules of models/rules.py accept of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode import InvalidFrame, RoleOrder, Store, message_to_dict, validate_role_sequence
from anynode.models.rules import OutOfOrder, Tail
from tests.kit.examples import examples
from tests.kit.soundness import assert_sound

Result = TypeVar("Result")
Message = dict[str, Any]
IDS = ("a", "b", "c")


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": f"tool-{id}", "arguments": "{}"}}


PLAIN = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant"]),
    st.sampled_from(["x", "öł \U0001f600"]),
)
CALLING = st.builds(
    lambda ids: {"role": "assistant", "content": "", "tool_calls": [call(id) for id in ids]},
    st.lists(st.sampled_from(IDS), min_size=1, max_size=3),
)
RESULT = st.builds(lambda id: {"role": "tool", "content": "found", "tool_call_id": id}, st.sampled_from(IDS))
MESSAGE = PLAIN | CALLING | RESULT


@st.composite
def likely(draw: st.DrawFn, length: int) -> list[Message]:
    """Messages that are mostly in order, or all batches would end at once."""
    messages: list[Message] = []
    tail = Tail()
    for _ in range(length):
        if draw(st.integers(0, 9)) == 0:
            message = draw(MESSAGE)
        elif "tool" in tail.next_roles:
            message = {"role": "tool", "content": "found", "tool_call_id": draw(st.sampled_from(sorted(tail.pending)))}
        elif "assistant" in tail.next_roles and draw(st.booleans()):
            message = draw(CALLING)
        else:
            message = {"role": draw(st.sampled_from(sorted(tail.next_roles))), "content": "x"}
        try:
            tail = after(tail, message)
        except OutOfOrder:
            if draw(st.booleans()):
                continue
        messages.append(message)
    return messages


@st.composite
def batches(draw: st.DrawFn) -> list[list[Message]]:
    """Messages as they are appended: some at a time."""
    messages = draw(likely(draw(st.integers(1, 14))))
    cuts = []
    while messages:
        size = draw(st.integers(1, 4))
        cuts.append(messages[:size])
        messages = messages[size:]
    return cuts


def after(tail: Tail, message: Message) -> Tail:
    """The rules' own answer: the end of a conversation after one more message. Raises OutOfOrder."""
    calls = [(each["id"], each["function"]["name"]) for each in message.get("tool_calls") or ()]
    return tail.followed_by(message["role"], calls=calls, tool_call_id=message.get("tool_call_id"))


def after_all(tail: Tail, messages: Sequence[Message]) -> tuple[Tail, str]:
    """The end of a conversation after more messages, or why the first one that may not come may not."""
    try:
        for message in messages:
            tail = after(tail, message)
    except OutOfOrder as error:
        return tail, str(error)
    return tail, ""


@pytest.fixture(scope="module")
def run(module_database_url: str) -> Iterator[Callable[[Callable[[Store], Coroutine[Any, Any, Result]]], Result]]:
    """Runs a coroutine that is given an open store; all in one event loop."""
    with asyncio.Runner() as runner:
        store = Store(module_database_url)
        runner.run(store.__aenter__())
        yield lambda work: runner.run(work(store))
        runner.run(store.close())


@examples(30)
@given(batches=batches())
def test_a_conversation_is_what_the_rules_accept_of_all_that_is_appended(
    run: Callable[[Any], Any], module_database_url: str, batches: Sequence[Sequence[Message]]
) -> None:
    async def append(store: Store) -> None:
        made = await store.create_conversation("ada")
        tail, stored = Tail(), list[Message]()
        for batch in batches:
            wanted, why_not = after_all(tail, batch)
            if why_not:
                with pytest.raises(RoleOrder) as refused:
                    await appended(store, made.id, batch)
                assert str(refused.value).endswith(why_not)
            else:
                added = await appended(store, made.id, batch)
                assert [each.position for each in added] == [len(stored) + 1 + number for number in range(len(batch))]
                tail = wanted
                stored += batch
            rows = [message async for message in store.get_messages(made.id, "ada")]
            assert [shown(row) for row in rows] == [{**message} for message in stored]
            for role in ("system", "user", "assistant", "tool"):
                if role in tail.next_roles:
                    validate_role_sequence(rows, role)
                else:
                    with pytest.raises(RoleOrder):
                        validate_role_sequence(rows, role)
        await assert_stored(module_database_url, made.id, stored)

    run(append)


async def appended(store: Store, id: UUID, batch: Sequence[Message]) -> list[Any]:
    """Append by `add_message` what is one, and more by `save_conversation_messages`."""
    if len(batch) == 1:
        return [await store.add_message(id, "ada", **batch[0])]
    return await store.save_conversation_messages(id, "ada", batch)


def shown(row: Any) -> Message:
    """The fields of a row that were given."""
    fields = {name: value for name, value in message_to_dict(row).items() if value is not None}
    return {name: fields[name] for name in ("role", "content", "tool_calls", "tool_call_id") if name in fields}


async def assert_stored(database_url: str, id: UUID, stored: Sequence[Message]) -> None:
    """The database has these messages, and is sound."""
    if stored:
        messages = await assert_sound(database_url, id)
        assert [(each["role"], each["content"]) for each in messages] == [
            (each["role"], each["content"]) for each in stored
        ]


@examples(60)
@given(messages=st.lists(MESSAGE, max_size=8), role=st.sampled_from(["system", "user", "assistant", "tool", "robot"]))
def test_a_sequence_is_valid_where_the_rules_say_so(messages: list[Message], role: str) -> None:
    tail, why_not = after_all(Tail(), messages)
    if not why_not and role in tail.next_roles:
        validate_role_sequence(messages, role)
        return
    with pytest.raises(RoleOrder) as refused:
        validate_role_sequence(messages, role)
    assert str(refused.value) == why_not or not why_not


@examples(20)
@given(data=st.data())
def test_questions_may_come_exactly_where_a_users_message_may(
    run: Callable[[Any], Any], module_database_url: str, data: st.DataObject
) -> None:
    async def answering(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
        return "answer", []

    async def ask(store: Store) -> None:
        made = await store.create_conversation("ada")
        tail, stored = Tail(), list[Message]()
        for message in data.draw(likely(6)):
            try:
                tail = after(tail, message)
            except OutOfOrder:
                break
            stored.append(message)
        if stored:
            await store.save_conversation_messages(made.id, "ada", stored)
        if "user" in tail.next_roles:
            answer = await store.chat("ada", "question", made.id, answering)
            assert answer["response"] == "answer"
            stored += [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        else:
            with pytest.raises(RoleOrder, match=r"^A user message cannot follow "):
                await store.chat("ada", "question", made.id, answering)
        await assert_stored(module_database_url, made.id, stored)

    run(ask)


@examples(20)
@given(content=st.text(max_size=30), role=st.sampled_from(["user", "assistant"]))
def test_any_text_is_stored_as_it_is_or_refused(run: Callable[[Any], Any], content: str, role: str) -> None:
    async def add(store: Store) -> None:
        made = await store.create_conversation("ada")
        if role == "assistant":
            await store.add_message(made.id, "ada", "user", "x")
        try:
            added = await store.add_message(made.id, "ada", role, content)
        except InvalidFrame:
            assert "\0" in content or (role == "user" and not content.strip())
        else:
            assert added.content == content
            assert [each.content async for each in store.get_messages(made.id, "ada")][-1] == content

    run(add)
