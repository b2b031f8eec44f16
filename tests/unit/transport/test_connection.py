"""One WebSocket connection: its timers, and with a fake peer its handshake, its frames and its end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from starlette.types import Message

from anynode.server.auth import Authenticator, Identity
from anynode.server.errors import ClientError, InvalidFrame, KeysUnavailable, RateLimited, Unauthorized
from anynode.server.settings import Settings
from anynode.server.transport import allowance
from anynode.server.transport import connection as module
from anynode.server.transport.connection import Connection, expiry_check_in, heartbeat_due_in
from anynode.server.transport.shares import Shares
from tests.kit.asgi import Peer, connected, websocket_scope
from tests.kit.turns import node_with

CONNECT: Message = {"type": "websocket.connect"}
DISCONNECT: Message = {"type": "websocket.disconnect", "code": 1006}
ACCEPTED = {"type": "websocket.accept", "subprotocol": None}
WITH_TOKEN = {"Authorization": "Bearer good"}
FAR = 4e9  # a time that no test lives to see, Unix seconds


def frame(text: str) -> Message:
    return {"type": "websocket.receive", "text": text}


# When to look at the heartbeat, and at the token.


@pytest.mark.parametrize(
    ("now", "sent_at", "due_in"),
    [
        (100.0, 100.0, 10.0),
        (104.0, 100.0, 6.0),
        (110.0, 100.0, 0.0),
        (109.9995, 100.0, 0.0),  # the timer rang a little early
        (109.9, 100.0, pytest.approx(0.1)),
        (500.0, 100.0, 0.0),
    ],
)
def test_a_heartbeat_is_due_an_interval_after_the_last_frame(now: float, sent_at: float, due_in: float) -> None:
    assert heartbeat_due_in(now, sent_at, 10.0) == due_in


@pytest.mark.parametrize(
    ("seconds_left", "expected"),
    [
        (3600.0, (3540.0, True)),
        (61.0, (1.0, True)),
        (60.0, (0.0, True)),
        (5.0, (0.0, True)),
        (-5.0, (0.0, True)),
        (86_460.0, (86_400.0, True)),
        (86_461.0, (86_400.0, False)),  # a timer far off is set again
        (1e11, (86_400.0, False)),
    ],
)
def test_a_token_is_looked_at_a_minute_before_its_end(seconds_left: float, expected: tuple[float, bool]) -> None:
    assert expiry_check_in(1000.0, 1000.0 + seconds_left) == expected


# A connection.


class Tokens:
    """Knows two users' tokens, and says until when they are valid."""

    def __init__(self, expires_at: float = FAR) -> None:
        self.expires_at = expires_at

    async def authenticate(self, token: str) -> Identity:
        users = {"good": "user-1", "newer": "user-1", "other": "user-2"}
        if token not in users:
            raise Unauthorized("the token is malformed")
        return Identity(users[token], self.expires_at)


class Recorded(Connection):
    """A connection of an API that does as its frames say."""

    subprotocol = "test.v1"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.obeyed: list[str] = []
        self.decoded_in: list[int] = []
        self.background_ended = asyncio.Event()

    def _token_in(self, text: str) -> str:
        if not text.startswith("token "):
            raise Unauthorized("the first frame must be a token")
        return text.removeprefix("token ")

    async def _welcome(self) -> None:
        await self._send(f"welcome {self._user_id}")

    async def _obey(self, text: str) -> None:
        await self._decode(lambda text: self.decoded_in.append(threading.get_ident()), text)
        self.obeyed.append(text)
        match text.split():
            case ["bad"]:
                raise InvalidFrame("bad")
            case ["broken"]:
                raise KeyError("broken")
            case ["token", token]:
                await self._renew(token)
            case ["heartbeats"]:
                self._start_heartbeats("heartbeat")
            case ["background"]:
                self._spawn(self._wait_for_ever())
        await self._send(f"done {text}")

    async def _wait_for_ever(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.background_ended.set()

    async def _refuse(self, error: ClientError, text: str) -> None:
        await self._send(f"refused {error.code} {text}")

    async def _turn_away(self, error: RateLimited) -> None:
        await self._send(f"turned away {error.limit}")

    def _warn_of_expiry(self, expires_at: float) -> None:
        self.send_soon(f"expiring {expires_at:.0f}")


@asynccontextmanager
async def running(
    peer: Peer,
    *,
    headers: Mapping[str, str] | None = None,
    subprotocols: list[str] | None = None,
    refusal: tuple[int, str] | None = None,
    tokens: Tokens | None = None,
    heartbeat_seconds: float = 10.0,
    shares: Shares | None = None,
) -> AsyncIterator[Recorded]:
    """A connection that runs meanwhile, and is over afterwards: its peer leaves where it is not closed."""
    settings = Settings(heartbeat_seconds=heartbeat_seconds)
    connection = Recorded(
        settings,
        node_with(),
        cast(Authenticator, tokens or Tokens()),
        shares or Shares(settings),
        websocket_scope(headers=headers, subprotocols=subprotocols or []),
        peer.receive,
        peer.send,
        refusal=refusal,
    )
    async with connected(peer, connection.run()):
        yield connection


async def closed(peer: Peer, **options: Any) -> tuple[int, str] | None:
    """Return how a connection with this peer is closed."""
    async with running(peer, **options):
        await peer.wait_sent(lambda sent: peer.closed is not None)
    return peer.closed


async def test_a_connection_that_is_not_wanted_is_accepted_and_closed_with_the_reason() -> None:
    peer = Peer(CONNECT, frame("token good"))
    assert await closed(peer, refusal=(1012, "restarting"), headers=WITH_TOKEN) == (1012, "restarting")
    assert peer.sent[0] == ACCEPTED
    assert peer.texts == []


@pytest.mark.parametrize(("offered", "chosen"), [([], None), (["x"], None), (["bearer.good", "test.v1"], "test.v1")])
async def test_the_subprotocol_is_chosen_only_where_it_is_offered(offered: list[str], chosen: str | None) -> None:
    peer = Peer(CONNECT)
    async with running(peer, subprotocols=offered, headers=WITH_TOKEN):
        await peer.wait_sent(lambda sent: len(sent) == 2)
    assert peer.sent[0] == {"type": "websocket.accept", "subprotocol": chosen}


@pytest.mark.parametrize(
    ("options", "frames"),
    [({"headers": WITH_TOKEN}, []), ({"subprotocols": ["bearer.good"]}, []), ({}, ["token good"])],
)
async def test_a_token_comes_in_a_header_a_subprotocol_or_the_first_frame(
    options: dict[str, Any], frames: list[str]
) -> None:
    peer = Peer(CONNECT, *map(frame, frames))
    async with running(peer, **options) as connection:
        await peer.wait_sent(lambda sent: peer.texts == ["welcome user-1"])
    assert connection.obeyed == []


async def test_a_first_frame_without_a_token_is_refused_and_another_may_follow() -> None:
    peer = Peer(CONNECT, frame("hello"), frame("token good"), frame("hello"))
    async with running(peer):
        await peer.wait_sent(lambda sent: len(peer.texts) == 3)
    assert peer.texts == ["refused unauthorized hello", "welcome user-1", "done hello"]


async def test_a_token_that_proves_nothing_closes_the_connection() -> None:
    assert await closed(Peer(CONNECT, frame("token bad"))) == (3000, "the token is malformed")


@pytest.mark.parametrize("value", ["Basic good", "Bearer ", ""])
async def test_a_header_that_holds_no_token_closes_the_connection_though_a_subprotocol_has_one(value: str) -> None:
    closed_with = await closed(Peer(CONNECT), headers={"Authorization": value}, subprotocols=["bearer.good"])
    assert closed_with == (3000, "The Authorization header must be `Bearer` and a token.")


async def test_where_no_token_can_be_verified_now_the_client_is_told_to_come_back() -> None:
    class NoKeys(Tokens):
        async def authenticate(self, token: str) -> Identity:
            raise KeysUnavailable("no keys")

    assert await closed(Peer(CONNECT), headers=WITH_TOKEN, tokens=NoKeys()) == (1013, "no keys")


async def test_a_client_that_does_not_authenticate_in_time_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AUTHENTICATION_SECONDS", 0.0)
    assert await closed(Peer(CONNECT)) == (3008, "no authentication in time")


@pytest.mark.parametrize("headers", [WITH_TOKEN, {}])
async def test_a_binary_frame_closes_the_connection(headers: dict[str, str]) -> None:
    peer = Peer(CONNECT, {"type": "websocket.receive", "bytes": b"\x00"})
    assert await closed(peer, headers=headers) == (1003, "frames are text")


async def test_a_peer_that_leaves_is_sent_nothing_more() -> None:
    peer = Peer(CONNECT, frame("a"))
    async with running(peer, headers=WITH_TOKEN) as connection:
        await peer.wait_sent(lambda sent: len(sent) == 3)
        peer.say(DISCONNECT)
    assert peer.texts == ["welcome user-1", "done a"]
    assert peer.closed is None
    connection.close_soon(1012, "restarting")  # it does nothing by now
    assert peer.closed is None


async def test_a_peer_that_is_gone_when_something_is_sent_ends_the_connection_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = Peer(CONNECT)
    async with running(peer, headers=WITH_TOKEN):
        await peer.wait_sent(lambda sent: len(sent) == 2)
        peer.is_gone = True
        peer.say(frame("a"))
    assert caplog.records == []


async def test_a_frame_that_is_refused_leaves_the_connection_as_it_is() -> None:
    peer = Peer(CONNECT, frame("bad"), frame("good"))
    async with running(peer, headers=WITH_TOKEN):
        await peer.wait_sent(lambda sent: len(peer.texts) == 3)
    assert peer.texts[1:] == ["refused invalid_frame bad", "done good"]


async def test_what_nobody_has_thought_of_closes_the_connection_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert await closed(Peer(CONNECT, frame("broken")), headers=WITH_TOKEN) == (1011, "internal error")
    assert [record.message for record in caplog.records] == ["a connection failed"]


async def test_frames_beyond_the_allowance_are_refused_and_many_of_them_close_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("FRAMES_BURST", 2), ("FRAMES_PER_SECOND", 0), ("REFUSALS_MAX", 3)):
        monkeypatch.setattr(allowance, name, value)
    peer = Peer(CONNECT, *(frame(f"{number}") for number in range(10)))
    assert await closed(peer, headers=WITH_TOKEN) == (1008, "too many frames")
    shown = ["done 0", "done 1", *(f"refused rate_limited {number}" for number in (2, 3, 4))]
    assert peer.texts[1:] == shown


async def test_frames_before_the_token_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FRAMES_BURST", 1), ("FRAMES_PER_SECOND", 0), ("REFUSALS_MAX", 1)):
        monkeypatch.setattr(allowance, name, value)
    peer = Peer(CONNECT, frame("a"), frame("b"), frame("token good"))
    assert await closed(peer) == (1008, "too many frames")
    assert peer.texts == ["refused unauthorized a", "refused rate_limited b"]


async def test_a_connection_goes_on_with_a_newer_token_of_its_user_and_with_no_other_ones() -> None:
    peer = Peer(CONNECT, frame("token newer"), frame("token bad"), frame("token other"))
    assert await closed(peer, headers=WITH_TOKEN) == (3003, "a connection cannot become another user's")
    assert peer.texts[1:] == ["done token newer", "refused unauthorized token bad"]


async def test_a_client_is_warned_before_its_token_runs_out_and_disconnected_then() -> None:
    expires_at = time.time() - 1  # less than a minute is left, and then nothing
    peer = Peer(CONNECT)
    assert await closed(peer, headers=WITH_TOKEN, tokens=Tokens(expires_at)) == (3000, "the token has expired")
    assert peer.texts == ["welcome user-1", f"expiring {expires_at:.0f}"]


async def test_a_newer_token_puts_the_end_off() -> None:
    tokens = Tokens(time.time() + 30)
    peer = Peer(CONNECT)
    async with running(peer, headers=WITH_TOKEN, tokens=tokens) as connection:
        await peer.wait_sent(lambda sent: len(peer.texts) == 2)
        assert "expiring" in peer.texts[1]
        timer = connection._expiry_timer
        tokens.expires_at = FAR
        peer.say(frame("token newer"))
        await peer.wait_sent(lambda sent: len(peer.texts) == 3)
        assert timer is not None
        assert timer.cancelled()
    assert peer.closed is None


async def test_what_is_sent_from_outside_waits_for_no_blocked_socket_and_for_nobody_unknown() -> None:
    peer = Peer(CONNECT)
    async with running(peer) as connection:
        await peer.wait_sent(lambda sent: len(sent) == 1)
        connection.send_soon("too early")
        peer.say(frame("token good"))
        await peer.wait_sent(lambda sent: len(peer.texts) == 1)
        connection._sending = 1  # as a sender does that waits for the socket
        connection.send_soon("blocked")
        connection._sending = 0
        connection.send_soon("heard")
        await peer.wait_sent(lambda sent: len(peer.texts) == 2)
        peer.is_gone = True
        connection.send_soon("to nobody")
        connection.close_soon(1012, "restarting")
    assert peer.texts == ["welcome user-1", "heard"]


async def test_a_connection_that_is_closed_from_outside_is_closed_once() -> None:
    peer = Peer(CONNECT)
    async with running(peer, headers=WITH_TOKEN) as connection:
        await peer.wait_sent(lambda sent: len(sent) == 2)
        connection.close_soon(1012, "restarting")
        connection.close_soon(1011, "internal error")
        await peer.wait_sent(lambda sent: peer.closed is not None)
        connection.send_soon("too late")
        peer.say(frame("too late"))
    assert peer.closed == (1012, "restarting")
    assert connection.obeyed == []
    assert peer.texts == ["welcome user-1"]


async def test_heartbeats_come_while_nothing_else_is_sent_and_end_with_the_connection() -> None:
    peer = Peer(CONNECT, frame("heartbeats"))
    async with running(peer, headers=WITH_TOKEN, heartbeat_seconds=0.002) as connection:
        await peer.wait_sent(lambda sent: peer.texts[2:] == ["heartbeat", "heartbeat"])
    timer = connection._heartbeat_timer
    assert timer is not None
    assert timer.cancelled()


# What a connection counts for.


async def test_a_connection_counts_for_its_user_once_it_has_authenticated_and_until_its_end() -> None:
    shares, peer = Shares(Settings()), Peer(CONNECT)
    async with running(peer, shares=shares) as connection:
        shares.unauthenticated.add(connection, "192.0.2.1")
        await peer.wait_sent(lambda sent: len(sent) == 1)
        assert (len(shares.sessions), len(shares.unauthenticated)) == (0, 1)
        peer.say(frame("token good"))
        await peer.wait_sent(lambda sent: len(peer.texts) == 1)
        assert (shares.sessions.count_of("user-1"), len(shares.unauthenticated)) == (1, 0)
    assert len(shares.sessions) == 0


async def test_a_client_that_may_not_have_one_more_is_told_why_and_closed() -> None:
    shares, peer = Shares(Settings(connections_max=1)), Peer(CONNECT, frame("token good"), frame("a"))
    shares.sessions.open(Identity("user-2", FAR), lambda: None)
    closing = (1013, "This node is at its limit of connections; try again, or ask another node.")
    assert await closed(peer, shares=shares) == closing
    assert peer.texts == ["turned away connections_max"]
    assert (len(shares.sessions), shares.sessions.count_of("user-1")) == (1, 0)


async def test_a_connection_whose_newest_token_is_revoked_is_closed() -> None:
    shares, peer = Shares(Settings()), Peer(CONNECT, frame("token newer"))
    tokens = Tokens()
    async with running(peer, headers=WITH_TOKEN, shares=shares, tokens=tokens):
        await peer.wait_sent(lambda sent: len(peer.texts) == 2)
        tokens.expires_at = FAR + 1
        peer.say(frame("token newer"))
        await peer.wait_sent(lambda sent: len(peer.texts) == 3)
        assert shares.sessions.end_if(lambda identity: identity.expires_at == FAR) == 0
        assert shares.sessions.end_if(lambda identity: identity.expires_at == FAR + 1) == 1
        await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed == (3000, "the token was revoked")
    assert len(shares.sessions) == 0


async def test_a_connection_that_gives_way_is_closed_though_its_peer_says_nothing() -> None:
    peer = Peer(CONNECT)
    async with running(peer) as connection:
        await peer.wait_sent(lambda sent: len(sent) == 1)
        connection.give_way()
        await peer.wait_sent(lambda sent: peer.closed is not None)
    assert peer.closed == (1013, "too many sockets without a token; send it at once")


async def test_long_frames_are_decoded_beside_the_loop_and_obeyed_in_their_order() -> None:
    long = "x" * 20_000
    peer = Peer(CONNECT, *(frame(text) for text in ("a", long, "b", long, "c")))
    async with running(peer, headers=WITH_TOKEN) as connection:
        await peer.wait_sent(lambda sent: len(peer.texts) == 6)
    assert connection.obeyed == ["a", long, "b", long, "c"]
    assert [thread == threading.get_ident() for thread in connection.decoded_in] == [True, False, True, False, True]


async def test_what_a_connection_does_beside_its_reader_ends_with_it() -> None:
    peer = Peer(CONNECT, frame("background"))
    async with running(peer, headers=WITH_TOKEN) as connection:
        await peer.wait_sent(lambda sent: len(peer.texts) == 2)
        assert not connection.background_ended.is_set()
    assert connection.background_ended.is_set()
