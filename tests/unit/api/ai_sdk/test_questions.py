"""What the AI SDK's requests ask of a node: a question, or an answer to the last one again."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
import pytest
from msgspec import Raw

from anynode.models.client_chats import Chat, Sent
from anynode.server.api.ai_sdk.questions import ask
from anynode.server.api.ai_sdk.wire import ChatRequest
from anynode.server.engine.admission import Admitted
from anynode.server.errors import ConversationBusy, InvalidFrame, RoleOrder
from anynode.server.limits import UserLimits
from anynode.server.protocol.frames import MessageSend, TurnRegenerate
from tests.kit.turns import CONVERSATION, OTHER_TURN, USER, node_with, turn_ref

OURS = "0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c77"  # an id that this server gave
OTHER_CONVERSATION = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c99")
CHANGED = "A message that was sent cannot be changed: send another one."
LIMITS = UserLimits(turns=3)
NOT_LAST = "Only the last question can be answered again."


class Asked:
    """A node that keeps what it is asked, and knows one chat and what was sent in it."""

    def __init__(self, sent: Sent | None = None, *, is_new: bool = True, has_chat: bool = True) -> None:
        self.sent = sent
        self.is_new = is_new
        self.has_chat = has_chat
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.conversations = self
        self.node = node_with(conversations=self, send=self.send, regenerate=self.regenerate)

    async def find_sent(self, user_id: str, client_message_id: str) -> Sent | None:
        self.asked.append(("find_sent", user_id, client_message_id))
        return self.sent

    async def find_chat(self, user_id: str, client_chat_id: str) -> Chat | None:
        assert (user_id, client_chat_id) == (USER, "chat-1")
        return Chat(CONVERSATION, turn_ref()) if self.has_chat else None

    async def send(self, user_id: str, frame: MessageSend, **options: Any) -> Admitted:
        return self._admit("send", user_id, frame, options)

    async def regenerate(self, user_id: str, frame: TurnRegenerate, **options: Any) -> Admitted:
        return self._admit("regenerate", user_id, frame, options)

    def _admit(self, *asked: Any) -> Admitted:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return Admitted(turn_ref(), self.is_new)

    @property
    def admissions(self) -> list[tuple[Any, ...]]:
        return [asked for asked in self.asked if asked[0] != "find_sent"]


def request(text: str = "hello", *, id: str = "m-1", role: str = "user", **fields: Any) -> ChatRequest:
    older = {"id": "m-0", "role": "user", "parts": [{"type": "text", "text": "older"}]}
    message = {"id": id, "role": role, "parts": [{"type": "text", "text": text}]}
    return ChatRequest("chat-1", [Raw(msgspec.json.encode(each)) for each in (older, message)], **fields)


def sent(content: str = "hello", **fields: Any) -> Sent:
    known = {"conversation_id": CONVERSATION, "is_appended": False, "is_last": True, **fields}
    return Sent(content=content, **known)


def sending(content: str = "hello", id: str = "m-1", if_busy: Any = "reject", wait_for: Any = None) -> Any:
    frame = MessageSend(id, content, if_busy=if_busy)
    return ("send", USER, frame, {"client_chat_id": "chat-1", "wait_for": wait_for, "limits": LIMITS})


def regenerating(id: str = "m-1", *, interrupts: bool = False, wait_for: Any = None) -> Any:
    options = {"interrupts": interrupts, "wait_for": wait_for, "limits": LIMITS}
    return ("regenerate", USER, TurnRegenerate(CONVERSATION, id), options)


async def test_a_question_is_sent_in_its_chat_without_a_look_at_what_was_sent() -> None:
    asked = Asked()
    admitted = await ask(asked.node, USER, LIMITS, request())
    assert (admitted.turn, admitted.is_new) == (turn_ref(), True)
    assert asked.asked == [sending()]


async def test_a_question_may_interrupt_and_waits_for_the_turn_that_its_client_has_stopped() -> None:
    asked = Asked()
    await ask(asked.node, USER, LIMITS, request(if_busy="interrupt"), wait_for=turn_ref(turn_id=OTHER_TURN))
    assert asked.asked == [sending(if_busy="interrupt", wait_for=OTHER_TURN)]


async def test_a_question_that_is_repeated_has_its_turn_if_it_says_the_same() -> None:
    asked = Asked(sent(), is_new=False)
    assert not (await ask(asked.node, USER, LIMITS, request())).is_new
    changed = Asked(sent("another text"), is_new=False)
    with pytest.raises(RoleOrder) as refused:
        await ask(changed.node, USER, LIMITS, request())
    assert refused.value.message == CHANGED


async def test_what_is_no_users_question_asks_nothing() -> None:
    asked = Asked()
    with pytest.raises(InvalidFrame):
        await ask(asked.node, USER, LIMITS, request(role="assistant"))
    assert asked.asked == []


async def test_what_the_node_refuses_is_refused() -> None:
    asked = Asked()
    asked.error = ConversationBusy()
    with pytest.raises(ConversationBusy):
        await ask(asked.node, USER, LIMITS, request())


# Answering again.


async def test_the_last_question_is_answered_again() -> None:
    asked = Asked(sent())
    await ask(asked.node, USER, LIMITS, request(trigger="regenerate-message"))
    assert asked.admissions == [regenerating()]


async def test_answering_again_may_interrupt_and_wait() -> None:
    asked = Asked(sent())
    again = request(trigger="regenerate-message", if_busy="interrupt")
    await ask(asked.node, USER, LIMITS, again, wait_for=turn_ref(turn_id=OTHER_TURN))
    assert asked.admissions == [regenerating(interrupts=True, wait_for=OTHER_TURN)]


async def test_a_question_that_was_never_heard_is_asked_instead_of_answered_again() -> None:
    asked = Asked(None)
    await ask(asked.node, USER, LIMITS, request(trigger="regenerate-message"))
    assert asked.admissions == [sending()]


async def test_a_question_whose_chat_is_not_there_is_asked() -> None:
    asked = Asked(sent(), has_chat=False)
    await ask(asked.node, USER, LIMITS, request(trigger="regenerate-message"))
    assert asked.admissions == [sending()]


@pytest.mark.parametrize("known", [{"is_last": False}, {"conversation_id": OTHER_CONVERSATION}])
async def test_only_the_last_question_of_its_own_chat_is_answered_again(known: dict[str, Any]) -> None:
    asked = Asked(sent(**known))
    with pytest.raises(RoleOrder) as refused:
        await ask(asked.node, USER, LIMITS, request(trigger="regenerate-message"))
    assert refused.value.message == NOT_LAST
    assert asked.admissions == []


async def test_a_question_that_was_changed_is_not_answered_again() -> None:
    asked = Asked(sent("another text"))
    with pytest.raises(RoleOrder) as refused:
        await ask(asked.node, USER, LIMITS, request(trigger="regenerate-message"))
    assert refused.value.message == CHANGED
    assert asked.admissions == []


# Messages that were appended over HTTP, whose ids are ours.


async def test_a_message_that_was_appended_and_never_answered_is_answered_now() -> None:
    asked = Asked(sent(is_appended=True))
    await ask(asked.node, USER, LIMITS, request(id=OURS))
    assert asked.admissions == [regenerating(OURS)]


async def test_a_message_whose_clients_id_looks_like_ours_is_sent() -> None:
    for known in (None, sent()):
        asked = Asked(known)
        await ask(asked.node, USER, LIMITS, request(id=OURS))
        assert asked.admissions == [sending(id=OURS)]


async def test_a_message_that_was_appended_cannot_be_changed() -> None:
    asked = Asked(sent("another text", is_appended=True))
    with pytest.raises(RoleOrder) as refused:
        await ask(asked.node, USER, LIMITS, request(id=OURS))
    assert refused.value.message == CHANGED
    assert asked.admissions == []
