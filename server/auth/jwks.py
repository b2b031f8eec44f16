"""The public keys of a JWKS address: which of them verify tokens, and when they are fetched.

The times, which README.md ("Authentication") promises: a set is fetched again after 10 minutes, so a withdrawn key is
good for at most that long. A key that no set had when its first token came is looked for at once, or, where the node
has just looked for another one, when 10 seconds have passed since then: so a made-up `kid` makes a node ask its issuer
six times a minute at most, and keeps a new key waiting for 10 seconds at most. A set that could not be fetched again
for a day is no longer trusted.

A token is refused for good only where a set that was fetched after the token came has no such key. Until then the
client is told to come back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

import jwt

from anynode.server.errors import KeysUnavailable, Unauthorized

JWKS_SECONDS_MAX: Final = 3.0  # for a whole fetch, because a client is waiting to connect
JWKS_BYTES_MAX: Final = 1_048_576  # real sets have a few KiB
JWKS_FRESH_SECONDS: Final = 600.0  # how late a withdrawn key is noticed
JWKS_FAILED_SECONDS: Final = 30.0  # after a fetch that failed, where there are older keys
JWKS_RETRY_SECONDS: Final = 1.0  # … and where there are none: nobody can connect
JWKS_COOLDOWN_SECONDS: Final = 10.0  # an invented kid must not make nodes ask the issuer again and again
JWKS_TRUSTED_SECONDS: Final = 86_400.0  # keys that were not confirmed for longer may have been withdrawn
KIDS_MAX: Final = 1000  # unknown ones that are remembered; any further one is told to come back once more
RSA_BITS_MIN: Final = 2048  # RFC 7518, 3.3

# The algorithms and the public members of each (kty, crv); private members are never loaded. The first algorithm is
# that of a key without `alg`. Any other is used only where the key's `alg` says so.
_KINDS: Final = {
    ("RSA", None): (("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), ("n", "e")),
    ("EC", "P-256"): (("ES256",), ("crv", "x", "y")),
    ("EC", "P-384"): (("ES384",), ("crv", "x", "y")),
    ("OKP", "Ed25519"): (("EdDSA",), ("crv", "x")),
}
_NAMES: Final = {"Ed25519": "EdDSA"}  # RFC 9864 gives it this name; PyJWT has the older one (RFC 8037)

logger = logging.getLogger("anynode.auth")


def signing_keys(body: bytes) -> list[jwt.PyJWK]:
    """Return the keys of a JWKS that verify tokens. Raises ValueError when there are none."""
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
        algorithms, members = _KINDS[entry["kty"], entry.get("crv")]
        intended = entry.get("use", "sig") == "sig" and "verify" in entry.get("key_ops", ("verify",))
        algorithm = entry.get("alg", algorithms[0])
        algorithm = _NAMES.get(algorithm, algorithm)
        if not intended or algorithm not in algorithms:
            return None
        key = jwt.PyJWK({name: entry.get(name) for name in ("kid", "kty", *members)}, algorithm)
    except (jwt.PyJWTError, LookupError, TypeError, ValueError, AttributeError):
        return None  # one bad key must not spoil the others
    return None if entry["kty"] == "RSA" and key.key.key_size < RSA_BITS_MIN else key


class Schedule:
    """When the keys are fetched, and which unknown ones have been looked for. Given the time; no I/O."""

    def __init__(self) -> None:
        self._fetched_at = self._tried_at = self._looked_at = -math.inf
        self._asked: set[int] = set()  # hashes of unknown kids, since the last fetch began …
        self._sought: set[int] = set()  # … those that the fetch that is under way looks for …
        self._absent: set[int] = set()  # … and those that a set did not have

    def is_trusted(self, now: float) -> bool:
        """Return whether the keys that were fetched last are still good."""
        return now < self._fetched_at + JWKS_TRUSTED_SECONDS

    def due_at(self, now: float) -> float:
        """Return when a fetch is due (a time that may have passed)."""
        if not self.is_trusted(now):
            return self._tried_at + JWKS_RETRY_SECONDS
        due_at = max(self._fetched_at + JWKS_FRESH_SECONDS, self._tried_at + JWKS_FAILED_SECONDS)
        return min(due_at, self._looked_at + JWKS_COOLDOWN_SECONDS) if self._asked else due_at

    def ask(self, kid: str | None) -> None:
        """Note that a key is wanted that is not there."""
        if len(self._asked) < KIDS_MAX:
            self._asked.add(hash(kid))

    def is_absent(self, kid: str | None) -> bool:
        """Return whether a set was fetched since the key was first wanted, and did not have it."""
        return hash(kid) in self._absent

    def begin(self, now: float) -> None:
        """Note that a fetch begins."""
        if self._asked and self.is_trusted(now):
            self._looked_at = now
        self._tried_at = now
        self._sought, self._asked = self._asked, set()

    def end(self, now: float, kids: Iterable[str | None]) -> None:
        """Note that the fetch has brought the keys of these ids."""
        self._fetched_at = now
        present = {hash(kid) for kid in kids}
        self._asked -= present
        absent = self._sought if len(self._absent) >= KIDS_MAX else self._absent | self._sought
        self._absent = absent - present

    def fail(self) -> None:
        """Note that the fetch has failed: what it looked for is still wanted."""
        self._asked = set(islice(self._asked | self._sought, KIDS_MAX))


class Jwks:
    """The keys of one address. All callers share one fetch; when it fails, the older keys stay in use for a day."""

    def __init__(self, url: str, monotonic: Callable[[], float]) -> None:
        self._url, self._monotonic = url, monotonic
        self._keys: list[jwt.PyJWK] = []
        self._schedule = Schedule()
        self._fetching: asyncio.Task[None] | None = None
        self._has_changed = asyncio.Event()
        self._last_warning = ""
        self._closed = False

    @property
    def has_keys(self) -> bool:
        """Whether there are keys that can be trusted."""
        return bool(self._keys) and self._schedule.is_trusted(self._monotonic())

    async def run(self) -> None:
        """Fetch the keys whenever a fetch is due, for ever."""
        while not self._closed:
            now = self._monotonic()
            due_in = self._schedule.due_at(now) - now
            if due_in <= 0:
                self._start_fetch(now)
                await self._end_of_fetch()
                continue
            self._has_changed.clear()
            try:
                async with asyncio.timeout(due_in):
                    await self._has_changed.wait()
            except TimeoutError:
                pass

    async def find(self, kid: str | None) -> jwt.PyJWK:
        """Return the key of this id. Raises Unauthorized where there is none, and KeysUnavailable where that cannot be
        known at the moment."""
        now = self._monotonic()
        key = self._pick(kid)
        if key is None:
            self._schedule.ask(kid)
            self._has_changed.set()
        if now >= self._schedule.due_at(now):
            self._start_fetch(now)  # a caller that has found its key does not wait for it
        if key is None:
            await self._end_of_fetch()
            key = self._pick(kid)
        if key is not None:
            return key
        if not self.has_keys:
            raise KeysUnavailable("The signing keys cannot be fetched at the moment; try again.")
        if self._schedule.is_absent(kid):
            raise Unauthorized("the signing key is unknown")
        raise KeysUnavailable("The signing key is not known yet; try again.")

    def _pick(self, kid: str | None) -> jwt.PyJWK | None:
        if not self.has_keys:
            return None
        if kid is None and len(self._keys) > 1:
            raise Unauthorized("the token does not say which key signed it (kid)")
        return next((key for key in self._keys if kid is None or key.key_id == kid), None)

    def _start_fetch(self, now: float) -> None:
        if self._fetching is None and not self._closed:
            self._schedule.begin(now)
            self._fetching = asyncio.create_task(self._fetch())

    async def _end_of_fetch(self) -> None:
        # wait() and not await: a caller that is cancelled must not end the fetch for the others
        if self._fetching is not None:
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
            self._keys = signing_keys(bytes(body))
            self._schedule.end(self._monotonic(), [key.key_id for key in self._keys])
            self._last_warning = ""
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._schedule.fail()
            self._warn(f"{type(error).__name__}: {error}")
        except BaseException:
            self._schedule.fail()
            raise
        finally:
            self._fetching = None
            self._has_changed.set()

    def _warn(self, words: str) -> None:
        if words != self._last_warning:  # a node without keys tries again every second
            self._last_warning = words
            logger.warning("the signing keys were not fetched: %s", words)

    async def close(self) -> None:
        """End the fetch that is under way; its callers are refused."""
        self._closed = True
        if self._fetching is not None:
            self._fetching.cancel()
            await self._end_of_fetch()
