"""Verifies tokens: HS256 with a shared secret, or RS256 and ES256 with the keys of a JWKS address.

Invariant: a key is only ever used with the one algorithm that belongs to it, whatever a token's header asks for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jwt
from jwt.algorithms import HMACAlgorithm

from anynode.models.text import is_storable
from anynode.server.errors import ConfigurationError, Unauthorized
from anynode.server.limits import UNLIMITED, UserLimits
from anynode.server.settings import Settings

if TYPE_CHECKING:
    from jwt.types import Options

TOKEN_CHARACTERS_MAX = 16_384  # twice the header that common proxies let through; longer tokens take longer to decode
USER_ID_CHARACTERS_MAX = 255  # OpenID Connect Core, 2
EMAIL_CHARACTERS_MIN = 3  # a@b
EMAIL_CHARACTERS_MAX = 254  # the longest that fits into a path of SMTP (RFC 5321, 4.5.3.1)
TIME_MAX = 253_402_300_799  # the end of the year 9999; a larger time is in milliseconds by mistake, and breaks datetime
JWKS_SECONDS_MAX = 3.0  # for a whole fetch, because a client is waiting to connect
JWKS_BYTES_MAX = 1_048_576  # real sets have a few KiB
JWKS_FRESH_SECONDS = 600.0  # how late a withdrawn key is noticed
JWKS_COOLDOWN_SECONDS = 30.0  # an invented kid must not make nodes ask the issuer again and again
JWKS_RETRY_SECONDS = 1.0  # shorter, because nobody can connect before the first fetch
RSA_BITS_MIN = 2048  # RFC 7518, 3.3

# The algorithm and the public members of each (kty, crv); private members are never loaded.
_KINDS = {("RSA", None): ("RS256", ("n", "e")), ("EC", "P-256"): ("ES256", ("crv", "x", "y"))}
_EXPLANATIONS: dict[type[Exception], str] = {
    jwt.InvalidAudienceError: "the token is for another audience (aud)",
    jwt.InvalidIssuerError: "the token is from another issuer (iss)",
    jwt.ImmatureSignatureError: "the token is not valid yet (nbf)",
    jwt.InvalidSignatureError: "the token's signature is wrong",
    jwt.InvalidAlgorithmError: "the token is signed with an algorithm that its key is not for (alg)",
}
# `_identity` checks exp, iat and sub: PyJWT accepts strings and booleans as times, and refuses an iat slightly ahead.
_OPTIONS: Options = {
    "require": ["exp", "iat", "sub", "aud", "iss"],
    "verify_exp": False,
    "verify_iat": False,
    "verify_sub": False,
}
logger = logging.getLogger("anynode.auth")


@dataclass(frozen=True, slots=True)
class Identity:
    """The user that a token names, when the token expires and was issued (Unix seconds), the e-mail address in it, if
    any, and what the user may have and spend."""

    user_id: str
    expires_at: float
    email: str | None = None
    issued_at: float = 0.0
    limits: UserLimits = UNLIMITED


def _nothing(identity: Identity) -> None:
    pass


class Authenticator:
    """Verifies tokens. Raises ConfigurationError where the settings hold no usable secret and no JWKS address.

    `on_verified` is called with the identity of each token that is good, whatever it was sent over.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_verified: Callable[[Identity], object] = _nothing,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._audience, self._issuer = settings.jwt_audience, settings.jwt_issuer
        self._on_verified = on_verified
        self._limits = settings.user_limits
        self._secret = _secret_key(settings.jwt_secret) if settings.jwt_secret else None
        self._jwks = None if settings.jwt_jwks_url is None else _Jwks(settings.jwt_jwks_url, monotonic)
        if self._secret is None and self._jwks is None:
            raise ConfigurationError("no token can be verified: set JWT_SECRET or JWT_JWKS_URL")

    async def authenticate(self, token: str) -> Identity:
        """Return the identity that the token proves. Raises only Unauthorized, for any string."""
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise Unauthorized(f"the token is longer than {TOKEN_CHARACTERS_MAX} characters")
        try:
            key = await self._key_of(token)
            decoded = jwt.decode_complete(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                options=_OPTIONS,
            )
        except jwt.MissingRequiredClaimError as error:
            raise Unauthorized(f"the token has no {error.claim} claim") from error
        # PyJWT raises its own errors, and lets some errors of parsing through (more of them before 2.15).
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthorized(_EXPLANATIONS.get(type(error), "the token is malformed")) from error
        if "crit" in decoded["header"]:
            raise Unauthorized("the token needs an extension that this server does not know (crit)")
        identity = replace(_identity(decoded["payload"]), limits=self._limits)
        self._on_verified(identity)
        return identity

    async def _key_of(self, token: str) -> jwt.PyJWK:
        # With both configured (development only) the header chooses the key, never the key's algorithm.
        header = {} if self._jwks is None else jwt.get_unverified_header(token)
        if self._secret is not None and (self._jwks is None or header.get("alg") == "HS256"):
            return self._secret
        assert self._jwks is not None  # __init__ makes sure of it
        return await self._jwks.find(header.get("kid"))

    async def close(self) -> None:
        if self._jwks is not None:
            await self._jwks.close()


def make_token(
    secret: str, *, user_id: str, audience: str, issuer: str, ttl_seconds: float, email: str | None = None
) -> str:
    """Return an HS256 token for the user, valid from now on."""
    now = time.time()
    claims = {"sub": user_id, "aud": audience, "iss": issuer, "iat": int(now), "exp": round(now + ttl_seconds, 3)}
    if email is not None:
        claims["email"] = email
    return jwt.encode(claims, secret, algorithm="HS256")


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


def _identity(claims: dict[str, Any]) -> Identity:
    for name in ("exp", "iat"):
        value = claims[name]  # Python reads NaN, 1e400 and integers beyond any float as numbers, and True as an int
        if isinstance(value, bool) or not isinstance(value, int | float) or not -TIME_MAX <= value <= TIME_MAX:
            raise Unauthorized(f"the token's {name} claim must be a time in Unix seconds")
    if claims["exp"] <= time.time():
        raise Unauthorized("the token has expired")
    user_id = claims["sub"]  # this also refuses NUL and lone surrogates, which Postgres cannot store
    if not (isinstance(user_id, str) and 0 < len(user_id) <= USER_ID_CHARACTERS_MAX and user_id.isprintable()):
        raise Unauthorized(f"the token's sub claim must be 1 to {USER_ID_CHARACTERS_MAX} printable characters")
    email = claims.get("email")
    return Identity(user_id, float(claims["exp"]), email if is_email(email) else None, float(claims["iat"]))


def is_email(value: object) -> bool:
    """Return whether a token's `email` is one that is stored. What only looks like an address is not found out."""
    return (
        isinstance(value, str)
        and EMAIL_CHARACTERS_MIN <= len(value) <= EMAIL_CHARACTERS_MAX
        and value.count("@") == 1
        and is_storable(value)
    )


def _secret_key(secret: str) -> jwt.PyJWK:
    try:
        raw = HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except (jwt.InvalidKeyError, UnicodeEncodeError) as error:
        raise ConfigurationError("JWT_SECRET must be random text, not a public key or a certificate") from error
    return jwt.PyJWK({"kty": "oct", "k": urlsafe_b64encode(raw).decode().rstrip("=")}, "HS256")


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


class _Jwks:
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
