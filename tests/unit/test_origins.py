"""Origins of pages: what a setting may name, and what it lets in."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.origins import is_own, parse_origin, pattern_of


def is_allowed(origin: str, allowed: Sequence[str]) -> bool:
    return re.fullmatch(pattern_of([parse_origin(each) for each in allowed]), origin) is not None


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://App.Example.com", "https://app.example.com"),
        ("https://app.example.com/", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://app.example.com:80", "http://app.example.com"),
        ("http://app.example.com:443", "http://app.example.com:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://*.example.com", "https://*.example.com"),
        ("http://*.localhost:3000", "http://*.localhost:3000"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("ionic://localhost", "ionic://localhost"),
        ("tauri://localhost", "tauri://localhost"),
        ("chrome-extension://abcdefghijklmnopabcdefghijklmnop", "chrome-extension://abcdefghijklmnopabcdefghijklmnop"),
        ("app://.", "app://."),
    ],
)
def test_an_origin_is_taken_as_browsers_send_it(text: str, origin: str) -> None:
    assert parse_origin(text) == origin
    assert is_allowed(origin.replace("*", "a"), [text])


@pytest.mark.parametrize(
    "text",
    [
        *("*", "null", "", "app.example.com", "https://", "https://*", "https://*.", "https://*.com", "https://*."),
        *("https://**.example.com", "https://a.*.example.com", "https://*a.example.com", "https://a*.example.com"),
        *("https://*.*.example.com", "https://*.10.0.0.1", "https://*.[::1]", "https://*..com", "capacitor://*.app.io"),
        *("https://a.example/path", "https://a.example//", "https://a.example?q", "https://a.example#f"),
        *("https://u:p@a.example", "https://a.example:", "https://a.example:x", "https://a.example:65536"),
        *("https://a b.example", "https://a.example\n", "https://bücher.example", "https://a|b.example"),
        *("file://host", "file:///home", "javascript://a.example", "data://a", "wss://a.example", "blob://a.example"),
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(origins such as|a wildcard only as in) https://"):
        parse_origin(text)


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        ("https://a.example.com", True),
        ("https://A.EXAMPLE.com", True),
        ("https://a-b_c1.example.com", True),
        ("https://xn--bcher-kva.example.com", True),
        ("https://example.com", False),
        ("https://.example.com", False),
        ("https://a.b.example.com", False),
        ("https://evil-example.com", False),
        ("https://a.example.com.evil.com", False),
        ("https://evil.com/.example.com", False),
        ("https://evil.com#.example.com", False),
        ("https://evil.com?.example.com", False),
        ("https://evil.com\\.example.com", False),
        ("https://evil@x.example.com", False),
        ("https://a:b.example.com", False),
        ("https://a.exampleXcom", False),
        ("https://a.example.com:8443", False),
        ("https://a.example.com:443", False),
        ("http://a.example.com", False),
        ("https://a.example.com/", False),
        ("https://a.example.com\n", False),
        ("https://\u212a.example.com", False),  # the Kelvin sign, which is a k where case is ignored
        (f"https://{'a' * 64}.example.com", False),
        ("null", False),
        ("", False),
    ],
)
def test_a_wildcard_stands_for_exactly_one_label(origin: str, is_let_in: bool) -> None:
    assert is_allowed(origin, ["https://other.example", "https://*.example.com"]) is is_let_in


def test_a_wildcard_keeps_its_port() -> None:
    assert is_allowed("https://a.example.com:8443", ["https://*.example.com:8443"])
    assert not is_allowed("https://a.example.com", ["https://*.example.com:8443"])


@given(st.text())
def test_nothing_is_allowed_where_nothing_is_named(origin: str) -> None:
    assert not is_allowed(origin, [])


@pytest.mark.parametrize(
    ("origin", "host", "is_its_own"),
    [
        ("https://chat.example", "chat.example", True),
        ("http://CHAT.example:8000", "chat.EXAMPLE:8000", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("https://chat.example", "chat.example:8000", False),
        ("https://chat.example/", "chat.example", False),
        ("https://chat.example?", "chat.example", False),
        ("https://chat.example#", "chat.example", False),
        ("https://u@chat.example", "u@chat.example", False),
        ("javascript://chat.example", "chat.example", False),
        ("file://chat.example", "chat.example", False),
        ("null", "null", False),
        ("https://", "", False),
        ("", "", False),
    ],
)
def test_the_servers_own_page_has_its_host_over_http_and_nothing_behind(
    origin: str, host: str, is_its_own: bool
) -> None:
    assert is_own(origin, host) is is_its_own
