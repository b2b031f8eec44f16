"""`/openapi.json` and the page at `/docs` are whole, and their examples are as their schemas say."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest

from anynode.server.api.operations import OPERATIONS
from anynode.server.errors import HTTP_ERRORS
from anynode.server.reference.examples import BODIES
from anynode.server.reference.openapi import openapi
from anynode.server.reference.page import page

DOCUMENT = openapi()
OPERATIONS_SHOWN = [
    (f"{method.upper()} {path}", operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
CONTENTS = [
    pytest.param(content, id=f"{name} {place}")
    for name, operation in OPERATIONS_SHOWN
    for place, holder in [("body", operation.get("requestBody", {})), *operation["responses"].items()]
    for content in holder.get("content", {}).values()
]


def validator(schema: dict[str, Any]) -> jsonschema_rs.Validator:
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]}, validate_formats=True)


def test_it_has_every_operation() -> None:
    shown = {(name, operation["operationId"]) for name, operation in OPERATIONS_SHOWN}
    assert shown == {(f"{operation.method} {operation.path}", operation.name) for operation in OPERATIONS}


@pytest.mark.parametrize("content", CONTENTS)
def test_an_example_is_as_its_schema_says(content: dict[str, Any]) -> None:
    assert content.get("examples") or content["schema"] == {"type": "string"}
    for example in content.get("examples", {}).values():
        validator(content["schema"]).validate(example["value"])


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_a_schema_refuses_what_is_not_its_kind(kind: type) -> None:
    schema = DOCUMENT["components"]["schemas"][kind.__name__]
    assert validator(schema).is_valid(BODIES[kind])
    for name in schema["required"]:
        assert not validator(schema).is_valid({other: value for other, value in BODIES[kind].items() if other != name})


def test_every_error_has_a_status_at_some_operation() -> None:
    said = {
        (status, code)
        for _, operation in OPERATIONS_SHOWN
        for status, response in operation["responses"].items()
        for code in response.get("content", {}).get("application/json", {}).get("examples", {})
        if int(status) >= 400
    }
    assert said == {(str(error.http_status), error.code) for error in HTTP_ERRORS}


def test_the_page_shows_every_operation_and_every_type_and_needs_no_script() -> None:
    shown = page(DOCUMENT)
    for name, operation in OPERATIONS_SHOWN:
        assert f"<code>{name}</code>" in shown
        assert f'id="{operation["operationId"]}"' in shown
    for name in DOCUMENT["components"]["schemas"]:
        assert f'id="{name}"' in shown
    assert "<script" not in shown
    assert "style=" not in shown
