"""What a model is told of a function, what a function is called with, and which cannot be a tool."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pytest

from anynode.server.agents.load import check_tools, open_agent
from anynode.server.agents.tools import TOOLS_MAX, ToolContext, load_tools, make_tool
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings

CONTEXT = ToolContext("call_1", "search", UUID(int=1), UUID(int=2), "ada", 1)


class Place(msgspec.Struct):
    """Where it is."""

    name: str
    position: tuple[float, float] | None = None


@dataclass
class Filter:
    after: str


async def search(
    query: Annotated[str, msgspec.Meta(description="what to look for", min_length=1)],
    near: Place,
    context: ToolContext,
    limit: int = 10,
    *,
    kind: Literal["page", "image"] | None = None,
    filters: list[Filter] = [],  # noqa: B006 (a default that is no plain value)
) -> list[str]:
    """Search for pages.

    Near a place.
    """
    return [query, near.name, str(limit), str(kind), context.tool_call_id, *(each.after for each in filters)]


def test_a_tool_has_the_name_and_the_docstring_of_its_function() -> None:
    tool = make_tool(search)
    assert (tool.name, tool.description) == ("search", "Search for pages.\n\nNear a place.")


def test_the_schema_of_its_parameters_tells_types_descriptions_and_defaults_and_not_the_context() -> None:
    schema = make_tool(search).parameters
    assert {name: schema[name] for name in ("type", "required", "additionalProperties")} == {
        "type": "object",
        "required": ["query", "near"],
        "additionalProperties": False,
    }
    assert list(schema["properties"]) == ["query", "near", "limit", "kind", "filters"]
    assert schema["properties"]["query"] == {"type": "string", "minLength": 1, "description": "what to look for"}
    assert schema["properties"]["near"] == {"$ref": "#/$defs/Place"}
    assert schema["properties"]["limit"] == {"type": "integer", "default": 10}
    assert schema["properties"]["kind"] == {
        "anyOf": [{"enum": ["image", "page"]}, {"type": "null"}],
        "default": None,
    }
    assert schema["properties"]["filters"] == {"type": "array", "items": {"$ref": "#/$defs/Filter"}}
    assert set(schema["$defs"]) == {"Place", "Filter"}
    assert set(schema) == {"type", "properties", "required", "additionalProperties", "$defs"}


def test_a_function_without_parameters_has_an_object_without_properties() -> None:
    def now() -> str:
        return ""

    tool = make_tool(now)
    assert tool.parameters == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    assert tool.description == ""


async def test_a_call_gives_the_function_its_arguments_defaults_and_context() -> None:
    tool = make_tool(search)
    assert await tool.bind({"query": "x", "near": {"name": "Ulm"}}, CONTEXT)() == ["x", "Ulm", "10", "None", "call_1"]
    arguments = {"query": "x", "near": {"name": "Ulm"}, "limit": 3, "kind": "page", "filters": [{"after": "May"}]}
    assert await tool.bind(arguments, CONTEXT)() == ["x", "Ulm", "3", "page", "call_1", "May"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"query": "x"}, "missing required field `near`"),
        ({"query": 3, "near": {"name": "Ulm"}}, "Expected `str`, got `int` - at `$.query`"),
        ({"query": "", "near": {"name": "Ulm"}}, "length >= 1"),
        ({"query": "x", "near": {"name": "Ulm"}, "limit": "3"}, "Expected `int`, got `str` - at `$.limit`"),
        ({"query": "x", "near": {"name": "Ulm"}, "more": 1}, "unknown field `more`"),
        ({"query": "x", "near": {"name": "Ulm"}, "context": {}}, "unknown field `context`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says.replace("$", r"\$")):
        make_tool(search).bind(arguments, CONTEXT)


def test_a_context_that_may_be_none_is_no_parameter_of_the_model_either() -> None:
    def whose(me: ToolContext | None = None) -> str:
        return me.user_id if me else ""

    tool = make_tool(whose)
    assert tool.parameters["properties"] == {}
    assert tool.bind({}, CONTEXT)() == "ada"


def test_keys_of_an_object_may_be_numbers_as_json_has_them() -> None:
    def name(numbers: dict[int, str]) -> str:
        return numbers[1]

    assert make_tool(name).bind({"numbers": {"1": "one"}}, CONTEXT)() == "one"


class Service:
    def method(self, number: int) -> int:
        return number + 1


def test_a_method_can_be_a_tool() -> None:
    tool = make_tool(Service().method)
    assert list(tool.parameters["properties"]) == ["number"]
    assert tool.bind({"number": 1}, CONTEXT)() == 2


def untyped(x) -> None:  # type: ignore[no-untyped-def]
    ...


def variable(*x: int) -> None: ...


def keywords(**x: int) -> None: ...


def positional(x: int, /) -> None: ...


def custom(x: Service) -> None: ...


def unknown(x: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def yields() -> Iterator[int]:
    yield 1


async def yields_too() -> AsyncIterator[int]:
    yield 1


def größe() -> None: ...


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (untyped, "the parameter 'x' of untyped has no annotation"),
        (variable, "the parameter 'x' of variable cannot be given by its name"),
        (keywords, "the parameter 'x' of keywords cannot be given by its name"),
        (positional, "the parameter 'x' of positional cannot be given by its name"),
        (custom, "the parameter 'x' of custom is of no type that JSON has"),
        (unknown, "the annotations of unknown cannot be read"),
        (yields, "yields must return"),
        (yields_too, "yields_too must return"),
        (lambda: None, "'<lambda>' is none"),
        (größe, "'größe' is none"),
        (Service, "is no function"),
        (print, "is no function"),
        (3, "is no function"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(TypeError) as refusal:
        make_tool(function)
    assert says in str(refusal.value)


MODULE = """
def one() -> str:
    return "1"

def untyped(x):
    return x

class Other:
    @staticmethod
    def one() -> str:
        return "other"

tools = [one]
pair = (one,)
none = []
twice = [one, Other.one]
bad = [one, untyped]
many = [one] * 129
number = 3
"""


@pytest.fixture
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds a module of tools that no path leads to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    (tmp_path / "my_tools.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "my_tools", raising=False)


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize("name", ["my_tools:tools", "my_tools:pair"])
def test_tools_of_the_working_directory_are_found(name: str) -> None:
    assert [tool.name for tool in load_tools(name)] == ["one"]


def test_without_the_setting_there_are_none() -> None:
    assert load_tools(None) == ()
    check_tools(None)


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_tools", "TOOLS must be `package.module:attribute`, not 'my_tools'"),
        ("no_such_module:tools", "TOOLS=no_such_module:tools: module 'no_such_module' cannot be imported"),
        ("my_tools:toolz", "module 'my_tools' has no 'toolz'"),
        ("my_tools:one", "must be a list of functions"),
        ("my_tools:number", "must be a list of functions"),
        ("my_tools:none", "with at least one in it"),
        ("my_tools:twice", "two tools have the name one"),
        ("my_tools:bad", "the parameter 'x' of untyped has no annotation"),
        ("my_tools:many", f"129 functions; a model can be given {TOOLS_MAX}"),
    ],
)
@pytest.mark.parametrize("agent", ["echo", "openai"])
async def test_what_is_no_list_of_tools_is_refused_with_one_line(name: str, says: str, agent: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_tools(name)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigurationError) as again:
        async with open_agent(Settings(agent=agent, tools=name)):
            pass
    assert str(again.value) == str(refusal.value)
