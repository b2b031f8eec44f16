"""Paths: which parts they have, what is in each of them, and what each names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from anynode.server.auth import Identity
from anynode.server.errors import Forbidden, InvalidFrame
from anynode.server.transport.paths import as_id, named, route_of
from tests.kit.asgi import http_scope

ID = UUID("0199aa10-5f3e-7c51-9b1d-2f5b6f0a7c11")
ADA = Identity("ada", 4e9)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Do nothing: paths are only matched here."""


def matched(path: str, scope: Scope) -> Mapping[str, Any] | None:
    """What the path of a route names in a scope, or None if it is not its."""
    match, child = route_of(path, app).matches(scope)
    return None if match is Match.NONE else child["path_params"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("chat", "chat"),
        ("%63hat", "chat"),
        ("a%2Fb", "a/b"),
        (f"a%2fthings%2f{ID}", f"a/things/{ID}"),
        ("%252F", "%2F"),
        ("%2525%2F", "%25/"),
        ("%25", "%"),
        ("100%", "100%"),
        ("%zz", "%zz"),
        ("%2E%2E", ".."),
        ("%C3%B6%20%F0%9F%98%80", "ö \U0001f600"),
        ("%EF%BF%BD", "\ufffd"),
        ("%00", "\0"),
        ("a%0Ab", "a\nb"),
    ],
)
def test_the_id_of_a_conversation_is_one_part_of_a_path_as_it_was_before_it_was_encoded(raw: str, text: str) -> None:
    one, things = "/conversations/{conversation_id}", "/conversations/{conversation_id}/things/{thing_id}"
    assert matched(one, http_scope("GET", f"/conversations/{raw}")) == {"conversation_id": text}
    for path in (f"/conversations/{raw}/things/{ID}", f"/conversations/{raw}/t%68ings/{ID}"):
        assert matched(things, http_scope("GET", path)) == {"conversation_id": text, "thing_id": str(ID)}
        assert matched(one, http_scope("GET", path)) is None


@pytest.mark.parametrize("raw", ["%ff", "%ED%A0%80", "a%C3"])
def test_what_is_not_utf_8_is_no_id(raw: str) -> None:
    names = matched("/conversations/{conversation_id}", http_scope("GET", f"/conversations/{raw}"))
    assert names is not None
    assert not names["conversation_id"].isprintable()
    assert as_id(names["conversation_id"]) is None


@pytest.mark.parametrize("raw", [None, b"", b"/another%20path", b"/conversations/another%20one"])
def test_without_the_path_as_it_came_a_part_is_as_the_server_has_decoded_it(raw: bytes | None) -> None:
    scope = {**http_scope("GET", "/"), "path": "/conversations/100%25", "raw_path": raw}
    assert matched("/conversations/{conversation_id}", scope) == {"conversation_id": "100%25"}
    del scope["raw_path"]
    assert matched("/conversations/{conversation_id}", scope) == {"conversation_id": "100%25"}


def test_below_a_root_path_an_id_is_the_same() -> None:
    scope = {**http_scope("GET", "/api/conversations/a%2Fb"), "root_path": "/api"}
    assert matched("/conversations/{conversation_id}", scope) == {"conversation_id": "a/b"}


@pytest.mark.parametrize(
    "path", ["/conversations/", "/conversations//things/1", "/conversations", "/conversations/%2F/"]
)
def test_an_id_has_a_character_at_least(path: str) -> None:
    for pattern in ("/conversations/{conversation_id}", "/conversations/{conversation_id}/things/{thing_id}"):
        assert matched(pattern, http_scope("GET", path)) is None


def test_what_else_others_have_named_may_have_slashes_that_are_not_encoded() -> None:
    assert matched("/models/{model}", http_scope("GET", "/models/org/model-1")) == {"model": "org/model-1"}
    assert matched("/things/{thing_id}", http_scope("GET", "/things/a/b")) is None


def test_ours_are_uuids_and_those_of_others_are_printable_texts() -> None:
    path = {"user_id": "ada", "model": "org/model-1", "turn_id": str(ID), "conversation_id": "anything"}
    assert named(path, ADA) == ({"turn_id": ID}, {"model": "org/model-1"})
    with pytest.raises(Forbidden):
        named({"user_id": "grace"}, ADA)
    for name, text in (("turn_id", "17"), ("turn_id", "\udcff"), ("model", "a\nb"), ("model", "x" * 129)):
        with pytest.raises(InvalidFrame) as raised:
            named({name: text}, ADA)
        assert [problem.path for problem in raised.value.problems] == [name]
