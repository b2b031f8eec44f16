"""Tokens: which user a token speaks for.

`tokens` verifies HS256 with a shared secret, and other algorithms with the keys that `jwks` fetches. `headers` finds
the token of a request. The package imports settings, errors and limits, nothing of the engine or above.

Invariant: a key is only ever used with the one algorithm that belongs to it, whatever a token's header asks for.
"""

from anynode.server.auth.headers import bearer_of, token_of_subprotocols
from anynode.server.auth.jwks import signing_keys
from anynode.server.auth.tokens import (
    EMAIL_CHARACTERS_MAX,
    LIMITS_CLAIM,
    TOKEN_CHARACTERS_MAX,
    USER_ID_CHARACTERS_MAX,
    Authenticator,
    Identity,
    is_email,
    limits_of,
    make_token,
)

__all__ = [
    "EMAIL_CHARACTERS_MAX",
    "LIMITS_CLAIM",
    "TOKEN_CHARACTERS_MAX",
    "USER_ID_CHARACTERS_MAX",
    "Authenticator",
    "Identity",
    "bearer_of",
    "is_email",
    "limits_of",
    "make_token",
    "signing_keys",
    "token_of_subprotocols",
]
