"""The limits of users as the database takes them, and the refusal where it says that one was reached. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from uuid import UUID

from anynode.models.usage import ReachedLimit
from anynode.server.errors import RETRY_AFTER_MS, RateLimited
from anynode.server.limits import UserLimits
from anynode.server.protocol.encoding import encode
from anynode.server.settings import Settings

# What people are told at each limit, by the name of its setting.
_MESSAGES: Final = {
    "turns_per_user_max": "At most {max} of your turns run at once; wait until one has ended.",
    "turns_per_user_per_minute": "At most {max} of your turns begin within a minute; try again in {wait}.",
    "tokens_per_user_per_day": "Your turns have spent the {max} tokens of this day (UTC); try again in {wait}.",
    "conversations_per_user_max": "You have {max} conversations, and more are not stored; delete some.",
    "messages_per_user_bytes_max": "Your conversations have {max} bytes, and more are not stored; delete some.",
}


@dataclass(frozen=True, slots=True)
class LimitsInForce:
    """The limits of a user that are not off, by the names of their settings. `json` is how the database takes them;
    without a limit it is None, and nothing is counted."""

    by_name: Mapping[str, int]
    json: str | None


def limits_in_force(limits: UserLimits | None, settings: Settings) -> LimitsInForce:
    """Return the limits for the turns of a user, and for what the user stores. There are none for code in this process
    (None)."""
    if limits is None:
        return LimitsInForce({}, None)
    return _in_force(limits, settings.conversations_per_user_max, settings.messages_per_user_bytes_max)


@lru_cache(maxsize=1024)  # there are few kinds of users
def _in_force(limits: UserLimits, conversations_max: int, bytes_max: int) -> LimitsInForce:
    every = {
        "turns_per_user_max": limits.turns,
        "turns_per_user_per_minute": limits.turns_per_minute,
        "tokens_per_user_per_day": limits.tokens_per_day,
        "conversations_per_user_max": conversations_max,
        "messages_per_user_bytes_max": bytes_max,
    }
    by_name = {name: limit for name, limit in every.items() if limit > 0}
    return LimitsInForce(by_name, encode(by_name) if by_name else None)


def refused_by(reached: ReachedLimit, limits: LimitsInForce, conversation_id: UUID | None = None) -> RateLimited:
    """Return the refusal for a limit that was reached."""
    limit_max = limits.by_name[reached.name]
    retry_after_ms = reached.retry_after_ms or RETRY_AFTER_MS  # 0: another caller is measuring what the user stores
    message = _MESSAGES[reached.name].format(max=limit_max, wait=_duration(retry_after_ms))
    return RateLimited(
        message,
        conversation_id=conversation_id,
        limit=reached.name,
        limit_max=limit_max,
        retry_after_ms=retry_after_ms,
    )


def _duration(milliseconds: int) -> str:
    """Return a time as people say it: rounded up to seconds, to minutes from two minutes on."""
    seconds = -(-milliseconds // 1000)
    if seconds < 120:
        return f"{seconds} s"
    minutes = -(-seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
