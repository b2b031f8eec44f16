"""An agent that uses the store of its turn: its question says how, and its answer is what came of it, as JSON."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

from anynode import AgentEvent, ClientError, TextDelta, Turn
from anynode.server.store.messages import message_for_model

AGENT: Final = "tests.agents.storing:use_store"


async def use_store(turn: Turn) -> AsyncIterator[AgentEvent]:
    """Follow the question, a list of actions, and tell the outcome of each."""
    outcomes = []
    for action, *arguments in json.loads(turn.history[-1].content):
        try:
            outcomes.append(await _outcome(turn, action, *arguments))
        except ClientError as error:
            outcomes.append([type(error).__name__, error.message])
    yield TextDelta(json.dumps(outcomes))


async def _outcome(turn: Turn, action: str, *arguments: Any) -> Any:
    store, user, own = turn.store, turn.user_id, turn.conversation_id
    match action:
        case "history":  # what the agent is given, in the form of a context
            return [message_for_model(message) for message in turn.history]
        case "is_cut":
            return turn.history_is_cut
        case "context":
            return await store.get_conversation_context(own, user, *arguments)
        case "older":
            return [each.content for each in await store.get_conversation_history(own, user, *arguments)]
        case "all":
            return len([each async for each in store.get_messages(own, user)])
        case "count":  # with the models
            from anynode.models.tables import Message

            with store.reading():
                return await Message.filter(conversation_id=own).count()
        case "add":
            (added,) = await store.save_conversation_messages(
                arguments[0] or own, user, [{"role": "user", "content": arguments[1]}]
            )
            return added.position
        case "delegate":  # to the node's own agent, in another conversation
            answer = await store.chat(user, arguments[1], arguments[0])
            return answer["response"]
        case "kill":  # in the first attempt: take the whole node along
            if turn.attempt == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return turn.attempt
    raise AssertionError(f"an unknown action: {action}")
