"""How followers get what is committed: from a log where the turn runs here, and else from Postgres, read together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import cast
from uuid import UUID

import pytest

from anynode.models.conversations import Snapshot
from anynode.models.database import Database, Unavailable
from anynode.models.events import Event, Reading
from anynode.server.engine import follow as module
from anynode.server.engine.follow import Follows, Update
from anynode.server.engine.held import HELD_PER_USER_MAX
from anynode.server.errors import NotFound

CONVERSATION = UUID("018f0000-0000-7000-8000-000000000001")
OTHER = UUID("018f0000-0000-7000-8000-000000000002")
NO_DATABASE = cast(Database, None)


def events(*seqs: int, last: str = "turn.delta") -> list[Event]:
    """Events with these seqs, the last of them of this type."""
    made = [Event(seq, "turn.delta", "t", "{}") for seq in seqs]
    if made:
        made[-1].type = last
    return made


class Postgres:
    """Conversations of one user, and who reads them how."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_running = False
        self.is_broken = False
        self.snapshots = 0
        self.reads: asyncio.Queue[int] = asyncio.Queue()  # cursors that followers read from
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fault: Exception | None = None
        # What is read of turns that run on other nodes: the cursors, and the answer that the test gives.
        self.polls: asyncio.Queue[tuple[Mapping[UUID, int], asyncio.Future[dict[UUID, Reading]]]] = asyncio.Queue()

    async def read_events(
        self, database: Database, user_id: str, conversation_id: UUID, after: int, *, limit: int
    ) -> Reading | None:
        if user_id != "user":
            return None
        found = [event for event in self.events if event.seq > after]
        reading = Reading(found, self.is_broken, True, self.is_running)
        await self.reads.put(after)
        await self.may_answer.wait()
        if self.fault is not None:
            raise self.fault
        return reading

    async def read_running(
        self, database: Database, cursors: Mapping[UUID, int], *, limit: int, within_seconds: float
    ) -> dict[UUID, Reading]:
        answer: asyncio.Future[dict[UUID, Reading]] = asyncio.get_running_loop().create_future()
        await self.polls.put((dict(cursors), answer))
        return await answer

    async def read_snapshot(
        self, database: Database, user_id: str, conversation_id: UUID, *, messages_max: int
    ) -> Snapshot | None:
        self.snapshots += 1
        await self.may_answer.wait()
        return Snapshot(50, None, "", []) if user_id == "user" else None


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Postgres:
    """Postgres, in its place."""
    made = Postgres()
    for name in ("read_events", "read_running", "read_snapshot"):
        monkeypatch.setattr(module, name, getattr(made, name))
    monkeypatch.setattr(module, "READ_SECONDS", 0.0)
    return made


@pytest.fixture
async def follows(postgres: Postgres) -> Follows:
    """The channels of a node."""
    return Follows(NO_DATABASE, snapshot_messages_max=10)


class Follower:
    """Somebody who follows a conversation, and what is shown."""

    def __init__(self, follows: Follows, after: int | None, user_id: str, conversation_id: UUID, is_own: bool) -> None:
        self.updates: asyncio.Queue[Update] = asyncio.Queue()
        self._follow = follows.follow(user_id, conversation_id, after, is_own=is_own)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with aclosing(self._follow) as updates:
            async for update in updates:
                await self.updates.put(update)

    async def next(self) -> list[int] | Snapshot:
        """The seqs of the next batch, or a snapshot."""
        update = await self.updates.get()
        return update if isinstance(update, Snapshot) else [event.seq for event in update]

    async def stop(self) -> None:
        """Follow no more."""
        self.task.cancel()
        await asyncio.wait((self.task,))


Follow = Callable[..., Follower]


@pytest.fixture
async def follow(follows: Follows) -> AsyncIterator[Follow]:
    """Makes followers, and stops them."""
    made: list[Follower] = []

    def begin(
        after: int | None, user_id: str = "user", conversation_id: UUID = CONVERSATION, *, is_own: bool = True
    ) -> Follower:
        made.append(Follower(follows, after, user_id, conversation_id, is_own))
        return made[-1]

    yield begin
    for follower in made:
        await follower.stop()


@pytest.fixture
async def lapsed(follows: Follows, postgres: Postgres) -> AsyncIterator[asyncio.Queue[None]]:
    """The task that reads what other nodes commit; an item for each time that it tells of a lapsed lease."""
    told: asyncio.Queue[None] = asyncio.Queue()
    running = asyncio.create_task(follows.read_remote(lambda: told.put_nowait(None)))
    yield told
    running.cancel()
    await asyncio.wait((running,))


def running(*seqs: int, has_lapsed: bool = False) -> Reading:
    """More of a turn that runs elsewhere."""
    return Reading(events(*seqs), False, True, True, has_lapsed)


# Turns that run here.


async def test_followers_of_a_turn_that_runs_here_never_read_postgres(
    follows: Follows, postgres: Postgres, follow: Follow
) -> None:
    log = follows.start_log(CONVERSATION, events(5, 6))
    one, other = follow(4), follow(5)
    assert [await one.next(), await other.next()] == [[5, 6], [6]]
    follows.extend_log(CONVERSATION, log, events(7), is_over=False)
    assert [await one.next(), await other.next()] == [[7], [7]]
    follows.extend_log(CONVERSATION, log, events(8, last="turn.completed"), is_over=True)
    assert [await one.next(), await other.next()] == [[8], [8]]
    follows.start_log(CONVERSATION, events(9))
    assert [await one.next(), await other.next()] == [[9], [9]]
    assert postgres.reads.empty()


async def test_a_slow_follower_gets_what_it_missed_at_once(follows: Follows, follow: Follow) -> None:
    log = follows.start_log(CONVERSATION, events(5))
    async with aclosing(follows.follow("user", CONVERSATION, 4, is_own=True)) as updates:
        await anext(updates)
        for seq in (6, 7):
            follows.extend_log(CONVERSATION, log, events(seq), is_over=False)
        follows.extend_log(CONVERSATION, log, events(8, last="turn.completed"), is_over=True)
        assert [event.seq for event in cast(Sequence[Event], await anext(updates))] == [6, 7, 8]


async def test_a_stranger_reads_nothing_of_a_log(follows: Follows, follow: Follow) -> None:
    follows.start_log(CONVERSATION, events(5, 6))
    stranger = follow(4, "stranger", is_own=False)
    with pytest.raises(NotFound):
        await stranger.task
    assert stranger.updates.empty()


async def test_a_stranger_gets_no_snapshot(follow: Follow) -> None:
    stranger = follow(None, "stranger", is_own=False)
    with pytest.raises(NotFound):
        await stranger.task


async def test_followers_of_a_turn_that_was_lost_go_on_in_postgres(
    follows: Follows, postgres: Postgres, follow: Follow
) -> None:
    log = follows.start_log(CONVERSATION, events(5))
    follower = follow(4)
    assert await follower.next() == [5]
    postgres.events = events(5, 6, 7, last="turn.completed")  # what its next node has committed
    follows.end_log(CONVERSATION, log, is_whole=False)
    assert await follower.next() == [6, 7]


async def test_a_log_ends_once(follows: Follows, postgres: Postgres, follow: Follow) -> None:
    log = follows.start_log(CONVERSATION, events(5))
    follower = follow(4)
    assert await follower.next() == [5]
    follows.extend_log(CONVERSATION, log, events(6, last="turn.completed"), is_over=True)
    follows.end_log(CONVERSATION, log, is_whole=False)  # as where a turn is closed, and then forgotten
    assert await follower.next() == [6]
    follows.start_log(CONVERSATION, events(7))
    assert await follower.next() == [7]
    assert postgres.reads.empty()


# Postgres.


async def test_without_a_cursor_a_snapshot_comes_first_and_then_what_follows_it(
    postgres: Postgres, follow: Follow
) -> None:
    postgres.events = events(50, 51)
    follower = follow(None, is_own=False)
    assert await follower.next() == Snapshot(50, None, "", [])
    assert await follower.next() == [51]


async def test_where_the_journal_does_not_hold_the_cursor_a_snapshot_comes(postgres: Postgres, follow: Follow) -> None:
    postgres.is_broken = True
    postgres.events = events(9)
    follower = follow(4)
    assert await follower.next() == Snapshot(50, None, "", [])


@pytest.mark.parametrize("after", [None, 4])
async def test_what_one_user_has_read_and_not_taken_is_bounded_and_the_rest_is_read_later(
    follows: Follows, postgres: Postgres, follow: Follow, after: int | None
) -> None:
    postgres.events = events(5)
    followed = [follows.follow("user", UUID(int=number), after, is_own=True) for number in range(HELD_PER_USER_MAX + 1)]
    for following in followed[:-1]:  # each takes its first update, and does not ask for the next
        await anext(following)
    last = asyncio.ensure_future(anext(followed[-1]))
    await asyncio.sleep(0)
    assert not last.done()
    stranger = follow(after, "stranger", is_own=False)
    with pytest.raises(NotFound):  # another user has its own bound
        await stranger.task
    await followed[0].aclose()
    await last
    for following in followed:
        await following.aclose()


async def test_followers_that_ask_the_same_share_one_reading(postgres: Postgres, follow: Follow) -> None:
    postgres.events = events(5, 6)
    postgres.may_answer.clear()
    together = [follow(4), follow(4), follow(4)]
    assert await postgres.reads.get() == 4
    alone = follow(5)
    assert await postgres.reads.get() == 5
    postgres.may_answer.set()
    assert [await each.next() for each in together] == [[5, 6]] * 3
    assert await alone.next() == [6]


async def test_a_follower_that_goes_does_not_end_the_reading_of_the_others(postgres: Postgres, follow: Follow) -> None:
    postgres.events = events(5)
    postgres.may_answer.clear()
    first, second = follow(4), follow(4)
    await postgres.reads.get()
    await first.stop()
    postgres.may_answer.set()
    assert await second.next() == [5]


async def test_another_user_does_not_share_a_reading(postgres: Postgres, follow: Follow) -> None:
    postgres.events = events(5)
    postgres.may_answer.clear()
    follow(4)
    await postgres.reads.get()
    stranger = follow(4, "stranger", is_own=False)
    with pytest.raises(NotFound):
        await stranger.task


async def test_who_cannot_read_is_told(postgres: Postgres, follow: Follow) -> None:
    postgres.fault = Unavailable("no answer")
    follower = follow(4)
    with pytest.raises(Unavailable):
        await follower.task


async def test_followers_are_woken_by_a_turn_that_begins_elsewhere(
    follows: Follows, postgres: Postgres, follow: Follow
) -> None:
    follower = follow(4)
    await postgres.reads.get()
    postgres.events = events(5)
    follows.hear({OTHER: 5, CONVERSATION: 5})
    assert await follower.next() == [5]


async def test_what_was_heard_of_already_wakes_nobody_and_what_may_be_anything_does(
    follows: Follows, postgres: Postgres, follow: Follow
) -> None:
    postgres.events = events(5)
    follower = follow(4)
    assert await follower.next() == [5]
    assert await postgres.reads.get() == 4
    follows.hear({CONVERSATION: 5})
    assert await postgres.reads.get() == 5
    follows.hear({CONVERSATION: 5})
    follows.wake(CONVERSATION)
    assert await postgres.reads.get() == 5
    follows.look_again()
    assert await postgres.reads.get() == 5
    assert postgres.reads.empty()


async def test_what_commits_during_a_reading_is_read_by_the_next(
    follows: Follows, postgres: Postgres, follow: Follow
) -> None:
    postgres.may_answer.clear()
    follower = follow(4)
    await postgres.reads.get()  # it has found nothing
    postgres.events = events(5)
    follows.hear({CONVERSATION: 5})
    postgres.may_answer.set()
    assert await follower.next() == [5]


# Turns that run on other nodes.


async def test_one_statement_reads_all_turns_that_run_elsewhere(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    postgres.events = events(5)
    one = follow(4)
    assert await one.next() == [5]
    cursors, answer = await postgres.polls.get()
    assert cursors == {CONVERSATION: 5}
    other = follow(5, conversation_id=OTHER)
    await postgres.reads.get()
    await postgres.reads.get()
    answer.set_result({CONVERSATION: running(6, 7)})
    assert await one.next() == [6, 7]
    cursors, answer = await postgres.polls.get()
    assert cursors == {CONVERSATION: 7, OTHER: 5}
    answer.set_result({CONVERSATION: running(), OTHER: running(6)})
    assert await other.next() == [6]
    assert postgres.reads.empty()
    assert lapsed.empty()


async def test_a_follower_that_catches_up_joins_the_log_and_does_not_move_it(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    first = follow(4)
    _, answer = await postgres.polls.get()
    postgres.events = events(5, 6)
    second = follow(4, is_own=False)
    assert await second.next() == [5, 6]  # it has read more than the log has by now
    answer.set_result({CONVERSATION: running(5)})
    assert await first.next() == [5]
    cursors, answer = await postgres.polls.get()
    assert cursors == {CONVERSATION: 5}
    answer.set_result({CONVERSATION: running(6, 7)})
    assert [await first.next(), await second.next()] == [[6, 7], [7]]


async def test_at_the_end_of_a_turn_elsewhere_nothing_is_read_until_the_next_begins(
    follows: Follows, postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    follower = follow(4)
    _, answer = await postgres.polls.get()
    await postgres.reads.get()
    answer.set_result({CONVERSATION: Reading(events(5, last="turn.completed"), False, True, False)})
    assert await follower.next() == [5]
    follows.hear({CONVERSATION: 5})
    postgres.is_running = False
    postgres.events = events(5, 6)
    follows.hear({CONVERSATION: 6})
    assert await follower.next() == [6]
    assert (postgres.reads.qsize(), postgres.polls.empty()) == (1, True)


async def test_where_the_next_turn_runs_already_its_log_begins_at_the_end_of_the_last(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    follower = follow(4)
    _, answer = await postgres.polls.get()
    answer.set_result({CONVERSATION: Reading(events(5, last="turn.completed"), False, True, True)})
    assert await follower.next() == [5]
    cursors, answer = await postgres.polls.get()
    assert cursors == {CONVERSATION: 5}
    answer.set_result({CONVERSATION: running(6)})
    assert await follower.next() == [6]


async def test_a_lapsed_lease_is_told_of(postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]) -> None:
    postgres.is_running = True
    follow(4)
    _, answer = await postgres.polls.get()
    answer.set_result({CONVERSATION: running()})
    _, answer = await postgres.polls.get()
    assert lapsed.empty()
    answer.set_result({CONVERSATION: running(has_lapsed=True)})
    await lapsed.get()


@pytest.mark.parametrize("fault", [Unavailable("no answer"), ValueError("no sense")])
async def test_where_turns_elsewhere_cannot_be_read_each_follower_reads_by_itself(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None], fault: Exception
) -> None:
    postgres.is_running = True
    follower = follow(4)
    await postgres.reads.get()
    _, answer = await postgres.polls.get()
    postgres.events = events(5)
    answer.set_exception(fault)
    assert await follower.next() == [5]
    assert await postgres.reads.get() == 4
    cursors, _ = await postgres.polls.get()
    assert cursors == {CONVERSATION: 5}


async def test_a_log_whose_place_is_gone_is_left_for_a_snapshot(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    follower = follow(4)
    _, answer = await postgres.polls.get()
    postgres.is_broken = True
    answer.set_result({CONVERSATION: Reading(events(9), True, True, True)})
    assert await follower.next() == Snapshot(50, None, "", [])


async def test_a_turn_that_is_taken_over_here_is_no_longer_read(
    follows: Follows, postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    follower = follow(4)
    _, answer = await postgres.polls.get()
    postgres.events = events(5, 6, last="turn.restarted")
    log = follows.start_log(CONVERSATION, events(6, last="turn.restarted"))
    answer.set_result({CONVERSATION: running(5, 6)})
    assert await follower.next() == [5, 6]  # what is before the log, from Postgres
    follows.extend_log(CONVERSATION, log, events(7), is_over=False)
    assert await follower.next() == [7]
    follow(4, conversation_id=OTHER)
    assert (await postgres.polls.get())[0].keys() == {OTHER}


async def test_what_nobody_follows_any_more_is_no_longer_read(
    postgres: Postgres, follow: Follow, lapsed: asyncio.Queue[None]
) -> None:
    postgres.is_running = True
    follower = follow(4)
    _, answer = await postgres.polls.get()
    await follower.stop()
    answer.set_result({CONVERSATION: running(5)})
    follow(4, conversation_id=OTHER)
    assert (await postgres.polls.get())[0] == {OTHER: 4}


async def test_followers_share_a_snapshot_that_is_read_and_one_that_goes_does_not_end_it(
    follow: Follow, postgres: Postgres
) -> None:
    postgres.may_answer.clear()
    followers = [follow(None) for _ in range(3)]
    stranger = follow(None, "somebody else")
    for _ in range(5):
        await asyncio.sleep(0)
    assert postgres.snapshots == 2
    await followers[0].stop()
    postgres.may_answer.set()
    assert [await follower.next() for follower in followers[1:]] == [Snapshot(50, None, "", [])] * 2
    with pytest.raises(NotFound):
        await stranger.task
