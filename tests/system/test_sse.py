"""The journal as Server-Sent Events: the socket's frames, from every cursor, on every node, once and in order."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.gated_turn import ANSWER, EVENTS, Gated
from tests.kit.harness import TERMINAL, Frame, NodeProcess, running_node, socket_to, sql, text_of, token_for
from tests.kit.postgres_proxy import postgres_proxy
from tests.kit.rest import MISSING, Event, Events, Rest, frames_of, rest_to
from tests.kit.stored import ended
from tests.kit.transcripts import merged

Nodes = Sequence[NodeProcess]
UUID = uuid.UUID
QUICK = script_of(("text", "a "), ("text", "b"))
TIME_MAX = 253_402_300_799  # the end of the year 9999, beyond which no token is taken


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(2)]


@pytest.fixture
def gated(strings: Strings) -> Gated:
    return Gated(strings)


async def begin(rest: Rest, question: str) -> str:
    """Start a turn in a new conversation."""
    id = await rest.create()
    started = (await rest.proceed(id, question, wait=False)).expect(202)
    assert started["after"] == 0
    return id


async def drive(events: Events, gated: Gated, *, to: int, after: int = 0) -> list[Event]:
    """Take the events up to the one with seq `to`, letting each come when the one before has been seen."""
    taken: list[Event] = []
    while after < to:
        gated.open(after + 1)
        event = await events.next()
        assert event is not None
        assert event[0] is not None
        assert event[0] > after, event
        after = event[0]
        taken.append(event)
    return taken


async def of_socket(node: NodeProcess, user: str, id: str, after: int | None, *types: str) -> list[Frame]:
    """The frames of a socket that follows from there, up to the first of one of these types."""
    async with socket_to(node, user) as socket:
        await socket.follow(id, after)
        return await socket.until(*types)


async def seq_of(rest: Rest, id: str) -> int:
    return int((await rest.get(f"/conversations/{id}")).expect(200)["seq"])


# From every cursor.


@pytest.mark.parametrize("number", [0, 1])
async def test_from_every_cursor_of_a_finished_turn_come_the_frames_of_the_socket(
    nodes: Nodes, module_database_url: str, gated: Gated, user: str, number: int
) -> None:
    gated.open_all()
    async with rest_to(nodes[0], user) as asking, rest_to(nodes[number], user) as rest:
        id = await begin(asking, gated.question)
        await eventually(ended(module_database_url, id))
        last = await seq_of(rest, id)
        for after in range(last):
            async with rest.events(id, after) as events:
                frames = frames_of(await events.until(*TERMINAL))
            assert frames == await of_socket(nodes[number], user, id, after, *TERMINAL)
            assert frames[-1]["seq"] == last
            assert frames[0]["seq"] > after
        async with rest.events(id, last) as events:
            (await asking.append(id, {"role": "user", "content": "news"})).expect(201)
            ((_, frame),) = await events.until("message.created")
            assert frame["seq"] == last + 1


@pytest.mark.parametrize("number", [0, 1])
async def test_in_mid_stream_followers_from_every_cursor_see_the_whole_rest(
    nodes: Nodes, gated: Gated, user: str, number: int
) -> None:
    half = EVENTS // 2
    async with rest_to(nodes[0], user) as asking, rest_to(nodes[number], user) as rest, AsyncExitStack() as stack:
        id = await begin(asking, gated.question)
        watching = await stack.enter_async_context(rest.events(id, 0))
        whole = await drive(watching, gated, to=half)
        streams = [await stack.enter_async_context(rest.events(id, after)) for after in range(half + 1)]
        whole += await drive(watching, gated, to=EVENTS, after=half)
        for after, stream in enumerate(streams):
            frames = frames_of(await stream.until(*TERMINAL))
            expected = [frame for frame in frames_of(whole) if frame["seq"] > after]
            assert merged(frames) == merged(expected)
        assert text_of(frames_of(whole)) == ANSWER


async def test_a_client_that_is_cut_off_after_every_event_and_goes_on_elsewhere_sees_what_another_sees(
    nodes: Nodes, gated: Gated, user: str
) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(rest_to(node, user)) for node in nodes]
        id = await begin(clients[0], gated.question)
        watching = await stack.enter_async_context(clients[0].events(id, 0))
        seen: list[Event] = []
        whole: list[Event] = []
        last = 0
        while last != EVENTS:
            # As a browser's EventSource does: the same address, and the last id in a header.
            async with clients[len(seen) % 2].events(id, 0, last_event_id=last) as events:
                gated.open(last + 1)
                event = await events.next()
                assert event is not None
                seen.append(event)
                assert events.last_event_id is not None
                last = events.last_event_id
                events.drop()
            whole += await drive(watching, gated, to=last, after=whole[-1][0] or 0 if whole else 0)
    assert merged(frames_of(seen)) == merged(frames_of(whole))
    assert len(seen) == EVENTS
    assert text_of(frames_of(seen)) == ANSWER


@pytest.mark.parametrize("cut", range(EVENTS))
async def test_nothing_is_lost_or_repeated_when_the_agent_goes_on_while_the_client_moves(
    nodes: Nodes, gated: Gated, user: str, cut: int
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await begin(rest, gated.question)
        async with rest.events(id, 0) as watching:
            async with (rest, elsewhere)[cut % 2].events(id, 0) as events:
                seen = await drive(events, gated, to=cut)
                gated.open_all()
                events.drop()
            async with (elsewhere, rest)[cut % 2].events(id, last_event_id=cut) as events:
                seen += await events.until(*TERMINAL)
            whole = await watching.until(*TERMINAL)
    assert merged(frames_of(seen)) == merged(frames_of(whole))
    assert text_of(frames_of(seen)) == ANSWER


async def test_a_stream_goes_on_from_turn_to_turn(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        async with rest.events(id, 0) as events, elsewhere.events(id, 0) as others:
            frames: list[Frame] = []
            for number in range(4):
                (await (rest, elsewhere)[number % 2].proceed(id, QUICK)).expect(200)
                frames += frames_of(await events.until(*TERMINAL))
            of_others: list[Frame] = []
            while not of_others or of_others[-1]["seq"] < frames[-1]["seq"]:
                of_others += frames_of(await others.until(*TERMINAL))
        whole: list[Frame] = []
        async with rest.events(id, 0) as events:
            while not whole or whole[-1]["seq"] < frames[-1]["seq"]:
                whole += frames_of(await events.until(*TERMINAL))
    assert merged(frames) == merged(of_others) == merged(whole)


async def test_many_streams_of_one_conversation_are_one_transcript(nodes: Nodes, gated: Gated, user: str) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(rest_to(node, user)) for node in nodes]
        id = await begin(clients[0], gated.question)
        streams = [await stack.enter_async_context(client.events(id, 0)) for client in clients for _ in range(20)]
        gated.open_all()
        transcripts = await asyncio.gather(*(stream.until(*TERMINAL) for stream in streams))
    assert all(merged(frames_of(events)) == merged(frames_of(transcripts[0])) for events in transcripts)
    assert text_of(frames_of(transcripts[0])) == ANSWER


# Cursors.


async def test_the_last_event_id_prevails_over_the_address(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, *[{"role": role, "content": role} for role in ("system", "user", "assistant")])).expect(
            201
        )
        for after, last, expected in ((0, 2, 3), (3, 1, 2), (None, 1, 2), (0, 0, 1)):
            async with rest.events(id, after, last_event_id=last) as events:
                event = await events.next()
                assert event is not None
                assert (event[0], event[1]["type"]) == (expected, "message.created")


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "+1", "0x1", "1 2", "9223372036854775808", "9" * 30, "null"])
async def test_a_cursor_that_is_none_is_refused(nodes: Nodes, user: str, value: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        path = f"/conversations/{await rest.create()}/events"
        by_query = await rest.get(path, after=value)
        assert (by_query.refusal, by_query.paths) == ((422, "invalid_frame"), ["query.after"])
        by_header = await rest.ask("GET", path, headers={"Last-Event-ID": value})
        assert (by_header.refusal, by_header.paths) == ((422, "invalid_frame"), ["Last-Event-ID"])


async def test_somebody_elses_stream_is_not_found_whatever_the_cursor(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[0], user + "-2") as stranger:
        id = await begin(rest, QUICK)
        for headers in ({}, {"Last-Event-ID": "0"}, {"Last-Event-ID": "999"}):
            theirs = await stranger.ask("GET", f"/conversations/{id}/events", headers=headers)
            missing = await stranger.ask("GET", f"/conversations/{MISSING}/events", headers=headers)
            assert theirs.refusal == (404, "not_found")
            assert theirs.body == missing.body


@pytest.mark.parametrize("after", [None, 9_999, 9_223_372_036_854_775_807])
async def test_without_a_cursor_or_with_one_that_is_ahead_a_snapshot_comes_first(
    nodes: Nodes, gated: Gated, user: str, after: int | None
) -> None:
    async with rest_to(nodes[0], user) as asking, rest_to(nodes[1], user) as rest:
        id = await begin(asking, gated.question)
        async with rest.events(id, 0) as watching:
            await drive(watching, gated, to=4)
            async with rest.events(id, after) as events:
                snapshot = await events.next()
                assert snapshot is not None
                assert snapshot[1] == (await of_socket(nodes[1], user, id, after, "conversation.snapshot"))[0]
                assert (snapshot[0], snapshot[1]["seq"], snapshot[1]["turn"]["text"]) == (4, 4, "Let me look ")
                gated.open_all()
                rest_of_it = frames_of(await events.until(*TERMINAL))
        assert rest_of_it[0]["seq"] > 4
        assert text_of([snapshot[1], *rest_of_it]) == ANSWER


async def test_a_snapshot_of_a_conversation_without_anything(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        async with rest.events(id) as events:
            empty: Frame = {
                "type": "conversation.snapshot",
                "conversation_id": id,
                "messages": [],
                "turn": None,
                "seq": 0,
                "has_older": False,
            }
            assert await events.next() == (0, empty)
            (await rest.proceed(id, QUICK)).expect(200)
            assert frames_of(await events.until(*TERMINAL))[0]["seq"] == 1


# Form.


async def test_the_stream_is_one_that_nothing_in_between_keeps_or_delays(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await begin(rest, QUICK)
        async with rest.events(id, 0) as events:
            headers = events.response.headers
            assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Accel-Buffering"] == "no"
            assert "Content-Encoding" not in headers
            await events.next()
            assert events.retry_milliseconds is not None
            assert 0 < events.retry_milliseconds <= 5000


HOSTILE = "\n\ndata: {}\n\nid: 99\r\rretry: 1\u2028\u2029\x85\x0b\x0c\x1c: \ufeff\u2615 </script>\r\n\n"


async def test_no_text_breaks_out_of_its_event(nodes: Nodes, user: str) -> None:
    question = script_of(
        ("text", HOSTILE),
        ("call", HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),
        ("result", HOSTILE, HOSTILE, HOSTILE),
        ("text", HOSTILE),
    )
    async with rest_to(nodes[0], user) as rest:
        id = await begin(rest, question)
        async with rest.events(id, 0) as events:
            frames = frames_of(await events.until(*TERMINAL))
            assert events.last_event_id == frames[-1]["seq"]
        assert text_of(frames) == HOSTILE * 2
        assert frames == await of_socket(nodes[0], user, id, 0, *TERMINAL)


# Silence.


async def test_heartbeats_come_while_nothing_else_does_and_change_no_cursor(
    start_node: StartNode, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, HEARTBEAT_SECONDS="0.1")
    gate = strings.name()
    async with rest_to(node, user) as rest:
        id = await begin(rest, script_of(("text", "a"), ("gate", gate), ("text", "b")))
        async with rest.events(id, 0) as events:
            await events.until("turn.delta")
            last = events.last_event_id
            for _ in range(3):
                await events.heartbeat()
            assert events.last_event_id == last
            strings.open(gate)
            frames = frames_of(await events.until(*TERMINAL))
            assert [frame["type"] for frame in frames] == ["turn.delta", "turn.completed"]
            await events.heartbeat()
        idle = await rest.create()
        async with rest.events(idle, 0) as events:
            await events.heartbeat()
            assert events.last_event_id is None
            await events.heartbeat()
            (await rest.append(idle, {"role": "user", "content": "x"})).expect(201)
            assert frames_of(await events.until("message.created"))[0]["seq"] == 1


# Ends.


async def test_a_drain_ends_the_stream_and_what_comes_later_is_seen_elsewhere(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    gated = Gated(strings)
    leaving, other = [start_node(**strings.environment, DRAIN_SECONDS="60") for _ in range(2)]
    async with rest_to(leaving, user) as rest, rest_to(other, user) as elsewhere:
        id = await begin(rest, gated.question)
        async with rest.events(id, 0) as events, elsewhere.events(id, 0) as watching:
            seen = await drive(events, gated, to=6)
            leaving.process.send_signal(signal.SIGTERM)
            assert await events.rest() == []  # an end, not a break: else reading it would fail
            async with elsewhere.events(id, 0, last_event_id=events.last_event_id) as again:
                seen += await drive(again, gated, to=EVENTS, after=6)
            whole = await watching.until(*TERMINAL)
    assert merged(frames_of(seen)) == merged(frames_of(whole))
    assert text_of(frames_of(seen)) == ANSWER
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0
    ((status, epoch),) = await sql(database_url, "SELECT status, epoch FROM turns")
    assert (status, epoch) == ("completed", 1)


async def test_a_draining_node_ends_a_new_stream_so_that_its_client_goes_on_elsewhere(
    start_node: StartNode, strings: Strings, user: str
) -> None:
    gate = strings.name()
    leaving = start_node(**strings.environment, DRAIN_SECONDS="60")
    async with rest_to(leaving, user) as rest:
        id = await begin(rest, script_of(("text", "a"), ("gate", gate)))
        leaving.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            return (await rest.get("/readyz")).status == 503

        await eventually(is_draining)
        async with rest.events(id, 0) as events:
            seen = await events.rest()
            assert all(frame["type"] != "error" for _, frame in seen)
        strings.open(gate)
    assert await asyncio.to_thread(leaving.process.wait, 30) == 0


async def test_the_stream_ends_with_its_token(nodes: Nodes, strings: Strings, user: str) -> None:
    gate = strings.name()
    async with (
        rest_to(nodes[0], user) as rest,
        rest_to(nodes[0], user, token=token_for(user, ttl_seconds=1.5)) as short,
    ):
        id = await begin(rest, script_of(("text", "a"), ("gate", gate), ("text", "b")))
        async with short.events(id, 0) as events:
            seen = await events.until("turn.delta")
            assert await events.rest() == []
        refused = await short.get(f"/conversations/{id}/events")
        assert refused.refusal == (401, "unauthorized")
        strings.open(gate)
        async with rest.events(id, last_event_id=events.last_event_id) as events:
            seen += await events.until(*TERMINAL)
    assert text_of(frames_of(seen)) == "ab"


async def test_a_token_that_is_good_for_ages_is_good_for_a_stream(nodes: Nodes, user: str) -> None:
    token = token_for(user, ttl_seconds=TIME_MAX - time.time() - 60)
    async with rest_to(nodes[0], user, token=token) as rest:
        id = await begin(rest, QUICK)
        async with rest.events(id, 0) as events:
            assert text_of(frames_of(await events.until(*TERMINAL))) == "a b"


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("runs", [False, True])
async def test_a_deletion_ends_the_stream_with_an_error_wherever_it_is_followed(
    nodes: Nodes, strings: Strings, user: str, number: int, *, runs: bool
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[number], user) as follower:
        id = await begin(rest, script_of(("text", "a"), ("gate", strings.name() if runs else "open")))
        strings.open("open")
        async with follower.events(id, 0) as events:
            await events.until("turn.delta" if runs else "turn.completed")
            (await rest.ask("DELETE", f"/conversations/{id}")).expect(204)
            *before, (id_, error) = await events.rest()
        assert id_ is None
        assert (error["type"], error["code"], error["retryable"]) == ("error", "not_found", False)
        assert [frame["type"] for _, frame in before] in ([], ["turn.cancelled"])


async def test_the_user_alone_ends_the_streams_of_a_conversation(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[0], user + "-2") as stranger:
        id = await rest.create()
        async with rest.events(id, 0) as events:
            assert (await stranger.ask("DELETE", f"/conversations/{id}")).status == 404
            (await rest.append(id, {"role": "user", "content": "x"})).expect(201)
            assert frames_of(await events.until("message.created"))[0]["seq"] == 1


# Trouble.


async def test_a_reader_that_is_slow_gets_what_it_missed_in_few_frames_and_all_of_it(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, ANSWER_BYTES_MAX="67108864", FLUSH_INTERVAL_MS="1")
    pieces, size = 400, 40_000
    question = script_of(("paced", pieces, "{number} ".ljust(size, "x"), 0.002))
    async with rest_to(node, user) as rest, rest_to(node, user, is_narrow=True) as slow:
        id = await rest.create()
        async with slow.events(id, 0) as events:
            end = (await rest.proceed(id, question)).expect(200)  # nobody waits for the slow one
            seen = frames_of(await events.until(*TERMINAL))
    ((said,),) = await sql(database_url, "SELECT count(*) FROM events WHERE type = 'turn.delta'")
    deltas = [frame for frame in seen if frame["type"] == "turn.delta"]
    assert len(deltas) < said / 2
    assert text_of(seen) == end["response"]
    assert len(end["response"]) > 10_000_000
    seqs = [frame["seq"] for frame in seen]
    assert seqs == sorted(set(seqs))
    assert seqs[-1] == said + 3


async def test_a_reader_that_never_reads_does_not_hold_up_a_drain(
    start_node: StartNode, strings: Strings, user: str
) -> None:
    node = start_node(**strings.environment, ANSWER_BYTES_MAX="67108864", DRAIN_SECONDS="1")
    async with rest_to(node, user) as rest, rest_to(node, user, is_narrow=True) as lazy:
        id = await rest.create()
        async with lazy.events(id, 0):
            (await rest.proceed(id, script_of(("paced", 200, "x" * 60_000, 0.001)))).expect(200)
            node.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(node.process.wait, 30) == 0


async def test_while_postgres_is_away_the_stream_says_so_and_then_goes_on(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    gate = strings.name()
    with postgres_proxy(database_url) as proxy:
        cut, other = start_node(proxy.url, **strings.environment), start_node(**strings.environment)
        async with rest_to(cut, user) as rest, rest_to(other, user) as elsewhere:
            id = await begin(elsewhere, script_of(("text", "a"), ("gate", gate), ("text", "b")))
            async with rest.events(id, 0) as events, elsewhere.events(id, 0) as watching:
                seen = await events.until("turn.delta")
                proxy.cut()
                ((id_, error),) = await events.until("error")
                assert (id_, error["code"], error["retryable"]) == (None, "database_unavailable", True)
                strings.open(gate)
                whole = await watching.until(*TERMINAL)
                proxy.heal()
                while seen[-1][1]["type"] not in TERMINAL:
                    event = await events.next()
                    assert event is not None
                    if event[1]["type"] != "error":
                        seen.append(event)
    assert merged(frames_of(seen)) == merged(frames_of(whole))
    assert text_of(frames_of(seen)) == "ab"


async def test_what_happened_while_postgres_was_away_is_seen_afterwards(
    start_node: StartNode, database_url: str, strings: Strings, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        cut, other = start_node(proxy.url, **strings.environment), start_node(**strings.environment)
        async with rest_to(cut, user) as rest, rest_to(other, user) as elsewhere:
            id, gone = [await elsewhere.create() for _ in range(2)]
            async with rest.events(id, 0) as events, rest.events(gone, 0) as of_gone:
                proxy.cut()
                (
                    await elsewhere.append(id, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
                ).expect(201)
                (await elsewhere.proceed(id, QUICK)).expect(200)
                (await elsewhere.ask("DELETE", f"/conversations/{gone}")).expect(204)
                proxy.heal()
                seen = frames_of(await events.until(*TERMINAL))
                assert (await of_gone.rest())[-1][1]["code"] == "not_found"
            async with elsewhere.events(id, 0) as events:
                assert merged(seen) == merged(frames_of(await events.until(*TERMINAL)))


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        assert "Traceback" not in node.log.read_text()
