"""The routes of the API reference: `/openapi.json`, `/asyncapi.json`, and a page at `/docs`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anynode.server.reference.asyncapi import asyncapi
from anynode.server.reference.openapi import openapi

_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
code, pre { font: .875rem/1.45 ui-monospace, monospace; }
pre { background: var(--soft); padding: .75rem; border-radius: .375rem; overflow-x: auto; }
details { border: 1px solid var(--line); border-radius: .375rem; margin: .5rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; } summary code { font-weight: 600; } summary span { display: block; opacity: .8; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td { border-top: 1px solid var(--line); padding: .25rem .5rem .25rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
"""


def reference_routes() -> list[Route]:
    """Make the routes; their contents are made once, here."""
    document = openapi()
    contents = {
        "/openapi.json": (msgspec.json.encode(document), "application/json"),
        "/asyncapi.json": (msgspec.json.encode(asyncapi()), "application/json"),
        "/docs": (page(document).encode(), "text/html"),
        "/docs.css": (_STYLE.encode(), "text/css"),
    }

    def route(path: str, content: bytes, media_type: str) -> Route:
        async def show(request: Request) -> Response:
            return Response(content, headers=_PAGE_HEADERS, media_type=media_type)

        return Route(path, show)

    return [route(path, *content) for path, content in contents.items()]


def page(document: Mapping[str, Any]) -> str:
    """Render the operations of an OpenAPI document as HTML that needs no script."""
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code><span>'
        f"{_text(schema.get('description', ''))}</span></summary>{_json(schema)}</details>"
        for name, schema in document["components"]["schemas"].items()
    )
    info = document["info"]
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(info["title"])} over HTTP</title><link rel="stylesheet" href="docs.css"></head>
<body><main>
<h1>{escape(info["title"])} {escape(info["version"])} over HTTP</h1>
<p>{_text(info["description"])}</p>
<p>Every request has the header <code>Authorization: Bearer</code> with a token; <code>anynode token --user ada</code>
makes one. For machines there are <a href="openapi.json">openapi.json</a> and, for the socket, <a
href="asyncapi.json">asyncapi.json</a>.</p>
<h2>Operations</h2>
{operations}
<h2>Types</h2>
{schemas}
</main></body>
</html>
"""


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = "".join((*_parameters(operation), *_body(operation), *_responses(operation)))
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><code>{method.upper()} {escape(path)}</code>'
        f"<span>{_text(operation['summary'])}</span></summary><table>{rows}</table>"
        f"{_curl(method, path, operation)}{_example_answer(operation)}</details>"
    )


def _parameters(operation: Mapping[str, Any]) -> Iterator[str]:
    for parameter in operation["parameters"]:
        schema = dict(parameter["schema"])
        said = [schema.pop("description", ""), parameter.get("description", "")]
        kind = ", ".join(f"{name} {json.dumps(value)}" for name, value in schema.items())
        what = _text(" ".join(filter(None, said)))
        yield _row(f"{parameter['name']} ({parameter['in']})", f"{what} <code>{escape(kind)}</code>")


def _body(operation: Mapping[str, Any]) -> Iterator[str]:
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        names = [each["$ref"].rpartition("/")[2] for each in schema.get("anyOf", [schema])]
        links = " or ".join(f'<a href="#{escape(name)}"><code>{escape(name)}</code></a>' for name in names)
        yield _row("body", links)


def _responses(operation: Mapping[str, Any]) -> Iterator[str]:
    for status, response in operation["responses"].items():
        yield _row(status, _text(response["description"]))


def _text(text: str) -> str:
    """Render text as HTML; text between backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _row(name: str, text: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{text}</td></tr>"


def _curl(method: str, path: str, operation: Mapping[str, Any]) -> str:
    examples = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
    data = "".join(
        f" \\\n  -d '{json.dumps(example['value'], ensure_ascii=False)}'" for example in [*examples.values()][:1]
    )
    flags = "" if method == "get" else f" -X {method.upper()}"
    return f'<pre>{escape(f"""curl{flags} -H "Authorization: Bearer $TOKEN" $URL{path}{data}""")}</pre>'


def _example_answer(operation: Mapping[str, Any]) -> str:
    response = next(iter(operation["responses"].values()))
    examples = response.get("content", {}).get("application/json", {}).get("examples", {})
    return "".join(_json(example["value"]) for example in [*examples.values()][:1])


def _json(value: object) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
