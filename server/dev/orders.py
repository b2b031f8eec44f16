"""The orders that the page of `anynode dev` may give: kill a node, or drain it.

A node writes each order as a line into a pipe, to the process that has started all nodes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from msgspec import Struct
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from anynode.server.auth import Authenticator, bearer_of
from anynode.server.errors import BodyTimeout, ClientError, InvalidFrame, MessageTooLarge, NotFound, Unauthorized
from anynode.server.protocol.bodies import Body
from anynode.server.protocol.decoding import decode_body
from anynode.server.transport.http import refusal, reply

logger = logging.getLogger("anynode.dev_orders")

BODY_BYTES_MAX: Final = 1024
BODY_SECONDS_MAX: Final = 5.0
NODE_ID: Final = re.compile(r"([A-Za-z0-9._-]{1,63})-[0-9a-f]{8}")

Action: TypeAlias = Literal["kill", "drain"]


class OrderBody(Body, frozen=True):
    """The body of an order: what to do with the node."""

    action: Action


class Order(Struct, frozen=True):
    """An action and the id of the node that it is for."""

    node_id: str
    action: Action

    @property
    def name(self) -> str:
        """The node's name, which stays when the node is restarted and its id changes."""
        return self.node_id.rpartition("-")[0]


class Orders:
    """The pipe to the process that runs the nodes with these names. Writing to it does not block."""

    def __init__(self, pipe: int, names: Sequence[str]) -> None:
        self._pipe = pipe
        self._names = frozenset(names)

    def knows(self, node_id: str) -> bool:
        """Return whether the id may be, or may have been, that of one of these nodes."""
        found = NODE_ID.fullmatch(node_id)
        return found is not None and found[1] in self._names

    def give(self, order: Order) -> None:
        """Write the order into the pipe."""
        try:
            os.write(self._pipe, f"{order.action} {order.node_id}\n".encode())  # short enough to go as a whole
        except OSError as error:  # nobody reads; without its parent this node ends too
            logger.warning("the order to %s %s is lost: %s", order.action, order.node_id, error)


def read_order(line: bytes) -> Order | None:
    """Return the order that a line of the pipe holds, or None if it holds none."""
    match line.decode(errors="replace").split():
        case [("kill" | "drain") as action, node_id]:
            return Order(node_id, action)
    return None


def order_routes(orders: Orders, authenticator: Authenticator) -> list[Route]:
    """Return the route `POST /dev/nodes/{node_id}`."""

    async def order(request: Request) -> Response:
        try:
            token = bearer_of(request.scope["headers"])
            if token is None:
                raise Unauthorized("There is no Authorization: Bearer header.")
            await authenticator.authenticate(token)
            node_id = request.path_params["node_id"]
            if not orders.knows(node_id):
                raise NotFound("There is no such node here.")
            body: OrderBody = decode_body(await _read(request), [OrderBody])
        except ClientError as error:
            return refusal(error)
        given = Order(node_id, body.action)
        answer = reply(given, 202)
        # After the answer is sent: the node that answers may be the one that is to be killed.
        answer.background = BackgroundTask(_give, orders, given)
        return answer

    return [Route("/dev/nodes/{node_id}", order, methods=["POST"])]


async def _give(orders: Orders, order: Order) -> None:
    orders.give(order)


async def _read(request: Request) -> bytes:
    """Return the whole body. Raises MessageTooLarge, BodyTimeout or InvalidFrame."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY_BYTES_MAX:
                    raise MessageTooLarge(f"The body is longer than {BODY_BYTES_MAX} bytes.")
    except ClientDisconnect:
        raise InvalidFrame("the body did not come whole") from None  # nobody hears it
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {BODY_SECONDS_MAX:g} seconds") from None
    return bytes(body)
