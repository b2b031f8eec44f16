"""What must hold of a conversation in the database, whatever has happened to the processes that wrote it."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence

import asyncpg

from anynode.models.rules import TERMINAL_EVENTS
from tests.kit.harness import TERMINAL, sql
from tests.kit.stored import assert_seqs_are_gapless, messages_of

EVENTS = """
SELECT seq, type, epoch, turn_id, payload::text AS payload FROM events WHERE conversation_id = $1 ORDER BY seq
"""
TURNS = "SELECT id, status, epoch FROM turns WHERE conversation_id = $1 ORDER BY position, created_at"
CLIENT_IDS = "SELECT client_id FROM messages WHERE conversation_id = $1 AND client_id IS NOT NULL"


async def assert_sound(database_url: str, conversation_id: str | uuid.UUID) -> Sequence[asyncpg.Record]:
    """The roles are in order, the positions and the journal without a gap; each client's id is there once; each turn
    has one end, which is its last event; and what the journal says is what the messages hold. Returns these."""
    id = uuid.UUID(str(conversation_id))
    messages = await messages_of(database_url, str(id))
    await assert_seqs_are_gapless(database_url, str(id))
    client_ids = Counter(row["client_id"] for row in await sql(database_url, CLIENT_IDS, id))
    assert set(client_ids.values()) <= {1}, client_ids
    events = await sql(database_url, EVENTS, id)
    texts = _texts_of(events)
    for turn in await sql(database_url, TURNS, id):
        own = [event for event in events if event["turn_id"] == turn["id"]]
        ends = [event["type"] for event in own if event["type"] in TERMINAL]
        assert ends == [TERMINAL_EVENTS[turn["status"]]], f"a turn is {turn['status']} and has the ends {ends}"
        assert own[-1]["type"] in TERMINAL
        epochs = [event["epoch"] for event in own]
        assert epochs == sorted(epochs)
        assert epochs[-1] == turn["epoch"]
        said = [each for each in messages if each["turn_id"] == str(turn["id"]) and each["role"] == "assistant"]
        assert "".join(each["content"] for each in said) == texts[turn["id"]]
        assert said[-1]["content"] == json.loads(own[-1]["payload"])["message"]["content"]
    return messages


def _texts_of(events: Sequence[asyncpg.Record]) -> Mapping[uuid.UUID, str]:
    """What somebody shows of each turn who has seen all of these events."""
    texts: dict[uuid.UUID, str] = {}
    for event in events:
        match event["type"]:
            case "turn.started":
                texts[event["turn_id"]] = ""
            case "turn.delta":
                texts[event["turn_id"]] += json.loads(event["payload"])["text"]
            case "turn.restarted":
                texts[event["turn_id"]] = json.loads(event["payload"])["text"]
    return texts


async def let_lease_lapse(database_url: str, conversation_id: str | uuid.UUID) -> None:
    """Let the running turn's lease have run out by now."""
    await sql(
        database_url,
        "UPDATE turns SET lease_expires_at = clock_timestamp() - interval '1 second' "
        "WHERE conversation_id = $1 AND status = 'running'",
        uuid.UUID(str(conversation_id)),
    )
