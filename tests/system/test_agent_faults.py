"""Whatever an agent does, its turn ends exactly once, committed, and the next message works."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.kit.harness import TERMINAL, Frame, NodeProcess, Socket, running_node, socket_to, sql, text_of
from tests.kit.provider import DONE, Reply, answer, delta, event, openai_environment, serve_provider

StartNode = Callable[..., NodeProcess]

ANSWER_BYTES_MAX = 300_000
FINE = script_of(("text", "fine"))


@pytest.fixture(scope="module")
def node(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    environment = {**strings.environment, "ANSWER_BYTES_MAX": str(ANSWER_BYTES_MAX)}
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), environment) as running:
        yield running


@pytest.fixture(scope="module")
def impatient_node(
    module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    environment = {**strings.environment, "AGENT_TIMEOUT_SECONDS": "1"}
    with running_node(module_database_url, tmp_path_factory.mktemp("node"), environment) as running:
        yield running


async def answer_and_go_on(database_url: str, node: NodeProcess, user: str, question: str) -> list[Frame]:
    """The frames of a turn; asserts that it ended once and as the database says, and that the next message works."""
    async with socket_to(node, user) as socket:
        frames = await socket.answer(question)
        await assert_it_ended_once_and_goes_on(database_url, socket, frames)
    return frames


async def assert_it_ended_once_and_goes_on(database_url: str, socket: Socket, frames: Sequence[Frame]) -> None:
    end = frames[-1]
    assert end["type"] in TERMINAL
    conversation_id = end["conversation_id"]
    following = await socket.answer(FINE, conversation_id)
    assert following[0]["seq"] == end["seq"] + 1
    assert following[-1]["message"]["content"] == "fine"
    ends = await sql(
        database_url,
        "SELECT count(*) FROM events WHERE conversation_id = $1 AND turn_id = $2 AND type = ANY ($3)",
        uuid.UUID(conversation_id),
        uuid.UUID(end["turn_id"]),
        list(TERMINAL),
    )
    assert ends[0]["count"] == 1
    rows = await sql(
        database_url,
        "SELECT t.status, m.status AS message_status, m.content, t.error FROM turns t "
        "JOIN messages m ON m.turn_id = t.id AND m.id = $2 WHERE t.id = $1",
        uuid.UUID(end["turn_id"]),
        uuid.UUID(end["message"]["id"]),
    )
    assert len(rows) == 1
    assert f"turn.{rows[0]['status']}" == f"turn.{rows[0]['message_status']}" == end["type"]
    assert rows[0]["content"] == end["message"]["content"]
    assert json.loads(rows[0]["error"] or "null") == end.get("error")


# Errors.


async def test_an_agent_that_raises_fails_its_turn_without_telling_people_its_internals(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("text", "so far"), ("raise", "password=hunter2"))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["error"]["code"] == "agent_failed"
    assert "hunter2" not in json.dumps(frames[2:])
    assert frames[-1]["message"]["content"] == text_of(frames) == "so far"


@pytest.mark.parametrize("retryable", [True, False])
async def test_an_agents_own_error_reaches_people_as_it_is(
    node: NodeProcess, module_database_url: str, user: str, retryable: bool
) -> None:
    question = script_of(("text", "so far"), ("agent_error", "The oracle sleeps until noon.", retryable))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    error = {"code": "agent_failed", "message": "The oracle sleeps until noon.", "retryable": retryable}
    assert frames[-1]["error"] == error
    assert frames[-1]["message"]["content"] == "so far"


async def test_an_agents_error_with_a_nul_and_a_lone_surrogate_is_told_all_the_same(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("text", "so far"), ("agent_error", "bad \0 worse \ud83d end", False))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["error"]["message"] == "bad \ufffd worse \ufffd end"


async def test_an_agent_that_fails_at_once_leaves_an_empty_failed_message(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    frames = await answer_and_go_on(module_database_url, node, user, script_of(("raise", "no")))
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["message"]["content"] == ""


@pytest.mark.parametrize(
    "nonsense", [("nonsense", "text"), ("nonsense", None), ("nonsense", 42), ("call", "1", "tool", "no object")]
)
async def test_an_agent_that_yields_nonsense_fails_its_turn(
    node: NodeProcess, module_database_url: str, user: str, nonsense: Sequence[Any]
) -> None:
    question = script_of(("text", "so far"), nonsense)
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["message"]["content"] == "so far"


async def test_an_agent_that_cancels_itself_fails_its_turn(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    frames = await answer_and_go_on(module_database_url, node, user, script_of(("cancel_itself",)))
    assert frames[-1]["type"] == "turn.failed"


async def test_an_agent_that_fails_between_a_call_and_its_result_leaves_a_conversation_that_goes_on(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("text", "let me see"), ("call", "1", "tool", {}), ("raise", "no"))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"


# Agents that do not stop, or do not start.


@pytest.mark.parametrize("beginning", [(), (("text", "so far"),)])
async def test_an_agent_that_hangs_fails_its_turn(
    impatient_node: NodeProcess, module_database_url: str, user: str, beginning: Sequence[Sequence[Any]]
) -> None:
    frames = await answer_and_go_on(module_database_url, impatient_node, user, script_of(*beginning, ("hang",)))
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["error"]["code"] == "agent_failed"
    assert frames[-1]["error"]["retryable"] is True
    assert frames[-1]["message"]["content"] == ("so far" if beginning else "")


async def test_an_agent_that_says_something_now_and_then_is_not_timed_out(
    impatient_node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("paced", 6, "w{number} ", 0.4))
    frames = await answer_and_go_on(module_database_url, impatient_node, user, question)
    assert frames[-1]["type"] == "turn.completed"


@pytest.mark.parametrize("action", ["hold", "deaf"])
async def test_a_turn_is_cancelled_at_once_although_its_agent_does_not_let_go(
    node: NodeProcess, module_database_url: str, strings: Strings, user: str, action: str
) -> None:
    gate = strings.name()
    try:
        async with socket_to(node, user) as socket:
            await socket.ask(script_of(("text", "so far "), (action, gate, 1)))
            frames = await socket.until("turn.delta")
            cancel = {"type": "turn.cancel", "conversation_id": frames[0]["conversation_id"]}
            await socket.send(cancel)
            frames += await socket.until(*TERMINAL)
            await assert_it_ended_once_and_goes_on(module_database_url, socket, frames)
    finally:
        strings.open(gate)
    assert frames[-1]["type"] == "turn.cancelled"
    assert frames[-1]["message"]["content"] == text_of(frames)
    assert text_of(frames).startswith("so far ")


@pytest.mark.parametrize("action", ["hold", "deaf"])
async def test_a_node_ends_although_an_agent_does_not_let_go(
    start_node: StartNode, user: str, tmp_path: Path, action: str
) -> None:
    strings = Strings(tmp_path / "strings")
    node = start_node(**strings.environment, DRAIN_SECONDS="1")
    try:
        async with socket_to(node, user) as socket:
            await socket.ask(script_of(("text", "so far"), (action, "let go", 1)))
            await socket.until("turn.delta")
        node.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(node.process.wait, 20) == 0
    finally:
        strings.open("let go")


async def test_a_tight_loop_of_deltas_stops_neither_other_turns_nor_pings(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    async with socket_to(node, user) as busy, socket_to(node, user) as socket:
        await busy.ask(script_of(("repeat", 100_000, "x"), ("repeat", 100_000, "")))
        busy_frames = await busy.until("turn.delta")
        other = asyncio.create_task(socket.answer(script_of(("paced", 5, "w{number} ", 0.001))))
        await busy.send({"type": "ping"})
        busy_frames += await busy.until("pong", *TERMINAL)
        assert busy_frames.pop()["type"] == "pong"
        frames = await other
        is_still_running = await sql(
            module_database_url,
            "SELECT FROM turns WHERE id = $1 AND status = 'running'",
            uuid.UUID(busy_frames[-1]["turn_id"]),
        )
        busy_frames += await busy.until(*TERMINAL)
    assert text_of(frames) == frames[-1]["message"]["content"] == "w0 w1 w2 w3 w4 "
    assert is_still_running
    assert busy_frames[-1]["type"] == "turn.completed"
    assert busy_frames[-1]["message"]["content"] == text_of(busy_frames) == "x" * 100_000


# What cannot be stored, and how much.


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a\0b"], "a\ufffdb"),
        (["a\ud83db"], "a\ufffdb"),
        (["\ude00b"], "\ufffdb"),
        (["a\ud83d\ude00b"], "a😀b"),
        (["a\ud83d", "\ude00b"], "a😀b"),
        (["a\ud83d", "", "\ude00b"], "a😀b"),
        (["a\ud83d", "b"], "a\ufffdb"),
        (["a", "\ud83d"], "a\ufffd"),
        (["\ud83d"], "\ufffd"),
        (["\0"], "\ufffd"),
        (["\ud83d", "\ud83d", "\ude00"], "\ufffd😀"),
    ],
)
async def test_text_that_postgres_does_not_take_is_mended(
    node: NodeProcess, module_database_url: str, user: str, texts: Sequence[str], expected: str
) -> None:
    question = script_of(*(("text", text) for text in texts))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.completed"
    assert text_of(frames) == frames[-1]["message"]["content"] == expected


async def test_tool_events_that_postgres_does_not_take_are_mended(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(
        ("call", "\0id", "to\ud83dol", {"a\0": ["\ude00", {"b": "\ud83d\ude00"}]}),
        ("result", "\0id", "to\ud83dol", "re\0sult \ud83d"),
        ("step",),
        ("text", "done"),
    )
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.completed"
    call, result = (frame for frame in frames if frame["type"].startswith("turn.tool"))
    assert call["arguments"] == {"a\ufffd": ["\ufffd", {"b": "😀"}]}
    assert (call["tool_call_id"], call["tool_name"]) == ("\ufffdid", "to\ufffdol")
    assert result["content"] == "re\ufffdsult \ufffd"


async def test_usage_that_postgres_does_not_take_is_stored_without_it(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("text", "so far"), ("usage", 1, 2, "mo\0del \ud83d"))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.completed"
    assert frames[-1]["usage"]["model"] == "model "


async def test_an_answer_that_grows_too_long_fails_and_keeps_what_fitted(
    node: NodeProcess, module_database_url: str, user: str
) -> None:
    question = script_of(("repeat", 1000, "x" * 1000))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    assert "ANSWER_BYTES_MAX" in frames[-1]["error"]["message"]
    assert frames[-1]["message"]["content"] == text_of(frames) == "x" * ANSWER_BYTES_MAX


async def test_the_length_of_an_answer_counts_in_bytes(node: NodeProcess, module_database_url: str, user: str) -> None:
    question = script_of(("repeat", 1000, "ö" * 1000))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["message"]["content"] == text_of(frames) == "ö" * (ANSWER_BYTES_MAX // 2)


async def test_tool_results_without_end_fail_the_turn(node: NodeProcess, module_database_url: str, user: str) -> None:
    async with socket_to(node, user) as socket:
        frames = await socket.answer(script_of(("results", 60, "x" * 50_000), ("step",), ("text", "done")))
        await assert_it_ended_once_and_goes_on(module_database_url, socket, frames)
    assert frames[-1]["type"] == "turn.failed"
    assert "ANSWER_BYTES_MAX" in frames[-1]["error"]["message"]


async def test_one_huge_delta_is_delivered_whole(node: NodeProcess, module_database_url: str, user: str) -> None:
    question = script_of(("huge", "y", 250_000))
    frames = await answer_and_go_on(module_database_url, node, user, question)
    assert frames[-1]["type"] == "turn.completed"
    assert text_of(frames) == frames[-1]["message"]["content"] == "y" * 250_000


@pytest.mark.parametrize("actions", [(), (("text", ""),), (("step",), ("step",)), (("usage", 1, 0),)])
async def test_an_agent_that_says_nothing_completes_an_empty_answer(
    node: NodeProcess, module_database_url: str, user: str, actions: Sequence[Sequence[Any]]
) -> None:
    frames = await answer_and_go_on(module_database_url, node, user, script_of(*actions))
    assert [frame["type"] for frame in frames] == ["message.created", "turn.started", "turn.completed"]
    assert frames[-1]["message"]["content"] == ""


# The openai agent, from end to end.


async def test_a_models_answer_streams_through_with_its_usage(start_node: StartNode, user: str) -> None:
    async with serve_provider() as provider:
        node = start_node(**openai_environment(provider))
        provider.replies.append(answer("It is ", "probably ", "42 ☕."))
        async with socket_to(node, user) as socket:
            frames = await socket.answer("What is it?")
            assert frames[-1]["type"] == "turn.completed"
            assert text_of(frames) == frames[-1]["message"]["content"] == "It is probably 42 ☕."
            usage = frames[-1]["usage"]
            assert (usage["input_tokens"], usage["output_tokens"], usage["model"]) == (7, 3, "fake-1")
            await socket.answer("Why?", frames[0]["conversation_id"])
    asked = [(message["role"], message["content"]) for message in provider.requests[1].body["messages"]]
    assert asked == [("user", "What is it?"), ("assistant", "It is probably 42 ☕."), ("user", "Why?")]


async def test_a_cancel_closes_the_request_to_the_provider_and_keeps_what_was_said(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with serve_provider() as provider:
        node = start_node(**openai_environment(provider))
        provider.replies.append(Reply((delta(content="It is "),), then="hang"))
        async with socket_to(node, user) as socket:
            await socket.ask("What is it?")
            frames = await socket.until("turn.delta")
            await socket.send({"type": "turn.cancel", "conversation_id": frames[0]["conversation_id"]})
            frames += await socket.until(*TERMINAL)
            async with asyncio.timeout(15):
                await provider.left.wait()
            assert frames[-1]["type"] == "turn.cancelled"
            assert frames[-1]["message"]["content"] == "It is "
            following = await socket.answer("And now?", frames[0]["conversation_id"])
            assert following[-1]["message"]["content"] == "Hello world."


async def test_a_disconnect_does_not_close_the_request_to_the_provider(
    start_node: StartNode, database_url: str, user: str
) -> None:
    async with serve_provider() as provider:
        node = start_node(**openai_environment(provider))
        provider.replies.append(Reply((delta(content="It is "),), then="hang"))
        async with socket_to(node, user) as socket:
            await socket.ask("What is it?")
            await socket.until("turn.delta")
            socket.drop()

        async def is_disconnected() -> bool:
            return await asyncio.to_thread(node.metric, "anynode_connections") == 0

        await eventually(is_disconnected)
        assert not provider.left.is_set()
        rows = await sql(database_url, "SELECT status FROM turns")
        assert [row["status"] for row in rows] == ["running"]


REFUSED = json.dumps({"error": {"message": "as the provider says", "type": "x"}}).encode()
PROVIDER_FAULTS = {
    "a wrong key": (Reply((REFUSED,), 401, content_type="application/json"), "OPENAI_API_KEY", False, ""),
    "too many requests": (
        Reply((REFUSED,), 429, {"Retry-After": "17"}, content_type="application/json"),
        "try again in 17 s",
        True,
        "",
    ),
    "a failing provider": (Reply((REFUSED,), 500, content_type="application/json"), "status 500", True, ""),
    "an unknown model": (Reply((REFUSED,), 404, content_type="application/json"), "MODEL", False, ""),
    "a cut stream": (Reply((delta(content="It is "),), then="cut"), "cut off", True, "It is "),
    "a stream without an end": (Reply((delta(content="It is "),)), "cut off", True, "It is "),
    "garbage": (Reply((delta(content="It is "), b"data: {nonsense\n\n")), "", None, "It is "),
    "an error in the stream": (
        Reply((delta(content="It is "), event({"error": {"message": "as the provider says"}}), DONE)),
        "as the provider says",
        True,
        "It is ",
    ),
    "a web page": (Reply((b"<html>",), content_type="text/html"), "OPENAI_BASE_URL", False, ""),
}


@pytest.mark.parametrize("fault", PROVIDER_FAULTS)
async def test_a_providers_fault_fails_the_turn_with_a_message_to_act_on(
    start_node: StartNode, database_url: str, user: str, fault: str
) -> None:
    reply, words, retryable, said = PROVIDER_FAULTS[fault]
    async with serve_provider() as provider:
        node = start_node(**openai_environment(provider))
        provider.replies.append(reply)
        async with socket_to(node, user) as socket:
            frames = await socket.answer("What is it?")
            end = frames[-1]
            assert end["type"] == "turn.failed"
            assert end["error"]["code"] == "agent_failed"
            assert words in end["error"]["message"]
            assert len(end["error"]["message"]) > 20
            assert "sk-secret" not in json.dumps(end)
            if retryable is not None:
                assert end["error"]["retryable"] is retryable
            assert end["message"]["content"] == text_of(frames) == said
            following = await socket.answer("And now?", end["conversation_id"])
            assert following[-1]["message"]["content"] == "Hello world."


async def test_a_provider_that_cannot_be_reached_fails_the_turn(start_node: StartNode, user: str) -> None:
    async with serve_provider() as provider:
        environment = openai_environment(provider)
    node = start_node(**environment)
    async with socket_to(node, user) as socket:
        end = (await socket.answer("What is it?"))[-1]
    assert end["type"] == "turn.failed"
    assert "OPENAI_BASE_URL" in end["error"]["message"]
    assert end["error"]["retryable"] is True


async def test_a_provider_that_goes_silent_fails_the_turn(start_node: StartNode, user: str) -> None:
    async with serve_provider() as provider:
        node = start_node(**openai_environment(provider), AGENT_TIMEOUT_SECONDS="1")
        provider.replies.append(Reply((delta(content="It is "),), then="hang"))
        async with socket_to(node, user) as socket:
            frames = await socket.answer("What is it?")
            async with asyncio.timeout(15):
                await provider.left.wait()
    assert frames[-1]["type"] == "turn.failed"
    assert frames[-1]["message"]["content"] == "It is "
