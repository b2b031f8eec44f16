"""The limits of users as the database takes them, and what people are told at each of them."""

from __future__ import annotations

import json
from uuid import uuid4

import pytest

from anynode.models.usage import ReachedLimit
from anynode.server.engine.user_limits import limits_in_force, refused_by
from anynode.server.limits import UNLIMITED, UserLimits
from anynode.server.settings import Settings

NAMES = {
    "turns_per_user_max": 20,
    "turns_per_user_per_minute": 60,
    "tokens_per_user_per_day": 10_000_000,
    "conversations_per_user_max": 100_000,
    "messages_per_user_bytes_max": 1_073_741_824,
}


def test_the_limits_of_the_settings_are_in_force_by_their_names() -> None:
    settings = Settings()
    in_force = limits_in_force(settings.user_limits, settings)
    assert in_force.by_name == NAMES == {name: getattr(settings, name) for name in NAMES}
    assert json.loads(in_force.json or "") == NAMES


def test_a_tokens_own_limits_take_the_place_of_those_of_the_settings() -> None:
    in_force = limits_in_force(UserLimits(turns=2, turns_per_minute=3, tokens_per_day=4), Settings())
    assert list(in_force.by_name.values())[:3] == [2, 3, 4]


def test_a_limit_of_0_is_off_and_without_any_nothing_is_counted() -> None:
    quotas_off = Settings(conversations_per_user_max=0, messages_per_user_bytes_max=0)
    assert limits_in_force(UserLimits(turns_per_minute=3), quotas_off).by_name == {"turns_per_user_per_minute": 3}
    assert limits_in_force(UNLIMITED, quotas_off).json is None
    assert limits_in_force(None, Settings()).json is None


@pytest.mark.parametrize(
    ("name", "retry_after_ms", "said"),
    [
        ("turns_per_user_max", 1000, "At most 20 of your turns run at once; wait until one has ended."),
        ("turns_per_user_per_minute", 11_001, "At most 60 of your turns begin within a minute; try again in 12 s."),
        ("turns_per_user_per_minute", 119_000, "At most 60 of your turns begin within a minute; try again in 119 s."),
        (
            "tokens_per_user_per_day",
            119_001,
            "Your turns have spent the 10000000 tokens of this day (UTC); try again in 2 min.",
        ),
        (
            "tokens_per_user_per_day",
            7_260_000,
            "Your turns have spent the 10000000 tokens of this day (UTC); try again in 2 h 1 min.",
        ),
        ("conversations_per_user_max", 60_000, "You have 100000 conversations, and more are not stored; delete some."),
        (
            "messages_per_user_bytes_max",
            60_000,
            "Your conversations have 1073741824 bytes, and more are not stored; delete some.",
        ),
    ],
)
def test_a_refusal_says_which_limit_it_is_and_when_to_try_again(name: str, retry_after_ms: int, said: str) -> None:
    conversation_id, settings = uuid4(), Settings()
    in_force = limits_in_force(settings.user_limits, settings)
    refused = refused_by(ReachedLimit(name, retry_after_ms), in_force, conversation_id)
    assert refused.message == said
    assert (refused.limit, refused.limit_max, refused.retry_after_ms) == (name, NAMES[name], retry_after_ms)
    assert refused.conversation_id == conversation_id


def test_a_quota_that_another_caller_measures_at_the_moment_is_asked_for_again_soon() -> None:
    settings = Settings()
    in_force = limits_in_force(settings.user_limits, settings)
    assert refused_by(ReachedLimit("conversations_per_user_max", 0), in_force).retry_after_ms == 1000
