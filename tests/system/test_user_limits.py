"""One user's limits hold over all nodes, exactly, and another user does not notice that they are reached."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest

from anynode import Client, Refused
from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.ai_sdk import new_id
from tests.kit.harness import Frame, NodeProcess, Socket, running_node, socket_to, sql, token_for
from tests.kit.rest import Rest, rest_to

Nodes = Sequence[NodeProcess]
TURNS, PER_MINUTE, TOKENS, CONVERSATIONS, BYTES = 3, 10, 1000, 12, 20_000
LIMITS = {
    "TURNS_PER_USER_MAX": str(TURNS),
    "TURNS_PER_USER_PER_MINUTE": str(PER_MINUTE),
    "TOKENS_PER_USER_PER_DAY": str(TOKENS),
    "CONVERSATIONS_PER_USER_MAX": str(CONVERSATIONS),
    "MESSAGES_PER_USER_BYTES_MAX": str(BYTES),
    "LEASE_SECONDS": "1",
}
MINUTE_MS, DAY_MS = 60_000, 86_400_000


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes on one database, with small limits."""
    directory = tmp_path_factory.mktemp("nodes")
    environment = {**strings.environment, **LIMITS}
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, environment)) for _ in range(3)]


@pytest.fixture
async def sockets(nodes: Nodes, user: str) -> AsyncIterator[list[Socket]]:
    """Three sockets of the user on each node."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(socket_to(node, user)) for node in nodes for _ in range(3)]


@pytest.fixture
async def rest(nodes: Nodes, user: str) -> AsyncIterator[Rest]:
    async with rest_to(nodes[0], user) as rest:
        yield rest


async def outcome_of(socket: Socket, script: str, conversation_id: str | None = None) -> Frame:
    """Send a message, and return `turn.started` or the `error`."""
    await socket.ask(script, conversation_id)
    return (await socket.until("turn.started", "error"))[-1]


async def usage_of(url: str, user: str) -> dict[str, Any]:
    (row,) = await sql(url, "SELECT * FROM user_usage WHERE user_id = $1", user)
    return dict(row)


def limit_of(refused: Frame) -> tuple[str, str, int]:
    return refused["code"], refused["limit"], refused["limit_max"]


async def test_of_many_turns_at_once_on_all_nodes_exactly_as_many_run_as_may(
    nodes: Nodes, sockets: list[Socket], strings: Strings, gate: str
) -> None:
    script = script_of(["text", "hello "], ["gate", gate])
    outcomes = await asyncio.gather(*(outcome_of(socket, script) for socket in sockets))
    assert Counter(outcome["type"] for outcome in outcomes) == {"turn.started": TURNS, "error": len(sockets) - TURNS}
    for refused in (outcome for outcome in outcomes if outcome["type"] == "error"):
        assert limit_of(refused) == ("rate_limited", "turns_per_user_max", TURNS)
        assert refused["retryable"]
        assert refused["retry_after_ms"] == 1000
        assert refused["message"] == "At most 3 of your turns run at once; wait until one has ended."
    async with socket_to(nodes[0], "somebody else") as other:
        assert (await outcome_of(other, script_of(["text", "hello"])))["type"] == "turn.started"
    strings.open(gate)


async def test_a_turn_that_has_ended_makes_room_for_another_on_any_node(
    sockets: list[Socket], strings: Strings, gate: str
) -> None:
    running, ended, waiting = sockets[0], sockets[3], sockets[6]
    for _ in range(TURNS - 1):
        assert (await outcome_of(running, script_of(["gate", gate])))["type"] == "turn.started"
    other_gate = strings.name()
    assert (await outcome_of(ended, script_of(["gate", other_gate])))["type"] == "turn.started"
    assert (await outcome_of(waiting, script_of(["gate", gate])))["type"] == "error"
    strings.open(other_gate)
    await ended.until("turn.completed")
    assert (await outcome_of(waiting, script_of(["gate", gate])))["type"] == "turn.started"
    strings.open(gate)


async def test_a_turn_of_a_deleted_conversation_and_one_that_was_taken_over_do_not_count_for_ever(
    module_database_url: str,
    strings: Strings,
    tmp_path_factory: pytest.TempPathFactory,
    nodes: Nodes,
    user: str,
    gate: str,
) -> None:
    directory = tmp_path_factory.mktemp("dying")
    async with socket_to(nodes[0], user) as socket, rest_to(nodes[0], user) as rest:
        async with socket_to(nodes[1], user) as other:
            deleted = await outcome_of(other, script_of(["gate", gate]))
        (await rest.ask("DELETE", f"/conversations/{deleted['conversation_id']}")).expect(204)
        with running_node(module_database_url, directory, {**strings.environment, **LIMITS}) as dying:
            async with socket_to(dying, user) as lost:
                assert (await outcome_of(lost, script_of(["kill", 1], ["text", "done"])))["type"] == "turn.started"
            dying.kill()

        async def is_over() -> bool:
            running = "SELECT FROM turns t JOIN conversations c ON c.id = t.conversation_id"
            return not await sql(module_database_url, running + " WHERE user_id = $1 AND t.status = 'running'", user)

        await eventually(is_over)
        for _ in range(TURNS):
            assert (await outcome_of(socket, script_of(["gate", gate])))["type"] == "turn.started"
        assert (await outcome_of(socket, script_of(["gate", gate])))["type"] == "error"
    strings.open(gate)


async def test_of_many_turns_in_a_minute_on_all_nodes_exactly_as_many_begin_as_may(sockets: list[Socket]) -> None:
    async def ask_again_and_again(socket: Socket) -> list[Frame]:
        frames = []
        while True:
            await socket.ask(script_of(["text", "hello"]))
            frames += [(await socket.until("turn.completed", "error"))[-1]]
            if frames[-1].get("limit") == "turns_per_user_per_minute":
                return frames

    outcomes = [frame for frames in await asyncio.gather(*map(ask_again_and_again, sockets)) for frame in frames]
    assert sum(outcome["type"] == "turn.completed" for outcome in outcomes) == PER_MINUTE
    last = [outcome for outcome in outcomes if outcome.get("limit") == "turns_per_user_per_minute"]
    assert len(last) == len(sockets)
    for refused in last:
        assert limit_of(refused) == ("rate_limited", "turns_per_user_per_minute", PER_MINUTE)
        assert 0 < refused["retry_after_ms"] <= MINUTE_MS


async def test_a_minute_later_turns_begin_again(module_database_url: str, sockets: list[Socket], user: str) -> None:
    for _ in range(PER_MINUTE):
        await sockets[0].answer(script_of(["text", "hello"]))
    assert (await outcome_of(sockets[3], script_of(["text", "hello"])))["type"] == "error"
    later = "UPDATE user_usage SET minute_started_at = minute_started_at - interval '1 minute' WHERE user_id = $1"
    await sql(module_database_url, later, user)
    assert (await outcome_of(sockets[3], script_of(["text", "hello"])))["type"] == "turn.started"
    assert (await usage_of(module_database_url, user))["minute_turns"] == 1


async def test_the_tokens_of_a_day_are_counted_from_what_turns_say_that_they_have_used(
    module_database_url: str, sockets: list[Socket], user: str
) -> None:
    await sockets[0].answer(script_of(["usage", 300, 100, "m"], ["text", "hello"], ["usage", 100, 99, "m"]))
    await sockets[3].answer(script_of(["usage", 400, 0, "m"], ["raise", "broken"]))
    assert (await usage_of(module_database_url, user))["day_tokens"] == TOKENS - 1
    await sockets[6].answer(script_of(["usage", 2, 5, "m"], ["text", "hello"]))
    refused = await outcome_of(sockets[0], script_of(["text", "hello"]))
    assert limit_of(refused) == ("rate_limited", "tokens_per_user_per_day", TOKENS)
    assert 0 < refused["retry_after_ms"] <= DAY_MS
    await sql(module_database_url, "UPDATE user_usage SET day = day - 1 WHERE user_id = $1", user)
    assert (await outcome_of(sockets[0], script_of(["text", "hello"])))["type"] == "turn.started"


async def test_a_repeated_message_and_one_that_is_refused_for_another_reason_count_once_and_not_at_all(
    module_database_url: str, sockets: list[Socket], user: str, strings: Strings, gate: str
) -> None:
    message_id = str(uuid.uuid4())
    script = script_of(["gate", gate])
    for socket in sockets:
        await socket.ask(script, message_id=message_id)
    started = [(await socket.until("turn.started", "error"))[-1] for socket in sockets]
    assert {frame["type"] for frame in started} == {"turn.started"}
    busy = await outcome_of(sockets[0], script, started[0]["conversation_id"])
    assert busy["code"] == "conversation_busy"
    usage = await usage_of(module_database_url, user)
    assert (usage["minute_turns"], len(usage["running"])) == (1, 1)
    strings.open(gate)


async def test_every_api_tells_of_a_limit_in_its_own_terms(
    nodes: Nodes, sockets: list[Socket], rest: Rest, strings: Strings, gate: str, chat: str
) -> None:
    for _ in range(TURNS):
        await outcome_of(sockets[0], script_of(["gate", gate]))
    conversation_id = await rest.create()
    text = script_of(["text", "hello"])
    ai_sdk = {"id": chat, "trigger": "submit-message"}
    ai_sdk["messages"] = [{"id": new_id(), "role": "user", "parts": [{"type": "text", "text": text}]}]  # type: ignore[assignment]
    for reply in (
        await rest.proceed(conversation_id, text),
        await rest.proceed(conversation_id, text, wait=False),
        await rest.post("/api/chat", ai_sdk),
        await rest.post("/v1/responses", {"input": text}),
    ):
        error = reply.expect(429)["error"]
        assert limit_of(error) == ("rate_limited", "turns_per_user_max", TURNS)
        assert error["retry_after_ms"] == 1000
        assert reply.headers["Retry-After"] == "1"
    assert (await rest.messages(conversation_id)) == []
    strings.open(gate)


async def test_the_client_waits_as_long_as_it_is_told_to_or_says_that_this_is_too_long(
    module_database_url: str, nodes: Nodes, sockets: list[Socket], user: str
) -> None:
    for _ in range(PER_MINUTE):
        await sockets[0].answer(script_of(["text", "hello"]))
    question = script_of(["text", "at last"])
    async with Client([nodes[1].ws], token_for(user), patience_seconds=30) as client:
        with pytest.raises(Refused, match=r"begin within a minute; try again in \d+ s. \(rate_limited\)"):
            await anext(client.send(question))
        soon = "UPDATE user_usage SET minute_started_at = clock_timestamp() - interval '59.5 s' WHERE user_id = $1"
        await sql(module_database_url, soon, user)
        frames = [frame async for frame in client.send(question)]
    assert frames[-1]["message"]["content"] == "at last"


async def test_what_is_stored_has_a_quota_and_deleting_makes_room(
    module_database_url: str, rest: Rest, user: str
) -> None:
    made = await asyncio.gather(*(rest.post("/conversations", {}) for _ in range(CONVERSATIONS + 5)))
    assert Counter(reply.status for reply in made) == {201: CONVERSATIONS, 429: 5}
    error = next(reply.json for reply in made if reply.status == 429)["error"]
    assert limit_of(error) == ("rate_limited", "conversations_per_user_max", CONVERSATIONS)
    assert 0 < error["retry_after_ms"] <= MINUTE_MS
    deleted = next(reply.json for reply in made if reply.status == 201)["id"]
    (await rest.ask("DELETE", f"/conversations/{deleted}")).expect(204)
    assert (await rest.post("/conversations", {})).status == 429  # it was measured a moment ago
    later = "UPDATE user_usage SET measured_at = measured_at - interval '1 minute' WHERE user_id = $1"
    await sql(module_database_url, later, user)
    await rest.create()
    assert (await usage_of(module_database_url, user))["conversations"] == CONVERSATIONS


async def test_the_bytes_of_everything_that_a_user_stores_are_counted(
    module_database_url: str, rest: Rest, user: str
) -> None:
    conversation_id = await rest.create(title="title", metadata={"k": "v" * 90}, system_prompt="p" * 100)
    (await rest.append(conversation_id, {"role": "user", "content": "q" * 5000})).expect(201)
    (await rest.post(f"/conversations/{conversation_id}/continue", {})).expect(502)  # no script, but a turn
    (await rest.append(conversation_id, {"role": "user", "content": "q" * 9000})).expect(201)
    stored = (await usage_of(module_database_url, user))["bytes"]
    refused = await rest.append(conversation_id, {"role": "assistant", "content": "a" * (BYTES - stored + 1)})
    assert limit_of(refused.expect(429)["error"]) == ("rate_limited", "messages_per_user_bytes_max", BYTES)
    measured = (await usage_of(module_database_url, user))["bytes"]
    assert (
        measured == stored + 1
    )  # added up and measured it is the same, but for the space that jsonb has after a colon
    stored = measured
    (await rest.append(conversation_id, {"role": "assistant", "content": "a" * (BYTES - stored)})).expect(201)
    patch = await rest.ask("PATCH", f"/conversations/{conversation_id}", {"metadata": {"k": "v"}})
    assert limit_of(patch.expect(429)["error"]) == ("rate_limited", "messages_per_user_bytes_max", BYTES)
