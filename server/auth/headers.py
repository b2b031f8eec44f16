"""Where a request carries its token: the header `Authorization`, or a subprotocol of a WebSocket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def bearer_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the token of `Authorization: Bearer …` in ASGI headers, or None."""
    for name, value in headers:
        scheme, _, token = value.strip().partition(b" ")
        if name.lower() == b"authorization" and scheme.lower() == b"bearer" and token.strip():
            return token.strip().decode("latin-1")
    return None


def token_of_subprotocols(offered: Sequence[str]) -> str | None:
    """Return the JWT of an offered subprotocol `bearer.JWT`, or None. A page's WebSocket cannot set headers."""
    return next((name[7:] for name in offered if name.startswith("bearer.") and len(name) > 7), None)
