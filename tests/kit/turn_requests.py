"""What a client sends to have a turn stopped or run again."""

from __future__ import annotations

import uuid
from typing import Any

from tests.kit.harness import Frame, Socket


def cancel(conversation_id: str, **fields: Any) -> Frame:
    """Return the frame that stops a conversation's turn."""
    return {"type": "turn.cancel", "conversation_id": conversation_id, **fields}


def regenerate(conversation_id: str, **fields: Any) -> Frame:
    """Return the frame that asks for another answer to the last question."""
    return {"type": "turn.regenerate", "conversation_id": conversation_id, **fields}


async def interrupt(socket: Socket, conversation_id: str, content: str, message_id: str | None = None) -> str:
    """Send a message that stops the turn that runs; return its message_id."""
    message_id = message_id or str(uuid.uuid4())
    await socket.send(
        {
            "type": "message.send",
            "conversation_id": conversation_id,
            "message_id": message_id,
            "content": content,
            "if_busy": "interrupt",
        }
    )
    return message_id
