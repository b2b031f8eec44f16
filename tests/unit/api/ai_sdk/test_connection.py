"""The WebSocket of the AI SDK's transport over a fake socket: turns that are shown, resumed, waited for and stopped."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import UUID

import pytest
from starlette.types import Message

from anynode.models.client_chats import Chat, ChatEnd
from anynode.models.conversations import Snapshot
from anynode.server.api.ai_sdk import connection as module
from anynode.server.api.ai_sdk import stops
from anynode.server.api.ai_sdk.connection import AiSdkConnection
from anynode.server.api.tickets import Tickets
from anynode.server.auth import Authenticator, Identity
from anynode.server.engine.admission import Admitted
from anynode.server.engine.turn_reader import TurnInterrupted
from anynode.server.errors import ConversationBusy, DatabaseUnavailable, NotFound, Unauthorized
from anynode.server.protocol.frames import MessageSend
from anynode.server.settings import Settings
from anynode.server.transport.shares import Shares
from tests.kit.asgi import Peer, connected, websocket_scope
from tests.kit.turns import (
    CONVERSATION,
    OTHER_TURN,
    STARTED,
    TURN,
    USER,
    ScriptedReader,
    ended,
    journal,
    node_with,
    said,
    turn_ref,
)

CHAT = "chat-1"
WHOLE = journal(STARTED, said("a "), said("b"), ended())
GONE = Snapshot(99, None, "", [])
TOKEN = {"Authorization": "Bearer good"}


class Tokens:
    """Knows one user's token and one ticket."""

    async def authenticate(self, token: str) -> Identity:
        if token not in ("good", "newer"):
            raise Unauthorized("the token is malformed")
        return Identity(USER, 4e9)

    async def redeem(self, ticket: str) -> Identity:
        if ticket == "away":
            raise DatabaseUnavailable
        return await self.authenticate(ticket)


class Asked:
    """A node that keeps what it is asked, and knows one chat. `news` is what follows when something newer is waited
    for."""

    def __init__(self) -> None:
        self.cancelled: list[UUID | None] = []
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.chat: Chat | None = Chat(CONVERSATION, turn_ref())
        self.end: ChatEnd | None = ChatEnd(CONVERSATION, 10, "m-9", False)
        self.news: Sequence[Any] = ()
        self.followed: list[tuple[Any, ...]] = []
        self.reader = ScriptedReader(WHOLE[:2], stays=True)
        self.is_new = True
        self.node = node_with(turns=self.reader, conversations=self, follows=self, send=self._send, cancel=self._cancel)

    async def find_chat(self, user_id: str, client_chat_id: str) -> Chat | None:
        assert (user_id, client_chat_id) == (USER, CHAT)
        return self.chat

    async def find_chat_end(self, user_id: str, client_chat_id: str) -> ChatEnd | None:
        assert (user_id, client_chat_id) == (USER, CHAT)
        return self.end

    async def find_sent(self, user_id: str, client_message_id: str) -> None:
        return None

    async def keep_following(
        self, user_id: str, conversation_id: UUID, after: int | None, *, is_own: bool
    ) -> AsyncGenerator[Any, None]:
        self.followed.append((user_id, conversation_id, after, is_own))
        for update in self.news:
            if isinstance(update, NotFound):
                raise update
            yield update
        await asyncio.Event().wait()

    async def _send(self, user_id: str, frame: MessageSend, **options: Any) -> Admitted:
        self.sent.append((frame.message_id, options))
        await self.may_send.wait()
        if self.error is not None:
            raise self.error
        return Admitted(turn_ref(), self.is_new)

    async def _cancel(self, user_id: str, conversation_id: UUID, turn_id: UUID | None) -> None:
        assert (user_id, conversation_id) == (USER, CONVERSATION)
        self.cancelled.append(turn_id)


def frame(type: str, request_id: str, **fields: Any) -> Message:
    return {"type": "websocket.receive", "text": json.dumps({"type": type, "requestId": request_id, **fields})}


def send(request_id: str = "r-1", message_id: str = "m-1", **fields: Any) -> Message:
    message = {"id": message_id, "role": "user", "parts": [{"type": "text", "text": "hello"}]}
    return frame("send", request_id, id=CHAT, trigger="submit-message", messages=[message], **fields)


def resume(request_id: str = "r-1", **fields: Any) -> Message:
    return frame("resume", request_id, id=CHAT, **fields)


def wait(request_id: str = "r-1", after: str = "m-9") -> Message:
    return resume(request_id, body={"wait_after": after})


def abort(request_id: str = "r-1") -> Message:
    return frame("abort", request_id)


@asynccontextmanager
async def talking(
    asked: Asked, *said: Message, headers: dict[str, str] = TOKEN, query: str = "", **settings: Any
) -> AsyncIterator[Peer]:
    """The client of a connection that has been sent these frames."""
    peer, tokens = Peer({"type": "websocket.connect"}, *said), Tokens()
    shares = Shares(Settings(**settings))
    connection = AiSdkConnection(
        Settings(**settings),
        asked.node,
        cast(Authenticator, tokens),
        shares,
        websocket_scope(headers=headers, query=query),
        peer.receive,
        peer.send,
        refusal=None,
        tickets=cast(Tickets, tokens),
    )
    async with connected(peer, connection.run()):
        yield peer


async def frames(peer: Peer, number: int) -> list[Any]:
    """Return the frames that the client is sent, when there are as many as `number`."""
    await peer.wait_sent(lambda sent: len(peer.frames) >= number)
    assert len(peer.frames) == number
    return peer.frames


def kinds(shown: Sequence[Any]) -> list[str]:
    return [each["chunk"]["type"] if each["type"] == "chunk" else each["type"] for each in shown]


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pending stops are due at once."""
    monkeypatch.setattr(stops, "STOP_SECONDS", 0.001)


# The handshake.


async def test_the_first_frame_may_bring_the_token_and_is_then_obeyed(asked: Asked) -> None:
    asked.chat = None
    async with talking(asked, resume(headers={"authorization": "Bearer good"}), headers={}) as peer:
        assert await frames(peer, 1) == [{"type": "no-active", "requestId": "r-1"}]


async def test_a_first_frame_without_a_token_is_refused_and_so_is_one_with_a_bad_token(asked: Asked) -> None:
    bad = resume("r-2", headers={"authorization": "Bearer bad"})
    async with talking(asked, resume(), abort("r-3"), bad, headers={}) as peer:
        await peer.wait_sent(lambda sent: peer.closed is not None)
    assert [(shown["type"], shown["requestId"]) for shown in peer.frames] == [
        ("error", "r-1"),
        ("error", "r-3"),
        ("error", "r-2"),
    ]
    assert peer.closed == (3000, "the token is malformed")


@pytest.mark.parametrize(
    ("ticket", "closed"),
    [
        ("bad", (3000, "the token is malformed")),
        ("away", (1013, "The database does not answer at the moment; nothing was lost, try again.")),
    ],
)
async def test_a_ticket_lets_in_or_says_why_not(asked: Asked, ticket: str, closed: tuple[int, str]) -> None:
    async with talking(asked, query=f"ticket={ticket}") as peer:
        await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed == closed
    async with talking(asked, query="ticket=good&heartbeats=true", headers={}) as peer:
        ready = {"type": "ready", "requestId": "", "node_id": "test-1", "heartbeat_seconds": 10.0}
        assert await frames(peer, 1) == [ready]


async def test_heartbeats_come_to_clients_that_ask_for_them(asked: Asked) -> None:
    async with talking(asked, query="heartbeats=true", heartbeat_seconds=0.002) as peer:
        await peer.wait_sent(lambda sent: len(peer.frames) > 1)
    assert peer.frames[1] == {"type": "heartbeat", "requestId": ""}


async def test_a_frame_of_no_request_closes_the_connection_with_what_is_wrong(asked: Asked) -> None:
    async with talking(asked, {"type": "websocket.receive", "text": "hello"}) as peer:
        await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed is not None
    assert peer.closed[0] == 1008
    assert peer.closed[1].startswith("the frame: ")


# Sending.


async def test_a_question_is_shown_to_its_end(asked: Asked) -> None:
    asked.reader.script, asked.reader.stays = [WHOLE], False
    async with talking(asked, send()) as peer:
        shown = await frames(peer, 9)
    assert kinds(shown) == [
        *("start", "start-step", "text-start", "text-delta", "text-delta", "text-end", "finish-step", "finish"),
        "end",
    ]
    assert [each["sequence"] for each in shown[:-1]] == list(range(8))
    assert {each["requestId"] for each in shown} == {"r-1"}
    assert asked.reader.asked == [(turn_ref(), True, False)]
    assert asked.cancelled == []


async def test_a_question_that_is_refused_is_an_error_of_its_request(asked: Asked) -> None:
    asked.error = ConversationBusy()
    async with talking(asked, send()) as peer:
        (error,) = await frames(peer, 1)
    assert error == {
        "type": "error",
        "requestId": "r-1",
        "errorText": "A turn is still running in this conversation.",
    }


@pytest.mark.parametrize(
    ("error", "closed"),
    [(TurnInterrupted(), (1012, "the answer begins again")), (KeyError(), (1011, "internal error"))],
)
async def test_an_answer_that_cannot_go_on_closes_the_connection(
    asked: Asked, error: Exception, closed: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    asked.reader.script = [WHOLE[:2], error]
    with caplog.at_level(logging.CRITICAL):
        async with talking(asked, send()) as peer:
            await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed == closed
    assert "end" not in kinds(peer.frames)


async def test_a_connection_shows_a_bounded_number_of_turns(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOWS_MAX", 1)
    async with talking(asked, send(), send("r-2"), resume("r-3"), wait("r-4")) as peer:
        await peer.wait_sent(lambda sent: kinds(peer.frames).count("error") == 3)
    refused = [each["requestId"] for each in peer.frames if each["type"] == "error"]
    assert refused == ["r-2", "r-3", "r-4"]


# Resuming.


async def test_a_turn_is_resumed_from_its_start(asked: Asked) -> None:
    async with talking(asked, resume()) as peer:
        shown = await frames(peer, 5)
    assert kinds(shown) == ["start", "start", "start-step", "text-start", "text-delta"]
    assert asked.reader.asked == [(turn_ref(), True, False)]


@pytest.mark.parametrize("last_sequence", [0, 2, 6])
async def test_a_turn_is_resumed_after_a_sequence_number(asked: Asked, last_sequence: int) -> None:
    asked.reader.script, asked.reader.stays = [WHOLE], False
    async with talking(asked, resume(lastSequence=last_sequence)) as peer:
        shown = await frames(peer, 9 - last_sequence)
    assert [each["sequence"] for each in shown[1:-1]] == list(range(last_sequence + 1, 8))
    assert asked.reader.asked == [(turn_ref(), False, False)]


@pytest.mark.parametrize("chat", [None, Chat(CONVERSATION, None)])
async def test_where_no_turn_is_there_is_nothing_to_resume(asked: Asked, chat: Chat | None) -> None:
    asked.chat = chat
    async with talking(asked, resume()) as peer:
        assert await frames(peer, 1) == [{"type": "no-active", "requestId": "r-1"}]


async def test_a_turn_whose_events_are_gone_is_resumed_from_its_start_only(asked: Asked) -> None:
    asked.chat = Chat(CONVERSATION, turn_ref(None))
    async with talking(asked, resume(lastSequence=2), resume("r-2")) as peer:
        shown = await frames(peer, 6)
    assert kinds(shown[:2]) == ["error", "start"]
    assert shown[0]["errorText"] == "The answer is too old to go on with: resume without lastSequence."


# Stopping.


async def test_the_abort_of_a_question_stops_its_turn(asked: Asked) -> None:
    async with talking(asked, send()) as peer:
        await frames(peer, 4)
        peer.say(abort())
        await peer.wait_heard()
        assert asked.cancelled == [TURN]
        for _ in range(5):
            await asyncio.sleep(0)
        assert asked.reader.is_closed
    assert "end" not in kinds(peer.frames)


async def test_the_abort_of_a_resumed_request_stops_its_turn_a_moment_later(asked: Asked, soon: None) -> None:
    async with talking(asked, resume()) as peer:
        await frames(peer, 5)
        peer.say(abort())
        await peer.wait_heard()
        assert asked.cancelled == []
        async with asyncio.timeout(5.0):
            while not asked.cancelled:  # noqa: ASYNC110 (the node is asked by a timer)
                await asyncio.sleep(0)
    assert asked.cancelled == [TURN]


async def test_a_turn_that_is_resumed_twice_goes_on(asked: Asked) -> None:
    async with talking(asked, resume()) as peer:
        await frames(peer, 5)
        peer.say(abort())
        peer.say(resume("r-2"))
        await frames(peer, 10)
    assert asked.cancelled == []


async def test_a_client_that_stops_and_goes_has_stopped(asked: Asked) -> None:
    async with talking(asked, resume()) as peer:
        await frames(peer, 5)
        peer.say(abort())
    assert asked.cancelled == [TURN]


async def test_a_client_that_goes_has_stopped_nothing(asked: Asked) -> None:
    async with talking(asked, resume(), send("r-2")) as peer:
        await frames(peer, 9)
    assert asked.cancelled == []


@pytest.mark.parametrize("following", [send("r-2"), wait("r-2")])
async def test_a_pending_stop_is_made_before_what_the_client_asks_next(asked: Asked, following: Message) -> None:
    async with talking(asked, resume()) as peer:
        await frames(peer, 5)
        peer.say(abort())
        peer.say(following)
        await peer.wait_heard()
        assert asked.cancelled == [TURN]
    assert asked.cancelled == [TURN]


async def test_a_question_waits_for_the_turn_that_its_client_has_stopped(asked: Asked) -> None:
    async with talking(asked, send()) as peer:
        await frames(peer, 4)
        peer.say(abort())
        peer.say(send("r-2", "m-2"))
        peer.say(resume("r-3"))  # of another request, which does not wait
        await frames(peer, 4 + 4 + 5)
        peer.say(send("r-4", "m-4"))
        await frames(peer, 4 + 4 + 5 + 4)
    assert [(id, options["wait_for"]) for id, options in asked.sent] == [("m-1", None), ("m-2", TURN), ("m-4", None)]


async def test_a_question_that_is_aborted_while_it_waits_is_stopped_when_it_is_admitted(asked: Asked) -> None:
    asked.may_send.clear()
    async with talking(asked, send(body={"if_busy": "interrupt"})) as peer:
        peer.say(abort())
        await peer.wait_heard()
        assert asked.cancelled == []
        asked.may_send.set()
        async with asyncio.timeout(5.0):
            while not asked.cancelled:  # noqa: ASYNC110 (the question is admitted by a task of its own)
                await asyncio.sleep(0)
    assert asked.cancelled == [TURN]
    assert peer.frames == []


# Waiting for something newer.


@pytest.mark.parametrize("end", [ChatEnd(CONVERSATION, 10, "m-8", False), ChatEnd(CONVERSATION, 10, "m-9", True)])
async def test_what_is_newer_already_is_told_at_once(asked: Asked, end: ChatEnd) -> None:
    asked.end = end
    async with talking(asked, wait()) as peer:
        assert kinds(await frames(peer, 2)) == ["start", "end"]
    assert asked.followed == []


async def test_in_a_chat_that_is_not_there_nothing_is_waited_for(asked: Asked) -> None:
    asked.end = None
    async with talking(asked, wait()) as peer:
        assert kinds(await frames(peer, 1)) == ["no-active"]


@pytest.mark.parametrize("news", [journal(STARTED, turn_id=OTHER_TURN), GONE])
async def test_the_next_event_and_a_snapshot_are_news_and_a_postgres_that_is_away_is_none(
    asked: Asked, news: Any
) -> None:
    asked.news = [DatabaseUnavailable(), news]
    async with talking(asked, wait()) as peer:
        assert kinds(await frames(peer, 2)) == ["start", "end"]
    assert asked.followed == [(USER, CONVERSATION, 10, True)]


async def test_nothing_is_told_while_there_is_nothing_newer(asked: Asked) -> None:
    asked.news = [DatabaseUnavailable()]
    async with talking(asked, wait()) as peer:
        await peer.wait_heard()
        for _ in range(10):
            await asyncio.sleep(0)
        assert peer.frames == []
        peer.say(abort())  # of a request that shows no turn
        await peer.wait_heard()
    assert (peer.frames, asked.cancelled) == ([], [])


async def test_a_chat_that_is_deleted_meanwhile_is_an_error_of_the_request(asked: Asked) -> None:
    asked.news = [NotFound()]
    async with talking(asked, wait()) as peer:
        (error,) = await frames(peer, 1)
    assert (error["type"], error["requestId"]) == ("error", "r-1")


@pytest.mark.parametrize("is_in_frame", [True, False])
async def test_a_client_that_has_too_many_connections_is_told_in_the_words_of_the_wire(
    asked: Asked, is_in_frame: bool
) -> None:
    options: dict[str, Any] = {"headers": {}} if is_in_frame else {}
    async with talking(asked, send(headers=TOKEN), connections_max=0, **options) as peer:
        await peer.wait_sent(lambda sent: peer.closed is not None)
    said = "This node is at its limit of connections; try again, or ask another node."
    assert peer.closed == (1013, said)
    assert peer.frames == ([{"type": "error", "requestId": "r-1", "errorText": said}] if is_in_frame else [])
