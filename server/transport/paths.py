"""The paths of requests over HTTP: what their parts name, and how parts are told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote
from uuid import UUID

import msgspec
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Scope

from anynode.server.auth import Identity
from anynode.server.errors import Forbidden, InvalidFrame, Problem
from anynode.server.protocol.frames import ID_CHARACTERS_MAX, is_client_id

TEXTS: Final = ("user_id", "chat_id", "response_id", "model")  # what a path may name, besides our own ids
CONVERSATION: Final = "conversation_id"  # may be ours or the client's own: `http` finds it


class _Anything(Convertor[str]):
    """A part of a path that others have named. It may have slashes in it: a user's id may be an address. `named`
    refuses what else may not be in it."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


def route_of(path: str, app: ASGIApp) -> Route:
    """Return the route of an application at a path whose `{parameters}` are named as `named` reads them."""
    pattern = re.sub(rf"{{({'|'.join(TEXTS)})}}", r"{\1:anything}", path)
    return (_SegmentsRoute if f"{{{CONVERSATION}}}" in path else Route)(pattern, app)


class _SegmentsRoute(Route):
    """A route where each part of the path stands for itself: `%2F` is a slash within a part and separates nothing.

    Servers decode `path` as a whole, so the parts are taken from `raw_path`, where the server gives it and nothing
    between it and this route has changed `path`.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        raw = scope.get("raw_path") or b""
        if b"%" not in raw or unquote(raw.decode("latin-1")) != scope["path"]:
            return super().matches(scope)
        # What is not UTF-8 becomes lone surrogates, which no id has.
        parts = [unquote(part, errors="surrogateescape") for part in raw.decode("latin-1").split("/")]
        path = "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)
        match, child = super().matches({**scope, "path": path})
        if match is not Match.NONE:
            named = child["path_params"].items()
            child["path_params"] = {name: text.replace("%2F", "/").replace("%25", "%") for name, text in named}
        return match, child


def named(parameters: Mapping[str, str], identity: Identity) -> tuple[dict[str, UUID], dict[str, str]]:
    """Return the ids in a path that this server gave, and the texts that others gave; neither has the conversation."""
    ids, texts = {}, {}
    for name, text in parameters.items():
        if name == "user_id":
            if text != identity.user_id:
                raise Forbidden("The token is another user's.")
        elif name in TEXTS:
            if not is_client_id(text):
                raise InvalidFrame(problems=[Problem(name, f"is not 1 to {ID_CHARACTERS_MAX} printable characters")])
            texts[name] = text
        elif name != CONVERSATION:
            if (id := as_id(text)) is None:
                raise InvalidFrame(problems=[Problem(name, "is not a UUID")])
            ids[name] = id
    return ids, texts


def as_id(text: str) -> UUID | None:
    """Return the UUID that a part of a path spells, or None."""
    try:
        return msgspec.convert(text, UUID)
    except ValueError:  # msgspec's, and that of lone surrogates
        return None
