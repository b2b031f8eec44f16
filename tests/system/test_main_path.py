"""The main path, over real sockets."""

from __future__ import annotations

from tests.kit.harness import NodeProcess, socket_to, text_of


async def test_a_message_is_answered_and_the_history_counts(shared_node: NodeProcess, user: str) -> None:
    async with socket_to(shared_node, user) as socket:
        first = await socket.answer("hello there")
        assert [frame["type"] for frame in first][:2] == ["message.created", "turn.started"]
        assert first[-1]["type"] == "turn.completed"
        assert text_of(first) == first[-1]["message"]["content"] == "[1] hello there"
        second = await socket.answer("and again", first[0]["conversation_id"])
        assert text_of(second) == "[3] and again"
        seqs = [frame["seq"] for frame in first + second]
        assert seqs == sorted(seqs)
