"""Every error that a client can see: its code, its HTTP status, and whether trying again can help.

The docstring of a class is its message if the code that raises it gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple
from uuid import UUID

RETRY_AFTER_MS: Final = 1000  # where it is not known when trying again will help


class CloseCode(IntEnum):
    """The codes with which the server closes a socket (PROTOCOL.md, "Close codes")."""

    BINARY = 1003
    LIMITS = 1008
    INTERNAL = 1011
    RESTARTING = 1012
    OVERLOADED = 1013
    UNAUTHORIZED = 3000
    FORBIDDEN = 3003
    AUTHENTICATION_TIMEOUT = 3008


class ClientError(Exception):
    """Something went wrong."""

    code: ClassVar[str]
    http_status: ClassVar[int]
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, conversation_id: UUID | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.conversation_id = conversation_id
        super().__init__(self.message)


class Problem(NamedTuple):
    """One fault of a request, with its place: `messages[2].role`."""

    path: str
    message: str


class InvalidFrame(ClientError):
    """The server does not understand the frame."""

    code = "invalid_frame"
    http_status = 422

    def __init__(
        self, message: str | None = None, *, conversation_id: UUID | None = None, problems: Sequence[Problem] = ()
    ) -> None:
        if message is None and problems:
            message = "; ".join(": ".join(filter(None, problem)) for problem in problems)
        super().__init__(message, conversation_id=conversation_id)
        self.problems = problems


class MessageIdTaken(InvalidFrame):
    """`message_id` names a message of another conversation."""

    http_status = 409


class BodyTimeout(InvalidFrame):
    """The body did not arrive in time; send the request again."""

    http_status = 408


class NotFound(ClientError):
    """There is no such conversation."""

    code = "not_found"
    http_status = 404


class ConversationBusy(ClientError):
    """A turn is still running in this conversation."""

    code = "conversation_busy"
    http_status = 409
    retryable = True


class RoleOrder(ClientError):
    """A message of this role may not come next in the conversation."""

    code = "role_order"
    http_status = 409


class MessageTooLarge(ClientError):
    """The message is too large."""

    code = "message_too_large"
    http_status = 413


class RateLimited(ClientError):
    """Too much at once; slow down and try again."""

    code = "rate_limited"
    http_status = 429
    retryable = True

    def __init__(
        self,
        message: str | None = None,
        *,
        conversation_id: UUID | None = None,
        limit: str | None = None,
        limit_max: int | None = None,
        retry_after_ms: int = RETRY_AFTER_MS,
    ) -> None:
        super().__init__(message, conversation_id=conversation_id)
        self.limit = limit  # the name of the limit, as its setting is called in small letters …
        self.limit_max = limit_max  # … and its value
        self.retry_after_ms = retry_after_ms  # trying again cannot help before


class Unauthorized(ClientError):
    """The token is missing, malformed, expired or not signed by a key that this server trusts."""

    code = "unauthorized"
    http_status = 401


class Forbidden(ClientError):
    """This is not allowed."""

    code = "forbidden"
    http_status = 403


class Draining(ClientError):
    """This node is shutting down; reconnect to reach another one."""

    code = "draining"
    http_status = 503
    retryable = True


class DatabaseUnavailable(ClientError):
    """The database does not answer at the moment; nothing was lost, try again."""

    code = "database_unavailable"
    http_status = 503
    retryable = True


class KeysUnavailable(ClientError):
    """The keys that verify tokens cannot be fetched at the moment; try again."""

    code = "keys_unavailable"
    http_status = 503
    retryable = True


class AgentFailed(ClientError):
    """The agent could not produce an answer."""

    code = "agent_failed"
    http_status = 502


class InternalError(ClientError):
    """Something went wrong in the server; its log says more."""

    code = "internal_error"
    http_status = 500
    retryable = True


CLIENT_ERRORS: tuple[type[ClientError], ...] = (
    InvalidFrame,
    NotFound,
    ConversationBusy,
    RoleOrder,
    MessageTooLarge,
    RateLimited,
    Unauthorized,
    Forbidden,
    Draining,
    DatabaseUnavailable,
    KeysUnavailable,
    AgentFailed,
    InternalError,
)
HTTP_ERRORS: tuple[type[ClientError], ...] = (
    *CLIENT_ERRORS,
    BodyTimeout,
    MessageIdTaken,
)  # also the kinds that differ in their status


class ConfigurationError(Exception):
    """The server cannot start with this configuration; the message is one line that says what to change."""
