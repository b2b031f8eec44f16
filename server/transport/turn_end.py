"""How a turn ends, for those who ask once and wait: its end is followed like anybody's, then read from Postgres."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from anynode.models.conversations import Admission
from anynode.models.database import Database
from anynode.models.rules import FAILED
from anynode.models.turns import read_turn
from anynode.server.engine.node import Node
from anynode.server.errors import AgentFailed, ConversationBusy, Draining, NotFound
from anynode.server.protocol.bodies import Answer, StoredTurn
from anynode.server.protocol.encoding import message_of, usage_of
from anynode.server.protocol.frames import ErrorDetail, Message
from anynode.server.transport.cut_short import LAST_WORDS_SECONDS, CutShort, until
from anynode.server.transport.turn_events import JournalGone, events_of_turn

_ERROR = msgspec.json.Decoder(ErrorDetail)


async def answer_of(node: Node, database: Database, user_id: str, admission: Admission) -> Answer:
    """What an admitted turn says, once it has ended. Raises AgentFailed where it has failed, Draining where this node
    goes down first, NotFound where the conversation is deleted, or Unavailable."""
    assert admission.turn_id is not None
    turn_id, conversation_id = admission.turn_id, admission.conversation_id
    if admission.first_seq is not None:
        ending = end_of_turn(node, user_id, conversation_id, turn_id, admission.first_seq)
        try:
            # It may be that this very end has let the drain be over.
            await until(ending, node.drained.wait(), grace_seconds=LAST_WORDS_SECONDS)
        except CutShort:
            raise Draining(
                "This node is shutting down, the turn goes on: send again with the same message_id."
            ) from None
    turn = await stored_turn(database, user_id, conversation_id, turn_id)
    if turn.status == FAILED:
        raise AgentFailed(turn.error.message if turn.error else None)
    if not turn.messages:
        raise ConversationBusy  # its end was lost with a failover: it runs again
    message = turn.messages[-1]
    calls: list[Any] = [call for said in turn.messages for call in said.tool_calls or ()]
    return Answer(conversation_id, message.content, calls, turn_id, message, turn.usage)


async def end_of_turn(node: Node, user_id: str, conversation_id: UUID, turn_id: UUID, first_seq: int) -> None:
    """Wait for it, also while Postgres is away. Raises NotFound where the conversation is deleted meanwhile."""
    try:
        async with aclosing(events_of_turn(node.follows, user_id, conversation_id, turn_id, first_seq)) as batches:
            async for _ in batches:
                pass
    except JournalGone:
        pass


async def stored_turn(database: Database, user_id: str, conversation_id: UUID, turn_id: UUID) -> StoredTurn:
    """A turn as the database has it. Raises NotFound or Unavailable."""
    rows = await read_turn(database, user_id, conversation_id, turn_id)
    if rows is None:
        raise NotFound("There is no such turn.")
    row = rows[0]
    return StoredTurn(
        conversation_id=conversation_id,
        turn_id=turn_id,
        status=row["status"],
        usage=usage_of(row["usage"]),
        error=None if row["error"] is None else _ERROR.decode(row["error"]),
        created_at=row["started_at"],
        finished_at=row["finished_at"],
        messages=_messages(rows, turn_id),
    )


def _messages(rows: Sequence[asyncpg.Record], turn_id: UUID) -> list[Message]:
    found = []
    for row in rows:
        if row["id"] is not None:
            found.append(message_of({**row, "status": row["message_status"], "turn_id": turn_id}))
    return found
