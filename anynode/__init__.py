"""Anynode: a WebSocket chat server for streaming AI answers. Any node can resume a dropped connection.

Only the names in `__all__` are public: what an agent is given and yields, what a tool is given, the client, the
conversation store with its errors, and pure helpers for messages. Each is loaded when it is first used, so that `import
anynode` costs nothing, and needs no more than the names that are used. The tables are in `anynode.models.tables`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anynode.server.agents.agent import (
        AgentError,
        AgentEvent,
        HistoryMessage,
        StepEnd,
        TextDelta,
        ToolCall,
        ToolResult,
        Turn,
        Usage,
        continues,
        resumes_calls,
    )
    from anynode.server.agents.pydantic_ai import from_pydantic_ai
    from anynode.server.agents.run_agent import from_run_agent
    from anynode.server.agents.tools import ToolContext
    from anynode.server.client.client import Client, GivenUp, Refused
    from anynode.server.errors import (
        AgentFailed,
        ClientError,
        ConfigurationError,
        ConversationBusy,
        DatabaseUnavailable,
        InvalidFrame,
        MessageTooLarge,
        NotFound,
        RoleOrder,
    )
    from anynode.server.store.chats import ChatAnswer
    from anynode.server.store.messages import build_message_array, message_to_dict, validate_role_sequence
    from anynode.server.store.store import Store

__all__ = [
    "AgentError",
    "AgentEvent",
    "AgentFailed",
    "ChatAnswer",
    "Client",
    "ClientError",
    "ConfigurationError",
    "ConversationBusy",
    "DatabaseUnavailable",
    "GivenUp",
    "HistoryMessage",
    "InvalidFrame",
    "MessageTooLarge",
    "NotFound",
    "Refused",
    "RoleOrder",
    "StepEnd",
    "Store",
    "TextDelta",
    "ToolCall",
    "ToolContext",
    "ToolResult",
    "Turn",
    "Usage",
    "build_message_array",
    "continues",
    "from_pydantic_ai",
    "from_run_agent",
    "message_to_dict",
    "resumes_calls",
    "validate_role_sequence",
]

_ERRORS = (
    "AgentFailed",
    "ClientError",
    "ConfigurationError",
    "ConversationBusy",
    "DatabaseUnavailable",
    "InvalidFrame",
    "MessageTooLarge",
    "NotFound",
    "RoleOrder",
)

_MODULES = {
    **dict.fromkeys(_ERRORS, "anynode.server.errors"),
    "ChatAnswer": "anynode.server.store.chats",
    "Client": "anynode.server.client.client",
    "GivenUp": "anynode.server.client.client",
    "Refused": "anynode.server.client.client",
    "Store": "anynode.server.store.store",
    "ToolContext": "anynode.server.agents.tools",
    "build_message_array": "anynode.server.store.messages",
    "from_pydantic_ai": "anynode.server.agents.pydantic_ai",
    "from_run_agent": "anynode.server.agents.run_agent",
    "message_to_dict": "anynode.server.store.messages",
    "validate_role_sequence": "anynode.server.store.messages",
}  # of the names that are not in anynode.server.agents.agent

if not TYPE_CHECKING:  # a type checker would take any name for one that exists

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'anynode' has no attribute {name!r}")
        value = getattr(import_module(_MODULES.get(name, "anynode.server.agents.agent")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
