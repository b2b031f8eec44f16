"""Functions and Pydantic AI agents as agents of real nodes: what is shown, stored, and seen in the next turn."""

from __future__ import annotations

import json
import uuid

import pytest

from tests.agents.adapted import PYDANTIC_AI, RUN_AGENT
from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, socket_to, sql, text_of


@pytest.fixture(scope="module")
def environment(strings: Strings) -> dict[str, str]:
    return {DIRECTORY: str(strings.directory), "LEASE_SECONDS": "1"}


@pytest.mark.parametrize(
    ("agent", "types", "roles"),
    [
        (RUN_AGENT, ["tool_call", "tool_result"] * 2, ["assistant", "tool"] * 2),
        (PYDANTIC_AI, ["tool_call"] * 2 + ["tool_result"] * 2, ["assistant", "tool", "tool"]),
    ],
)
async def test_calls_and_results_are_shown_stored_and_seen_in_the_next_turn(
    start_node: StartNode,
    database_url: str,
    environment: dict[str, str],
    user: str,
    agent: str,
    types: list[str],
    roles: list[str],
) -> None:
    async with socket_to(start_node(AGENT=agent, **environment), user) as socket:
        frames = await socket.answer("apples pears")
        conversation_id = frames[0]["conversation_id"]
        assert [frame["type"] for frame in frames] == [
            *("message.created", "turn.started"),
            *(f"turn.{type}" for type in types),
            *("turn.delta", "turn.completed"),
        ]
        called = [frame for frame in frames if frame["type"] == "turn.tool_call"]
        assert [frame["tool_call_id"] for frame in called] == ["apples", "pears"]
        assert [frame["arguments"] for frame in called] == [{"word": "apples"}, {"word": "pears"}]
        stored = await sql(
            database_url,
            "SELECT role, content, tool_name, tool_call_id FROM messages WHERE conversation_id = $1 ORDER BY position",
            uuid.UUID(conversation_id),
        )
        assert [row["role"] for row in stored] == ["user", *roles, "assistant"]
        assert sorted(tuple(row)[1:] for row in stored if row["role"] == "tool") == [
            ("found apples", "look_up", "apples"),
            ("found pears", "look_up", "pears"),
        ]
        seen = json.loads(text_of(await socket.answer("figs", conversation_id)))
    answer = text_of(frames)
    contents = [content for _, content in seen if content]
    assert contents[: contents.index("figs") + 1] == ["apples pears", "found apples", "found pears", answer, "figs"]


async def test_of_the_tools_of_pydantic_ai_the_node_that_takes_over_runs_only_those_that_have_not_answered(
    start_node: StartNode, environment: dict[str, str], strings: Strings, user: str
) -> None:
    dying, other = [start_node(AGENT=PYDANTIC_AI, **environment) for _ in range(2)]
    async with socket_to(dying, user) as socket, socket_to(other, user) as elsewhere:
        await socket.ask("quick slow")
        frames = await socket.until("turn.tool_result")
        assert frames[-1]["content"] == "found quick"

        async def both_run() -> bool:
            return strings.marks("slow-run") == [1]

        await eventually(both_run)
        dying.kill()
        await elsewhere.follow(frames[0]["conversation_id"], frames[-1]["seq"])
        strings.open("slow")
        frames = await elsewhere.until(*TERMINAL)
    assert frames[-1]["type"] == "turn.completed"
    assert ["tool-return", "found quick"] in json.loads(frames[-1]["message"]["content"])
    assert strings.marks("quick-run") == [1]
    assert strings.marks("slow-run") == [1, 2]
