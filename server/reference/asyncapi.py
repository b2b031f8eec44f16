"""`/asyncapi.json`: the frames of the socket as AsyncAPI 3.0, made from the types that decode and encode them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final, get_args

import msgspec

from anynode.server.protocol.frames import SUBPROTOCOL, AnyClientFrame, AnyServerFrame
from anynode.server.reference.examples import FRAMES

_SCHEMA: Final = "#/components/schemas/{name}"
_DESCRIPTION: Final = """Streaming chat over a WebSocket: frames are JSON text, in both directions. PROTOCOL.md of the \
repository says when each is sent and what a client does with it."""


def asyncapi() -> dict[str, Any]:
    """Make the AsyncAPI document."""
    client, server = list(get_args(AnyClientFrame)), list(get_args(AnyServerFrame))
    _, schemas = msgspec.json.schema_components([*client, *server], ref_template=_SCHEMA)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Anynode",
            "version": version("anynode"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "node": {
                "host": "{host}",
                "protocol": "wss",
                "description": "Any node, or a load balancer in front of all nodes.",
                "variables": {"host": {"default": "127.0.0.1:8000"}},
                "security": [{"$ref": "#/components/securitySchemes/bearer"}],
            }
        },
        "channels": {
            "socket": {
                "address": "/ws",
                "description": f"A WebSocket with the subprotocol `{SUBPROTOCOL}`.",
                "messages": {_tag(frame): {"$ref": _message_reference(frame)} for frame in [*client, *server]},
                "bindings": {"ws": {"method": "GET", "bindingVersion": "0.1.0"}},
            }
        },
        "operations": {
            "takeFrames": _operation("receive", "Frames that clients send.", client),
            "sendFrames": _operation("send", "Frames that the server sends.", server),
        },
        "components": {
            "messages": {_tag(frame): _message(frame) for frame in [*client, *server]},
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _operation(action: str, summary: str, frames: Sequence[type[msgspec.Struct]]) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": "#/channels/socket"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/socket/messages/{_tag(frame)}"} for frame in frames],
    }


def _message(frame: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "name": _tag(frame),
        "title": frame.__name__,
        "summary": " ".join((frame.__doc__ or "").split()),
        "payload": {"$ref": _SCHEMA.format(name=frame.__name__)},
        "examples": [{"payload": FRAMES[_tag(frame)]}],
    }


def _message_reference(frame: type[msgspec.Struct]) -> str:
    return f"#/components/messages/{_tag(frame)}"


def _tag(frame: type[msgspec.Struct]) -> str:
    return str(frame.__struct_config__.tag)
