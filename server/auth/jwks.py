"""The public keys of a JWKS address: which of them verify tokens, and when they are fetched."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import jwt

from anynode.server.errors import Unauthorized

JWKS_SECONDS_MAX = 3.0  # for a whole fetch, because a client is waiting to connect
JWKS_BYTES_MAX = 1_048_576  # real sets have a few KiB
JWKS_FRESH_SECONDS = 600.0  # how late a withdrawn key is noticed
JWKS_COOLDOWN_SECONDS = 30.0  # an invented kid must not make nodes ask the issuer again and again
JWKS_RETRY_SECONDS = 1.0  # shorter, because nobody can connect before the first fetch
RSA_BITS_MIN = 2048  # RFC 7518, 3.3

# The algorithm and the public members of each (kty, crv); private members are never loaded.
_KINDS = {("RSA", None): ("RS256", ("n", "e")), ("EC", "P-256"): ("ES256", ("crv", "x", "y"))}

logger = logging.getLogger("anynode.auth")


def signing_keys(body: bytes) -> list[jwt.PyJWK]:
    """Return the keys of a JWKS that verify RS256 or ES256. Raises ValueError when there are none."""
    try:
        document = json.loads(body)
        keys = [key for entry in document["keys"] if (key := _signing_key(entry)) is not None]
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("not a key set") from error
    if not keys:
        raise ValueError("no usable key in the set")
    return keys


def _signing_key(entry: Any) -> jwt.PyJWK | None:
    try:
        algorithm, members = _KINDS[entry["kty"], entry.get("crv")]
        intended = entry.get("use", "sig") == "sig" and "verify" in entry.get("key_ops", ("verify",))
        if not intended or entry.get("alg", algorithm) != algorithm:
            return None
        key = jwt.PyJWK({name: entry.get(name) for name in ("kid", "kty", *members)}, algorithm)
    except (jwt.PyJWTError, LookupError, TypeError, ValueError, AttributeError):
        return None  # one bad key must not spoil the others
    return key if algorithm == "ES256" or key.key.key_size >= RSA_BITS_MIN else None


class Jwks:
    """The keys of one address. All callers share one fetch; when it fails, the older keys stay in use."""

    def __init__(self, url: str, monotonic: Callable[[], float]) -> None:
        self._url, self._monotonic = url, monotonic
        self._keys: list[jwt.PyJWK] = []
        self._fetched_at = self._tried_at = self._unknown_at = -math.inf
        self._fetching: asyncio.Task[None] | None = None
        self._closed = False

    async def find(self, kid: str | None) -> jwt.PyJWK:
        now, had_keys = self._monotonic(), bool(self._keys)
        retry_at = self._tried_at + (JWKS_COOLDOWN_SECONDS if had_keys else JWKS_RETRY_SECONDS)
        if now >= max(self._fetched_at + JWKS_FRESH_SECONDS, retry_at):
            self._start_fetch(now)  # a caller that finds its key does not wait for the fetch
        key = self._pick(kid)
        if key is None:
            if had_keys and self._fetching is None and now >= self._unknown_at + JWKS_COOLDOWN_SECONDS:
                self._unknown_at = now
                self._start_fetch(now)
            await self._end_of_fetch()
            key = self._pick(kid)
        if key is None:
            unknown, none = "the signing key is unknown", "the signing keys cannot be fetched at the moment"
            raise Unauthorized(unknown if self._keys else none)
        return key

    def _pick(self, kid: str | None) -> jwt.PyJWK | None:
        if kid is None and len(self._keys) > 1:
            raise Unauthorized("the token does not say which key signed it (kid)")
        return next((key for key in self._keys if kid is None or key.key_id == kid), None)

    def _start_fetch(self, now: float) -> None:
        if self._fetching is None and not self._closed:
            self._tried_at = now
            self._fetching = asyncio.create_task(self._fetch())

    async def _end_of_fetch(self) -> None:
        if (
            self._fetching is not None
        ):  # wait() and not await: a caller that is cancelled must not end the fetch for the others
            await asyncio.wait((self._fetching,))

    async def _fetch(self) -> None:
        import aiohttp  # not at the top: it takes a fifth of a node's start, and few nodes fetch keys

        body, timeout = bytearray(), aiohttp.ClientTimeout(total=JWKS_SECONDS_MAX)
        try:
            # No redirects, because they may lead from https to http. One session a fetch, so that no connection idles.
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self._url, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise ValueError(f"HTTP status {response.status}")
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > JWKS_BYTES_MAX:
                        raise ValueError(f"more than {JWKS_BYTES_MAX} bytes")
            self._keys, self._fetched_at = signing_keys(bytes(body)), self._monotonic()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            logger.warning("the signing keys were not fetched: %s: %s", type(error).__name__, error)
        finally:
            self._fetching = None

    async def close(self) -> None:
        self._closed = True
        if self._fetching is not None:
            self._fetching.cancel()
            await self._end_of_fetch()
