"""What the attacks' program decides: bounds, verdicts, the document's table; and that attacks are what they say."""

from __future__ import annotations

import math

import pytest
from websockets.exceptions import InvalidHandshake, InvalidMessage
from websockets.server import ServerProtocol

from bench.hostile.anonymous import limbo_heads
from bench.hostile.figures import (
    COMMON,
    GROWTH,
    REFUSED,
    TABLE_BEGINS,
    TABLE_ENDS,
    Bound,
    Delays,
    Outcome,
    Row,
    bounds_of,
    fill,
    replaced,
    rows_of,
    text_table,
)
from bench.hostile.peer import handshake

CALM = Delays(2, 3, 4)
ROW = Row("pings", "Send pings.", bounds_of(Bound("pings that cost", 7)))
DOCUMENT = f"before\n{TABLE_BEGINS}\n{TABLE_ENDS}\nbehind\n"


def outcome(figures: dict[str, float], *bounds: Bound, name: str = "pings") -> Outcome:
    """An attack's outcome."""
    return Outcome(name, CALM, Delays(5, 60, 70), (50, 90, 55), figures, bounds)


def test_a_figure_at_its_bound_holds_and_one_above_it_is_broken() -> None:
    at, above = outcome({"a": 3}, Bound("a", 3)), outcome({"a": 3.5}, Bound("a", 3))
    assert (at.broken, at.verdict) == ([], "holds")
    assert (above.broken, above.verdict) == ([Bound("a", 3)], "BROKEN: a 3.5 > 3")


@pytest.mark.parametrize("figures", [{}, {"a": math.nan}, {"a": math.inf}])
def test_a_bound_without_a_figure_is_broken(figures: dict[str, float]) -> None:
    assert outcome(figures, Bound("a", 3)).broken == [Bound("a", 3)]


def test_an_own_bound_takes_the_place_of_the_common_one() -> None:
    bounds = bounds_of(Bound(GROWTH, 5), Bound("own", 1))
    assert [bound.most for bound in bounds if bound.label == GROWTH] == [5]
    assert len(bounds) == len(COMMON) + 1


def test_a_bound_is_replaced_only_where_there_is_one() -> None:
    assert replaced([Bound("a", 1), Bound("b", 2)], [Bound("b", -1), Bound("c", 9)]) == (Bound("a", 1), Bound("b", -1))


def test_a_bystander_who_never_got_an_answer_waited_for_ever() -> None:
    assert Delays.of([]).p99 == math.inf


def test_the_table_says_what_was_broken_and_by_what() -> None:
    text = text_table([outcome({"lost turns": 4, REFUSED: 2}, Bound("lost turns", 0))])
    assert "2 / 3 / 4, 5 / 60 / 70" in text
    assert "50 → 90 → 55" in text
    assert "BROKEN: lost turns 4 > 0" in text


def test_a_column_of_the_document_is_written_and_the_other_one_stays() -> None:
    before = fill(DOCUMENT, [ROW], [outcome({"lost": 4}, Bound("lost", 0))], "before")
    after = fill(before, [ROW], [outcome({"lost": 0}, Bound("lost", 0))], "after")
    said = "p99 60 ms; RSS 50→90→55 MB; lost"
    assert rows_of(after) == [("pings", "Send pings.", "pings that cost ≤ 7", f"**broken**: {said} 4", f"{said} 0")]
    assert after.startswith("before\n")
    assert after.endswith("\nbehind\n")


def test_an_attack_that_did_not_run_keeps_its_figures() -> None:
    before = fill(DOCUMENT, [ROW], [outcome({}, name="pings")], "before")
    assert fill(before, [ROW], [], "before") == before


def test_a_document_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        fill("nothing", [ROW], [], "after")


def test_a_handshake_of_these_attacks_is_a_good_one() -> None:
    protocol = ServerProtocol(subprotocols=["anynode.v1"])  # type: ignore[list-item]
    protocol.receive_data(handshake())
    [request] = protocol.events_received()
    assert protocol.accept(request).status_code == 101  # type: ignore[arg-type]


@pytest.mark.parametrize("head", limbo_heads(), ids=["length", "chunked", "line", "headers", "path"])
def test_a_handshake_for_limbo_cannot_be_parsed(head: bytes) -> None:
    protocol = ServerProtocol()
    protocol.receive_data(head)
    assert protocol.events_received() == []
    assert isinstance(protocol.handshake_exc, InvalidMessage | InvalidHandshake)
