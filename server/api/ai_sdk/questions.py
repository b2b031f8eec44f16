"""What the AI SDK's requests ask of a node: a question, the last one again, the last answer."""

from __future__ import annotations

from uuid import UUID

from anynode.models.client_chats import Chat, Sent, find_chat, find_sent
from anynode.models.conversations import Admission
from anynode.models.database import Database, Unavailable
from anynode.models.ids import as_uuid
from anynode.server.api.ai_sdk.wire import AnySend, UserMessage, question_in
from anynode.server.engine.node import Node
from anynode.server.errors import DatabaseUnavailable, RoleOrder
from anynode.server.protocol.frames import MessageSend, TurnRegenerate


async def ask(
    node: Node, database: Database, user_id: str, request: AnySend, *, stopped: UUID | None = None
) -> Admission:
    """Admit what a client has posted; `stopped` is a turn that it has stopped, and that may still be running. Raises
    ClientError."""
    question = question_in(request)
    is_again = request.trigger == "regenerate-message"
    # Only the id of one that was appended here is a UUID of ours.
    sent = await _sent(database, user_id, question) if is_again or as_uuid(question.id) is not None else None
    # What was never heard, as a client cannot know whose connection broke, is asked now.
    if sent is not None and (is_again or sent.is_appended):
        chat = await chat_of(database, user_id, request.id)
        if chat is not None:
            if sent.conversation_id != chat.conversation_id or not sent.is_last:
                raise RoleOrder("Only the last question can be answered again.")
            frame = TurnRegenerate(chat.conversation_id, question.id)
            return await node.regenerate(user_id, frame, interrupts=request.if_busy == "interrupt", stopped=stopped)
    message = MessageSend(question.id, question.text, if_busy=request.if_busy)
    admission = await node.send(user_id, message, chat_id=request.id, stopped=stopped)
    if admission.outcome == "repeated":
        await _sent(database, user_id, question)
    return admission


async def chat_of(database: Database, user_id: str, chat_id: str) -> Chat | None:
    """The chat, None where there is none. Raises DatabaseUnavailable."""
    try:
        return await find_chat(database, user_id, chat_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error


async def _sent(database: Database, user_id: str, question: UserMessage) -> Sent | None:
    """What was sent under the question's id. Raises RoleOrder where it was another text, as when one is edited."""
    try:
        sent = await find_sent(database, user_id, question.id)
    except Unavailable as error:
        raise DatabaseUnavailable from error
    if sent is not None and sent.content != question.text:
        raise RoleOrder("A message that was sent cannot be changed: send another one.")
    return sent
