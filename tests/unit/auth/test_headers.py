"""Where a request carries its token, and what is no token."""

from __future__ import annotations

import pytest

from anynode.server.auth import bearer_of, token_of_subprotocols
from anynode.server.errors import Unauthorized


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ([], None),
        ([(b"authorization", b"Bearer a.b.c")], "a.b.c"),
        ([(b"Authorization", b"bEARER   a.b.c ")], "a.b.c"),
        ([(b"x-authorization", b"Bearer a")], None),
        ([(b"authorization", b"Bearer \xff")], "ÿ"),
    ],
)
def test_the_bearer_of_headers(headers: list[tuple[bytes, bytes]], token: str | None) -> None:
    assert bearer_of(headers) == token


@pytest.mark.parametrize(
    "value", [b"Basic abc", b"Bearer", b"Bearer ", b"Bearer \t", b"Bearera", b"", b"Token a.b.c", b"a.b.c"]
)
def test_a_header_without_a_token_is_refused_and_not_passed_over(value: bytes) -> None:
    with pytest.raises(Unauthorized, match="must be `Bearer` and a token"):
        bearer_of([(b"authorization", value)])


@pytest.mark.parametrize("first", [b"Basic abc", b"Bearer a"])
def test_two_headers_are_refused(first: bytes) -> None:
    with pytest.raises(Unauthorized, match="more than one"):
        bearer_of([(b"authorization", first), (b"Authorization", b"Bearer a")])


@pytest.mark.parametrize(
    ("offered", "token"),
    [
        ([], None),
        (["anynode.v1"], None),
        (["anynode.v1", "bearer.a.b.c"], "a.b.c"),
        (["bearer.a.b.c", "anynode.v1"], "a.b.c"),
        (["anynode.v1", "bearer."], None),
        (["anynode.v1", "Xbearer.a"], None),
    ],
)
def test_the_token_of_subprotocols(offered: list[str], token: str | None) -> None:
    assert token_of_subprotocols(offered) == token
