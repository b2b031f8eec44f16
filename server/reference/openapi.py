"""`/openapi.json`: the operations over HTTP as OpenAPI 3.1, made from the types that decode and encode them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final, get_args

import msgspec
from msgspec.structs import fields

from anynode.server.api.operations import AI_SDK_PATH, OPERATIONS
from anynode.server.errors import (
    HTTP_ERRORS,
    BodyTimeout,
    ClientError,
    DatabaseUnavailable,
    InternalError,
    InvalidFrame,
    KeysUnavailable,
    MessageTooLarge,
    Unauthorized,
)
from anynode.server.protocol.bodies import Continue, NoQuery, Refusal
from anynode.server.protocol.frames import ID_CHARACTERS_MAX
from anynode.server.reference.examples import BODIES
from anynode.server.transport.http import RETRY_SECONDS, Operation

_REFERENCE: Final = "#/components/schemas/{name}"
_ALWAYS: Final = (Unauthorized, InternalError, DatabaseUnavailable, KeysUnavailable)
_CLIENTS: Final = {"type": "string", "minLength": 1, "maxLength": ID_CHARACTERS_MAX, "format": "printable"}
_NAMED: Final[Mapping[str, dict[str, Any]]] = {
    "user_id": {"type": "string", "minLength": 1, "description": "The token's `sub`."},
    "response_id": {**_CLIENTS, "description": "`resp_…`, from the answer to createResponse."},
    "model": {**_CLIENTS, "description": "A model's id from listModels."},
    "conversation_id": {
        **_CLIENTS,
        "description": "The conversation's UUID, or the client's own id of it (`client_id`); percent-encode a slash.",
    },
    "chat_id": {**_CLIENTS, "description": "The client's own id of the chat, or the conversation's UUID."},
}
_TAGS: Final = {
    "/conversations": "conversations",
    AI_SDK_PATH: "AI SDK",
    "/auth": "AI SDK",
    "/api": "chat",
    "/v1": "OpenAI",
}
# What fields of a body say only together, which their types cannot.
_TOGETHER: Final[Mapping[str, dict[str, Any]]] = {
    Continue.__name__: {
        "anyOf": [
            {"required": ["content"], "properties": {"content": {"type": "string"}}},
            {"properties": {"message_id": {"type": "null"}}},
        ]
    },
}
_DESCRIPTION: Final = """The conversations of one user, whom the token names. Turns that are started here and turns of \
the socket `/ws` (see `/asyncapi.json`) are the same: a turn runs to its end even if nobody follows it, on any node. \
All errors have the shape of `Refusal`."""


def openapi() -> dict[str, Any]:
    """Make the OpenAPI document."""
    kinds = [kind for operation in OPERATIONS for kind in _kinds_of(operation)]
    structs = list(dict.fromkeys(part for kind in [*kinds, Refusal] for part in _parts(kind)))
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
    for name, rule in _TOGETHER.items():
        schemas[name] |= rule
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Anynode",
            "version": version("anynode"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}},
        },
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [next(tag for start, tag in _TAGS.items() if operation.path.startswith(start))],
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation)],
        "responses": {
            **{str(status): _success(kind, operation.can_stream) for status, kind in operation.replies.items()},
            **_refusals(operation),
        },
    }
    if operation.name == "followConversation":
        described["parameters"].append(
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The cursor of a client that reconnects; prevails over `after`.",
                "schema": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
            }
        )
    if operation.bodies:
        described["requestBody"] = {
            "required": any(field.required for field in fields(_parts(operation.bodies[0])[0])),
            "content": _content([part for kind in operation.bodies for part in _parts(kind)]),
        }
    return described


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _NAMED.get(name, {"type": "string", "format": "uuid"})}
        for name in re.findall(r"{(\w+)}", path)
    ]


def _query_parameters(operation: Operation) -> list[dict[str, Any]]:
    if operation.query is NoQuery:
        return []
    _, schemas = msgspec.json.schema_components([operation.query], ref_template=_REFERENCE)
    properties: Mapping[str, dict[str, Any]] = schemas[operation.query.__name__]["properties"]
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]


def _success(kind: Any, can_stream: bool) -> dict[str, Any]:
    if kind is None:
        return {"description": "Done."}
    if isinstance(kind, str):
        return {"description": "A stream.", "content": {kind: {"schema": {"type": "string"}}}}
    said = " Or: ".join(" ".join((part.__doc__ or "").split()) for part in _parts(kind))
    stream = {"text/event-stream": {"schema": {"type": "string"}}} if can_stream else {}
    return {"description": said, "content": {**_content(_parts(kind)), **stream}}


def _refusals(operation: Operation) -> dict[str, Any]:
    errors = [*_ALWAYS, *operation.errors]
    if operation.bodies:
        errors += [MessageTooLarge, BodyTimeout]
    if operation.bodies or operation.query is not NoQuery or "_id}" in operation.path:
        errors.append(InvalidFrame)
    by_status: dict[int, list[type[ClientError]]] = {}
    for error in HTTP_ERRORS:
        if error in errors:
            by_status.setdefault(error.http_status, []).append(error)
    return {str(status): _refusal(status, by_status[status]) for status in sorted(by_status)}


def _refusal(status: int, errors: Sequence[type[ClientError]]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "description": " ".join(f"`{error.code}`: {error().message}" for error in errors),
        "content": {
            "application/json": {
                "schema": {"$ref": _REFERENCE.format(name="Refusal")},
                "examples": {
                    error.code: {"value": {"error": {"code": error.code, "message": error().message}}}
                    for error in errors
                },
            }
        },
    }
    if status in (429, 503):
        described["headers"] = {
            "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "const": RETRY_SECONDS}}
        }
    return described


def _content(kinds: Sequence[type]) -> dict[str, Any]:
    references = [{"$ref": _REFERENCE.format(name=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    examples = {kind.__name__: {"value": BODIES[kind]} for kind in kinds if kind in BODIES}
    return {"application/json": {"schema": schema, "examples": examples}}


def _kinds_of(operation: Operation) -> list[Any]:
    return [*operation.bodies, *(kind for kind in operation.replies.values() if not isinstance(kind, str | None))]


def _parts(kind: Any) -> list[type[msgspec.Struct]]:
    """Return the Structs of a union, or a lone Struct as a list."""
    return list(get_args(kind)) or [kind]
