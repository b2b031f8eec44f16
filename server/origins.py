"""Origins of pages (RFC 6454): which of them a setting may name, and whether a browser's `Origin` is one of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<wildcard>\*\.)?(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}
# Pages of these have the origin `null`, or none; nothing has a socket's own scheme.
_NO_ORIGINS: Final = frozenset({"about", "blob", "data", "file", "filesystem", "javascript", "ws", "wss"})
_LABEL: Final = "[a-z0-9](?:[a-z0-9_-]{0,62})"
_OWN: Final = re.compile(r"https?://([^/?#@\\\s]+)", re.IGNORECASE)


def parse_origin(text: str) -> str:
    """Return an origin as browsers send it, in small letters and without a default port.

    It may be that of an app (`capacitor://localhost`), or have one wildcard as its first label
    (`https://*.example.com`). Raises ValueError, which says what an origin is and does not show the text.
    """
    found = _ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if found is None or found["scheme"] in _NO_ORIGINS or int(found["port"] or 0) > 65535:
        raise ValueError(
            "origins such as https://app.example.com, https://*.example.com or capacitor://localhost: a scheme, a host "
            "and perhaps a port, and nothing behind"
        )
    scheme, host, port = found["scheme"], found["host"], found["port"]
    if found["wildcard"] and (scheme not in _DEFAULT_PORTS or not _may_have_names_below(host)):
        raise ValueError("a wildcard only as in https://*.example.com: one label before a name of at least two")
    at = "" if port is None or port == _DEFAULT_PORTS.get(scheme) else f":{port}"
    return f"{scheme}://{found['wildcard'] or ''}{host}{at}"


def pattern_of(allowed: Sequence[str]) -> str:
    """Return a regular expression that an `Origin` matches as a whole where it is one of these, which `parse_origin`
    has returned. A wildcard stands for exactly one label: for no name alone, and for no deeper one."""
    if not allowed:
        return "(?!)"  # nothing
    alternatives = "|".join(re.escape(origin).replace(r"\*", _LABEL) for origin in allowed)
    return f"(?ai:{alternatives})"


def is_own(origin: str, host: str) -> bool:
    """Return whether an `Origin` is that of a page which this server has served under the request's `Host`."""
    found = _OWN.fullmatch(origin)
    return found is not None and found[1].lower() == host.lower()


def _may_have_names_below(host: str) -> bool:
    labels = host.split(".")
    return host == "localhost" or (len(labels) > 1 and all(labels) and labels[-1].isalpha())
