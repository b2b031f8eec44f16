"""Settings: what the environment says, and one line for every value that is wrong."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.errors import ConfigurationError
from anynode.server.settings import SECRET_BYTES_MIN, ScriptedCall, Settings, check_for_production, read_settings

NAMES = [setting.name.upper() for setting in fields(Settings)]
GOOD = {"JWT_SECRET": "x" * SECRET_BYTES_MIN, "DATABASE_URL": "postgresql://localhost/anynode"}


def complaint(environment: dict[str, str], *, production: bool = False) -> str:
    line = complaint_or_none(environment, production=production)
    assert line is not None
    return line


def complaint_or_none(environment: dict[str, str], *, production: bool) -> str | None:
    try:
        settings = read_settings(environment)
        if production:
            check_for_production(settings)
    except ConfigurationError as error:
        return str(error)
    return None


def test_the_defaults_are_those_of_the_design() -> None:
    assert read_settings({}) == Settings(
        host="0.0.0.0",
        port=8000,
        jwt_audience="anynode",
        jwt_issuer="anynode",
        agent="echo",
        flush_interval_ms=25,
        lease_seconds=5,
        max_attempts=3,
        drain_seconds=25,
        history_messages_max=200,
        message_bytes_max=65536,
        journal_retention_minutes=10,
        heartbeat_seconds=10,
        echo_tokens_per_second=50,
        allowed_origins=(),
    )


def test_an_empty_variable_counts_as_unset() -> None:
    assert read_settings(dict.fromkeys(NAMES, "")) == Settings()


def test_a_foreign_variable_is_none_of_our_business() -> None:
    assert read_settings({"PATH": "/", "ANYNODE_PORT": "junk", "port": "junk"}) == Settings()


def test_every_setting_says_what_it_is_for() -> None:
    assert all(setting.metadata["doc"] for setting in fields(Settings))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("HOST", "::1", "::1"),
        ("NODE_NAME", "A", "A"),
        ("NODE_NAME", "web-1.example_2", "web-1.example_2"),
        ("NODE_NAME", "n" * 63, "n" * 63),
        ("FLUSH_INTERVAL_MS", "2.5", 2.5),
        ("ECHO_TOKENS_PER_SECOND", "0", 0.0),
        ("HEARTBEAT_SECONDS", "0.3", 0.3),
        ("OPENAI_BASE_URL", "http://[::1]:8080/v1/", "http://[::1]:8080/v1"),
        ("JWT_JWKS_URL", "https://issuer.example/keys", "https://issuer.example/keys"),
        ("ALLOWED_ORIGINS", "https://A.example, http://b.example:81/ ,", ("https://a.example", "http://b.example:81")),
        ("ALLOWED_ORIGINS", "https://*.Example.com,app://.", ("https://*.example.com", "app://.")),
        ("SYSTEM_PROMPT", "two\nlines", "two\nlines"),
    ],
)
def test_a_good_value_is_taken(name: str, value: str, expected: object) -> None:
    assert getattr(read_settings({name: value}), name.lower()) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "80.5"),
        ("PORT", "9" * 5000),
        ("NODE_NAME", " "),
        ("NODE_NAME", "web 1"),
        ("NODE_NAME", "web\n"),
        ("NODE_NAME", "wéb"),
        ("NODE_NAME", "n" * 64),
        ("DATABASE_POOL_MAX", "0"),
        ("LEASE_SECONDS", "0.5"),
        ("LEASE_SECONDS", "nan"),
        ("LEASE_SECONDS", "inf"),
        ("DRAIN_SECONDS", "-1"),
        ("DRAIN_SECONDS", "soon"),
        ("MAX_ATTEMPTS", "0"),
        ("HISTORY_MESSAGES_MAX", "0"),
        ("MESSAGE_BYTES_MAX", "64k"),
        ("HEARTBEAT_SECONDS", "0"),
        ("HEARTBEAT_SECONDS", "1e999"),
        ("HEARTBEAT_SECONDS", "1e9\n"),
        ("FLUSH_INTERVAL_MS", "-1"),
        ("ECHO_TOKENS_PER_SECOND", "-1"),
        ("ECHO_FAIL_AFTER", "-1"),
        ("JOURNAL_RETENTION_MINUTES", "0"),
        ("JWT_JWKS_URL", "issuer.example/keys"),
        ("JWT_JWKS_URL", "ftp://issuer.example/keys"),
        ("JWT_JWKS_URL", "https://"),
        ("JWT_JWKS_URL", "https://issuer.example:port/"),
        ("OPENAI_BASE_URL", "https://[::1"),
        ("ALLOWED_ORIGINS", "*"),
        ("ALLOWED_ORIGINS", "https://ok.example, https://*.com"),
        ("ALLOWED_ORIGINS", "null"),
        ("ALLOWED_ORIGINS", "app.example.com"),
        ("ALLOWED_ORIGINS", "https://app.example.com/path"),
        ("ALLOWED_ORIGINS", "https://app.example.com?query"),
        ("ALLOWED_ORIGINS", "https://app.example.com:99999"),
        ("ALLOWED_ORIGINS", "file:///home"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(name: str, value: str) -> None:
    line = complaint({name: value})
    assert line.startswith(name + " ")
    assert len(line.splitlines()) == 1
    assert line == line.strip()


@given(st.sampled_from(NAMES), st.text(st.characters(codec=None)) | st.floats().map(str) | st.integers().map(str))
def test_any_value_is_taken_or_one_line(name: str, value: str) -> None:
    line = complaint_or_none({**GOOD, name: value}, production=True)
    if line is not None:
        assert len(line.splitlines()) == 1
        assert name in line


SECRET = "hunter2"
SHAPES = [
    *(
        "{}",
        "{}:5",
        "1{}",
        "{}://h",
        "ftp://u:{}@h",
        "https://u:{}@h:port/",
        "https://u:{}@h/path",
        "https://*.{}",
        "[::{}",
    ),
    *(
        "[[{{'{}': 1}}]]",
        '[[{{"name": "a", "{}": 1}}]]',
        '[["{}"]]',
        "[::{}",
        "10.0.0.0/{}",
        "postgresql://u:{}@h:port/db",
    ),
]


@given(st.sampled_from(NAMES), st.sampled_from(SHAPES), st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_a_wrong_value_is_never_shown(name: str, shape: str, more: str) -> None:
    line = complaint_or_none({**GOOD, name: shape.format(SECRET) + more}, production=True)
    assert line is None or SECRET not in line.lower()


def test_a_wrong_value_of_any_setting_that_is_not_free_text_is_refused_and_not_shown() -> None:
    # Or the test above would have nothing to look at.
    refused = [name for name in NAMES if complaint_or_none({**GOOD, name: f"ftp://u:{SECRET}@h\n"}, production=True)]
    assert len(refused) > len(NAMES) / 2
    assert {"JWT_JWKS_URL", "OPENAI_BASE_URL", "ALLOWED_ORIGINS", "ECHO_TOOL_CALLS", "PORT"} <= set(refused)


# What production insists on.


def test_a_secret_and_a_database_are_enough_for_production() -> None:
    check_for_production(read_settings(GOOD))


def test_keys_of_an_issuer_stand_for_a_secret() -> None:
    environment = {"JWT_JWKS_URL": "https://issuer.example/keys", "DATABASE_URL": GOOD["DATABASE_URL"]}
    check_for_production(read_settings(environment))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"JWT_SECRET": ""}, "JWT_SECRET is not set"),
        ({"JWT_SECRET": "x" * (SECRET_BYTES_MIN - 1)}, "JWT_SECRET is too short: 31 bytes"),
        ({"JWT_JWKS_URL": "https://issuer.example/keys"}, "JWT_SECRET and JWT_JWKS_URL are both set"),
        ({"DATABASE_URL": ""}, "DATABASE_URL is not set"),
    ],
)
def test_production_says_in_one_line_what_is_missing(changes: dict[str, str], named: str) -> None:
    line = complaint({**GOOD, **changes}, production=True)
    assert line.startswith(named)
    assert len(line.splitlines()) == 1


def test_the_length_of_a_secret_is_counted_in_bytes() -> None:
    check_for_production(read_settings({**GOOD, "JWT_SECRET": "é" * 16}))


def test_a_secret_that_is_not_utf_8_is_one_line() -> None:
    # The environment holds bytes; what is not UTF-8 of them reaches Python as lone surrogates.
    line = complaint({**GOOD, "JWT_SECRET": "\udcff" * SECRET_BYTES_MIN}, production=True)
    assert "JWT_SECRET" in line


def test_a_secret_is_never_shown() -> None:
    assert "hunter2" not in complaint({**GOOD, "JWT_SECRET": "hunter2"}, production=True)


# What the echo agent is to call.


def test_a_script_of_calls_is_a_list_of_steps() -> None:
    script = '[[{"name": "a", "arguments": {"x": 1}}, {"name": "b"}], [{"name": "c", "arguments": {}}]]'
    assert read_settings({"ECHO_TOOL_CALLS": script}).echo_tool_calls == (
        (ScriptedCall("a", {"x": 1}), ScriptedCall("b", {})),
        (ScriptedCall("c", {}),),
    )


@pytest.mark.parametrize(
    "script",
    [
        "calls",
        "{}",
        '[{"name": "a"}]',
        "[[]]",
        '[["a"]]',
        '[[{"arguments": {}}]]',
        '[[{"name": ""}]]',
        '[[{"name": "a", "arguments": []}]]',
        '[[{"name": "a", "more": 1}]]',
        json.dumps([[{"name": "a"}] * 65]),
        json.dumps([[{"name": "a"}]] * 101),
        "[" * 5000,
    ],
)
def test_a_script_of_calls_that_is_none_is_one_line(script: str) -> None:
    line = complaint({"ECHO_TOOL_CALLS": script})
    assert line.startswith("ECHO_TOOL_CALLS must be a JSON list of steps, each a list of ")
    assert len(line.splitlines()) == 1
