"""Frames that clients have been sent: taken from a socket, merged, and compared with the journal."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

from tests.kit.exactness import assert_shown
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, socket_to, sql, text_of


def merged(frames: Sequence[Frame]) -> list[Frame]:
    """A transcript in which it does not matter how deltas were cut."""
    result: list[Frame] = []
    for frame in frames:
        if frame["type"] == "turn.delta" and result and result[-1]["type"] == "turn.delta":
            result[-1] = {**frame, "text": result[-1]["text"] + frame["text"]}
        else:
            result.append(frame)
    return result


async def whole(node: NodeProcess, user: str, conversation_id: str, ends: int = 1) -> list[Frame]:
    """The conversation's transcript, read in one piece from the beginning."""
    async with socket_to(node, user) as socket:
        await socket.follow(conversation_id, 0)
        frames: list[Frame] = []
        for _ in range(ends):
            frames += await socket.until(*TERMINAL, "error", "conversation.snapshot")
        return frames


async def assert_all_was_shown(database_url: str, frames: Sequence[Frame]) -> None:
    """The frames are the journal of their conversation, each event once and in order."""
    events = await sql(
        database_url,
        "SELECT seq, type, turn_id::text AS turn_id, payload::text AS payload FROM events "
        "WHERE conversation_id = $1 ORDER BY seq",
        uuid.UUID(frames[0]["conversation_id"]),
    )
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert_shown(events, frames)


async def take(socket: Socket, last_seq: int) -> list[Frame]:
    """The frames up to the one that ends with this seq."""
    frames: list[Frame] = []
    while not frames or frames[-1].get("seq", 0) < last_seq:
        frames.append(await socket.receive())
        assert frames[-1]["type"] != "error", frames[-1]
    return frames


async def nothing_has_come(socket: Socket) -> bool:
    """Whether the server has sent this connection nothing up to now."""
    await socket.send({"type": "ping", "request_id": "now"})
    return bool((await socket.receive())["type"] == "pong")


def merged_types(frames: Sequence[Frame]) -> list[str]:
    """The types of the frames, a run of deltas counted once."""
    types = [frame["type"] for frame in frames]
    return [type for number, type in enumerate(types) if type != "turn.delta" or types[number - 1] != type]


def seen(frames: Sequence[Frame]) -> list[list[str]]:
    """The history that the agent was given."""
    assert frames[-1]["type"] == "turn.completed", frames[-1]
    history: list[list[str]] = json.loads(text_of(frames))["history"]
    return history
