"""Loads the agent that `AGENT` names, with the tools that `TOOLS` names."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

from anynode.server.agents.agent import Agent
from anynode.server.agents.echo import make_echo
from anynode.server.agents.import_by_name import import_named
from anynode.server.agents.tools import load_tools
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings

BUILT_IN = ("echo", "openai")


@asynccontextmanager
async def open_agent(settings: Settings) -> AsyncIterator[Agent]:
    """Open the agent of the settings, with what it needs, while the context lasts. Raises ConfigurationError."""
    tools = load_tools(settings.tools)
    if settings.agent == "echo":
        yield make_echo(settings, tools)
    elif settings.agent == "openai":
        # Not at the top: aiohttp takes a fifth of a node's start, and other agents do not need it.
        from anynode.server.agents.openai import open_openai

        async with open_openai(settings, tools) as agent:
            yield agent
    else:
        yield _import_agent(settings.agent)


def check_agent(name: str) -> None:
    """Raise ConfigurationError, with one line that says why, unless `name` names an agent."""
    if name not in BUILT_IN:
        _import_agent(name)


def check_tools(name: str | None) -> None:
    """Raise ConfigurationError, with one line that says why, unless `name` is None or names tools."""
    load_tools(name)


def _import_agent(name: str) -> Agent:
    found: Any = import_named("AGENT", name, forms="`echo`, `openai` or `package.module:attribute`")
    if not is_agent(found):
        raise ConfigurationError(
            f"AGENT={name} must be an async generator function, "
            f"`async def answer(turn)` with `yield TextDelta(…)` in it; it is {_kind(found)}"
        )
    return cast(Agent, found)


def is_agent(found: Any) -> bool:
    """Return whether something is an agent: an async generator function, or an object that is called like one."""
    while isinstance(found, partial):
        found = found.func
    return inspect.isasyncgenfunction(found) or (callable(found) and inspect.isasyncgenfunction(type(found).__call__))


def _kind(found: Any) -> str:
    if inspect.iscoroutinefunction(found):
        return "an async function without `yield`"
    if inspect.isclass(found):
        return "a class"
    if inspect.isroutine(found):
        return "a plain function"
    return f"of type {type(found).__name__}"
