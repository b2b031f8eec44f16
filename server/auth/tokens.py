"""Verifies tokens, and makes those of HS256: the claims, and the identity that follows from them."""

from __future__ import annotations

import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jwt
from jwt.algorithms import HMACAlgorithm

from anynode.models.text import is_storable
from anynode.server.auth.jwks import Jwks
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
        self._jwks = None if settings.jwt_jwks_url is None else Jwks(settings.jwt_jwks_url, monotonic)
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
