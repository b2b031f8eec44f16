"""Ask over Anynode's own protocol, and print the answer as it comes, through however many reconnects.

pip install websockets
ANYNODE_TOKEN=… python client.py "Why is the sky blue?"
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

URL = os.environ.get("ANYNODE_URL", "http://127.0.0.1:8000").replace("http", "ws", 1) + "/ws"
ENDINGS = ("turn.completed", "turn.cancelled", "turn.failed")


async def ask(question: str, token: str) -> None:
    """Print the answer to a question, in a new conversation."""
    # The same message_id is the same message, however often it is sent.
    request = {"type": "message.send", "message_id": str(uuid.uuid4()), "content": question}
    headers = {"Authorization": f"Bearer {token}"}
    shown = ""
    async for socket in connect(
        URL, subprotocols=[Subprotocol("anynode.v1")], additional_headers=headers
    ):  # and again, when it breaks
        try:
            await socket.send(json.dumps(request))
            async for text in socket:
                frame = json.loads(text)
                if frame["type"] == "goaway":
                    await socket.close()
                elif frame["type"] == "error":
                    raise SystemExit(frame["message"])
                elif frame["type"] == "turn.delta":
                    shown += frame["text"]
                    print(frame["text"], end="", flush=True)
                elif frame["type"] == "turn.restarted" and shown != frame["text"]:  # what was printed is void
                    shown = frame["text"]
                    print("\n" + shown, end="", flush=True)
                if "seq" in frame:  # from here on, on whatever node
                    request = {
                        "type": "conversation.follow",
                        "conversation_id": frame["conversation_id"],
                        "after": frame["seq"],
                    }
                if frame["type"] in ENDINGS:
                    print()
                    return
        except ConnectionClosed as closed:
            if closed.rcvd is not None and closed.rcvd.code >= 3000:  # the token is refused
                raise SystemExit(closed.rcvd.reason) from None


if __name__ == "__main__":
    asyncio.run(ask(sys.argv[1], os.environ["ANYNODE_TOKEN"]))
