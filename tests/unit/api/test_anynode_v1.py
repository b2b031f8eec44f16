"""Anynode's own wire over a fake socket: what each frame asks of the node, and what a follower is shown."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, cast
from uuid import UUID

import pytest
from starlette.types import Message

from anynode.models.conversations import Snapshot
from anynode.models.events import Event
from anynode.server.api import anynode_v1 as module
from anynode.server.api.anynode_v1 import AnynodeConnection
from anynode.server.auth import Authenticator, Identity
from anynode.server.engine.admission import Admitted
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, NotFound, Unauthorized
from anynode.server.limits import UserLimits
from anynode.server.protocol.frames import MessageSend, TurnRegenerate
from anynode.server.settings import Settings
from anynode.server.transport.shares import Shares
from tests.kit.asgi import Peer, connected, websocket_scope
from tests.kit.turns import CONVERSATION, STARTED, TURN, USER, journal, node_with, said, turn_ref

Update: TypeAlias = Sequence[Event] | Snapshot | Exception

ID = str(CONVERSATION)
OTHER = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c99")
READY = {"type": "ready", "user_id": USER, "node_id": "test-1", "protocol": "anynode.v1", "heartbeat_seconds": 10.0}

LIMITS = UserLimits(turns=3)


class Tokens:
    """Knows one user's tokens."""

    async def authenticate(self, token: str) -> Identity:
        if token != "good":
            raise Unauthorized("the token is malformed")
        return Identity(USER, 4e9, limits=LIMITS)


class Asked:
    """A node that keeps what it is asked; what it follows goes as the script of the conversation says, and then on."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.admitted = Admitted(turn_ref(), is_new=True)
        self.error: Exception | None = None
        self.scripts: dict[UUID, Sequence[Update]] = {}
        self.closed: list[UUID] = []
        self.node = node_with(follows=self, send=self.send, regenerate=self.regenerate, cancel=self.cancel)

    async def send(self, user_id: str, frame: MessageSend, *, limits: UserLimits) -> Admitted:
        assert limits == LIMITS
        return self._admit("send", user_id, frame)

    async def regenerate(self, user_id: str, frame: TurnRegenerate, *, limits: UserLimits) -> Admitted:
        assert limits == LIMITS
        return self._admit("regenerate", user_id, frame)

    async def cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> None:
        self.asked.append(("cancel", user_id, conversation_id, turn_id))

    async def keep_following(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool
    ) -> AsyncGenerator[Any, None]:
        self.asked.append(("follow", user_id, conversation_id, after, is_own))
        try:
            for update in self.scripts.get(conversation_id, ()):
                if isinstance(update, Exception) and not isinstance(update, DatabaseUnavailable):
                    raise update
                yield update
            await asyncio.Event().wait()
        finally:
            self.closed.append(conversation_id)

    def _admit(self, *asked: Any) -> Admitted:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error
        return self.admitted


def frame(type: str, **fields: Any) -> Message:
    return {"type": "websocket.receive", "text": json.dumps({"type": type, **fields})}


PING = frame("ping", request_id="last")
PONG = {"type": "pong", "request_id": "last"}
SEND = frame("message.send", message_id="m-1", content="hello", conversation_id=ID)


@asynccontextmanager
async def talking(asked: Asked, *said: Message, **settings: Any) -> AsyncIterator[tuple[Peer, AnynodeConnection]]:
    """A connection that has authenticated and obeyed these frames."""
    peer = Peer({"type": "websocket.connect"}, *said, PING)
    connection = AnynodeConnection(
        Settings(**settings),
        asked.node,
        cast(Authenticator, Tokens()),
        Shares(Settings(**settings)),
        websocket_scope(headers={"Authorization": "Bearer good"}),
        peer.receive,
        peer.send,
        refusal=None,
    )
    async with connected(peer, connection.run()):
        await peer.wait_sent(lambda sent: PONG in peer.frames or peer.closed is not None)
        yield peer, connection


async def told(asked: Asked, *said: Message, frames: int) -> list[Any]:
    """Return what a client that sends these frames is told besides `ready` and the last `pong`."""
    async with talking(asked, *said) as (peer, _):
        await peer.wait_sent(lambda sent: len(peer.frames) == frames + 2)
    assert peer.frames[0] == READY
    return [shown for shown in peer.frames[1:] if shown != PONG]


@pytest.fixture
def asked() -> Asked:
    return Asked()


# The handshake.


async def test_the_first_frame_is_auth(asked: Asked) -> None:
    first = [frame("ping", request_id="r-1"), frame("auth", token="good")]
    peer = Peer({"type": "websocket.connect"}, *first)
    authenticator, shares = cast(Authenticator, Tokens()), Shares(Settings())
    connection = AnynodeConnection(
        Settings(), asked.node, authenticator, shares, websocket_scope(), peer.receive, peer.send, refusal=None
    )
    async with connected(peer, connection.run()):
        await peer.wait_sent(lambda sent: len(peer.frames) == 2)
    refused, ready = peer.frames
    assert (refused["type"], refused["code"], refused["request_id"]) == ("error", "unauthorized", "r-1")
    assert ready == READY


async def test_a_newer_token_is_answered_with_ready(asked: Asked) -> None:
    assert await told(asked, frame("auth", token="good"), frames=1) == [READY]
    (refused,) = await told(asked, frame("auth", token="bad"), frames=1)
    assert (refused["type"], refused["code"]) == ("error", "unauthorized")


async def test_pings_are_answered(asked: Asked) -> None:
    assert await told(asked, frame("ping"), frames=1) == [{"type": "pong"}]


async def test_a_frame_that_is_none_is_refused_with_its_request_id(asked: Asked) -> None:
    (refused,) = await told(asked, frame("dance", request_id="r-1"), frames=1)
    assert (refused["type"], refused["code"], refused["request_id"]) == ("error", "invalid_frame", "r-1")


async def test_heartbeats_come_while_nothing_else_does(asked: Asked) -> None:
    async with talking(asked, heartbeat_seconds=0.002) as (peer, _):
        await peer.wait_sent(lambda sent: peer.frames[-1] == {"type": "heartbeat"})


async def test_a_node_that_goes_down_says_goaway(asked: Asked) -> None:
    async with talking(asked) as (peer, connection):
        connection.warn_of_drain(17.5)
        await peer.wait_sent(lambda sent: len(peer.frames) == 3)
        connection._warn_of_expiry(18.5)
        await peer.wait_sent(lambda sent: len(peer.frames) == 4)
    assert peer.frames[2:] == [
        {"type": "goaway", "reason": "restarting", "deadline": 17.5},
        {"type": "auth.expiring", "expires_at": 18.5},
    ]


# Following.


async def test_a_conversation_is_followed_from_a_cursor(asked: Asked) -> None:
    unavailable = DatabaseUnavailable(conversation_id=CONVERSATION)
    asked.scripts = {CONVERSATION: [journal(STARTED, said("a "), said("b")), unavailable, Snapshot(99, None, "", [])]}
    follow = frame("conversation.follow", conversation_id=ID, after=6, request_id="r-1")
    started, delta, error, snapshot = await told(asked, follow, frames=4)
    common = {"conversation_id": ID, "turn_id": str(TURN)}
    assert started == {"type": "turn.started", "seq": 7, "message_id": "m-1", **common}
    assert delta == {"type": "turn.delta", "seq": 9, "text": "a b", **common}
    assert (error["code"], error["request_id"], error["conversation_id"]) == ("database_unavailable", "r-1", ID)
    assert (snapshot["type"], snapshot["seq"], snapshot["turn"]) == ("conversation.snapshot", 99, None)
    assert asked.asked == [("follow", USER, CONVERSATION, 6, False)]
    assert asked.closed == [CONVERSATION]


async def test_a_conversation_that_is_not_the_users_is_refused_and_not_followed_any_more(asked: Asked) -> None:
    asked.scripts = {CONVERSATION: [NotFound(conversation_id=CONVERSATION)]}
    follow = frame("conversation.follow", conversation_id=ID, request_id="r-1")
    async with talking(asked, follow) as (peer, connection):
        await peer.wait_sent(lambda sent: len(peer.frames) == 3)
        (error,) = [shown for shown in peer.frames[1:] if shown != PONG]
        assert (error["code"], error["request_id"], error["conversation_id"]) == ("not_found", "r-1", ID)
        for _ in range(5):
            await asyncio.sleep(0)
        assert connection._follows == {}
    assert asked.asked == [("follow", USER, CONVERSATION, None, False)]


async def test_what_nobody_has_thought_of_closes_the_connection(asked: Asked, caplog: pytest.LogCaptureFixture) -> None:
    asked.scripts = {CONVERSATION: [KeyError("broken")]}
    with caplog.at_level(logging.ERROR):
        async with talking(asked, frame("conversation.follow", conversation_id=ID)) as (peer, _):
            await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed == (1011, "internal error")
    assert [record.getMessage() for record in caplog.records] == [f"showing conversation {ID} failed"]


async def test_a_conversation_that_is_followed_again_is_followed_once(asked: Asked) -> None:
    follows = [frame("conversation.follow", conversation_id=ID, after=after) for after in (6, 8)]
    asked.scripts = {CONVERSATION: [journal(STARTED)]}
    async with talking(asked, follows[0]) as (peer, connection):
        await peer.wait_sent(lambda sent: len(peer.frames) == 3)
        peer.say(follows[1])
        await peer.wait_sent(lambda sent: len(peer.frames) == 4)
        assert asked.closed == [CONVERSATION]
        assert list(connection._follows) == [CONVERSATION]
    assert asked.asked == [("follow", USER, CONVERSATION, after, False) for after in (6, 8)]


async def test_a_conversation_is_unfollowed(asked: Asked) -> None:
    asked.scripts = {CONVERSATION: [journal(STARTED)]}
    async with talking(asked, frame("conversation.follow", conversation_id=ID)) as (peer, connection):
        await peer.wait_sent(lambda sent: len(peer.frames) == 3)
        peer.say(frame("conversation.unfollow", conversation_id=ID))
        peer.say(frame("conversation.unfollow", conversation_id=str(OTHER)))
        await peer.wait_heard()
        assert asked.closed == [CONVERSATION]
        assert connection._follows == {}


async def test_a_connection_follows_a_bounded_number_of_conversations(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLLOWS_MAX", 1)
    first = frame("conversation.follow", conversation_id=ID)
    others = [
        frame("conversation.follow", conversation_id=str(OTHER)),
        frame("message.send", message_id="m-1", content="hello"),
        frame("turn.regenerate", conversation_id=str(OTHER)),
    ]
    refused = await told(asked, first, *others, first, SEND, frames=3)
    assert [error["code"] for error in refused] == ["rate_limited"] * 3
    assert [name for name, *_ in asked.asked if name != "follow"] == ["send"]


# Asking.


async def test_a_message_is_sent_and_its_turn_is_followed_as_the_users_own(asked: Asked) -> None:
    asked.scripts = {CONVERSATION: [journal(STARTED)]}
    (started,) = await told(asked, SEND, frames=1)
    assert started["type"] == "turn.started"
    assert asked.asked == [
        ("send", USER, MessageSend("m-1", "hello", CONVERSATION)),
        ("follow", USER, CONVERSATION, 6, True),
    ]


async def test_a_turn_whose_events_are_gone_is_followed_from_a_snapshot(asked: Asked) -> None:
    asked.admitted = Admitted(turn_ref(None), is_new=False)
    asked.scripts = {CONVERSATION: [Snapshot(99, None, "", [])]}
    await told(asked, SEND, frames=1)
    assert asked.asked[1] == ("follow", USER, CONVERSATION, None, True)


@pytest.mark.parametrize(("is_new", "follows"), [(True, 1), (False, 2)])
async def test_a_turn_of_a_conversation_that_is_followed_is_shown_again_only_if_it_was_repeated(
    asked: Asked, is_new: bool, follows: int
) -> None:
    asked.admitted = Admitted(turn_ref(), is_new=is_new)
    asked.scripts = {CONVERSATION: [journal(STARTED)]}
    async with talking(asked, frame("conversation.follow", conversation_id=ID)) as (peer, _):
        await peer.wait_sent(lambda sent: len(peer.frames) == 3)
        peer.say(SEND)
        await peer.wait_heard()
        await peer.wait_sent(lambda sent: len(peer.frames) == 2 + follows)
    assert [name for name, *_ in asked.asked].count("follow") == follows


async def test_an_answer_is_regenerated_and_a_turn_cancelled(asked: Asked) -> None:
    again = frame("turn.regenerate", conversation_id=ID, message_id="m-1")
    cancels = [frame("turn.cancel", conversation_id=ID), frame("turn.cancel", conversation_id=ID, turn_id=str(TURN))]
    async with talking(asked, again, *cancels):
        pass
    assert [each for each in asked.asked if each[0] != "follow"] == [
        ("regenerate", USER, TurnRegenerate(CONVERSATION, "m-1")),
        ("cancel", USER, CONVERSATION, None),
        ("cancel", USER, CONVERSATION, TURN),
    ]


async def test_a_message_that_is_refused_is_told_with_its_conversation(asked: Asked) -> None:
    asked.error = ConversationBusy(conversation_id=CONVERSATION)
    send = frame("message.send", message_id="m-1", content="hello", conversation_id=ID, request_id="r-1")
    assert await told(asked, send, frames=1) == [
        {
            "type": "error",
            "code": "conversation_busy",
            "message": "A turn is still running in this conversation.",
            "retryable": True,
            "request_id": "r-1",
            "conversation_id": ID,
        }
    ]


async def test_a_client_that_may_not_have_one_more_connection_is_told_in_an_error_and_closed(asked: Asked) -> None:
    async with talking(asked, connections_max=0) as (peer, _):
        pass
    error = {"type": "error", "code": "rate_limited", "retryable": True, "limit": "connections_max", "limit_max": 0}
    said = "This node is at its limit of connections; try again, or ask another node."
    assert peer.frames == [{**error, "message": said, "retry_after_ms": 1000}]
    assert peer.closed == (1013, said)
