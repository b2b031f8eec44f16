"""Settings, which only this module reads from the environment. A bad value is refused with one line.

The line never shows the value: it may be a secret, if only because somebody has put it into the wrong variable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any, TypeAlias
from urllib.parse import urlsplit

import msgspec

from anynode.models.text import is_storable
from anynode.server.errors import ConfigurationError
from anynode.server.limits import LIMIT_MAX, UserLimits
from anynode.server.origins import parse_origin

IPNetwork: TypeAlias = IPv4Network | IPv6Network

CALLS_AT_ONCE_MAX = 64  # of tools, in one step of a turn
NODE_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")  # as the label of a host
SECRET_BYTES_MIN = 32  # HS256: a key shorter than its hash can be guessed (RFC 7518, 3.2)


def _text(name: str, value: str) -> str:
    return value


def _node_name(name: str, value: str) -> str:
    if not NODE_NAME.fullmatch(value):
        raise ConfigurationError(f"{name} must be 1 to 63 of the characters A-Z a-z 0-9 . _ -")
    return value


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def parse(name: str, value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ConfigurationError(f"{name} must be a whole number from {low} to {high}") from None
        if not low <= number <= high:
            raise ConfigurationError(f"{name} must be from {low} to {high}")
        return number

    return parse


_limit = _whole(0, LIMIT_MAX)


def _number(low: float, high: float) -> Callable[[str, str], float]:
    def parse(name: str, value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise ConfigurationError(f"{name} must be a number from {low:g} to {high:g}") from None
        if not math.isfinite(number) or not low <= number <= high:
            raise ConfigurationError(f"{name} must be from {low:g} to {high:g}")
        return number

    return parse


def _flag(name: str, value: str) -> bool:
    flags = {"true": True, "1": True, "false": False, "0": False}
    if value.lower() not in flags:
        raise ConfigurationError(f"{name} must be true or false")
    return flags[value.lower()]


def _http_url(name: str, value: str) -> str:
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise ConfigurationError(f"{name} must be an http:// or https:// URL")
    return value.rstrip("/")


def _origins(name: str, value: str) -> tuple[str, ...]:
    try:
        return tuple(parse_origin(part.strip()) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ConfigurationError(f"{name} takes {error}") from None


def _networks(name: str, value: str) -> tuple[IPNetwork, ...]:
    try:
        return tuple(ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip())
    except ValueError:
        raise ConfigurationError(
            f"{name} must be addresses or networks such as 10.0.0.0/8, separated by commas"
        ) from None


class ScriptedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of a tool that the echo agent makes."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    arguments: dict[str, Any] = {}


ScriptedSteps = tuple[tuple[ScriptedCall, ...], ...]
_STEPS = Annotated[
    tuple[Annotated[tuple[ScriptedCall, ...], msgspec.Meta(min_length=1, max_length=CALLS_AT_ONCE_MAX)], ...],
    msgspec.Meta(max_length=100),
]


def _scripted_calls(name: str, value: str) -> ScriptedSteps:
    try:
        steps: ScriptedSteps = msgspec.json.decode(value, type=_STEPS)
    except (ValueError, RecursionError) as error:
        place = str(error).partition(" - at ")[2]  # and not what is there
        raise ConfigurationError(
            f'{name} must be a JSON list of steps, each a list of {{"name": …, "arguments": {{…}}}}'
            + (f"; it is not, at {place}" if place else "")
        ) from None
    return steps


def _setting(default: Any, parse: Callable[[str, str], Any], doc: str) -> Any:
    return field(default=default, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings: each field is read from the environment variable of the same name in capitals."""

    host: str = _setting("0.0.0.0", _text, "Address to listen on (`anynode dev`: 127.0.0.1).")  # noqa: S104
    port: int = _setting(8000, _whole(0, 65535), "Port to listen on; 0: any free one.")
    node_name: str | None = _setting(
        None,
        _node_name,
        "First part of the node's id; by default the machine's name (`anynode dev`: always A, B, C …).",
    )
    database_url: str | None = _setting(
        None, _text, "`postgresql://user:password@host:port/database`; required by `serve`."
    )
    database_pool_max: int = _setting(
        10, _whole(1, 1000), "Connections to Postgres for requests; a node opens three more for itself."
    )
    jwt_secret: str | None = _setting(None, _text, "Secret of HS256 tokens, at least 32 bytes; this or `JWT_JWKS_URL`.")
    jwt_jwks_url: str | None = _setting(
        None, _http_url, "URL of the public keys (JWKS) of the issuer of your tokens; this or `JWT_SECRET`."
    )
    jwt_audience: str = _setting("anynode", _text, "The `aud` that a token must have.")
    jwt_audience_claim: str = _setting(
        "aud", _text, "The claim that holds the audience: `client_id` for Cognito, `azp` for Clerk."
    )
    jwt_leeway_seconds: float = _setting(
        10.0, _number(0, 300), "Seconds that an issuer's clock may be ahead, for `nbf` and `iat`."
    )
    jwt_issuer: str = _setting("anynode", _text, "The `iss` that a token must have.")
    allowed_origins: tuple[str, ...] = _setting(
        (),
        _origins,
        "Origins of pages and apps that may connect, separated by commas; the server's own is always allowed. "
        "`https://*.example.com` stands for any one label; `capacitor://localhost` is an app's.",
    )
    agent: str = _setting("echo", _text, "`echo`, `openai`, or your own as `package.module:attribute`.")
    agent_timeout_seconds: float = _setting(
        60.0, _number(0.1, 3600), "Seconds an agent may stay silent before its turn fails."
    )
    answer_bytes_max: int = _setting(
        1_048_576,
        _whole(1, 67_108_864),
        "Longest text of an answer, in bytes of UTF-8; a turn whose text grows longer fails.",
    )
    tools: str | None = _setting(
        None, _text, "`package.module:attribute` of a list of functions that the model may call (`openai`, `echo`)."
    )
    tool_steps_max: int = _setting(
        10, _whole(1, 1000), "Requests to the model in one turn; the last one may not call tools."
    )
    tool_timeout_seconds: float = _setting(
        30.0, _number(0.1, 3600), "Seconds a tool call may take; a longer one is reported to the model as an error."
    )
    tool_result_bytes_max: int = _setting(
        65_536,
        _whole(1, 16_777_216),
        "Longest tool result, in bytes of UTF-8; a longer one is reported to the model as an error.",
    )
    openai_base_url: str = _setting(
        "https://api.openai.com/v1", _http_url, "Base URL of a server of the chat completions API."
    )
    openai_api_key: str | None = _setting(None, _text, "API key, sent to `OPENAI_BASE_URL` as a bearer token.")
    model: str = _setting("gpt-4o-mini", _text, "Name of the model to ask (`openai`).")
    continue_partial: bool = _setting(
        False,
        _flag,
        "After a takeover, send the model the text that it had produced, as an assistant prefix to continue.",
    )
    system_prompt: str | None = _setting(None, _text, "System prompt of conversations that have none of their own.")
    echo_tokens_per_second: float = _setting(50.0, _number(0, 1e6), "Speed of the echo agent; 0: as fast as possible.")
    echo_tokens: int = _setting(
        0,
        _whole(0, 1_000_000),
        "Number of tokens `w0 w1 …` that the echo agent streams instead of the echo; 0: the echo.",
    )
    echo_fail_after: int = _setting(
        0, _whole(0, 1_000_000), "Number of tokens after which the echo agent fails; 0: never."
    )
    echo_tool_calls: tuple[tuple[ScriptedCall, ...], ...] = _setting(
        (), _scripted_calls, "Calls that the echo agent makes first: JSON, a list of steps, each a list of calls."
    )
    flush_interval_ms: float = _setting(
        25.0, _number(0, 1000), "Milliseconds that a token waits at most to be committed together with others."
    )
    lease_seconds: float = _setting(
        5.0, _number(1, 300), "Seconds without a renewal after which other nodes take over a node's turns."
    )
    max_attempts: int = _setting(3, _whole(1, 100), "A turn fails once this many nodes have died while running it.")
    drain_seconds: float = _setting(25.0, _number(0, 3600), "Seconds that running turns may take to end after SIGTERM.")
    history_messages_max: int = _setting(
        200, _whole(1, 100_000), "Number of the newest messages that an agent and a snapshot get."
    )
    message_bytes_max: int = _setting(
        65_536, _whole(1, 16_777_216), "Longest `content` of a message, in bytes of UTF-8."
    )
    journal_retention_minutes: float = _setting(
        10.0, _number(0.001, 525_600), "Minutes that the events of an ended turn are kept."
    )
    heartbeat_seconds: float = _setting(
        10.0,
        _number(0.1, 3600),
        "Seconds between heartbeats; a client that hears nothing for twice as long reconnects elsewhere.",
    )
    connections_max: int = _setting(
        20_000,
        _whole(1, 1_000_000),
        "Sockets, streams and waiting requests of this node; further ones are refused with `rate_limited`, and sockets "
        "closed with 1013.",
    )
    turns_max: int = _setting(
        5_000, _whole(1, 1_000_000), "Turns that this node runs at once; further ones are refused with `rate_limited`."
    )

    turn_seconds_max: float = _setting(
        3600.0, _number(1, 86_400), "Seconds that a turn may take on one node, whatever its agent does; then it fails."
    )
    turns_per_user_max: int = _setting(
        20, _limit, "Turns of one user that run at once, on all nodes together; 0: any number."
    )
    turns_per_user_per_minute: int = _setting(
        60, _limit, "Turns of one user that begin within a minute, on all nodes together; 0: any number."
    )
    tokens_per_user_per_day: int = _setting(
        10_000_000,
        _limit,
        "Tokens, read and written, that one user's turns spend in a day (UTC), on all nodes together; 0: any number.",
    )
    conversations_per_user_max: int = _setting(
        100_000, _limit, "Conversations that are stored of one user; 0: any number."
    )
    messages_per_user_bytes_max: int = _setting(
        1_073_741_824,
        _limit,
        "Bytes of messages and metadata that are stored of one user; 0: any number.",
    )
    connections_per_user_max: int = _setting(
        100, _limit, "Sockets, streams and waiting requests of one user on this node; 0: any number."
    )
    unauthenticated_max: int = _setting(
        2_000,
        _whole(1, 1_000_000),
        "Sockets of this node that have not authenticated yet; a further one takes the place of the one that has "
        "waited longest.",
    )
    unauthenticated_per_address_max: int = _setting(
        500, _whole(1, 1_000_000), "The same for one address, or one /64 network of IPv6."
    )
    trusted_proxies: tuple[IPNetwork, ...] = _setting(
        (),
        _networks,
        "Addresses and networks of the proxies in front, separated by commas (`10.0.0.0/8, 192.0.2.7`); only from them "
        "is an `X-Forwarded-For` believed.",
    )

    @property
    def user_limits(self) -> UserLimits:
        """The limits of a user whose token does not carry its own."""
        return UserLimits(
            turns=self.turns_per_user_max,
            turns_per_minute=self.turns_per_user_per_minute,
            tokens_per_day=self.tokens_per_user_per_day,
            connections=self.connections_per_user_max,
        )

    @property
    def frame_bytes_max(self) -> int:
        """Longest frame, and longest body of a request, in bytes: JSON may need six bytes for one of its content."""
        return 6 * self.message_bytes_max + 16_384


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Parse `environment`; an empty variable counts as unset. Raises ConfigurationError with one line."""
    values = {}
    for setting in fields(Settings):
        name = setting.name.upper()
        raw = environment.get(name, "")
        if not is_storable(raw):
            raise ConfigurationError(f"{name} is not UTF-8 text")
        if raw != "":
            values[setting.name] = setting.metadata["parse"](name, raw)
    return Settings(**values)


def check_for_production(settings: Settings) -> None:
    """Check what `anynode serve` requires. Raises ConfigurationError with one line that says what to change."""
    if settings.jwt_jwks_url is None:
        if settings.jwt_secret is None:
            raise ConfigurationError(
                f"JWT_SECRET is not set: set it to at least {SECRET_BYTES_MIN} random bytes, or set JWT_JWKS_URL"
            )
        length = len(settings.jwt_secret.encode())
        if length < SECRET_BYTES_MIN:
            raise ConfigurationError(f"JWT_SECRET is too short: {length} bytes, at least {SECRET_BYTES_MIN} are needed")
    elif settings.jwt_secret is not None:
        raise ConfigurationError(
            "JWT_SECRET and JWT_JWKS_URL are both set: unset the one that does not sign your tokens"
        )
    if settings.database_url is None:
        raise ConfigurationError("DATABASE_URL is not set: set it to postgresql://user:password@host:port/database")
