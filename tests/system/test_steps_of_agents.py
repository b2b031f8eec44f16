"""Whatever an agent says of its steps and tools, what is stored is in order; what cannot be stored fails its turn."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from tests.agents.recalling import AGENT, ids_of
from tests.agents.scripted import Strings, script_of
from tests.kit.exactness import roles_after
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql, text_of

ANSWER_BYTES_MAX = 20_000
HISTORY_MESSAGES_MAX = 8
RECALL = script_of(("recall",))

Stored = tuple[str, str, list[str] | str | None, str]


@pytest.fixture(scope="module")
def node(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    environment = {
        **strings.environment,
        "AGENT": AGENT,
        "ANSWER_BYTES_MAX": str(ANSWER_BYTES_MAX),
        "HISTORY_MESSAGES_MAX": str(HISTORY_MESSAGES_MAX),
        "LEASE_SECONDS": "300",
    }
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), environment) as running:
        yield running


async def stored_in(database_url: str, conversation_id: str) -> list[Stored]:
    """What the database has of each message: its role, its content, the ids of its calls or of the call that it
    answers, its status. Roles are in order, and each call is answered once, right after it."""
    rows = await sql(
        database_url,
        "SELECT role, content, tool_calls, tool_call_id, status FROM messages WHERE conversation_id = $1 "
        "ORDER BY position",
        uuid.UUID(conversation_id),
    )
    stored: list[Stored] = [
        (
            row["role"],
            row["content"],
            ids_of(json.loads(row["tool_calls"] or "null"), row["tool_call_id"]),
            row["status"],
        )
        for row in rows
    ]
    assert all(role in roles_after(before) for before, role in pairwise([None, *(message[0] for message in stored)]))
    unanswered: list[str] = []
    for role, _, ids, _ in stored:
        if role == "tool":
            unanswered.remove(str(ids))
        else:
            assert unanswered == []
            assert ids is None or isinstance(ids, list)
            assert ids != []
            unanswered = list(ids or [])
    assert unanswered == []
    return stored


async def assert_as_shown(database_url: str, frames: Sequence[Frame]) -> list[Stored]:
    """The only turn of a conversation ended once, and its client shows what its messages hold. Returns those that
    answer."""
    end = frames[-1]
    assert end["type"] in TERMINAL, end
    _, *answer = await stored_in(database_url, end["conversation_id"])
    assert text_of(frames) == "".join(content for role, content, _, _ in answer if role == "assistant")
    role, content, _, status = answer[-1]
    assert (role, content, f"turn.{status}") == ("assistant", end["message"]["content"], end["type"])
    results = [frame["content"] for frame in frames if frame["type"] == "turn.tool_result"]
    assert [content for role, content, _, _ in answer if role == "tool"] == results
    (turn,) = await sql(
        database_url,
        "SELECT status, epoch, (SELECT count(*) FROM events WHERE turn_id = t.id AND type = ANY ($2)) AS ends "
        "FROM turns t WHERE conversation_id = $1",
        uuid.UUID(end["conversation_id"]),
        list(TERMINAL),
    )
    assert (f"turn.{turn['status']}", turn["epoch"], turn["ends"]) == (end["type"], 1, 1)
    return answer


async def cancelled(socket: Socket, question: str, until: str, conversation_id: str | None = None) -> list[Frame]:
    """The frames of a turn that is cancelled after the first frame of a type."""
    await socket.ask(question, conversation_id)
    frames = await socket.until(until)
    await socket.send({"type": "turn.cancel", "conversation_id": frames[0]["conversation_id"]})
    return frames + await socket.until(*TERMINAL)


# What is no step at all.


@pytest.mark.parametrize(
    "actions",
    [
        [("call", 7, "tool", {})],
        [("call", "1", None, {})],
        [("call", "1", "tool", None)],
        [("call", "1", "tool", ["no object"])],
        [("call", "1", "tool", {}), ("result", 1, "tool", "found")],
        [("call", "1", "tool", {}), ("result", "1", None, "found")],
        [("call", "1", "tool", {}), ("result", "1", "tool", 7)],
        [("call", "1", "tool", {}), ("result", "1", "tool", None)],
        [("call", "1", "tool", {}), ("result", "1", "tool", "found", "no")],
        [("result", "1", "tool", "found")],
        [("call", "1", "tool", {}), ("result", "2", "tool", "found")],
        [("results", 1, "found"), ("step",), ("text", "more "), ("result", "call-0", "tool", "found")],
    ],
    ids=json.dumps,
)
async def test_an_agent_whose_tool_events_are_none_fails_its_own_turn_alone(
    node: NodeProcess, module_database_url: str, strings: Strings, user: str, actions: Sequence[Sequence[Any]]
) -> None:
    gate = strings.name()
    async with socket_to(node, user) as socket, socket_to(node, user) as neighbour:
        await neighbour.ask(script_of(("text", "begun "), ("gate", gate), ("results", 1, "found"), ("text", "ended")))
        frames = await neighbour.until("turn.delta")
        failed = await socket.answer(script_of(("text", "so far "), *actions, ("text", "never heard")))
        assert failed[-1]["type"] == "turn.failed"
        assert failed[-1]["error"]["code"] == "agent_failed"
        assert text_of(failed).startswith("so far ")
        assert "never heard" not in text_of(failed)
        answer = await assert_as_shown(module_database_url, failed)
        assert ("results" in actions[0]) == (len(answer) > 1)
        strings.open(gate)
        frames += await neighbour.until(*TERMINAL)
        assert frames[-1]["type"] == "turn.completed"
        assert len(await assert_as_shown(module_database_url, frames)) == 3
        # In the conversation, too, life goes on.
        recalled = await socket.answer(RECALL, failed[-1]["conversation_id"])
    assert json.loads(text_of(recalled))[-2:] == [["assistant", failed[-1]["message"]["content"], None], asked(RECALL)]


async def test_arguments_that_are_no_dict_are_mended_like_others(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(("frozen", "1", {"a": "NUL \0"})))
        frames = await socket.until(*TERMINAL, within_seconds=5)
    assert [frame["arguments"] for frame in frames if frame["type"] == "turn.tool_call"] == [{"a": "NUL \ufffd"}]
    assert frames[-1]["type"] == "turn.completed"
    await assert_as_shown(module_database_url, frames)


@pytest.mark.parametrize(
    "actions",
    [
        [("call", "1", "tool", {}), ("result", "1", "tool", "found"), ("result", "1", "tool", "found again")],
        [
            *(("call", number, "tool", {}) for number in ("1", "2")),
            *(("result", "1", "tool", found) for found in ("found", "found again")),
        ],
        [("call", "1", "tool", {}), ("call", "1", "tool", {}), ("result", "1", "tool", "found")],
    ],
    ids=["a call twice answered", "one of two calls twice answered", "an id for two calls"],
)
async def test_a_call_is_answered_once_whatever_the_agent_says(
    node: NodeProcess, module_database_url: str, user: str, actions: Sequence[Sequence[Any]]
) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer(script_of(("text", "before "), *actions, ("text", "after")))
    await stored_in(module_database_url, frames[-1]["conversation_id"])


# Where steps begin and end.


def asked(content: str) -> list[str | None]:
    """A question as the agent recalls it."""
    return ["user", content, None]


def call(number: int) -> tuple[Any, ...]:
    return ("call", str(number), "tool", {"number": number})


def result(number: int) -> tuple[Any, ...]:
    return ("result", str(number), "tool", f"found {number}")


THREE_STEPS: list[Stored] = [
    ("assistant", "before ", ["1", "2"], "completed"),
    ("tool", "found 2", "2", "completed"),
    ("tool", "found 1", "1", "completed"),
    ("assistant", "between ", ["3"], "completed"),
    ("tool", "found 3", "3", "completed"),
    ("assistant", "after", None, "completed"),
]
TOOLS_ALONE: list[Stored] = [
    ("assistant", "", ["1"], "completed"),
    ("tool", "found 1", "1", "completed"),
    ("assistant", "", ["2"], "completed"),
    ("tool", "found 2", "2", "completed"),
    ("assistant", "", None, "completed"),
]
ENDS = ("step",)


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (
            [
                *(("text", "before "), call(1), call(2), result(2), result(1), ENDS),
                *(("text", "between "), call(3), result(3), ENDS, ("text", "after"), ENDS),
            ],
            THREE_STEPS,
        ),
        (
            [
                *(("text", "before "), call(1), call(2), result(2), result(1)),
                *(("text", "between "), call(3), result(3), ("text", "after")),
            ],
            THREE_STEPS,
        ),
        (
            [
                *(("text", "before "), call(1), call(2), ENDS, result(2), result(1)),
                *(("text", "between "), call(3), ENDS, result(3), ("text", "after")),
            ],
            THREE_STEPS,
        ),
        (
            [
                *(("text", "before "), ENDS, call(1), ENDS, call(2), ENDS, result(2), ENDS, result(1), ENDS, ENDS),
                *(("text", "bet"), ENDS, ("text", "ween "), call(3), ENDS, result(3), ENDS, ENDS, ("text", "after")),
            ],
            THREE_STEPS,
        ),
        ([call(1), result(1), call(2), result(2)], TOOLS_ALONE),
        ([call(1), ENDS, result(1), call(2), ENDS, result(2)], TOOLS_ALONE),
    ],
    ids=["as it should be", "never", "before the results", "at every turn", "tools alone", "tools before results"],
)
async def test_a_step_is_what_is_said_up_to_its_results_wherever_the_agent_says_that_it_ends(
    node: NodeProcess,
    module_database_url: str,
    user: str,
    actions: Sequence[Sequence[Any]],
    expected: Sequence[Stored],
) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer(script_of(*actions))
    assert await assert_as_shown(module_database_url, frames) == expected


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (
            [("text", "before "), call(1), call(2), result(1)],
            [("assistant", "before ", ["1"], "completed"), ("tool", "found 1", "1", "completed")],
        ),
        (
            [("text", "before "), call(1), call(2), call(3), ENDS, result(3), result(1)],
            [
                ("assistant", "before ", ["1", "3"], "completed"),
                ("tool", "found 3", "3", "completed"),
                ("tool", "found 1", "1", "completed"),
            ],
        ),
        (
            [call(1), result(1), call(2), call(3), result(3)],
            [
                ("assistant", "", ["1"], "completed"),
                ("tool", "found 1", "1", "completed"),
                ("assistant", "", ["3"], "completed"),
                ("tool", "found 3", "3", "completed"),
            ],
        ),
    ],
    ids=["the first of two", "two of three", "in the second step"],
)
@pytest.mark.parametrize("status", ["cancelled", "failed", "completed"])
async def test_calls_that_nobody_answered_are_forgotten_and_those_beside_them_are_not(
    node: NodeProcess,
    module_database_url: str,
    user: str,
    actions: Sequence[Sequence[Any]],
    expected: Sequence[Stored],
    status: str,
) -> None:
    last = {"cancelled": ("hang",), "failed": ("raise", "no"), "completed": ENDS}[status]
    async with socket_to(node, user) as socket:
        await socket.ask(script_of(*actions, last))
        frames: list[Frame] = []
        for _ in range(sum(action[0] == "result" for action in actions)):
            frames += await socket.until("turn.tool_result")
        if status == "cancelled":
            await socket.send({"type": "turn.cancel", "conversation_id": frames[0]["conversation_id"]})
        frames += await socket.until(*TERMINAL)
    answer = await assert_as_shown(module_database_url, frames)
    assert answer == [*expected, ("assistant", "", None, status)]


@pytest.mark.parametrize("before", [[], [call(8), result(8), ("text", "between ")]], ids=["at once", "in a later step"])
async def test_a_result_that_is_too_long_fails_the_turn_and_is_not_stored(
    node: NodeProcess, module_database_url: str, user: str, before: Sequence[Sequence[Any]]
) -> None:
    asked_for = (*before, call(9), ("result", "9", "tool", "x" * ANSWER_BYTES_MAX), ("text", "never heard"))
    async with socket_to(node, user) as socket:
        frames = await socket.answer(script_of(*asked_for))
    assert frames[-1]["type"] == "turn.failed"
    assert "ANSWER_BYTES_MAX" in frames[-1]["error"]["message"]
    answer = await assert_as_shown(module_database_url, frames)
    assert [(role, ids) for role, _, ids, _ in answer[:-1]] == ([("assistant", ["8"]), ("tool", "8")] if before else [])
    stored = await sql(
        module_database_url,
        "SELECT length(payload::text) FROM events WHERE conversation_id = $1 AND type <> 'message.created' "
        "AND length(payload::text) > 1000",
        uuid.UUID(frames[0]["conversation_id"]),
    )
    assert stored == []


# What is seen of them afterwards.


async def test_a_cancelled_turn_that_ran_a_tool_is_seen_and_a_silent_one_is_not(node: NodeProcess, user: str) -> None:
    did_something, did_nothing = script_of(call(1), result(1), ("hang",)), script_of(("hang",))
    async with socket_to(node, user) as socket:
        frames = await cancelled(socket, did_something, "turn.tool_result")
        conversation_id = frames[0]["conversation_id"]
        silent = await cancelled(socket, did_nothing, "turn.started", conversation_id)
        assert frames[-1]["message"]["content"] == silent[-1]["message"]["content"] == ""
        recalled = json.loads(text_of(await socket.answer(RECALL, conversation_id)))
    assert recalled == [
        asked(did_something),
        ["assistant", "", ["1"]],
        ["tool", "found 1", "1"],
        ["assistant", "", None],
        asked(RECALL),
    ]


async def test_superseded_answers_push_neither_their_question_nor_what_came_before_it_out(
    node: NodeProcess, user: str
) -> None:
    with_a_tool = script_of(call(1), result(1), ("recall",))
    async with socket_to(node, user) as socket:
        first = await socket.answer(RECALL)
        conversation_id = first[0]["conversation_id"]
        before = [asked(RECALL), ["assistant", text_of(first), None], asked(with_a_tool)]
        answer = await socket.answer(with_a_tool, conversation_id)
        for _ in range(6):  # six times three messages are more than an agent is given
            assert json.loads(text_of(answer)) == before
            await socket.send({"type": "turn.regenerate", "conversation_id": conversation_id})
            answer = await socket.until(*TERMINAL, "error")
        assert json.loads(text_of(answer)) == before


async def test_many_turns_at_once_lose_nothing_to_one_that_fails(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    """The good turns share their flushes with events that cannot be stored."""
    good = script_of(*(action for number in range(10) for action in (call(number), result(number), ("text", "w "))))
    bad = script_of(("text", "so far "), ("call", 7, "tool", {}))

    async def answer(question: str) -> list[Frame]:
        async with socket_to(node, user) as socket:
            return await socket.answer(question)

    answers = await asyncio.gather(*(answer(bad if number % 3 == 0 else good) for number in range(12)))
    for number, frames in enumerate(answers):
        assert frames[-1]["type"] == ("turn.failed" if number % 3 == 0 else "turn.completed")
        assert len(await assert_as_shown(module_database_url, frames)) == (1 if number % 3 == 0 else 21)
