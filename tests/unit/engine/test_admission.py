"""Admission: what a client asks for as the database takes it, and the database's answer as a turn or an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from anynode.models.admissions import Admission, StoredMessage
from anynode.models.rules import Tail
from anynode.server.agents.agent import HistoryMessage
from anynode.server.engine.admission import (
    admitted_by,
    agent_history,
    appended_of,
    new_message_id,
    newest_of,
    question_of,
)
from anynode.server.errors import (
    ClientError,
    ConversationBusy,
    InvalidFrame,
    MessageIdTaken,
    MessageTooLarge,
    NotFound,
    RoleOrder,
)
from anynode.server.protocol.bodies import (
    AnyPostedMessage,
    AssistantMessage,
    NewCall,
    NewCalledFunction,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from anynode.server.protocol.frames import MessageSend, TurnRegenerate
from tests.kit.turns import AT, CONVERSATION, FIRST_SEQ, TURN, USER, turn_ref

CALLS = '[{"id":"1","function":{"name":"search","arguments":"{}"},"type":"function"}]'


def send(content: str = "hello", **fields: Any) -> MessageSend:
    return MessageSend("m-1", content, CONVERSATION, **fields)


# The question in a frame.


def test_a_question_has_new_ids_and_events_that_hold_them() -> None:
    before = datetime.now(UTC)
    question = question_of(USER, send(), message_bytes_max=100)
    other = question_of(USER, send(), message_bytes_max=100)
    ids = {id for each in (question, other) for id in (each.turn_id, each.message_id, each.new_conversation_id)}
    assert len(ids) == 6
    assert (question.user_id, question.conversation_id, question.client_message_id) == (USER, CONVERSATION, "m-1")
    assert before <= question.created_at <= datetime.now(UTC)
    assert json.loads(question.turn_started) == {"message_id": "m-1"}
    assert json.loads(question.message_created)["message"] == {
        "id": str(question.message_id),
        "role": "user",
        "content": "hello",
        "tool_calls": None,
        "tool_name": None,
        "tool_call_id": None,
        "status": "completed",
        "turn_id": str(question.turn_id),
        "created_at": question.created_at.isoformat().replace("+00:00", "Z"),
    }
    assert question.client_chat_id is None
    assert question_of(USER, send(), chat_id="chat-1", message_bytes_max=100).client_chat_id == "chat-1"


@pytest.mark.parametrize(
    ("content", "title"), [(" what \n is\tit? ", "what is it?"), ("x" * 200, "x" * 80), ("ab " * 40, ("ab " * 40)[:80])]
)
def test_the_title_of_a_new_conversation_is_the_beginning_of_its_question(content: str, title: str) -> None:
    assert question_of(USER, send(content), message_bytes_max=1000).title == title


@pytest.mark.parametrize("content", ["", " ", "\n\t", "\u00a0\u3000", "\ufeff"])
def test_a_question_of_nothing_is_refused(content: str) -> None:
    with pytest.raises(InvalidFrame, match="content is empty") as refused:
        question_of(USER, send(content), message_bytes_max=100)
    assert refused.value.conversation_id == CONVERSATION


def test_a_questions_bytes_of_utf_8_are_bounded() -> None:
    assert question_of(USER, send("ü" * 50), message_bytes_max=100).content == "ü" * 50
    with pytest.raises(MessageTooLarge, match="longer than 100 bytes") as refused:
        question_of(USER, send("ü" * 50 + "x"), message_bytes_max=100)
    assert refused.value.conversation_id == CONVERSATION


def test_an_id_for_a_message_is_never_the_same() -> None:
    assert new_message_id() != new_message_id()


# What became of it.


@pytest.mark.parametrize("first_seq", [FIRST_SEQ, None])
@pytest.mark.parametrize(("outcome", "is_new"), [("admitted", True), ("repeated", False)])
@pytest.mark.parametrize("frame", [send(), TurnRegenerate(CONVERSATION)])
def test_a_question_that_has_its_turn_is_admitted(
    frame: MessageSend | TurnRegenerate, outcome: str, is_new: bool, first_seq: int | None
) -> None:
    admitted = admitted_by(USER, Admission(outcome, CONVERSATION, TURN, first_seq), frame)
    assert (admitted.turn, admitted.is_new) == (turn_ref(first_seq), is_new)


@pytest.mark.parametrize("frame", [send(), TurnRegenerate(CONVERSATION)])
@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        ("not_found", NotFound, "There is no such conversation."),
        ("conversation_busy", ConversationBusy, "A turn is still running in this conversation."),
        ("not_last", RoleOrder, "Only the last question can be answered again."),
        ("message_id_taken", MessageIdTaken, "`message_id` names a message of another conversation."),
    ],
)
def test_every_other_outcome_is_an_error_with_the_conversation(
    frame: MessageSend | TurnRegenerate, outcome: str, kind: type[ClientError], message: str
) -> None:
    with pytest.raises(kind) as refused:
        admitted_by(USER, Admission(outcome, CONVERSATION, TURN), frame)
    assert (refused.value.message, refused.value.conversation_id) == (message, CONVERSATION)


@pytest.mark.parametrize(
    ("last_role", "message"),
    [
        ("user", "A user message cannot follow a user message; expected: assistant."),
        ("tool", "A user message cannot follow a tool message; expected: assistant or tool."),
        ("assistant", "A user message cannot follow an assistant message; expected: tool."),
    ],
)
def test_a_question_out_of_order_is_told_what_may_come(last_role: str, message: str) -> None:
    with pytest.raises(RoleOrder) as refused:
        admitted_by(USER, Admission("role_order", CONVERSATION, last_role=last_role), send())
    assert (refused.value.message, refused.value.conversation_id) == (message, CONVERSATION)


def test_without_a_question_none_can_be_answered_again() -> None:
    with pytest.raises(RoleOrder, match="There is no question to answer again") as refused:
        admitted_by(USER, Admission("role_order", CONVERSATION, last_role="assistant"), TurnRegenerate(CONVERSATION))
    assert refused.value.conversation_id == CONVERSATION


def test_an_outcome_that_nobody_knows_is_no_clients_fault() -> None:
    with pytest.raises(ValueError, match="an admission has the outcome 'queued'"):
        admitted_by(USER, Admission("queued", CONVERSATION, TURN), send())


# Messages that are appended.


def appended(*given: AnyPostedMessage, tail: Tail | None = None, bytes_max: tuple[int, int] = (100, 200)) -> Any:
    return appended_of(given, tail or Tail(), AT, message_bytes_max=bytes_max[0], answer_bytes_max=bytes_max[1])


def call(id: str, name: str = "search", arguments: str = "{}") -> NewCall:
    return NewCall(id, NewCalledFunction(name, arguments))


def test_a_whole_conversation_is_appended_in_order_as_rows_and_as_messages() -> None:
    given: list[AnyPostedMessage] = [
        SystemMessage("Be brief."),
        UserMessage([TextPart("a "), TextPart("b")]),
        AssistantMessage(None, [call("1")]),
        ToolMessage("1", "found"),
        AssistantMessage("done"),
    ]
    rows, messages = zip(*appended(*given), strict=True)
    assert [(row.role, row.content, row.tool_calls, row.tool_name, row.tool_call_id) for row in rows] == [
        ("system", "Be brief.", None, None, None),
        ("user", "a b", None, None, None),
        ("assistant", "", CALLS, None, None),
        ("tool", "found", None, "search", "1"),
        ("assistant", "done", None, None, None),
    ]
    assert len({row.id for row in rows}) == 5
    for row, message in zip(rows, messages, strict=True):
        assert (message.id, message.role, message.content) == (row.id, row.role, row.content)
        assert (message.tool_name, message.tool_call_id) == (row.tool_name, row.tool_call_id)
        assert (message.status, message.turn_id, message.created_at) == ("completed", None, AT)
        assert message.tool_calls == (None if row.tool_calls is None else json.loads(row.tool_calls))
        assert json.loads(row.payload)["message"]["id"] == str(row.id)


def test_a_result_takes_its_tools_name_from_the_call_unless_it_has_one() -> None:
    tail = Tail("assistant", {"1": "search", "2": "weather"})
    (first, _), (second, _) = appended(ToolMessage("1", "a", "other"), ToolMessage("2", "b"), tail=tail)
    assert (first.tool_name, second.tool_name) == ("other", "weather")


def test_messages_out_of_order_are_refused_with_the_place_of_the_first_one() -> None:
    with pytest.raises(RoleOrder, match=r"^messages\[1\]: A user message cannot follow a user message"):
        appended(UserMessage("a"), UserMessage("b"))
    with pytest.raises(RoleOrder, match=r"^A user message cannot follow a user message"):
        appended(UserMessage("b"), tail=Tail("user"))
    with pytest.raises(RoleOrder, match="No call 2 is pending; pending: 1"):
        appended(ToolMessage("2", "a"), tail=Tail("assistant", {"1": "search"}))


@pytest.mark.parametrize(
    ("before", "new", "bytes_max"),
    [
        ([], SystemMessage("ü" * 5), 10),
        ([], UserMessage([TextPart("ü" * 3), TextPart("ü" * 2)]), 10),
        ([UserMessage("a")], AssistantMessage("ü" * 10), 20),
        ([UserMessage("a")], AssistantMessage("", [call("1")]), len(CALLS)),
        ([UserMessage("a")], AssistantMessage("ü", [call("1")]), len(CALLS) + 2),
        ([UserMessage("a"), AssistantMessage(None, [call("1")])], ToolMessage("1", "ü" * 50), 100),
    ],
)
def test_a_message_may_be_as_long_as_one_of_its_role(
    before: Sequence[AnyPostedMessage], new: AnyPostedMessage, bytes_max: int
) -> None:
    spoken = isinstance(new, SystemMessage | UserMessage)
    bounds = (bytes_max, 1000) if spoken else (1000, bytes_max)
    shorter = (bytes_max - 1, 1000) if spoken else (1000, bytes_max - 1)
    assert len(appended(*before, new, bytes_max=bounds)) == len(before) + 1
    with pytest.raises(MessageTooLarge, match=rf"^messages\[{len(before)}\] is longer than {bytes_max - 1} bytes"):
        appended(*before, new, bytes_max=shorter)


# What the agent sees.


def test_the_agent_sees_the_system_prompt_and_the_conversation_from_a_question_on() -> None:
    stored = [
        StoredMessage("assistant", "cut off"),
        StoredMessage("user", "a"),
        StoredMessage("assistant", "", tool_calls=CALLS),
        StoredMessage("tool", "found", tool_name="search", tool_call_id="1"),
        StoredMessage("assistant", "b"),
        StoredMessage("user", "c"),
    ]
    assert agent_history(stored, "Be brief.") == [
        HistoryMessage("system", "Be brief."),
        HistoryMessage("user", "a"),
        HistoryMessage("assistant", "", json.loads(CALLS)),
        HistoryMessage("tool", "found", None, "search", "1"),
        HistoryMessage("assistant", "b"),
        HistoryMessage("user", "c"),
    ]


@pytest.mark.parametrize("system_prompt", [None, ""])
def test_without_a_system_prompt_there_is_none(system_prompt: str | None) -> None:
    assert agent_history([StoredMessage("user", "a")], system_prompt) == [HistoryMessage("user", "a")]


def test_an_answer_that_was_superseded_and_a_turn_that_said_nothing_are_not_seen() -> None:
    stored = [
        StoredMessage("user", "a"),
        StoredMessage("assistant", "old", status="superseded"),
        StoredMessage("assistant", "new"),
        StoredMessage("user", "unheard", turn_id=TURN),
        StoredMessage("assistant", "", status="failed", turn_id=TURN),
        StoredMessage("user", "b"),
    ]
    shown = [message.content for message in agent_history(stored, None)]
    assert shown == ["a", "new", "b"]


@pytest.mark.parametrize(
    ("roles", "messages_max", "newest", "is_cut"),
    [
        ("uau", 3, "uau", False),
        ("uauau", 3, "uau", True),
        ("suau", 3, "uau", False),  # the system prompt is given all the same
        ("suauau", 3, "uau", True),
        ("", 3, "", False),
    ],
)
def test_a_history_is_cut_where_other_messages_than_the_system_prompt_are_left_out(
    roles: str, messages_max: int, newest: str, is_cut: bool
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    stored = [StoredMessage(names[role], "") for role in roles]
    assert newest_of(stored, messages_max) == ([StoredMessage(names[role], "") for role in newest], is_cut)
