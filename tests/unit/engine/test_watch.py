"""The watch: from where on a node asks what others have done, and what it does with the answers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from anynode.models.database import Database, Unavailable
from anynode.models.revocations import user_hash
from anynode.models.turns import News
from anynode.server.auth import Identity
from anynode.server.auth.revocations import Revocations
from anynode.server.engine import watch as module
from anynode.server.engine.follow import Follows
from anynode.server.engine.running_turns import RunningTurns
from anynode.server.engine.watch import BEGUN_MAX, Horizon, hear_cluster
from tests.kit.turns import CONVERSATION, OTHER_TURN, TURN

BEGUN = {CONVERSATION: 7}
MANY = {UUID(int=number): number for number in range(BEGUN_MAX)}


def news(
    horizon: int,
    begun: dict[UUID, int] | None = None,
    to_cancel: tuple[UUID, ...] = (),
    revoked: dict[str, float] | None = None,
) -> News:
    return News(horizon, to_cancel, BEGUN if begun is None else begun, revoked or {})


def heard(horizon: int = 100, at: float = 1000.0) -> Horizon:
    """A horizon that a first watch has been heard of."""
    made = Horizon()
    made.hear(news(horizon), at)
    return made


# The horizon.


def test_the_first_watch_asks_from_nowhere_and_everything_is_looked_at() -> None:
    horizon = Horizon()
    assert horizon.since(1000.0) is None
    assert horizon.hear(news(100), 1000.0) is None


def test_the_next_watch_asks_from_the_horizon_of_the_one_before() -> None:
    horizon = heard(100, 1000.0)
    assert horizon.since(1000.25) == 100
    assert horizon.hear(news(105), 1000.25) == BEGUN
    assert horizon.since(1000.5) == 105


def test_a_horizon_that_stays_is_no_gap() -> None:
    horizon = heard(100)
    assert horizon.hear(news(100, {}), 1000.25) == {}


def test_a_horizon_that_goes_back_is_another_servers_and_everything_is_looked_at() -> None:
    horizon = heard(100)
    assert horizon.hear(news(99), 1000.25) is None
    assert horizon.since(1000.5) == 99
    assert horizon.hear(news(101), 1000.5) == BEGUN


def test_more_news_than_one_answer_tells_is_a_gap() -> None:
    horizon = heard(100)
    assert horizon.hear(news(101, MANY), 1000.25) is None
    fewer = dict(list(MANY.items())[:-1])
    assert horizon.hear(news(102, fewer), 1000.5) == fewer


def test_more_revocations_than_one_answer_tells_are_a_gap() -> None:
    many = {str(number): 1.0 for number in range(BEGUN_MAX)}
    assert heard(100).hear(news(101, revoked=many), 1000.25) is None
    many.popitem()
    assert heard(100).hear(news(101, revoked=many), 1000.25) == BEGUN


@pytest.mark.parametrize(("seconds", "since"), [(29.9, 100), (30.0, 100), (30.1, None), (3600.0, None)])
def test_a_process_that_was_frozen_asks_from_nowhere(seconds: float, since: int | None) -> None:
    horizon = heard(100, 1000.0)
    assert horizon.since(1000.0 + seconds) == since
    assert (horizon.hear(news(101), 1000.0 + seconds) is None) == (since is None)


def test_time_counts_from_when_a_watch_was_asked_for() -> None:
    horizon = heard(100, 1000.0)
    horizon.since(1029.0)
    horizon.hear(news(101), 1029.0)  # however late the answer came
    assert horizon.since(1058.0) == 101


def test_after_a_watch_that_failed_everything_is_looked_at() -> None:
    horizon = heard(100)
    horizon.lose()
    assert horizon.since(1000.25) is None
    assert horizon.hear(news(101), 1000.25) is None
    assert horizon.hear(news(102), 1000.5) == BEGUN


# The watch.


class Done(Exception):
    """The script is over."""


class Cluster:
    """What watches answer, one after the other, and what became of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[News | Exception] = []
        self.asked_since: list[int | None] = []
        self.did: list[object] = []
        self.pauses: list[float] = []
        self.now = 1000.0
        self.took = 0.0  # seconds, of each watch
        self.pages: list[dict[str, float] | Exception] = []  # of all revocations
        self.revocations = Revocations()
        monkeypatch.setattr(module, "watch", self._watch)
        monkeypatch.setattr(module, "read_revocations", self._read_revocations)
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=self._sleep))
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    async def hear(self, *answers: News | Exception) -> None:
        self.answers = list(answers)
        running = SimpleNamespace(cancel=lambda: self.did.append("cancel"))
        turns = SimpleNamespace(get=lambda turn_id: running if turn_id == TURN else None)
        follows = SimpleNamespace(hear=self.did.append, look_again=lambda: self.did.append("look again"))
        with pytest.raises(Done):
            await hear_cluster(
                cast(Database, SimpleNamespace(run=print)),
                "node-1",
                cast(RunningTurns, turns),
                cast(Follows, follows),
                self.revocations,
            )

    async def _watch(self, database: Database, *, node: str, since: int | None, **bounds: Any) -> News:
        assert (node, bounds) == ("node-1", {"limit": BEGUN_MAX, "within_seconds": 2.0})
        self.asked_since.append(since)
        self.now += self.took
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _read_revocations(self, fetch: object) -> AsyncIterator[dict[str, float]]:
        pages, self.pages = self.pages, []
        for page in pages:
            if isinstance(page, Exception):
                raise page
            yield page

    def refuses(self, *user_ids: str) -> list[bool]:
        """Whether tokens of these users, issued at 99, are revoked."""
        return [self.revocations.is_revoked(Identity(user_id, 4e9, issued_at=99.0)) for user_id in user_ids]

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        if not self.answers:
            raise Done


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


async def test_followers_look_at_everything_first_and_then_hear_what_has_begun(cluster: Cluster) -> None:
    await cluster.hear(news(100), news(101), news(102, {}))
    assert cluster.asked_since == [None, 100, 101]
    assert cluster.did == ["look again", BEGUN, {}]


async def test_turns_of_this_node_that_are_to_be_cancelled_are_cancelled(cluster: Cluster) -> None:
    await cluster.hear(news(100, {}, (OTHER_TURN, TURN)))
    assert cluster.did == ["cancel", "look again"]


async def test_a_watch_waits_for_postgres_and_then_looks_at_everything(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        await cluster.hear(news(100), Unavailable("OSError: refused"), news(101), KeyError("broken"), news(102))
    assert cluster.asked_since == [None, 100, None, 101, None]
    assert cluster.did == ["look again"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "the watch waits for Postgres: OSError: refused",
        "a watch failed",
    ]


@pytest.mark.parametrize(("took", "pause"), [(0.0, 0.25), (0.2, 0.05), (3.0, 0.0)])
async def test_watches_begin_four_times_a_second_where_they_can(cluster: Cluster, took: float, pause: float) -> None:
    cluster.took = took
    await cluster.hear(news(100), news(101))
    assert cluster.pauses == pytest.approx([pause, pause])


async def test_all_revocations_are_read_first_and_then_heard_of_one_by_one(cluster: Cluster) -> None:
    cluster.pages = [{user_hash("ada"): 100.0}, {user_hash("bob"): 100.0}]
    await cluster.hear(news(100))
    assert cluster.refuses("ada", "bob", "eve") == [True, True, False]
    await cluster.hear(news(101), news(102, revoked={user_hash("eve"): 100.0}))
    assert cluster.refuses("ada", "bob", "eve") == [True] * 3


async def test_where_they_cannot_be_read_after_a_gap_the_next_watch_begins_anew(cluster: Cluster) -> None:
    cluster.pages = [{user_hash("ada"): 100.0}, Unavailable("OSError: refused")]
    await cluster.hear(news(100), news(101), news(102))
    assert cluster.asked_since == [None, None, 101]
    assert cluster.refuses("ada") == [True]
