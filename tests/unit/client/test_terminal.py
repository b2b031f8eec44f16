"""What the terminal shows of a chat: all that is said, and nothing that commands the terminal."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anynode.server.client.terminal import _Shown, _Status, printable

# A title, a cleared screen, the clipboard, a question whose answer is typed, the same in C1, text from right to left.
ATTACK = "\x1b]0;title\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\x1b[6n\x9b6n\x90q\x9c\r\b\x7f\x00\u202egpj\u2066\u200f\u061c"
COMMANDS = set(ATTACK) - set("]0;titlec2J56nqgpj[ZXZpbA==")


def frame(type: str, **fields: Any) -> dict[str, Any]:
    return {"type": type, "conversation_id": "c", **fields}


@given(st.text())
def test_only_control_characters_are_left_out(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(each) == "Cc" and each not in "\n\t" for each in shown)
    assert not any(unicodedata.bidirectional(each) in {"LRE", "RLE", "LRO", "RLO", "PDF"} for each in shown)
    assert not any(unicodedata.bidirectional(each) in {"LRI", "RLI", "FSI", "PDI"} for each in shown)
    left_out = [each for each in text if each not in shown]
    assert all(unicodedata.category(each) in ("Cc", "Cf") for each in left_out)


@pytest.mark.parametrize("text", ["a\n\tb", "ö€\U0001f469\u200d\U0001f4bb", "שלום", "\u00a0\u00ad\u200b"])
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize(
    "hostile",
    [
        frame("turn.delta", text=ATTACK),
        frame("turn.restarted", text=ATTACK),
        frame("turn.tool_call", tool_name=ATTACK),
        frame("conversation.snapshot", turn={"text": ATTACK}),
        frame("turn.failed", error={"message": ATTACK}),
    ],
)
def test_no_frame_commands_the_terminal(hostile: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _Shown().show(hostile)
    printed = capsys.readouterr()
    assert "title" in printed.out + printed.err
    assert not COMMANDS & set(printed.out + printed.err)


def test_a_sequence_that_comes_in_pieces_does_not_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _Shown()
    for piece in ATTACK:
        shown.show(frame("turn.delta", text=piece))
    assert capsys.readouterr().out == printable(ATTACK)


def test_an_answer_that_goes_on_elsewhere_is_told_by_what_was_said_not_by_what_was_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = _Shown()
    shown.show(frame("turn.delta", text="a\x1b"))
    shown.show(frame("turn.restarted", text="a\x1bb"))
    printed = capsys.readouterr()
    assert printed.out == "ab"
    assert "continued" in printed.err


def test_what_a_server_says_as_it_closes_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    status = _Status()
    status("connected")
    status(f"closed: {ATTACK}")
    assert not COMMANDS & set(capsys.readouterr().err)
