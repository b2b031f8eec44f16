"""Processes with a `Store` and a node write to the same conversations at once: nothing is lost, and nothing doubled."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from anynode import ConversationBusy, NotFound, RoleOrder, Store
from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql, text_of
from tests.kit.rest import rest_to
from tests.kit.soundness import assert_sound
from tests.kit.store_process import StoreProcess, store_process
from tests.kit.stored import turns_of

QUESTION = script_of(("text", "An "), ("text", "answer."))


@pytest.fixture
async def one(module_database_url: str, strings: Strings) -> AsyncIterator[StoreProcess]:
    async with store_process(module_database_url, strings) as process:
        yield process


@pytest.fixture
async def other(module_database_url: str, strings: Strings) -> AsyncIterator[StoreProcess]:
    async with store_process(module_database_url, strings) as process:
        yield process


async def outcome(asked: Any) -> str:
    """The name of what is raised, or `done`."""
    try:
        await asked
    except (ConversationBusy, RoleOrder) as error:
        return type(error).__name__
    return "done"


async def test_of_many_that_make_a_conversation_at_once_in_processes_and_on_a_node_all_get_the_same_one(
    node: NodeProcess, one: StoreProcess, other: StoreProcess, user: str, module_database_url: str
) -> None:
    async with rest_to(node, user) as rest:
        for number in range(5):
            id = str(uuid.uuid4()) if number % 2 else f"chat {number}"
            made = [
                process.ask("get_or_create_conversation", id, user, title=f"{n}")
                for n in range(5)
                for process in (one, other)
            ]
            replies = [rest.post("/conversations", {"client_id": id}) for _ in range(5)]
            found = await asyncio.gather(*made)
            shown = [reply.json for reply in await asyncio.gather(*replies)]
            assert len({each["id"] for each in found} | {each["id"] for each in shown}) == 1
            assert len({each["title"] for each in found} | {each["title"] for each in shown}) == 1
    rows = await sql(module_database_url, "SELECT 1 FROM conversations WHERE user_id = $1", user)
    assert len(rows) == 5


async def test_messages_of_all_are_appended_whole_one_after_another(
    node: NodeProcess, one: StoreProcess, other: StoreProcess, user: str, module_database_url: str
) -> None:
    made = await one.ask("create_conversation", user)

    def pair(name: str, number: int) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{name} {number}"} for role in ("user", "assistant")]

    async with rest_to(node, user) as rest:
        asked: list[Any] = []
        for number in range(6):
            for name, process in {"one": one, "other": other}.items():
                asked.append(process.ask("save_conversation_messages", made["id"], user, pair(name, number)))
            asked.append(rest.post(f"/conversations/{made['id']}/messages", {"messages": pair("node", number)}))
        saved = await asyncio.gather(*asked)
    assert {reply.status for reply in saved[2::3]} == {201}
    messages = await assert_sound(module_database_url, made["id"])
    assert Counter(message["content"] for message in messages) == {
        f"{name} {number}": 2 for name in ("one", "other", "node") for number in range(6)
    }
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        assert question["content"] == answer["content"]


async def test_one_turn_at_a_time_runs_in_a_conversation_and_all_others_are_refused(
    node: NodeProcess, one: StoreProcess, other: StoreProcess, user: str, strings: Strings, module_database_url: str
) -> None:
    made = await one.ask("create_conversation", user)
    gate = strings.name()
    slow = script_of(("text", "An "), ("gate", gate), ("text", "answer."))
    asked = {process: [process.ask("chat", user, slow, made["id"]) for _ in range(5)] for process in (one, other)}
    pending = [future for futures in asked.values() for future in futures]
    await eventually(lambda: are_done(pending, 9))
    async with socket_to(node, user) as socket:
        assert (await socket.answer(QUESTION, made["id"]))[-1]["code"] == "conversation_busy"
    assert await outcome(other.ask("add_message", made["id"], user, "user", "hello")) == "ConversationBusy"
    assert await turns_of(module_database_url, made["id"]) == ["running"]
    strings.open(gate)
    outcomes = Counter([await outcome(each) for each in pending])
    assert outcomes == {"done": 1, "ConversationBusy": 9}
    messages = await assert_sound(module_database_url, made["id"])
    assert [message["content"] for message in messages] == [slow, "An answer."]


async def are_done(futures: list[asyncio.Future[Any]], count: int) -> bool:
    """Whether at least `count` of them have an outcome."""
    return sum(future.done() for future in futures) >= count


async def test_questions_and_messages_of_all_at_once_are_stored_once_each_or_refused(
    node: NodeProcess, one: StoreProcess, other: StoreProcess, user: str, module_database_url: str
) -> None:
    made = [await one.ask("create_conversation", user) for _ in range(3)]
    accepted: Counter[str] = Counter()

    async def write(process: StoreProcess, name: str) -> None:
        for number in range(8):
            id = made[number % 3]["id"]
            text = f"{name} {number}"
            question = script_of(("text", text))
            if number % 2:
                answered = process.ask("chat", user, question, id, message_id=text)
                if await outcome(answered) == "done":
                    assert answered.result()["response"] == text
                    accepted[id] += 2
            elif await outcome(process.ask("save_conversation_messages", id, user, pair_of(question, text))) == "done":
                accepted[id] += 2

    async def ask_node(name: str) -> None:
        async with socket_to(node, user) as socket:
            for number in range(8):
                id = made[number % 3]["id"]
                text = f"{name} {number}"
                await socket.ask(script_of(("text", text)), id, text)
                if (end := await own_end(socket, text))["type"] != "error":
                    assert (end["type"], end["message"]["content"]) == ("turn.completed", text)
                    accepted[id] += 2

    await asyncio.gather(write(one, "one"), write(other, "other"), ask_node("node"), write(one, "more"))
    for each in made:
        messages = await assert_sound(module_database_url, each["id"])
        assert len(messages) == accepted[each["id"]] > 0
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            assert question["content"] == script_of(("text", answer["content"]))


async def own_end(socket: Socket, message_id: str) -> Frame:
    """The end of this message's turn, or the error in its place, on a socket that shows the turns of others too."""
    turn_id = None
    while True:
        frame = await socket.receive()
        if frame["type"] == "turn.started" and frame["message_id"] == message_id:
            turn_id = frame["turn_id"]
        elif frame["type"] == "error" or (frame["type"] in TERMINAL and frame["turn_id"] == turn_id):
            return frame


def pair_of(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


async def test_the_same_question_asked_by_many_at_once_has_one_turn_and_one_answer(
    node: NodeProcess, one: StoreProcess, other: StoreProcess, user: str, strings: Strings, module_database_url: str
) -> None:
    mark, message_id = strings.name(), strings.name()
    question = script_of(
        ("mark", mark),
        ("text", "An "),
        ("call", "call-1", "search", {}),
        ("result", "call-1", "search", "x"),
        ("text", "answer."),
    )
    answers = await asyncio.gather(
        *(process.ask("chat", user, question, message_id=message_id) for _ in range(5) for process in (one, other))
    )
    assert len({str(answer) for answer in answers}) == 1
    assert answers[0]["response"] == "answer."
    assert [call["id"] for call in answers[0]["tool_calls"]] == ["call-1"]
    assert strings.marks(mark) == [1]
    async with socket_to(node, user) as socket:  # the node shows it to a client that sends it once more
        assert text_of(await socket.answer(question, None, message_id)) == "An answer."
    messages = await assert_sound(module_database_url, answers[0]["conversation_id"])
    assert len(messages) == 4


async def test_a_client_of_a_node_follows_a_turn_of_a_process_live_seq_by_seq(
    node: NodeProcess, one: StoreProcess, user: str, strings: Strings
) -> None:
    made = await one.ask("create_conversation", user)
    gates = [strings.name() for _ in range(5)]
    question = script_of(*(action for n, gate in enumerate(gates) for action in (("text", f"{n} "), ("gate", gate))))
    async with socket_to(node, user) as socket:
        await socket.follow(made["id"], 0)
        asked = one.ask("chat", user, question, made["id"])
        frames = await socket.until("turn.started")
        for number, gate in enumerate(gates):
            frames.append(await socket.receive())
            assert (frames[-1]["type"], frames[-1]["text"]) == ("turn.delta", f"{number} ")
            assert not asked.done()
            strings.open(gate)
        frames.append(await socket.receive())
        assert frames[-1]["type"] == "turn.completed"
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
    assert (await asked)["response"] == text_of(frames) == "0 1 2 3 4 "


async def test_a_client_of_a_node_stops_a_turn_of_a_process_and_the_call_returns_what_was_said(
    node: NodeProcess, one: StoreProcess, user: str, strings: Strings, module_database_url: str
) -> None:
    made = await one.ask("create_conversation", user)
    async with socket_to(node, user) as socket:
        await socket.follow(made["id"], 0)
        asked = one.ask("chat", user, script_of(("text", "So far "), ("hang",)), made["id"])
        await socket.until("turn.delta")
        await socket.send({"type": "turn.cancel", "conversation_id": made["id"]})
        frames = await socket.until("turn.cancelled")
    assert (await asked)["response"] == frames[-1]["message"]["content"] == "So far "
    assert [each["status"] for each in await assert_sound(module_database_url, made["id"])] == [
        "completed",
        "cancelled",
    ]


async def test_a_call_whose_conversation_is_deleted_elsewhere_ends(
    one: StoreProcess, other: StoreProcess, user: str, strings: Strings, module_database_url: str
) -> None:
    made = await one.ask("create_conversation", user)
    mark = strings.name()
    asked = one.ask("chat", user, script_of(("mark", mark), ("hang",)), made["id"])
    await eventually(lambda: is_marked(strings, mark))
    assert await other.ask("delete_conversation", made["id"], user) is True
    async with asyncio.timeout(10):
        with suppress(NotFound):  # or it has read the end that came before the deletion: nothing was said
            assert (await asked)["response"] == ""
    assert await sql(module_database_url, "SELECT 1 FROM messages WHERE user_id = $1", user) == []


async def is_marked(strings: Strings, mark: str) -> bool:
    """Whether the agent has come past a mark."""
    return bool(strings.marks(mark))


async def test_a_slow_process_keeps_its_turn_for_longer_than_its_lease_beside_nodes_and_others_that_ask(
    node: NodeProcess, user: str, strings: Strings, module_database_url: str
) -> None:
    mark, gate = strings.name(), strings.name()
    question = script_of(("text", "Slowly "), ("mark", mark), ("gate", gate), ("text", "said."))
    async with store_process(module_database_url, strings, lease_seconds=1.0) as slow:
        made = await slow.ask("create_conversation", user)
        asked = slow.ask("chat", user, question, made["id"], message_id=mark)
        await eventually(lambda: is_marked(strings, mark))
        async with Store(module_database_url, lease_seconds=1.0) as store:
            waiting = asyncio.create_task(store.chat(user, question, made["id"], nobody, message_id=mark))
            for _ in range(10):
                slow.pause()  # for a part of its lease, again and again
                await asyncio.sleep(0.15)
                slow.resume()
                await asyncio.sleep(0.15)
                with pytest.raises(ConversationBusy):
                    await store.chat(user, "Another question", made["id"], nobody)
            strings.open(gate)
            assert (await asked)["response"] == (await waiting)["response"] == "Slowly said."
    (turn,) = await sql(
        module_database_url, "SELECT epoch, status FROM turns WHERE conversation_id = $1", uuid.UUID(made["id"])
    )
    assert tuple(turn) == (1, "completed")
    assert strings.marks(mark) == [1]
    await assert_sound(module_database_url, made["id"])


async def nobody(messages: list[dict[str, Any]]) -> tuple[str, list[Any]]:
    """An agent that is not to be asked."""
    raise AssertionError("another process has the turn")
