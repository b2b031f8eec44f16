"""Admission: what a client asks for as the database takes it, and the database's answer as a turn or an error. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypedDict

import msgspec

from anynode.models.admissions import Admission, Question, StoredMessage
from anynode.models.ids import uuid7
from anynode.models.messages import AppendedMessage
from anynode.models.rules import OutOfOrder, Tail, refused_user, visible
from anynode.models.turns import TurnRef
from anynode.server.agents.agent import HistoryMessage
from anynode.server.errors import ConversationBusy, InvalidFrame, MessageIdTaken, MessageTooLarge, NotFound, RoleOrder
from anynode.server.protocol.bodies import AnyPostedMessage, AssistantMessage, TextPart, ToolMessage
from anynode.server.protocol.encoding import encode, tool_calls_of
from anynode.server.protocol.frames import NOT_BLANK, Message, MessageSend, TurnRegenerate

TITLE_LENGTH: Final = 80


class AdmissionTerms(TypedDict):
    """What every admission by this node has in common."""

    node: str
    lease_seconds: float
    history_messages_max: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """The turn that answers a question; `is_new` is false where the question was repeated, and had its turn already."""

    turn: TurnRef
    is_new: bool


def new_message_id() -> str:
    """Return an id for a message whose client has given none."""
    return str(uuid7())


def question_of(user_id: str, frame: MessageSend, *, chat_id: str | None = None, message_bytes_max: int) -> Question:
    """Return the question in a frame, with the ids that it will have. Raises InvalidFrame or MessageTooLarge.

    `chat_id` is a client's own id of the conversation.
    """
    if NOT_BLANK.search(frame.content) is None:
        raise InvalidFrame("content is empty", conversation_id=frame.conversation_id)
    if len(frame.content.encode()) > message_bytes_max:
        raise MessageTooLarge(
            f"The message is longer than {message_bytes_max} bytes.", conversation_id=frame.conversation_id
        )
    turn_id, message_id, now = uuid7(), uuid7(), datetime.now(UTC)
    message = Message(message_id, "user", frame.content, None, None, None, "completed", turn_id, now)
    return Question(
        user_id=user_id,
        conversation_id=frame.conversation_id,
        new_conversation_id=uuid7(),
        title=" ".join(frame.content.split())[:TITLE_LENGTH],
        message_id=message_id,
        client_message_id=frame.message_id,
        content=frame.content,
        created_at=now,
        turn_id=turn_id,
        message_created=encode({"message": message}),
        turn_started=encode({"message_id": frame.message_id}),
        client_chat_id=chat_id,
    )


def appended_of(
    given: Sequence[AnyPostedMessage],
    tail: Tail,
    created_at: datetime,
    *,
    message_bytes_max: int,
    answer_bytes_max: int,
) -> list[tuple[AppendedMessage, Message]]:
    """Return messages that come after `tail`, as the database takes them and as people see them. Raises RoleOrder or
    MessageTooLarge."""
    appended = []
    for number, new in enumerate(given):
        role = str(type(new).__struct_config__.tag)
        content = _text_of(new.content)
        calls = list(new.tool_calls or ()) if isinstance(new, AssistantMessage) else []
        tool_calls = encode(calls) if calls else None
        tool_name = tool_call_id = None
        if isinstance(new, ToolMessage):
            tool_call_id = new.tool_call_id
            tool_name = new.tool_name or tail.pending.get(tool_call_id)
        bytes_max = message_bytes_max if role in ("system", "user") else answer_bytes_max
        if len(content.encode()) + len((tool_calls or "").encode()) > bytes_max:
            raise MessageTooLarge(f"messages[{number}] is longer than {bytes_max} bytes.")
        try:
            tail = tail.followed_by(
                role, calls=[(call.id, call.function.name) for call in calls], tool_call_id=tool_call_id
            )
        except OutOfOrder as error:
            place = f"messages[{number}]: " if len(given) > 1 else ""
            raise RoleOrder(f"{place}{error}") from error
        message = Message(
            uuid7(),
            role,
            content,
            msgspec.to_builtins(calls) or None,
            tool_name,
            tool_call_id,
            "completed",
            None,
            created_at,
        )
        payload = encode({"message": message})
        row = AppendedMessage(
            id=message.id,
            role=role,
            content=content,
            tool_calls=tool_calls,
            tool_name=tool_name,
            tool_call_id=tool_call_id,
            payload=payload,
        )
        appended.append((row, message))
    return appended


def _text_of(content: str | Sequence[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


def admitted_by(user_id: str, admission: Admission, frame: MessageSend | TurnRegenerate) -> Admitted:
    """Return the turn of an admission, or raise the ClientError that its outcome is."""
    conversation_id = frame.conversation_id
    match admission.outcome:
        case "admitted" | "repeated":
            assert admission.turn_id is not None
            turn = TurnRef(user_id, admission.conversation_id, admission.turn_id, admission.first_seq)
            return Admitted(turn, is_new=admission.outcome == "admitted")
        case "not_found":
            raise NotFound(conversation_id=conversation_id)
        case "conversation_busy":
            raise ConversationBusy(conversation_id=conversation_id)
        case "role_order" if isinstance(frame, TurnRegenerate):
            raise RoleOrder("There is no question to answer again.", conversation_id=conversation_id)
        case "answered":
            raise RoleOrder(
                "The last message is not a question without an answer; send content to ask one.",
                conversation_id=conversation_id,
            )
        case "not_last":
            raise RoleOrder("Only the last question can be answered again.", conversation_id=conversation_id)
        case "role_order":
            raise RoleOrder(refused_user(admission.last_role), conversation_id=conversation_id)
        case "message_id_taken":
            raise MessageIdTaken(conversation_id=conversation_id)
        case outcome:
            raise ValueError(f"an admission has the outcome {outcome!r}")


def newest_of(stored: Sequence[StoredMessage], messages_max: int) -> tuple[Sequence[StoredMessage], bool]:
    """Return the newest `messages_max` of messages (oldest first), and whether that leaves others out.

    A system message that begins the conversation does not count as left out: it is the system prompt.
    """
    left_out = stored[: max(0, len(stored) - messages_max)]
    return stored[len(left_out) :], any(message.role != "system" for message in left_out)


def agent_history(stored: Sequence[StoredMessage], system_prompt: str | None) -> list[HistoryMessage]:
    """Return what the agent sees of a conversation's newest messages, the system prompt first."""
    history = [HistoryMessage("system", system_prompt)] if system_prompt else []
    for message in visible(stored):
        if message.tool_calls is None and message.tool_call_id is None:
            history.append(HistoryMessage(message.role, message.content))
        else:
            calls = tool_calls_of(message.tool_calls)
            history.append(
                HistoryMessage(message.role, message.content, calls, message.tool_name, message.tool_call_id)
            )
    return history
