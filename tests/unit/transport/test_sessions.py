"""Sessions: counted for each user and for the node, given back in every way, and ended when a token is revoked."""

from __future__ import annotations

import pytest
from starlette.types import Receive, Scope, Send

from anynode.server.auth import Identity
from anynode.server.errors import RateLimited, Unauthorized
from anynode.server.limits import UNLIMITED, UserLimits
from anynode.server.transport.sessions import Sessions
from tests.kit.asgi import Peer, answered, http_scope
from tests.kit.turns import USER, request_of

TWO = UserLimits(connections=2)


def identity(user_id: str, limits: UserLimits = TWO, issued_at: float = 0.0) -> Identity:
    return Identity(user_id, 4e9, issued_at=issued_at, limits=limits)


def nothing() -> None:
    pass


def test_a_user_has_as_many_sessions_as_its_limits_say_and_others_have_theirs() -> None:
    sessions = Sessions(100)
    first, _ = (sessions.open(identity("ada"), nothing) for _ in range(2))
    with pytest.raises(RateLimited, match="You have 2 connections") as refused:
        sessions.open(identity("ada"), nothing)
    assert (refused.value.limit, refused.value.limit_max) == ("connections_per_user_max", 2)
    assert sessions.open(identity("bob"), nothing)
    first.close()
    first.close()  # it is given back once
    assert (sessions.count_of("ada"), sessions.count_of("bob"), len(sessions)) == (1, 1, 2)
    assert sessions.open(identity("ada"), nothing)
    with pytest.raises(RateLimited):
        sessions.open(identity("ada"), nothing)


def test_without_a_limit_a_user_may_have_any_number_up_to_the_nodes() -> None:
    sessions = Sessions(5)
    opened = [sessions.open(identity("ada", UNLIMITED), nothing) for _ in range(5)]
    assert sessions.is_full
    with pytest.raises(RateLimited, match="This node is at its limit") as refused:
        sessions.open(identity("bob"), nothing)
    assert (refused.value.limit, refused.value.limit_max) == ("connections_max", 5)
    for session in opened:
        session.close()
    assert len(sessions) == sessions.count_of("ada") == 0
    assert not sessions.is_full


def test_no_session_is_opened_with_a_token_that_was_revoked_while_something_was_on_its_way() -> None:
    sessions = Sessions(5, lambda identity: identity.issued_at < 7.0)
    with pytest.raises(Unauthorized, match="revoked"):
        sessions.open(identity("ada", issued_at=6.0), nothing)
    assert len(sessions) == 0
    assert sessions.open(identity("ada", issued_at=7.0), nothing)


def test_a_newer_token_brings_its_own_limits() -> None:
    sessions = Sessions(5)
    sessions.open(identity("ada", UserLimits(connections=1)), nothing)
    with pytest.raises(RateLimited):
        sessions.open(identity("ada", UserLimits(connections=1)), nothing)
    assert sessions.open(identity("ada", TWO), nothing)


@pytest.mark.parametrize("error", [None, KeyError("broken")])
def test_a_request_that_waits_is_counted_meanwhile(error: Exception | None) -> None:
    sessions = Sessions(5)
    try:
        with sessions.waiting(request_of(Peer())):
            assert sessions.count_of(USER) == 1
            if error is not None:
                raise error
    except KeyError:
        assert error is not None
    assert sessions.count_of(USER) == 0


@pytest.mark.parametrize("error", [None, KeyError("broken")])
async def test_a_stream_is_counted_from_when_it_is_made_until_it_ends(error: Exception | None) -> None:
    sessions = Sessions(1)

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        assert sessions.count_of(USER) == 1
        if error is not None:
            raise error

    app = sessions.streaming(request_of(Peer()), stream)
    with pytest.raises(RateLimited):
        sessions.streaming(request_of(Peer()), stream)
    try:
        await answered(app, http_scope("GET", "/"))
    except KeyError:
        assert error is not None
    assert sessions.count_of(USER) == 0


def test_what_a_revoked_token_has_opened_is_told_to_end_once_and_counts_until_it_has() -> None:
    sessions, ended = Sessions(10), list[str]()
    for user in ("ada", "bob", "ada"):
        sessions.open(identity(user), lambda user=user: ended.append(user))  # type: ignore[misc]
    assert sessions.end_if(lambda each: each.user_id == "ada") == 2
    assert sessions.end_if(lambda each: each.user_id == "ada") == 0
    assert ended == ["ada", "ada"]
    assert sessions.count_of("ada") == 2


def test_what_ends_may_close_its_session_at_once() -> None:
    sessions = Sessions(10)
    opened = [sessions.open(identity(user), lambda: opened.pop().close()) for user in ("ada", "bob")]
    assert sessions.end_if(lambda each: True) == 2
    assert len(sessions) == 0


def test_a_socket_goes_by_its_newest_token() -> None:
    sessions, ended = Sessions(10), list[str]()
    session = sessions.open(identity("ada", issued_at=1.0), lambda: ended.append("ada"))
    session.identity = identity("ada", issued_at=3.0)
    assert sessions.end_if(lambda each: each.issued_at < 2.0) == 0
    assert sessions.end_if(lambda each: each.issued_at < 4.0) == 1
    assert ended == ["ada"]


def test_a_request_whose_token_is_revoked_hears_of_it() -> None:
    sessions, request = Sessions(10), request_of(Peer())
    with sessions.waiting(request):
        sessions.end_if(lambda each: each.user_id == USER)
        assert request.revoked.is_set()
