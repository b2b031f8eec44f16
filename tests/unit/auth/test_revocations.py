"""Revocations that a node has heard of: which tokens they refuse, and what is news."""

from __future__ import annotations

import pytest

from anynode.models.revocations import ALL_USERS, user_hash
from anynode.server.auth import Identity
from anynode.server.auth.revocations import Revocations

ADA, BOB = user_hash("ada"), user_hash("bob")


def is_revoked(revocations: Revocations, user_id: str, issued_at: float) -> bool:
    return revocations.is_revoked(Identity(user_id, 4e9, issued_at=issued_at))


def test_at_first_no_token_is_revoked() -> None:
    assert not is_revoked(Revocations(), "ada", 0.0)


@pytest.mark.parametrize(
    ("user_id", "issued_at", "expected"),
    [
        ("ada", 99.9, True),
        ("ada", 100.0, True),  # a time in whole seconds may have been any in that second
        ("ada", 100.5, False),
        ("ada", 101.0, False),
        ("bob", 50.0, True),
        ("bob", 60.0, False),
        ("Ada", 60.0, False),
    ],
)
def test_tokens_of_a_user_that_were_issued_before_are_revoked(user_id: str, issued_at: float, expected: bool) -> None:
    revocations = Revocations()
    revocations.hear({ADA: 100.25, BOB: 55.0})
    assert is_revoked(revocations, user_id, issued_at) is expected


def test_a_revocation_of_all_users_is_everybodys_and_the_later_one_counts() -> None:
    revocations = Revocations()
    revocations.hear({ALL_USERS: 100.0, ADA: 50.0, BOB: 150.0})
    assert [is_revoked(revocations, user_id, 99.0) for user_id in ("ada", "bob", "eve")] == [True] * 3
    assert [is_revoked(revocations, user_id, 120.0) for user_id in ("ada", "bob", "eve")] == [False, True, False]


def test_a_revocation_is_news_once_and_never_taken_back() -> None:
    told: list[bool] = []
    revocations = Revocations(lambda: told.append(is_revoked(revocations, "ada", 99.0)))
    for news in ({}, {BOB: 1.0}, {ADA: 100.0}, {ADA: 100.0}, {ADA: 50.0, BOB: 1.0}, {ADA: 101.0}):
        revocations.hear(news)
    assert told == [False, True, True]
    assert is_revoked(revocations, "ada", 100.5)
