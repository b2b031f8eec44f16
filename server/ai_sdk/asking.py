"""What the AI SDK's requests ask of a node: a question, the last one again, the last answer."""

from __future__ import annotations

from models.chats import Chat, find_chat, sent_content
from models.conversations import Admission
from models.database import Database, Unavailable
from server.ai_sdk.protocol import AnySend, IfBusy, UserMessage, question_in
from server.errors import DatabaseUnavailable, NotFound, RoleOrder
from server.node import Node
from server.protocol import MessageSend, TurnRegenerate


async def ask(node: Node, database: Database, user_id: str, request: AnySend, *, interrupts: bool = False) -> Admission:
    """Admit what a client has posted. `interrupts`: it has stopped the turn that may still be running. Raises
    ClientError."""
    question = question_in(request)
    if_busy: IfBusy = "interrupt" if interrupts else request.if_busy
    if request.trigger == "regenerate-message" and (chat := await chat_of(database, user_id, request.id)) is not None:
        try:
            frame = TurnRegenerate(chat.conversation_id, question.id)
            return await node.regenerate(user_id, frame, interrupts=if_busy == "interrupt")
        except (NotFound, RoleOrder):
            # It was never heard, as a client cannot know whose connection broke: then it is asked now.
            if await _sent(database, user_id, question.id) is not None:
                raise
    message = MessageSend(question.id, question.text, if_busy=if_busy)
    admission = await node.send(user_id, message, chat_id=request.id)
    if admission.outcome == "repeated":
        await _check_repeated(database, user_id, request, question)
    return admission


async def chat_of(database: Database, user_id: str, chat_id: str) -> Chat | None:
    """The chat, None where there is none. Raises DatabaseUnavailable."""
    try:
        return await find_chat(database, user_id, chat_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error


async def _check_repeated(database: Database, user_id: str, request: AnySend, question: UserMessage) -> None:
    """A message is sent again as it was, or it is another one under the same id, as when it is edited."""
    if request.trigger == "regenerate-message":
        raise RoleOrder("Only the last question can be answered again.")
    if await _sent(database, user_id, question.id) != question.text:
        raise RoleOrder("A message that was sent cannot be changed: send another one.")


async def _sent(database: Database, user_id: str, message_id: str) -> str | None:
    try:
        return await sent_content(database, user_id, message_id)
    except Unavailable as error:
        raise DatabaseUnavailable from error
