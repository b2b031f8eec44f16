"""What begins while a follower reads, and is not in what it reads, is not missed."""

from __future__ import annotations

from tests.agents.scripted import eventually
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, socket_to
from tests.kit.postgres_proxy import postgres_proxy


async def test_a_turn_elsewhere_that_is_heard_of_during_a_reading_is_read_next(
    start_node: StartNode, database_url: str, user: str
) -> None:
    with postgres_proxy(database_url) as proxy:
        node, other = start_node(proxy.url), start_node()
        async with socket_to(other, user) as there, socket_to(node, user) as here:
            first = await there.answer("one")
            conversation_id = first[0]["conversation_id"]
            reading = proxy.hold("after", "read_events")
            await here.follow(conversation_id, first[-1]["seq"])
            await reading.reached()
            second = await there.answer("two", conversation_id)
            watches = proxy.executions("watch")

            async def has_heard() -> bool:
                return proxy.executions("watch") > watches + 1

            await eventually(has_heard)
            reading.release()
            assert [frame["seq"] for frame in await here.until(*TERMINAL)][-1] == second[-1]["seq"]
