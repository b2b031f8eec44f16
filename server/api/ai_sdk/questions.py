"""What the AI SDK's requests ask of a node: a question, or an answer to the last one again."""

from __future__ import annotations

from anynode.models.ids import as_uuid
from anynode.server.api.ai_sdk.wire import AnySend, AskedMessage, question_in
from anynode.server.engine.admission import Admitted
from anynode.server.engine.conversations import Sent
from anynode.server.engine.node import Node
from anynode.server.engine.turn_reader import TurnRef
from anynode.server.errors import RoleOrder
from anynode.server.limits import UserLimits
from anynode.server.protocol.frames import MessageSend, TurnRegenerate


async def ask(
    node: Node, user_id: str, limits: UserLimits, request: AnySend, *, wait_for: TurnRef | None = None
) -> Admitted:
    """Admit what a client has posted, within the user's limits. `wait_for` is a turn that the client has stopped, and
    that may still be running. Raises ClientError."""
    question = question_in(request)
    waited_id = None if wait_for is None else wait_for.turn_id
    is_again = request.trigger == "regenerate-message"
    # Only the id of a message that was appended over HTTP is a UUID of ours.
    sent = await _sent(node, user_id, question) if is_again or as_uuid(question.id) is not None else None
    # A client whose connection broke cannot know whether a question was heard; one that was not is asked now.
    if sent is not None and (is_again or sent.is_appended):
        chat = await node.conversations.find_chat(user_id, request.id)
        if chat is not None:
            if sent.conversation_id != chat.conversation_id or not sent.is_last:
                raise RoleOrder("Only the last question can be answered again.")
            frame = TurnRegenerate(chat.conversation_id, question.id)
            interrupts = request.if_busy == "interrupt"
            return await node.regenerate(user_id, frame, interrupts=interrupts, wait_for=waited_id, limits=limits)
    message = MessageSend(question.id, question.text, if_busy=request.if_busy)
    admitted = await node.send(user_id, message, client_chat_id=request.id, wait_for=waited_id, limits=limits)
    if not admitted.is_new:
        await _sent(node, user_id, question)
    return admitted


async def _sent(node: Node, user_id: str, question: AskedMessage) -> Sent | None:
    """Return what was sent under the question's id. Raises RoleOrder where it was another text, as when one is
    edited."""
    sent = await node.conversations.find_sent(user_id, question.id)
    if sent is not None and sent.content != question.text:
        raise RoleOrder("A message that was sent cannot be changed: send another one.")
    return sent
