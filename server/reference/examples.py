"""Examples of every frame and every body, for PROTOCOL.md, `/asyncapi.json` and `/openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from anynode.server.api.ai_sdk import bodies as ai_sdk
from anynode.server.api.ai_sdk.wire import ChatRequest
from anynode.server.api.openai import bodies as responses
from anynode.server.protocol import bodies
from anynode.server.protocol.frames import Message

_CONVERSATION: Final = "0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11"
_TURN: Final = "0199aa10-5f3e-7d02-8c44-91d2c3b4a5f6"
_ANSWER: Final = "0199aa10-61b2-7e13-a7d8-0a1b2c3d4e5f"


def _message(id: str, role: str, content: str, created_at: str, status: str = "completed") -> dict[str, Any]:
    return {
        "id": id,
        "role": role,
        "content": content,
        "tool_calls": None,
        "tool_name": None,
        "tool_call_id": None,
        "status": status,
        "turn_id": _TURN,
        "created_at": created_at,
    }


_QUESTION: Final = _message(
    "0199aa10-5f3e-7a90-b0c5-7d1e2f3a4b5c", "user", "Why is the sky blue?", "2026-01-15T09:30:00.125000Z"
)
_ANSWERED: Final = _message(
    _ANSWER, "assistant", "Because air scatters short waves more.", "2026-01-15T09:30:02.500000Z"
)
_USAGE: Final = {"input_tokens": 21, "output_tokens": 9, "model": "gpt-4o-mini", "seconds": 2.375}
_ERROR: Final = {
    "code": "agent_failed",
    "message": "the provider limits requests, try again in 20 s",
    "retryable": True,
}
_CALL: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "search", "arguments": '{"query": "Rayleigh scattering"}'},
}


def _event(type: str, seq: int, **fields: Any) -> dict[str, Any]:
    turn = {"turn_id": _TURN} if type.startswith("turn.") else {}
    return {"type": type, "conversation_id": _CONVERSATION, "seq": seq, **turn, **fields}


_FRAMES: Final[Sequence[dict[str, Any]]] = (
    {"type": "auth", "token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl"},
    {
        "type": "message.send",
        "conversation_id": _CONVERSATION,
        "message_id": "9b2f6c1e",
        "content": "Why is the sky blue?",
        "request_id": "r-1",
    },
    {"type": "conversation.follow", "conversation_id": _CONVERSATION, "after": 17},
    {"type": "conversation.unfollow", "conversation_id": _CONVERSATION},
    {"type": "turn.cancel", "conversation_id": _CONVERSATION, "turn_id": _TURN},
    {"type": "turn.regenerate", "conversation_id": _CONVERSATION, "message_id": "9b2f6c1e"},
    {"type": "ping", "request_id": "p-1"},
    _event("message.created", 18, message=_QUESTION),
    _event("turn.started", 19, message_id="9b2f6c1e"),
    _event("turn.delta", 22, text="Because air scatters "),
    _event(
        "turn.tool_call",
        23,
        tool_call_id="call_1",
        tool_name="search",
        arguments={"query": "Rayleigh scattering"},
    ),
    _event(
        "turn.tool_result",
        24,
        tool_call_id="call_1",
        tool_name="search",
        content="short waves scatter more",
        is_error=False,
    ),
    _event("turn.restarted", 25, epoch=2, text=""),
    _event("turn.completed", 40, message=_ANSWERED, usage=_USAGE),
    _event(
        "turn.cancelled",
        30,
        message=_message(_ANSWER, "assistant", "Because air", "2026-01-15T09:30:01Z", "cancelled"),
    ),
    _event(
        "turn.failed",
        30,
        message=_message(_ANSWER, "assistant", "", "2026-01-15T09:30:01Z", "failed"),
        error=_ERROR,
    ),
    {
        "type": "ready",
        "user_id": "ada",
        "node_id": "web-1-77f5a148",
        "protocol": "anynode.v1",
        "heartbeat_seconds": 10.0,
    },
    {"type": "heartbeat"},
    {
        "type": "conversation.snapshot",
        "conversation_id": _CONVERSATION,
        "messages": [_QUESTION],
        "turn": {"turn_id": _TURN, "text": "Because air scatters "},
        "seq": 22,
        "has_older": False,
    },
    {
        "type": "error",
        "code": "conversation_busy",
        "message": "A turn is still running in this conversation.",
        "retryable": True,
        "request_id": "r-1",
        "conversation_id": _CONVERSATION,
    },
    {"type": "auth.expiring", "expires_at": 1768469460.0},
    {"type": "goaway", "reason": "restarting", "deadline": 1768469425.0},
    {"type": "pong", "request_id": "p-1"},
)
FRAMES: Final[Mapping[str, dict[str, Any]]] = {frame["type"]: frame for frame in _FRAMES}

_SHOWN: Final = {
    "id": _CONVERSATION,
    "client_id": None,
    "title": "Why is the sky blue?",
    "system_prompt": None,
    "metadata": {"theme": "dark"},
    "seq": 40,
    "created_at": "2026-01-15T09:30:00.125000Z",
    "updated_at": "2026-01-15T09:30:00.125000Z",
}

_MODEL: Final = {"id": "gpt-4o-mini", "object": "model", "created": 0, "owned_by": "anynode"}

BODIES: Final[Mapping[type, dict[str, Any]]] = {
    responses.CreateResponse: {
        "input": "Why is the sky blue?",
        "conversation": "conv_0199aa105f3e7c519b1d2f5b6f0a7c11",
        "background": True,
        "stream": True,
    },
    responses.ResponseObject: {
        "id": "resp_0199aa105f3e7d028c4491d2c3b4a5f6",
        "object": "response",
        "created_at": 1768469400,
        "status": "completed",
        "background": True,
        "completed_at": 1768469402,
        "conversation": {"id": "conv_0199aa105f3e7c519b1d2f5b6f0a7c11"},
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "gpt-4o-mini",
        "output": [
            {
                "type": "message",
                "id": "msg_0199aa105f3e7d028c4491d2c3b4a5f6_0",
                "status": "completed",
                "content": [
                    {
                        "type": "output_text",
                        "text": "Because air scatters short waves more.",
                        "annotations": [],
                        "logprobs": [],
                    }
                ],
                "role": "assistant",
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 21,
            "output_tokens": 9,
            "total_tokens": 30,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        },
    },
    responses.Models: {"data": [_MODEL], "object": "list"},
    responses.Model: _MODEL,
    bodies.NewConversation: {"title": "The sky", "system_prompt": "Answer in one sentence.", "client_id": "chat-1"},
    bodies.ConversationChanges: {"title": "Blue"},
    bodies.UserMessage: {"role": "user", "content": "Why is the sky blue?"},
    bodies.NewMessages: {
        "messages": [
            {"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "short waves scatter more"},
            {"role": "assistant", "content": "Because air scatters short waves more."},
        ]
    },
    bodies.Continue: {"content": "Why is the sky blue?", "message_id": "9b2f6c1e"},
    bodies.Regenerate: {"message_id": "9b2f6c1e"},
    bodies.Cancel: {},
    bodies.Chat: {"message": "Why is the sky blue?"},
    bodies.Conversation: _SHOWN,
    bodies.Conversations: {"conversations": [_SHOWN], "next_skip": None, "next_before": None},
    bodies.Messages: {"messages": [_QUESTION, _ANSWERED], "next_before": None},
    bodies.Export: {
        "messages": [
            {"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "Because air scatters short waves more."},
        ]
    },
    Message: {**_QUESTION, "turn_id": None},
    bodies.Appended: {"messages": [{**_QUESTION, "turn_id": None}], "seq": 41},
    bodies.Answer: {
        "conversation_id": _CONVERSATION,
        "response": "Because air scatters short waves more.",
        "tool_calls": [],
        "turn_id": _TURN,
        "message": _ANSWERED,
        "usage": _USAGE,
    },
    bodies.StartedTurn: {"conversation_id": _CONVERSATION, "turn_id": _TURN, "after": 17},
    bodies.CancelledTurn: {"conversation_id": _CONVERSATION, "turn_id": _TURN},
    bodies.StoredTurn: {
        "conversation_id": _CONVERSATION,
        "turn_id": _TURN,
        "status": "completed",
        "usage": _USAGE,
        "error": None,
        "created_at": "2026-01-15T09:30:00.125000Z",
        "finished_at": "2026-01-15T09:30:02.500000Z",
        "messages": [_ANSWERED],
    },
    bodies.ChatAnswer: {
        "conversation_id": _CONVERSATION,
        "response": "Because air scatters short waves more.",
        "tool_calls": [],
    },
    ChatRequest: {
        "id": "c8Jm2pLxQ0aZ4rTv",
        "trigger": "submit-message",
        "messages": [
            {"id": "Zq7dK1sWnE5bXy3u", "role": "user", "parts": [{"type": "text", "text": "Why is the sky blue?"}]}
        ],
    },
    ai_sdk.Stopped: {"conversation_id": _CONVERSATION, "turn_id": _TURN},
    ai_sdk.ChatMessages: {
        "messages": [
            {
                "id": "Zq7dK1sWnE5bXy3u",
                "role": "user",
                "parts": [{"type": "text", "text": "Why is the sky blue?"}],
            },
            {
                "id": _TURN,
                "role": "assistant",
                "parts": [
                    {"type": "step-start"},
                    {"type": "text", "text": "Because air scatters short waves more.", "state": "done"},
                ],
                "metadata": {
                    "usage": {"inputTokens": 21, "outputTokens": 9, "totalTokens": 30},
                    "seconds": 2.375,
                    "model": "gpt-4o-mini",
                },
            },
        ],
        "next_before": None,
    },
    ai_sdk.Ticket: {"ticket": "p1Yk0sX2wQm8nB5vC7zL4tR9eH3jU6aDfG0iK1oN2xM", "expires_at": 1768469430.0},
}
