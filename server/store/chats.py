"""Turns that run in the application's own process, in the journal like those of any node.

A `Store` has a node of its own, which serves no clients (`Node` without an agent). Its turns have leases and epochs as
all turns have; the owner's name begins with `store:`. The agent of such a turn is a function in this process. So nobody
but a caller who brings the same agent can go on with it, and this is what happens when the process dies:

    who comes                                     while the lease holds     once it has run out
    a node, at its beat                           leaves the turn alone     ends it: failed, with what it has said
    the process itself, after a pause             -                         takes it over, and goes on with its agent
    `chat` with the same message_id               waits for the turn        takes it over, and goes on with its agent
    `chat` with another message                   ConversationBusy          ends it: failed; then asks its own question
    `chat`, and the turn has ended by then        -                         returns the stored answer, or asks

All of them change the turn under its lock and under the next epoch (`anynode_take_over`). So one of them wins, and a
process that was only paused finds its writes refused.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, TypedDict
from uuid import UUID

import msgspec

from anynode.models.turns import TurnRef
from anynode.server.agents.agent import Agent
from anynode.server.engine.admission import Admitted
from anynode.server.engine.node import Node
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, InternalError
from anynode.server.protocol.frames import MessageSend
from anynode.server.transport.turn_end import answer_of

logger = logging.getLogger("anynode.store")

END_SECONDS: Final = 5.0  # how long `close` waits for the ends of the turns that it stops
BUSY_SECONDS: Final = 5.0  # how long a question waits for the end of a turn whose process has died
BUSY_POLL_SECONDS: Final = 0.05
LAPSED_POLL_SECONDS: Final = 1.0


class ChatAnswer(TypedDict):
    """The answer of `Store.chat`: its text, and all calls of the turn as the chat completions API has them."""

    conversation_id: UUID
    response: str
    tool_calls: list[dict[str, Any]]


class Chats:
    """The turns of one store. The node begins to run with the first of them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop the turns that still run, which keeps what they have said."""
        if self._running is not None:
            self._node.cancel_here()
            await self._node.wait_ended(END_SECONDS)
            self._running.cancel()
            await asyncio.wait((self._running,))

    async def ask(self, user_id: str, question: MessageSend, agent: Agent) -> ChatAnswer:
        """Admit a question, and return the answer once its turn has ended, wherever that is. Raises ClientError."""
        self._run_node()
        admitted = await self._admit(user_id, question, agent)
        turn = admitted.turn
        # Its process may have died, or this one may lose it; then its lease runs out while the end is waited for.
        going_on = asyncio.create_task(self._go_on(turn, agent))
        try:
            ended = await answer_of(self._node, turn)
        except asyncio.CancelledError:
            self._node.cancel_here(turn.turn_id)
            raise
        finally:
            going_on.cancel()
        return {
            "conversation_id": ended.conversation_id,
            "response": ended.response,
            "tool_calls": list(msgspec.to_builtins(ended.tool_calls)),
        }

    def _run_node(self) -> None:
        if self._running is None:
            self._running = asyncio.create_task(self._node.run())
        if self._running.done():
            raise InternalError("The store has failed and must be opened again; the log says why.")

    async def _admit(self, user_id: str, question: MessageSend, agent: Agent) -> Admitted:
        """Admit a question. A turn in its way whose process has died is ended first."""
        now = asyncio.get_running_loop().time
        give_up_at = now() + BUSY_SECONDS
        is_ending = False
        while True:
            # It is asked to the end even where the caller goes: what is admitted has to be run, or stopped.
            asking = asyncio.ensure_future(self._node.send(user_id, question, agent=agent))
            try:
                return await asyncio.shield(asking)
            except asyncio.CancelledError:
                asking.add_done_callback(self._stop_admitted)
                raise
            except ConversationBusy:
                if question.conversation_id is None or now() > give_up_at:
                    raise
                is_ending = is_ending or await self._node.take_over_turn(question.conversation_id, None)
                if not is_ending:
                    raise
            await asyncio.sleep(BUSY_POLL_SECONDS)

    def _stop_admitted(self, asking: asyncio.Future[Admitted]) -> None:
        if not asking.cancelled() and asking.exception() is None:
            self._node.cancel_here(asking.result().turn.turn_id)

    async def _go_on(self, turn: TurnRef, agent: Agent) -> None:
        """Go on with a turn that no process runs any more, as soon as its lease has run out."""
        while True:
            if not self._node.runs(turn.turn_id):
                try:
                    await self._node.take_over_turn(turn.conversation_id, agent)
                except DatabaseUnavailable as error:
                    logger.warning("turn %s waits for Postgres: %s", turn.turn_id, error.__cause__)
            await asyncio.sleep(LAPSED_POLL_SECONDS)
