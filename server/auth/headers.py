"""Where a request carries its token: the header `Authorization`, or a subprotocol of a WebSocket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from anynode.server.errors import Unauthorized


def bearer_of(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the token of `Authorization: Bearer …` in ASGI headers, None without such a header.

    Raises Unauthorized where the header is there and holds no token: its client means to authenticate by it, and would
    otherwise wait in vain.
    """
    values = [value.strip() for name, value in headers if name.lower() == b"authorization"]
    if not values:
        return None
    if len(values) > 1:
        raise Unauthorized("There is more than one Authorization header; send one.")
    scheme, _, token = values[0].partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise Unauthorized("The Authorization header must be `Bearer` and a token.")
    return token.strip().decode("latin-1")


def token_of_subprotocols(offered: Sequence[str]) -> str | None:
    """Return the JWT of an offered subprotocol `bearer.JWT`, or None. A page's WebSocket cannot set headers."""
    return next((name[7:] for name in offered if name.startswith("bearer.") and len(name) > 7), None)
