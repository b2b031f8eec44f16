"""The plans of the hot statements on filled tables: index scans only, and no more rows than are needed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from anynode.models.queries import Bound, bind, statements
from tests.kit.databases import fresh_database

TABLES = ("users", "user_usage", "conversations", "messages", "turns", "events", "tickets", "revocations")
# 2,000 conversations of 10 users, each with 50 ended turns of a question, an answer and two events; in every
# twentieth another turn runs. Around them 60,000 empty ones: of a small table, reading all of it is right.
# `md5` makes ids that are the same in every run, in no order.
FILL = """
INSERT INTO users (id) SELECT 'user' || n FROM generate_series(0, 9) n;
INSERT INTO users (id) SELECT 'other' || n FROM generate_series(0, 999) n;
INSERT INTO users (id, email) SELECT 'idle' || n, n || '@example.org' FROM generate_series(0, 19999) n;
INSERT INTO user_usage (user_id, running) SELECT 'user' || n, ARRAY[md5('t1.1')::uuid] FROM generate_series(0, 9) n;
INSERT INTO user_usage (user_id) SELECT 'idle' || n FROM generate_series(0, 19999) n;
INSERT INTO conversations (id, client_id, user_id, title, last_seq, updated_at)
    SELECT md5('c' || c)::uuid, 'chat' || md5('c' || c)::uuid, 'user' || c % 10, 'title', 100,
           now() - make_interval(secs => c)
    FROM generate_series(1, 2000) c;
INSERT INTO conversations (id, user_id, updated_at)
    SELECT md5('e' || c)::uuid, 'other' || c % 1000, now() - make_interval(secs => c) FROM generate_series(1, 60000) c;
INSERT INTO turns
    (id, conversation_id, status, node, epoch, lease_expires_at, first_seq, created_at, finished_at, position)
    SELECT md5('t' || c || '.' || t)::uuid, md5('c' || c)::uuid, 'completed', 'n', 1, now() - interval '1 hour',
           2 * t - 1, now() - interval '1 hour', now() - make_interval(secs => 50 * c - t), 2 * t - 1
    FROM generate_series(1, 2000) c, generate_series(1, 50) t;
INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, first_seq)
    SELECT md5('r' || c)::uuid, md5('c' || c)::uuid, 'running', 'n', 1, now() + interval '1 hour', 101
    FROM generate_series(20, 2000, 20) c;
INSERT INTO messages (id, conversation_id, user_id, client_id, position, role, content, turn_id)
    SELECT md5('m' || c || '.' || p)::uuid, md5('c' || c)::uuid, 'user' || c % 10,
           CASE WHEN p % 2 = 1 THEN 'client' || c || '.' || p END, p,
           CASE WHEN p % 2 = 1 THEN 'user' ELSE 'assistant' END, 'content', md5('t' || c || '.' || (p + 1) / 2)::uuid
    FROM generate_series(1, 2000) c, generate_series(1, 100) p;
INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
    SELECT md5('c' || c)::uuid, s, md5('t' || c || '.' || (s + 1) / 2)::uuid, 1, 'turn.delta', '{"text": "x"}'
    FROM generate_series(1, 2000) c, generate_series(1, 100) s;
INSERT INTO events (conversation_id, seq, turn_id, epoch, type, payload)
    SELECT md5('c' || c)::uuid, s, md5('r' || c)::uuid, 1, 'turn.delta', '{"text": "x"}'
    FROM generate_series(20, 2000, 20) c, generate_series(101, 110) s;
INSERT INTO events (conversation_id, seq, epoch, type, payload, written_at)
    SELECT md5('e' || c)::uuid, s, 0, 'message.created', '{}', now() - make_interval(secs => 50 * c)
    FROM generate_series(1, 4000) c, generate_series(1, 5) s;
INSERT INTO tickets (hash, user_id, token_expires_at, expires_at)
    SELECT 'ticket' || n, 'other' || n % 1000, 0, now() + make_interval(secs => 9000 + n)
    FROM generate_series(1, 20000) n;
INSERT INTO revocations (user_hash, not_before)
    SELECT encode(sha256(convert_to('gone' || n, 'UTF8')), 'hex'), 2000000000 + n FROM generate_series(1, 20000) n;
ANALYZE;
"""


def id_of(name: str) -> uuid.UUID:
    """The id that FILL makes of a name."""
    return uuid.UUID(hashlib.md5(name.encode()).hexdigest())


GONE = hashlib.sha256(b"gone7").hexdigest()
MINE, RUNNING = id_of("c20"), id_of("r20")
NEW = [uuid.UUID(int=number) for number in range(1, 10)]
NOW = datetime.now(UTC)
HUNDRED = [id_of(f"r{number}") for number in range(20, 2001, 20)]
FLUSH: dict[str, Any] = {
    "turn_ids": [str(turn_id) for turn_id in HUNDRED],
    "epochs": [1] * 100,
    "event_turns": list(range(1, 101)),
    "event_seqs": [111] * 100,
    "event_types": ["turn.delta"] * 100,
    "event_payloads": ['{"text": "y"}'] * 100,
}
ENDINGS: dict[str, Any] = {
    "message_turn_ids": HUNDRED,
    "message_ids": [uuid.UUID(int=1000 + number) for number in range(100)],
    "user_ids": ["user0"] * 100,
    "numbers": [1] * 100,
    "roles": ["assistant"] * 100,
    "contents": ["y"] * 100,
    "tool_calls": [None] * 100,
    "tool_names": [None] * 100,
    "tool_call_ids": [None] * 100,
    "message_statuses": ["completed"] * 100,
    "created_ats": [NOW] * 100,
    "ended_turn_ids": HUNDRED,
    "statuses": ["completed"] * 100,
    "errors": [None] * 100,
    "usages": [None] * 100,
    "last_seqs": [111] * 100,
    "tokens": [10] * 100,
}
LIMITS = {
    "limits": json.dumps(
        {
            "turns_per_user_max": 20,
            "turns_per_user_per_minute": 60,
            "tokens_per_user_per_day": 1000,
            "conversations_per_user_max": 1000,
            "messages_per_user_bytes_max": 1_000_000,
        }
    )
}
QUESTION: dict[str, Any] = {
    "new_conversation_id": NEW[0],
    "title": "title",
    "message_id": NEW[1],
    "client_message_id": "new",
    "content": "question",
    "created_at": NOW,
    "turn_id": NEW[2],
    "node": "n",
    "lease_seconds": 5.0,
    "message_created": '{"message": {}}',
    "turn_started": '{"message_id": "m"}',
    "history_messages_max": 20,
    **LIMITS,
}
CHAT = f"chat{id_of('c1')}"
LOOKED_AT = {"looked_at_max": 5000, "bytes_max": 2**21}


def mine(**arguments: Any) -> dict[str, Any]:
    return {"user_id": "user0", "conversation_id": MINE, **arguments}


# The arguments of each statement, and how many rows of each table it may touch for them.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "admit": (
        {"user_id": "user1", "conversation_id": id_of("c1"), **QUESTION},
        {"messages": 45, "conversations": 5, "turns": 5, "events": 5, "user_usage": 2},
    ),
    "flush": (FLUSH, {"turns": 300}),
    "flush_one": (
        {"turn_id": HUNDRED[0], "epoch": 1, "seq": 111, "type": "turn.delta", "payload": '{"text": "y"}'},
        {"turns": 3},
    ),
    "flush_with_endings": (
        {**FLUSH, **ENDINGS},
        {"turns": 500, "conversations": 300, "messages": 300, "user_usage": 2},
    ),
    "turn_states": ({"turn_ids": HUNDRED}, {"turns": 100}),
    "regenerate": (
        {
            "user_id": "user1",
            "conversation_id": id_of("c1"),
            "client_message_id": None,
            "turn_id": NEW[2],
            "created_at": NOW,
            "node": "n",
            "lease_seconds": 5.0,
            "history_messages_max": 20,
            **LIMITS,
        },
        {"messages": 50, "conversations": 5, "turns": 5, "events": 5, "user_usage": 2},
    ),
    "answer": (
        {
            "user_id": "other1",
            "conversation_id": id_of("e1"),
            "turn_id": NEW[2],
            "created_at": NOW,
            "node": "n",
            "lease_seconds": 5.0,
            "history_messages_max": 20,
            **LIMITS,
        },
        {"messages": 10, "conversations": 5, "turns": 5, "events": 5, "user_usage": 2},
    ),
    "read_events": (mine(cursor=50, events_max=10, bytes_max=2**21), {"conversations": 1, "events": 11, "turns": 1}),
    "read_running": (
        {
            "conversation_ids": [str(id_of(f"c{number}")) for number in range(20, 2001, 20)],
            "cursors": [105] * 100,
            "events_max": 10,
            "payload_bytes_max": 2**15,
        },
        {"conversations": 100, "turns": 100, "events": 700},
    ),
    "watch": ({"node": "n", "horizon": 2**40, "changes_max": 1000}, {"conversations": 1, "turns": 1}),
    "snapshot": (
        mine(messages_max=20, bytes_max=2**21),
        {"conversations": 2, "events": 40, "messages": 21, "turns": 5},
    ),
    "create_conversation": (
        {
            "user_id": "user0",
            "conversation_id": NEW[0],
            "title": "title",
            "system_prompt": None,
            "metadata": "{}",
            "created_at": NOW,
            "bytes": 7,
            **LIMITS,
        },
        {"conversations": 1, "users": 2, "user_usage": 2},
    ),
    "get_or_create_conversation": (
        {
            "user_id": "user0",
            "client_id": f"chat{MINE}",
            "wanted_id": MINE,
            "new_id": NEW[0],
            "title": "title",
            "system_prompt": None,
            "metadata": "{}",
            "created_at": NOW,
            "bytes": 7,
            **LIMITS,
        },
        {"conversations": 2},
    ),
    "read_conversation": (mine(), {"conversations": 1}),
    "list_conversations": (
        {"user_id": "user0", "conversations_max": 20, "skip": 20, "search": None, **LOOKED_AT},
        {"conversations": 41},
    ),
    "list_conversations_before": (
        {
            "user_id": "user0",
            "conversations_max": 20,
            "skip": 20,
            **LOOKED_AT,
            "search": None,
            "before_updated_at": NOW - timedelta(minutes=20),
            "before_id": NEW[0],
        },
        {"conversations": 41},
    ),
    "update_conversation": (
        mine(
            sets_title=True,
            title="new",
            sets_system_prompt=False,
            system_prompt=None,
            sets_metadata=True,
            metadata="{}",
            bytes=5,
            **LIMITS,
        ),
        {"conversations": 2, "user_usage": 2},
    ),
    "delete_conversation": (
        mine(is_forced=True),
        {"conversations": 3, "turns": 110, "messages": 110, "events": 120},
    ),
    "read_tail": (
        {"user_id": "user1", "conversation_id": id_of("c1")},
        {"conversations": 1, "messages": 2, "turns": 1},
    ),
    "append": (
        {
            "user_id": "user1",
            "conversation_id": id_of("c1"),
            "position": 100,
            "created_at": NOW,
            "ids": [NEW[0]],
            "roles": ["user"],
            "contents": ["x"],
            "tool_calls": [None],
            "tool_names": [None],
            "tool_call_ids": [None],
            "payloads": ["{}"],
            **LIMITS,
        },
        {"conversations": 3, "messages": 3, "turns": 1, "user_usage": 2},
    ),
    "read_messages": (
        mine(before=id_of("m20.60"), messages_max=20, with_superseded=True, bytes_max=2**21),
        {"conversations": 1, "messages": 21},
    ),
    "read_turn": (mine(turn_id=id_of("t20.7")), {"conversations": 1, "turns": 1, "messages": 3}),
    "renew": ({"turn_ids": HUNDRED, "epochs": [1] * 100, "lease_seconds": 5.0}, {"turns": 300}),
    "release": ({"turn_ids": HUNDRED, "epochs": [1] * 100}, {"turns": 300}),
    "take_over": (
        {
            "node": "n2",
            "known": [],
            "lease_seconds": 5.0,
            "turns_max": 100,
            "attempts_max": 3,
            "stands_up_to": ["turn.tool_call", "turn.tool_result"],
            "two_beats_seconds": 2.0,
            "conversation_id": None,
        },
        {"turns": 300, "events": 5, "conversations": 5},
    ),
    "history": ({"conversation_id": MINE, "messages_max": 20}, {"conversations": 1, "messages": 41}),
    "request_cancel": (mine(turn_id=None), {"conversations": 2, "turns": 5, "events": 1}),
    "delete_expired_events": ({"retention_seconds": 99_000.0, "turns_max": 20}, {"turns": 100, "events": 3000}),
    "forget_deletions": ({"after_seconds": 60.0}, {}),
    "delete_expired_messages": ({"retention_seconds": 99_000.0, "events_max": 20}, {"events": 60}),
    "admit_to_chat": (
        {"user_id": "user1", "client_chat_id": CHAT, "conversation_id": None, **QUESTION},
        {"messages": 45, "conversations": 8, "turns": 5, "events": 5, "user_usage": 2},
    ),
    "find_conversation": (
        {"user_id": "user0", "client_id": f"chat{MINE}", "conversation_id": None},
        {"conversations": 2},
    ),
    "find_chat": (
        {"user_id": "user0", "client_chat_id": f"chat{MINE}", "conversation_id": None},
        {"conversations": 1, "turns": 2, "messages": 1},
    ),
    "find_chat_end": (
        {"user_id": "user0", "client_chat_id": f"chat{MINE}", "conversation_id": None},
        {"conversations": 2, "turns": 1, "messages": 1},
    ),
    # The planner looks at the ends of both tables.
    "find_turn": ({"user_id": "user0", "turn_id": id_of("t20.7")}, {"conversations": 3, "turns": 3}),
    "find_sent": (
        {"user_id": "user0", "client_message_id": "client20.7", "message_id": None},
        {"messages": 2, "turns": 1},
    ),
    "read_usage": ({"turn_ids": HUNDRED}, {"turns": 100}),
    "add_ticket": (
        {
            "hash": "new",
            "user_id": "other7",
            "token_expires_at": 0.0,
            "issued_at": 0.0,
            "limits": "{}",
            "lasts_seconds": 30.0,
            "tickets_max": 100,
        },
        {"tickets": 25},
    ),
    "redeem_ticket": ({"hash": "ticket7"}, {"tickets": 2}),
    "delete_expired_tickets": ({}, {"tickets": 2}),
    "write_emails": (
        {
            "user_ids": [f"other{number}" for number in range(100)] + [f"new{number}" for number in range(100)],
            "emails": [f"{number}@example.org" for number in range(200)],
            "issued_ats": [0.0] * 200,
        },
        {"users": 400},
    ),
    "claim_measurement": ({"user_id": "idle7"}, {"user_usage": 3}),
    # Everything of a user with 200 conversations of 100 messages.
    "measure_stored": ({"user_id": "user0"}, {"conversations": 200, "messages": 20_000, "user_usage": 4}),
    "revoke": ({"user_hash": GONE}, {"revocations": 2}),
    "read_revocations": ({"after": GONE, "rows_max": 100}, {"revocations": 100}),
    "forget_revocations": ({"after_seconds": 0.0}, {"revocations": 1}),
    "stop_turns": ({"user_id": "user0"}, {"turns": 220, "conversations": 310}),
    "delete_user": ({"user_id": "idle7"}, {"users": 1, "tickets": 25, "user_usage": 2, "revocations": 2}),
}
FUNCTIONS = {
    *("admit", "admit_to_chat", "answer", "append", "delete_conversation", "find_chat", "find_chat_end", "regenerate"),
    *("create_conversation", "take_over"),
}


def case(name: str, **other: Any) -> Bound:
    """A statement with the arguments that it has here, but for these."""
    return bind(name, **{**CASES[name][0], **other})


async def fetch(connection: asyncpg.Connection, statement: Bound, *, before: str = "") -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await connection.fetch(before + statement.sql, *statement.arguments)
    return rows


@pytest.fixture(scope="module")
def filled_database_url(postgres_url: str) -> Iterator[str]:
    """A database with 200,000 messages, as many events and 100,000 turns, analysed."""
    with fresh_database(postgres_url) as url:
        asyncio.run(_fill(url))
        yield url


async def _fill(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(FILL)
    finally:
        await connection.close()


@pytest.fixture
async def connection(filled_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection whose writes are taken back at the end."""
    connection = await asyncpg.connect(filled_database_url)
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield connection
    finally:
        await transaction.rollback()
        await connection.close()


async def read_rows(connection: asyncpg.Connection) -> dict[str, tuple[int, int]]:
    """Sequential scans, and rows fetched through an index, of this connection so far, by table."""
    rows = await connection.fetch(
        "SELECT relname, seq_scan, coalesce(idx_tup_fetch, 0) AS fetched FROM pg_stat_xact_user_tables"
    )
    return {row["relname"]: (row["seq_scan"], row["fetched"]) for row in rows}


def scans(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every (table, kind of scan) of a plan in JSON."""
    if "Relation Name" in plan and plan["Node Type"] != "ModifyTable":
        yield plan["Relation Name"], plan["Node Type"]
    for inner in plan.get("Plans", ()):
        yield from scans(inner)


async def test_every_statement_has_a_case_here() -> None:
    assert set(CASES) == set(statements())


@pytest.mark.parametrize("name", sorted(set(CASES) - FUNCTIONS - {"create_conversation", "forget_deletions", "revoke"}))
async def test_a_statement_finds_its_rows_by_an_index(connection: asyncpg.Connection, name: str) -> None:
    rows = await fetch(connection, case(name), before="EXPLAIN (FORMAT JSON) ")
    plan = json.loads(rows[0][0])[0]["Plan"]
    found = [(table, kind) for table, kind in scans(plan) if table in TABLES]
    assert found
    assert {kind for _, kind in found} <= {"Index Scan", "Index Only Scan", "Bitmap Heap Scan"}, found


@pytest.mark.parametrize("name", sorted(CASES))
async def test_a_statement_touches_no_more_rows_than_it_needs(connection: asyncpg.Connection, name: str) -> None:
    _, rows_max = CASES[name]
    # After five executions Postgres may change to a plan that does not look at the arguments.
    for _ in range(7):
        transaction = connection.transaction()
        await transaction.start()
        before = await read_rows(connection)
        await fetch(connection, case(name))
        after = await read_rows(connection)
        await transaction.rollback()
        reads = {table: after[table][1] - before[table][1] for table in TABLES}
        assert [table for table in TABLES if after[table][0] > before[table][0]] == []
        assert {table: read for table, read in reads.items() if read > rows_max.get(table, 0)} == {}


@pytest.mark.parametrize("name", ["list_conversations", "list_conversations_before"])
@pytest.mark.parametrize(("search", "found"), [("TITLE", 20), ("no such", 0)])
async def test_a_search_reads_the_titles_of_one_user_alone(
    connection: asyncpg.Connection, name: str, search: str, found: int
) -> None:
    statement = case(name, search=search)
    (plan,) = await fetch(connection, statement, before="EXPLAIN (FORMAT JSON) ")
    assert [kind for _, kind in scans(json.loads(plan[0])[0]["Plan"]) if kind == "Seq Scan"] == []
    for _ in range(7):
        before = await read_rows(connection)
        assert len(await fetch(connection, statement)) == found
        after = await read_rows(connection)
        assert after["conversations"][0] == before["conversations"][0]
        assert (
            after["conversations"][1] - before["conversations"][1] <= 400
        )  # the user's, and once more where it finds too few


async def test_the_statements_of_a_refused_admission_find_their_rows_by_an_index(
    connection: asyncpg.Connection,
) -> None:
    for conversation_id, client_id, outcome in (
        (MINE, "new", "conversation_busy"),
        (NEW[5], "new", "not_found"),
        (id_of("c1"), "client1.1", "repeated"),
    ):
        user = "user0" if conversation_id == MINE else "user1"
        before = await read_rows(connection)
        rows = await fetch(
            connection,
            case("admit", user_id=user, conversation_id=conversation_id, client_message_id=client_id),
        )
        after = await read_rows(connection)
        assert rows[0]["outcome"] == outcome
        assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(TABLES, 0)


async def test_the_cases_do_what_they_are_meant_to(connection: asyncpg.Connection) -> None:
    """A statement that finds nothing would have an easy plan."""
    assert dict((await fetch(connection, case("delete_user")))[0]) == {"tickets": 0, "has_conversations": False}
    assert (await fetch(connection, case("delete_user", user_id="other7")))[0]["has_conversations"]
    for name, outcome in (("append", "appended"), ("delete_conversation", "deleted")):
        transaction = connection.transaction()
        await transaction.start()
        (row,) = await fetch(connection, case(name))
        await transaction.rollback()
        assert row["outcome"] == outcome
    counts = {}
    for name in (
        *("read_events", "read_running", "snapshot", "list_conversations", "list_conversations_before"),
        *("read_conversation", "read_messages", "read_tail", "read_turn", "renew", "turn_states"),
    ):
        counts[name] = len(await fetch(connection, case(name)))
    for name in ("delete_expired_events", "delete_expired_messages"):
        counts[name] = len(await fetch(connection, case(name)))
    counts["admitted"] = sum(row["outcome"] == "admitted" for row in await fetch(connection, case("admit")))
    assert counts == {
        "read_events": 10,
        "read_running": 600,
        "snapshot": 20,
        "list_conversations": 20,
        "list_conversations_before": 20,
        "read_conversation": 1,
        "read_messages": 20,
        "read_tail": 1,
        "read_turn": 1,
        "renew": 100,
        "turn_states": 100,
        "delete_expired_events": 20,
        "delete_expired_messages": 20,
        "admitted": 1,
    }
    assert await fetch(connection, case("flush_one")) == []
    assert await fetch(connection, case("flush_with_endings")) == []
    (row,) = await connection.fetch(
        "SELECT count(*) AS ended FROM turns WHERE id = ANY ($1) AND status = 'completed'", HUNDRED
    )
    assert row["ended"] == 100
    await fetch(connection, case("write_emails"))
    (row,) = await connection.fetch("SELECT count(*) AS written FROM users WHERE email IS NOT NULL AND id !~ 'idle'")
    assert row["written"] == 200
