"""Verifies tokens, and makes those of HS256: the claims, and the identity that follows from them."""

from __future__ import annotations

import math
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import jwt
import msgspec
from jwt.algorithms import HMACAlgorithm

from anynode.models.text import is_storable
from anynode.server.auth.jwks import Jwks
from anynode.server.errors import ConfigurationError, Unauthorized
from anynode.server.limits import LIMIT_MAX, UNLIMITED, Limit, UserLimits
from anynode.server.settings import Settings

if TYPE_CHECKING:
    from jwt.types import Options

TOKEN_CHARACTERS_MAX = 16_384  # twice the header that common proxies let through; longer tokens take longer to decode
USER_ID_CHARACTERS_MAX = 255  # OpenID Connect Core, 2
EMAIL_CHARACTERS_MIN = 3  # a@b
EMAIL_CHARACTERS_MAX = 254  # the longest that fits into a path of SMTP (RFC 5321, 4.5.3.1)
TIME_MAX = 253_402_300_799  # the end of the year 9999; a larger time is in milliseconds by mistake, and breaks datetime

LIMITS_CLAIM: Final = "anynode_limits"
_LIMITS_KIND: Final = (
    f"an object with any of {', '.join(UserLimits.__struct_fields__)}, each an integer from 0 to {LIMIT_MAX}"
)

_EXPLANATIONS: dict[type[Exception], str] = {
    jwt.InvalidIssuerError: "the token is from another issuer (iss)",
    jwt.InvalidSignatureError: "the token's signature is wrong",
    jwt.InvalidAlgorithmError: "the token is signed with an algorithm that its key is not for (alg)",
}
# The times, `sub` and the audience are checked here: PyJWT accepts strings and booleans as times, refuses an iat
# slightly ahead, and knows one claim of an audience.
_OPTIONS: Options = {
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
    "verify_sub": False,
    "verify_aud": False,
}


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

    `on_verified` is called with the identity of each token that is good, whatever it was sent over. `is_revoked` says
    whether a token that is good otherwise was revoked.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        on_verified: Callable[[Identity], object] = _nothing,
        is_revoked: Callable[[Identity], bool] = lambda identity: False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._audience, self._audience_claim = settings.jwt_audience, settings.jwt_audience_claim
        self._issuer, self._leeway_seconds = settings.jwt_issuer, settings.jwt_leeway_seconds
        self._options: Options = {**_OPTIONS, "require": ["exp", "iat", "sub", self._audience_claim, "iss"]}
        self._on_verified, self._is_revoked = on_verified, is_revoked
        self._limits = settings.user_limits
        self._secret = _secret_key(settings.jwt_secret) if settings.jwt_secret else None
        self._jwks = None if settings.jwt_jwks_url is None else Jwks(settings.jwt_jwks_url, monotonic)
        if self._secret is None and self._jwks is None:
            raise ConfigurationError("no token can be verified: set JWT_SECRET or JWT_JWKS_URL")

    async def authenticate(self, token: str) -> Identity:
        """Return the identity that the token proves. Raises Unauthorized, for any string, and KeysUnavailable where the
        key of the token cannot be looked for at the moment."""
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise Unauthorized(f"the token is longer than {TOKEN_CHARACTERS_MAX} characters")
        try:
            key = await self._key_of(token)
            decoded = jwt.decode_complete(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._issuer,
                options=self._options,
            )
        except jwt.MissingRequiredClaimError as error:
            raise Unauthorized(f"the token has no {error.claim} claim") from error
        # PyJWT raises its own errors, and lets some errors of parsing through (more of them before 2.15).
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthorized(_EXPLANATIONS.get(type(error), "the token is malformed")) from error
        if "crit" in decoded["header"]:
            raise Unauthorized("the token needs an extension that this server does not know (crit)")
        identity = self._identity(decoded["payload"])
        self.check(identity)
        self._on_verified(identity)
        return identity

    def check(self, identity: Identity) -> None:
        """Check a token that was verified a while ago once more. Raises Unauthorized if it was revoked meanwhile."""
        if self._is_revoked(identity):
            raise Unauthorized("the token was revoked; log in again")

    async def _key_of(self, token: str) -> jwt.PyJWK:
        # With both configured (development only) the header chooses the key, never the key's algorithm.
        header = {} if self._jwks is None else jwt.get_unverified_header(token)
        if self._secret is not None and (self._jwks is None or header.get("alg") == "HS256"):
            return self._secret
        assert self._jwks is not None  # __init__ makes sure of it
        key = await self._jwks.find(header.get("kid"))
        return _ed25519(key) if header.get("alg") == "Ed25519" and key.algorithm_name == "EdDSA" else key

    def _identity(self, claims: dict[str, Any]) -> Identity:
        audience = claims[self._audience_claim]
        is_list = self._audience_claim == "aud" and isinstance(audience, list)  # RFC 7519, 4.1.3
        if self._audience not in (audience if is_list else (audience,)):
            raise Unauthorized(f"the token is for another audience ({self._audience_claim})")
        times = {name: _time(name, claims[name]) for name in ("exp", "iat", "nbf") if name in claims}
        now = time.time()
        if times["exp"] <= now:
            raise Unauthorized("the token has expired")
        if times.get("nbf", 0.0) > now + self._leeway_seconds:
            raise Unauthorized("the token is not valid yet (nbf)")
        if times["iat"] > now + self._leeway_seconds:
            raise Unauthorized("the token was issued in the future (iat): the clock of its issuer is ahead")
        user_id = claims["sub"]  # this also refuses NUL and lone surrogates, which Postgres cannot store
        if not (isinstance(user_id, str) and 0 < len(user_id) <= USER_ID_CHARACTERS_MAX and user_id.isprintable()):
            raise Unauthorized(f"the token's sub claim must be 1 to {USER_ID_CHARACTERS_MAX} printable characters")
        email = claims.get("email")
        limits = limits_of(claims[LIMITS_CLAIM], self._limits) if LIMITS_CLAIM in claims else self._limits
        return Identity(user_id, times["exp"], email if is_email(email) else None, times["iat"], limits)

    @property
    def has_keys(self) -> bool:
        """Whether tokens can be verified: a JWKS has been fetched, or none is needed."""
        return self._jwks is None or self._secret is not None or self._jwks.has_keys

    async def run(self) -> None:
        """Keep the keys of a JWKS fresh, for ever; return at once where there is none."""
        if self._jwks is not None:
            await self._jwks.run()

    async def close(self) -> None:
        if self._jwks is not None:
            await self._jwks.close()


def make_token(
    secret: str,
    *,
    user_id: str,
    audience: str,
    issuer: str,
    ttl_seconds: float,
    audience_claim: str = "aud",
    email: str | None = None,
    limits: Mapping[str, int] | None = None,
) -> str:
    """Return an HS256 token for the user, valid from now on.

    `iat` has milliseconds, so that a token that is made right after a revocation is good.
    """
    now = time.time()
    claims: dict[str, Any] = {"sub": user_id, audience_claim: audience, "iss": issuer}
    claims |= {"iat": math.floor(now * 1000) / 1000, "exp": round(now + ttl_seconds, 3)}
    if email is not None:
        claims["email"] = email
    if limits is not None:
        claims[LIMITS_CLAIM] = dict(limits)
    return jwt.encode(claims, secret, algorithm="HS256")


def _time(name: str, value: object) -> float:
    # Python reads NaN, 1e400 and integers beyond any float as numbers, and True as an int
    if isinstance(value, bool) or not isinstance(value, int | float) or not -TIME_MAX <= value <= TIME_MAX:
        raise Unauthorized(f"the token's {name} claim must be a time in Unix seconds")
    return float(value)


def limits_of(claim: object, defaults: UserLimits) -> UserLimits:
    """Return the limits of a claim; those that it does not name are the defaults. Raises Unauthorized."""
    try:
        given = msgspec.convert(claim, dict[str, Limit])
        return msgspec.convert({**msgspec.structs.asdict(defaults), **given}, UserLimits)
    except (msgspec.ValidationError, OverflowError) as error:
        raise Unauthorized(f"the token's {LIMITS_CLAIM} claim must be {_LIMITS_KIND}") from error


def _ed25519(key: jwt.PyJWK) -> jwt.PyJWK:
    """Return the same key for a token whose header calls EdDSA with this curve by its newer name (RFC 9864)."""
    twin = copy(key)
    twin.algorithm_name = "Ed25519"
    return twin


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
