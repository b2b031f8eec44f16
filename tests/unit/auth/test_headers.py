"""Where a request carries its token, and what is no token."""

from __future__ import annotations

import pytest

from anynode.server.auth import bearer_of, token_of_subprotocols


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ([], None),
        ([(b"authorization", b"Bearer a.b.c")], "a.b.c"),
        ([(b"Authorization", b"bEARER   a.b.c ")], "a.b.c"),
        ([(b"authorization", b"Basic abc")], None),
        ([(b"authorization", b"Basic abc"), (b"authorization", b"Bearer a")], "a"),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Bearer ")], None),
        ([(b"authorization", b"Bearera")], None),
        ([(b"authorization", b"")], None),
        ([(b"x-authorization", b"Bearer a")], None),
        ([(b"authorization", b"Bearer \xff")], "ÿ"),
    ],
)
def test_the_bearer_of_headers(headers: list[tuple[bytes, bytes]], token: str | None) -> None:
    assert bearer_of(headers) == token


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
