"""Sockets of a special kind: several of one user over several nodes, and one that holds little unread."""

from __future__ import annotations

import socket as sockets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from websockets.asyncio.client import connect

from tests.kit.harness import NodeProcess, Socket, socket_to, token_for


@asynccontextmanager
async def sockets_to(nodes: Sequence[NodeProcess], user: str, count: int) -> AsyncIterator[list[Socket]]:
    """Open `count` connections of one user, spread over the nodes."""
    async with AsyncExitStack() as stack:
        sockets = [
            await stack.enter_async_context(socket_to(nodes[number % len(nodes)], user)) for number in range(count)
        ]
        yield sockets
        for socket in sockets:
            socket.drop()  # a closing handshake would wait behind what has not been read


async def narrow_socket(stack: AsyncExitStack, node: NodeProcess, user: str) -> Socket:
    """Open a connection whose buffers hold few frames that have not been received."""
    narrow = sockets.socket()
    narrow.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    narrow.connect(("127.0.0.1", node.port))
    headers = {"Authorization": f"Bearer {token_for(user)}"}
    connecting = connect(
        node.ws + "/ws", sock=narrow, additional_headers=headers, compression=None, max_size=None, max_queue=1
    )
    socket = Socket(await stack.enter_async_context(connecting))
    assert (await socket.receive())["type"] == "ready"
    return socket
