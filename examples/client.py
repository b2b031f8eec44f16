"""Ask over Anynode's own protocol, and print the answer as it comes, through any number of reconnects.

pip install websockets
ANYNODE_TOKEN=… python client.py "Why is the sky blue?"
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

URL = os.environ.get("ANYNODE_URL", "http://127.0.0.1:8000").replace("http", "ws", 1) + "/ws"
ENDINGS = ("turn.completed", "turn.cancelled", "turn.failed")


class Refused(Exception):
    """The server refused the request, and would refuse it again."""


async def ask(question: str, token: str) -> None:
    """Print the answer to a question, in a new conversation. Raises Refused."""
    # The same message_id is the same message, however often it is sent.
    request = {"type": "message.send", "message_id": str(uuid.uuid4()), "content": question}
    headers = {"Authorization": f"Bearer {token}"}
    shown = ""
    # Connects again, with back-off, whenever the connection has broken. Frames have no limit.
    connections = connect(URL, subprotocols=[Subprotocol("anynode.v1")], additional_headers=headers, max_size=None)
    async for socket in connections:
        try:
            await socket.send(json.dumps(request))
            async for text in socket:
                frame = json.loads(text)
                if frame["type"] == "error" and not frame["retryable"]:
                    raise Refused(frame["message"])
                if frame["type"] in ("goaway", "error"):  # this node cannot now
                    await asyncio.sleep(1 if frame["type"] == "error" else 0)
                    await socket.close()
                if "seq" not in frame:
                    continue
                # From here on, on whatever node.
                about, after = frame["conversation_id"], frame["seq"]
                request = {"type": "conversation.follow", "conversation_id": about, "after": after}
                now = text_after(shown, frame)
                print(now.removeprefix(shown) if now.startswith(shown) else "\n" + now, end="", flush=True)
                shown = now
                if frame["type"] in ENDINGS or (frame["type"] == "conversation.snapshot" and frame["turn"] is None):
                    print()
                    return
        except ConnectionClosed as closed:
            if closed.rcvd is not None and closed.rcvd.code in (3000, 3003):
                raise Refused(closed.rcvd.reason) from None


def text_after(shown: str, frame: dict[str, Any]) -> str:
    """Return the text of the answer with this frame."""
    match frame["type"]:
        case "turn.delta":
            return shown + str(frame["text"])
        case "turn.restarted":  # what was said may be void
            return str(frame["text"])
        case "conversation.snapshot":  # it is so long ago that its events are gone
            return str((frame["turn"] or {"text": frame["messages"][-1]["content"]})["text"])
        case _:
            return shown


if __name__ == "__main__":
    try:
        asyncio.run(ask(sys.argv[1], os.environ["ANYNODE_TOKEN"]))
    except Refused as refused:
        sys.exit(str(refused))
