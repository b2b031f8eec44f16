"""Calls of tools put together from the pieces of a stream, however a provider cuts and names them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from anynode.server.agents.agent import AgentError, ToolCall
from anynode.server.agents.openai_calls import CallDelta, Calls
from anynode.server.agents.openai_stream import StepDecoder
from anynode.server.settings import CALLS_AT_ONCE_MAX
from tests.kit.provider import DONE, delta, event

MADE_ID = re.compile(r"call_[0-9a-f]{24}")


def piece(arguments: object = None, *, name: str | None = None, **others: Any) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**others, "function": function}


def finished(*chunks: Sequence[dict[str, Any]], ids: Sequence[str] = ()) -> tuple[list[ToolCall], dict[str, str]]:
    """The calls of chunks, each of which is a list of pieces."""
    calls = Calls(20_000)
    for chunk in chunks:
        calls.add(msgspec.convert(chunk, list[CallDelta]))
    return calls.finish(ids)


ONE, TWO = ToolCall("a", "search", {"q": "x"}), ToolCall("b", "look", {"n": 1})


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(
            [
                [piece("", name="search", id="a", index=0)],
                [piece('{"q":', index=0)],
                [piece('"x"}', index=0)],
                [piece("", name="look", id="b", index=1)],
                [piece('{"n":1}', index=1)],
            ],
            id="as it should be",
        ),
        pytest.param(
            [
                [piece("", name="search", id="a", index=0), piece("", name="look", id="b", index=1)],
                [piece('{"n"', index=1), piece('{"q":"x', index=0)],
                [piece('"}', index=0), piece(":1}", index=1)],
            ],
            id="mingled",
        ),
        pytest.param(
            [[piece('{"q":"x"}', name="search", id="a"), piece('{"n":1}', name="look", id="b")]],
            id="whole in one chunk without an index",
        ),
        pytest.param(
            [[piece('{"q":"x"}', name="search", id="a")], [piece('{"n":1}', name="look", id="b")]],
            id="whole in a chunk each without an index",
        ),
        pytest.param(
            [
                [piece(name="search", id="a")],
                [piece('{"q":')],
                [piece('"x"}')],
                [piece(name="look", id="b")],
                [piece('{"n":1}')],
            ],
            id="in pieces without an index",
        ),
        pytest.param(
            [
                [piece('{"q":', name="search", id="a")],
                [piece('{"n"', name="look", id="b")],
                [piece('"x"}', id="a")],
                [piece(":1}", id="b")],
            ],
            id="in pieces that have ids and no index",
        ),
        pytest.param(
            [[piece('{"q":"x"}', name="search", id="a", index=0)], [piece('{"n":1}', name="look", id="b", index=0)]],
            id="the index is always 0",
        ),
        pytest.param(
            [
                [piece('{"q":', name="search", id="a", index=0)],
                [piece('"x"}', name="search", id="a", index=0)],
                [piece('{"n":1}', name="look", id="b", index=1)],
            ],
            id="id and name in each piece",
        ),
        pytest.param(
            [
                [piece("", name="sea", id="a", index=0)],
                [piece('{"q":"x"}', name="rch", index=0)],
                [piece('{"n":1}', name="look", id="b", index=3)],
            ],
            id="a name in pieces, an index left out",
        ),
        pytest.param(
            [[piece({"q": "x"}, name="search", id="a", index=0), piece({"n": 1}, name="look", id="b", index=1)]],
            id="objects",
        ),
        pytest.param(
            [
                [piece('{"q":"x"}', name="search", id="a", index=0), {"index": 0}, {"function": None}],
                [{"index": 5, "id": "", "function": {"name": "", "arguments": ""}}],
                [piece('{"n":1}', name="look", id="b", index=1, type="function", more=1)],
            ],
            id="nothing in some pieces, more in others",
        ),
    ],
)
def test_two_calls_are_put_together(chunks: list[list[dict[str, Any]]]) -> None:
    assert finished(*chunks) == ([ONE, TWO], {})


@pytest.mark.parametrize("index", [{}, {"index": 0}])
def test_two_calls_without_ids_get_one_each(index: dict[str, int]) -> None:
    calls, errors = finished([piece('{"q":"x"}', name="search", **index)], [piece('{"n":1}', name="look", **index)])
    assert [(call.tool_name, call.arguments) for call in calls] == [("search", {"q": "x"}), ("look", {"n": 1})]
    assert all(MADE_ID.fullmatch(call.tool_call_id) for call in calls)
    assert calls[0].tool_call_id != calls[1].tool_call_id
    assert errors == {}


@pytest.mark.parametrize("id", ["", None, "x" * 257, "a\0", "\ud800", "known"])
def test_an_id_that_is_missing_or_unfit_or_taken_is_replaced(id: str | None) -> None:
    (call,), _ = finished([piece("{}", name="search", id=id, index=0)], ids=["known"])
    assert MADE_ID.fullmatch(call.tool_call_id)


def test_an_id_that_is_there_twice_is_replaced_the_second_time() -> None:
    calls, _ = finished([piece("{}", name="search", id="a", index=0), piece("{}", name="look", id="a", index=1)])
    assert calls[0].tool_call_id == "a"
    assert MADE_ID.fullmatch(calls[1].tool_call_id)


@pytest.mark.parametrize(
    ("given", "name"),
    [("functions.search", "functions_search"), ("x" * 70, "x" * 64), ("größe", "gr__e"), (None, "unnamed")],
)
def test_a_name_that_no_provider_takes_back_is_made_one(given: str | None, name: str) -> None:
    (call,), _ = finished([piece('{"a":1}', name=given, id="a", index=0)])
    assert call.tool_name == name


@pytest.mark.parametrize("arguments", ["", "  ", None, "{}"])
def test_no_arguments_are_an_empty_object(arguments: str | None) -> None:
    assert finished([piece(arguments, name="search", id="a", index=0)]) == ([ToolCall("a", "search", {})], {})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"q": "x', "truncated"),
        ("q=x", "malformed"),
        ("[1]", "they are of type list"),
        ('"x"', "they are of type str"),
        ("null", "they are of type NoneType"),
        ('{"q": 1e999}', "out of range"),
        ('{"q": NaN}', "malformed"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
    ],
)
def test_arguments_that_are_no_object_are_an_error_that_says_so(arguments: str, says: str) -> None:
    (call,), errors = finished([piece(arguments, name="search", id="a", index=0)])
    assert call == ToolCall("a", "search", {})
    assert errors["a"].startswith("the arguments must be a JSON object, and are not: ")
    assert says in errors["a"]


def test_a_surrogate_pair_that_is_cut_between_two_pieces_is_put_together() -> None:
    pieces = [piece('{"q":"\ud83d', name="search", id="a", index=0)], [piece('\ude00"}', index=0)]
    assert finished(*pieces)[0] == [ToolCall("a", "search", {"q": "\U0001f600"})]


def test_numbers_beyond_64_bits_come_through() -> None:
    (call,), _ = finished([piece('{"n": 123456789012345678901234567890}', name="search", id="a", index=0)])
    assert call.arguments == {"n": 123456789012345678901234567890}


def test_there_are_at_most_so_many_calls() -> None:
    chunk = [piece("{}", name="search", id=f"{number}", index=number) for number in range(CALLS_AT_ONCE_MAX)]
    assert len(finished(chunk)[0]) == CALLS_AT_ONCE_MAX
    with pytest.raises(AgentError, match=f"more than {CALLS_AT_ONCE_MAX} calls at once"):
        finished([*chunk, piece("{}", name="search", id="one more", index=CALLS_AT_ONCE_MAX)])


@pytest.mark.parametrize("text", ["x" * 10, "ü" * 5])
def test_names_and_arguments_of_all_calls_are_bounded_together(text: str) -> None:
    calls = Calls(24)
    calls.add([msgspec.convert(piece(text, name="ab", id="a", index=0), CallDelta)])
    calls.add([msgspec.convert(piece(text, name="ab", id="b", index=1), CallDelta)])
    with pytest.raises(AgentError, match="ANSWER_BYTES_MAX"):
        calls.add([msgspec.convert(piece("x", index=1), CallDelta)])


# In the stream


def decoded(stream: bytes) -> tuple[str, Calls]:
    calls = Calls(10_000)
    decoder = StepDecoder(None, calls)
    text = decoder.feed(stream)
    if not decoder.ended:
        text += decoder.end()
    decoder.check()
    return text, calls


STREAM = (
    delta(role="assistant", content="Let me ")
    + delta(tool_calls=[piece("", name="search", id="a", index=0)])
    + delta(tool_calls=[piece('{"q":"x"}', index=0)])
    + delta(content="see.")
)


@pytest.mark.parametrize(
    "end", [delta("tool_calls") + DONE, delta("stop") + DONE, delta("function_call") + DONE, DONE, delta("stop")]
)
def test_calls_count_whatever_the_finish_reason_says(end: bytes) -> None:
    text, calls = decoded(STREAM + end)
    assert text == "Let me see."
    assert calls.finish(()) == ([ONE], {})


def test_a_stream_with_calls_may_be_cut_at_every_byte() -> None:
    whole = STREAM + delta("tool_calls") + DONE
    for cut in range(1, len(whole) - 1):
        calls = Calls(10_000)
        decoder = StepDecoder(None, calls)
        text = decoder.feed(whole[:cut]) + decoder.feed(whole[cut:])
        decoder.check()
        assert (decoder.ended, text, calls.finish(())[0]) == (True, "Let me see.", [ONE])


def test_a_stream_with_calls_that_is_cut_off_is_no_step() -> None:
    with pytest.raises(AgentError, match="cut off"):
        decoded(STREAM)


def test_a_tool_that_is_asked_for_without_a_call_is_an_error() -> None:
    with pytest.raises(AgentError, match="did not say for which"):
        decoded(delta(content="Hm") + delta("tool_calls") + DONE)


def test_too_many_calls_end_the_stream() -> None:
    with pytest.raises(AgentError, match="calls at once"):
        decoded(event({"choices": [{"delta": {"tool_calls": [piece("{}", name="x", id=f"{n}") for n in range(65)]}}]}))


def test_calls_in_a_chunk_with_half_a_surrogate_pair_are_read_too() -> None:
    chunk = delta(content="X", tool_calls=[piece(json.dumps({"q": "x"}), name="search", id="a", index=0)])
    text, calls = decoded(chunk.replace(b'"X"', rb'"\ud83d"') + delta("tool_calls") + DONE)
    assert text == "\ud83d"
    assert calls.finish(()) == ([ONE], {})
