"""Which turns the client of a connection has stopped: decisions alone, which are given the time. No I/O.

The AI SDK has one word, `abort`, for two things. A person who presses stop aborts the request that shows a turn. A
client that resumes a turn which it already shows aborts the older request for the newer one. So the abort of a
resumed request stops its turn only after STOP_SECONDS, and not if the chat is resumed by then:

| in a chat | while nothing is pending | while a stop of turn P is pending |
|---|---|---|
| a request that sent a question is aborted | its turn is stopped now | its turn is stopped now, P stays pending |
| a request that resumed P is aborted | a stop of P is pending | the stop of P is pending from now on |
| a request that resumed another turn is aborted | a stop of that turn is pending | P now, that turn is pending |
| the chat is resumed | - | P is not stopped |
| a question is sent, or something newer is waited for | - | P is stopped now |
| STOP_SECONDS have passed, or the connection ends | - | P is stopped now |
| a question is admitted that was aborted while it waited | its turn is stopped now | its turn is stopped now |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from anynode.server.engine.turn_reader import TurnRef

STOP_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Pending:
    turn: TurnRef
    at: float


class Stops:
    """The stops of one connection. What is returned is to be stopped now."""

    def __init__(self, *, remembered_max: int) -> None:
        self._remembered_max = remembered_max
        self._pending: dict[str, _Pending] = {}  # by the chat's id
        self._stopped: dict[str, TurnRef] = {}  # by the chat's id: turns that were stopped, and may still run
        self._asking: dict[str, bool] = {}  # by requestId: questions that may wait, and whether they were aborted

    @property
    def asking(self) -> int:
        """How many questions may be waiting to be admitted."""
        return len(self._asking)

    @property
    def next_at(self) -> float | None:
        """When the next pending stop is due, None where none is pending."""
        return min((pending.at for pending in self._pending.values()), default=None)

    def stopped_in(self, chat_id: str) -> TurnRef | None:
        """Return the turn that was stopped last in a chat, while it may still run."""
        return self._stopped.get(chat_id)

    def ask(self, request_id: str) -> None:
        """A question may have to wait before it is admitted."""
        self._asking[request_id] = False

    def end_asking(self, request_id: str) -> None:
        """The question is admitted or refused."""
        self._asking.pop(request_id, None)

    def admit(self, request_id: str, chat_id: str, turn: TurnRef, waited_for: TurnRef | None) -> TurnRef | None:
        """A question of a request has its turn; `waited_for` is the stopped turn whose end it has waited for."""
        if self._stopped.get(chat_id) == waited_for:
            self._stopped.pop(chat_id, None)
        return self._stop(chat_id, turn) if self._asking.get(request_id) else None

    def abort_asking(self, request_id: str) -> None:
        """A request is aborted: if its question still waits, its turn is stopped as soon as it is admitted."""
        if request_id in self._asking:
            self._asking[request_id] = True

    def abort(self, chat_id: str, turn: TurnRef, now: float, *, is_resumed: bool) -> TurnRef | None:
        """A request that shows a turn is aborted."""
        if not is_resumed:
            return self._stop(chat_id, turn)
        pending = self._pending.get(chat_id)
        self._pending[chat_id] = _Pending(turn, now + STOP_SECONDS)
        if pending is not None and pending.turn.turn_id != turn.turn_id:
            return self._stop(chat_id, pending.turn)
        return None

    def resume(self, chat_id: str) -> None:
        """The chat is resumed."""
        self._pending.pop(chat_id, None)

    def settle(self, chat_id: str) -> TurnRef | None:
        """A question is sent in the chat, or something newer is waited for."""
        pending = self._pending.pop(chat_id, None)
        return None if pending is None else self._stop(chat_id, pending.turn)

    def due(self, now: float) -> list[TurnRef]:
        """Time has passed."""
        return self._settle_where(lambda pending: pending.at <= now)

    def end(self) -> list[TurnRef]:
        """The connection ends."""
        return self._settle_where(lambda pending: True)

    def _settle_where(self, is_due: Callable[[_Pending], bool]) -> list[TurnRef]:
        due = [chat_id for chat_id, pending in self._pending.items() if is_due(pending)]
        return [turn for chat_id in due if (turn := self.settle(chat_id)) is not None]

    def _stop(self, chat_id: str, turn: TurnRef) -> TurnRef:
        if len(self._stopped) >= self._remembered_max:  # of chats that nothing was sent to since
            self._stopped.clear()
        self._stopped[chat_id] = turn
        return turn
