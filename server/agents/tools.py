"""Tools: typed functions that a model may call, and the JSON Schemas that describe them to it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints
from uuid import UUID

import msgspec

from anynode.server.agents.import_by_name import import_named
from anynode.server.errors import ConfigurationError

if TYPE_CHECKING:
    from anynode.server.store.store import Store

TOOLS_MAX: Final = 128  # what the chat completions API takes
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolContext:
    """The call that a tool is run for: a tool gets it in a parameter with this annotation, which the model never sees.

    A call that was under way when its node died is made again on another node, with the same `tool_call_id`. No other
    call of the turn has this id, so with `turn_id` it makes an idempotency key. `attempt` is 1, or more after a
    takeover. `store` is the turn's: `Turn` describes it.
    """

    tool_call_id: str
    tool_name: str
    turn_id: UUID
    conversation_id: UUID
    user_id: str
    attempt: int
    store: Store = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # see `Turn`


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool: a function, with the name, the description and the JSON Schema that the model gets."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_async: bool
    _function: Callable[..., Any]
    _arguments: type[msgspec.Struct]
    _contexts: tuple[str, ...]  # the parameters that are given the context

    def bind(self, arguments: Mapping[str, Any], context: ToolContext) -> Callable[[], Any]:
        """Return the call, ready to be made. Raises msgspec.ValidationError where the arguments do not fit."""
        valid = msgspec.convert(dict(arguments), self._arguments, str_keys=True)
        given = {name: getattr(valid, name) for name in self._arguments.__struct_fields__}
        return partial(self._function, **given, **dict.fromkeys(self._contexts, context))


def load_tools(name: str | None) -> Sequence[Tool]:
    """Return the tools that TOOLS names, or none where it is unset. Raises ConfigurationError with one line."""
    if name is None:
        return ()
    functions = import_named("TOOLS", name)
    if not isinstance(functions, list | tuple) or not functions:
        raise ConfigurationError(f"TOOLS={name} must be a list of functions, with at least one in it")
    if len(functions) > TOOLS_MAX:
        raise ConfigurationError(f"TOOLS={name} has {len(functions)} functions; a model can be given {TOOLS_MAX}")
    tools: dict[str, Tool] = {}
    for function in functions:
        try:
            tool = make_tool(function)
        except TypeError as error:
            raise ConfigurationError(f"TOOLS={name}: {' '.join(str(error).split())}") from error
        if tool.name in tools:
            raise ConfigurationError(f"TOOLS={name}: two tools have the name {tool.name}")
        tools[tool.name] = tool
    return tuple(tools.values())


def make_tool(function: Any) -> Tool:
    """Return the tool that calls the function. Raises TypeError where the function cannot be a tool."""
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise TypeError(f"{function!r} is no function that is defined with `def` or `async def`")
    name = function.__name__
    if not _NAME.fullmatch(name):
        raise TypeError(f"a tool's name has up to 64 ASCII letters, digits, `_` and `-`; {name!r} is none")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} must return its result, and not yield")
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:  # annotations are code
        raise TypeError(f"the annotations of {name} cannot be read: {type(error).__name__}: {error}") from error
    fields: list[tuple[str, Any, Any]] = []
    contexts = []
    for parameter in inspect.signature(function).parameters.values():
        hint = _hint(name, parameter, hints)
        if _is_context(hint):
            contexts.append(parameter.name)
        else:
            fields.append((parameter.name, hint, _field(parameter)))
    arguments, parameters = _schema(name, fields)
    return Tool(
        name=name,
        description=inspect.getdoc(function) or "",
        parameters=parameters,
        is_async=inspect.iscoroutinefunction(function),
        _function=function,
        _arguments=arguments,
        _contexts=tuple(contexts),
    )


def _hint(name: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
        raise TypeError(f"the parameter {parameter.name!r} of {name} cannot be given by its name")
    if parameter.name not in hints:
        raise TypeError(f"the parameter {parameter.name!r} of {name} has no annotation")
    hint = hints[parameter.name]
    if not _is_context(hint):
        try:
            msgspec.json.schema(hint)
            msgspec.json.Decoder(hint)
        except Exception as error:  # whatever msgspec makes of it
            raise TypeError(
                f"the parameter {parameter.name!r} of {name} is of no type that JSON has: {error}"
            ) from error
    return hint


def _is_context(hint: Any) -> bool:
    return hint is ToolContext or ToolContext in get_args(hint)


def _field(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    if default is parameter.empty:
        return msgspec.field()
    if default is None or isinstance(default, str | int | float):
        return msgspec.field(default=default)  # the schema tells it
    return msgspec.field(default_factory=lambda: default)


def _schema(name: str, fields: Sequence[tuple[str, Any, Any]]) -> tuple[type[msgspec.Struct], dict[str, Any]]:
    """Return the type of the arguments, and its JSON Schema."""
    try:
        arguments = msgspec.defstruct(
            f"arguments of {name}", fields, module=__name__, kw_only=True, forbid_unknown_fields=True
        )
        (top,), types = msgspec.json.schema_components((arguments,), ref_template="#/$defs/{name}")
    except Exception as error:  # whatever msgspec makes of it
        raise TypeError(f"no JSON Schema can be made of the parameters of {name}: {error}") from error
    parameters = types.pop(top["$ref"].removeprefix("#/$defs/"))
    del parameters["title"]
    return arguments, {**parameters, "$defs": types} if types else parameters
