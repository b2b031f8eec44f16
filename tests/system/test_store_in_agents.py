"""`turn.store` and `turn.history_is_cut` in a node, and that a context is what an agent is given."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from anynode import Store
from tests.agents.storing import AGENT
from tests.kit.harness import NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.soundness import assert_sound

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX: Final = 6
ENVIRONMENT: Final = {"AGENT": AGENT, "HISTORY_MESSAGES_MAX": str(MAX), "SYSTEM_PROMPT": "Be brief."}


@pytest.fixture(scope="module")
def node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), ENVIRONMENT) as node:
        yield node


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(module_database_url: str) -> AsyncIterator[Store]:
    async with Store(module_database_url, history_messages_max=MAX, system_prompt="Be brief.") as store:
        yield store


@pytest_asyncio.fixture(loop_scope="module")
async def socket(node: NodeProcess, user: str) -> AsyncIterator[Socket]:
    async with socket_to(node, user) as socket:
        yield socket


async def asked(socket: Socket, conversation_id: Any, *actions: Sequence[Any]) -> list[Any]:
    """What came of the actions that a question to the node's agent had."""
    frames = await socket.answer(json.dumps(actions), str(conversation_id))
    assert frames[-1]["type"] == "turn.completed", frames[-1]
    outcomes: list[Any] = json.loads(text_of(frames))
    return outcomes


def talk(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": f"{number}"} for number in range(first, first + count)]


async def test_an_agent_reads_more_of_its_conversation_than_it_is_given(
    store: Store, socket: Socket, user: str
) -> None:
    made = await store.create_conversation(user)
    await store.save_conversation_messages(made.id, user, talk(20))
    is_cut, history, older, all_of, count = await asked(
        socket, made.id, ["is_cut"], ["history"], ["older", 100], ["all"], ["count"]
    )
    assert is_cut is True
    # The newest are from an assistant's message on, which no agent's history begins with.
    assert [each["content"] for each in history[:-1]] == ["Be brief.", "16", "17", "18", "19"]
    assert older[:-1] == [f"{number}" for number in range(20)]
    assert (all_of, count) == (21, 21)


async def test_an_agent_writes_to_another_conversation_of_the_user_and_is_refused_for_its_own(
    store: Store, socket: Socket, user: str, module_database_url: str
) -> None:
    made, other = [await store.create_conversation(user) for _ in range(2)]
    stranger = await store.create_conversation(f"{user}-stranger")
    own, another, absent = await asked(
        socket, made.id, ["add", None, "x"], ["add", str(other.id), "noted"], ["add", str(stranger.id), "x"]
    )
    assert own == ["ConversationBusy", "A turn is still running in this conversation."]
    assert another == 1
    assert absent == ["NotFound", "There is no such conversation."]
    assert [each.content for each in await store.get_conversation_history(other.id, user)] == ["noted"]
    assert await store.get_conversation_history(stranger.id, f"{user}-stranger") == []
    await assert_sound(module_database_url, made.id)


async def test_an_agent_asks_the_nodes_agent_in_another_conversation(
    store: Store, socket: Socket, user: str, module_database_url: str
) -> None:
    made, other = [await store.create_conversation(user) for _ in range(2)]
    (delegated,) = await asked(socket, made.id, ["delegate", str(other.id), json.dumps([["is_cut"], ["all"]])])
    assert json.loads(delegated) == [False, 1]
    own = json.dumps([["delegate", str(made.id), "[]"]])
    (refused,) = await asked(socket, made.id, ["delegate", None, own])
    assert json.loads(refused) == [["ConversationBusy", "A turn is still running in this conversation."]]
    for each in (made, other):
        await assert_sound(module_database_url, each.id)


@pytest.mark.parametrize("has_prompt", [False, True])
@pytest.mark.parametrize(("count", "is_cut"), [(MAX - 2, False), (MAX, True), (MAX + 2, True)])
async def test_the_history_is_cut_where_older_messages_are_left_out(
    store: Store, socket: Socket, user: str, has_prompt: bool, count: int, is_cut: bool
) -> None:
    made = await store.create_conversation(user)
    prompt = [{"role": "system", "content": "Be kind."}] if has_prompt else []
    await store.save_conversation_messages(made.id, user, [*prompt, *talk(count)])
    assert await asked(socket, made.id, ["is_cut"]) == [is_cut]


@pytest.mark.parametrize("has_prompt", [False, True])
@pytest.mark.parametrize(("left", "is_cut"), [(0, False), (1, True)])
async def test_exactly_as_many_messages_as_fit_are_not_cut(
    store: Store, socket: Socket, user: str, has_prompt: bool, left: int, is_cut: bool
) -> None:
    # An odd number of messages comes before a question where a call and its result are among them.
    made = await store.create_conversation(user)
    call = {"id": "call-1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    called: list[dict[str, Any]] = [
        {"role": "user", "content": "find"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "call-1"},
        {"role": "assistant", "content": "there"},
    ]
    if left + MAX - 1 == 5:
        called.insert(3, {"role": "tool", "content": "too", "tool_call_id": "call-2"})
        called[1]["tool_calls"] = [call, {**call, "id": "call-2"}]
    else:
        called += talk(2)
    prompt = [{"role": "system", "content": "Be kind."}] if has_prompt else []
    await store.save_conversation_messages(made.id, user, [*prompt, *called])
    found, history = await asked(socket, made.id, ["is_cut"], ["history"])
    assert found is is_cut
    assert history[0] == {"role": "system", "content": "Be kind." if has_prompt else "Be brief."}
    assert (len(history) == MAX + 1) is (not is_cut)


async def test_superseded_answers_do_not_cut_a_history(
    store: Store, socket: Socket, user: str, module_database_url: str
) -> None:
    made = await store.create_conversation(user)
    await store.save_conversation_messages(made.id, user, talk(MAX - 2))
    await socket.answer("[]", str(made.id))
    for _ in range(3):
        await socket.send({"type": "turn.regenerate", "conversation_id": str(made.id)})
        await socket.until("turn.completed")
    await sql(
        module_database_url,
        "DELETE FROM messages WHERE conversation_id = $1 AND position <= 2",  # so that exactly as many are left
        made.id,
    )
    is_cut, all_of = await asked(socket, made.id, ["is_cut"], ["all"])
    assert (is_cut, all_of) == (False, MAX - 4 + 2 + 3 + 1)


async def test_after_a_takeover_a_history_is_cut_as_before(user: str, database_url: str, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "LEASE_SECONDS": "1"}
    async with Store(database_url) as own:
        made = await own.create_conversation(user)
        await own.save_conversation_messages(made.id, user, [{"role": "system", "content": "Be kind."}, *talk(MAX)])
    with running_node(database_url, tmp_path, environment) as first:
        async with socket_to(first, user) as socket:
            await socket.ask(json.dumps([["is_cut"], ["kill"], ["is_cut"], ["older", 100]]), str(made.id))
            first.process.wait(10)
    with running_node(database_url, tmp_path, environment) as second:
        async with socket_to(second, user) as socket:
            await socket.follow(str(made.id), 0)
            frames = await socket.until("turn.completed", "turn.failed")
    before, attempt, after, older = json.loads(text_of(frames))
    assert (before, attempt > 1, after) == (True, True, True)
    assert len(older) == MAX + 2
    await assert_sound(database_url, made.id)


# A context is what an agent is given.


def random_messages(choice: random.Random) -> list[dict[str, Any]]:
    """A conversation up to an assistant's message, with or without a prompt, calls, and results in any order."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "own prompt"}] if choice.random() < 0.5 else []
    for _ in range(choice.randrange(6)):
        messages.append({"role": "user", "content": f"question {choice.random()}"})
        for step in range(choice.randrange(3)):
            ids = [f"call-{len(messages)}-{number}" for number in range(choice.randrange(1, 4))]
            calls = [
                {"id": id, "type": "function", "function": {"name": f"tool-{step}", "arguments": "{}"}} for id in ids
            ]
            messages.append({"role": "assistant", "content": choice.choice(["", "wait "]), "tool_calls": calls})
            choice.shuffle(ids)
            messages += [{"role": "tool", "content": f"result {id}", "tool_call_id": id} for id in ids]
        messages.append({"role": "assistant", "content": f"answer {choice.random()}"})
    return messages


@pytest.mark.parametrize("seed", range(12))
async def test_the_context_of_a_conversation_is_what_its_agent_is_given(
    store: Store, socket: Socket, user: str, module_database_url: str, seed: int
) -> None:
    choice = random.Random(seed)
    prompt = choice.choice([None, "prompt of the conversation"])
    made = await store.create_conversation(user, None, prompt)
    if messages := random_messages(choice):
        await store.save_conversation_messages(made.id, user, messages)
    for status in choice.choices(["completed", "superseded", "cancelled", "failed"], k=2):
        # What only a node's answers can be.
        await socket.answer("[]", str(made.id), str(uuid.uuid4()))
        last = "(SELECT max(position) FROM messages WHERE conversation_id = $1)"
        content = choice.choice(["''", "content"])
        if status != "superseded":
            await sql(
                module_database_url,
                f"UPDATE messages SET status = $2, content = {content} "
                f"WHERE conversation_id = $1 AND position = {last}",
                made.id,
                status,
            )
        else:
            await socket.send({"type": "turn.regenerate", "conversation_id": str(made.id)})
            await socket.until("turn.completed")
    history, context, larger = await asked(socket, made.id, ["history"], ["context"], ["context", 1000])
    assert context == history
    assert context == await context_before_answer(store, made.id, user)
    assert larger[-len(context) + 1 :] == context[1:]
    assert larger[0] == context[0]


async def context_before_answer(store: Store, id: uuid.UUID, user: str) -> list[dict[str, Any]]:
    """The context that a store outside of the node gave when the last answer was not there: one message more now."""
    wider = await store.get_conversation_context(id, user, MAX + 1)
    assert wider[-1]["role"] == "assistant"
    return wider[:-1]
