"""What the AI SDK's requests ask of a node: a question, the last one again, the last answer."""

from __future__ import annotations

from uuid import UUID

from models.chats import Chat, find_chat, sent_content
from models.conversations import Admission
from models.database import Database, Unavailable
from server.ai_sdk.protocol import AnySend, UserMessage, question_in
from server.errors import DatabaseUnavailable, RoleOrder
from server.node import Node
from server.protocol import MessageSend, TurnRegenerate


async def ask(
    node: Node, database: Database, user_id: str, request: AnySend, *, stopped: UUID | None = None
) -> Admission:
    """Admit what a client has posted; `stopped` is a turn that it has stopped, and that may still be running. Raises
    ClientError."""
    question = question_in(request)
    is_again = request.trigger == "regenerate-message"
    # What was never heard, as a client cannot know whose connection broke, is asked now.
    if is_again and (sent := await _sent(database, user_id, question.id)) is not None:
        _check_text(question, sent)
        if (chat := await chat_of(database, user_id, request.id)) is not None:
            frame = TurnRegenerate(chat.conversation_id, question.id)
            return await node.regenerate(user_id, frame, interrupts=request.if_busy == "interrupt", stopped=stopped)
    message = MessageSend(question.id, question.text, if_busy=request.if_busy)
    admission = await node.send(user_id, message, chat_id=request.id, stopped=stopped)
    if admission.outcome == "repeated":
        _check_text(question, await _sent(database, user_id, question.id))
    return admission


async def chat_of(database: Database, user_id: str, chat_id: str) -> Chat | None:
    """The chat, None where there is none. Raises DatabaseUnavailable."""
    try:
        return await find_chat(database, user_id, chat_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error


def _check_text(question: UserMessage, sent: str | None) -> None:
    """A message comes again as it was, or it is another one under the same id, as when it is edited."""
    if question.text != sent:
        raise RoleOrder("A message that was sent cannot be changed: send another one.")


async def _sent(database: Database, user_id: str, message_id: str) -> str | None:
    try:
        return await sent_content(database, user_id, message_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error
