"""Prose that can be read by a stranger: short lines, docstrings that stand alone, everyday words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.kit.prose import elliptic_docstrings, findings, idioms, is_only_a_link, long_lines, markdown_prose
from tests.kit.repository import listed

# The patterns themselves stand in the first, and what they must find in the second.
OF_THE_RULES = {Path("tests/kit/prose.py"), Path("tests/contract/test_prose.py")}


def test_files_keep_to_the_rules_of_style() -> None:
    names = [name for name in listed() if name not in OF_THE_RULES]
    found = [str(finding) for name in names for finding in findings(name)]
    assert found == []


NAME = Path("a.md")


@pytest.mark.parametrize(
    "line",
    ["word " * 21, "- " + "word " * 21, "text [a link](" + "x" * 90 + ") more"],
)
def test_a_long_line_of_prose_is_found(line: str) -> None:
    assert [finding.line for finding in long_lines(NAME, f"Short.\n\n{line.rstrip()}x\n")] == [3]


@pytest.mark.parametrize(
    "text",
    [
        "| a table |" + " " * 100 + "|",
        "```json\n" + "x" * 101 + "\n```",
        "    " + "indented code " * 10,
        "<!-- a comment " + "x" * 100 + " -->",
        "[a link](https://example.org/" + "x" * 100 + ")",
    ],
)
def test_tables_code_comments_and_lone_links_may_be_long(text: str) -> None:
    assert list(long_lines(NAME, text)) == []


def test_prose_goes_on_after_a_fence() -> None:
    text = "one\n```sh\n# no heading\n```\ntwo\n"
    assert [line for _, line in markdown_prose(text)] == ["one", "two"]


def test_a_link_with_words_beside_it_is_no_lone_link() -> None:
    assert is_only_a_link("- [a](b.md)")
    assert not is_only_a_link("See [a](b.md)")


@pytest.mark.parametrize("first", ["The same, later.", "As it is now.", "With a name.", "Its row.", "Who asks."])
def test_a_docstring_that_cannot_be_read_alone_is_found(first: str) -> None:
    tree = ast.parse(f'class A:\n    def b(self):\n        """{first}"""\n')
    assert [finding.line for finding in elliptic_docstrings(NAME, tree)] == [3]


@pytest.mark.parametrize("first", ["Return a row.", "One running turn.", "Ask again.", "Forget it.", "Offer a page."])
def test_a_docstring_that_begins_with_a_verb_or_a_noun_is_none(first: str) -> None:
    assert list(elliptic_docstrings(NAME, ast.parse(f'"""{first}"""'))) == []


@pytest.mark.parametrize(
    "text",
    [
        *("mend the client", "text, be it long", "a ticket is had", "after so many tokens", "silent for so long"),
        *("as many as it may", "Whoever asks", "nothing lost and nothing twice", "broken over\n# so many\nlines"),
    ],
)
def test_an_idiom_is_found(text: str) -> None:
    assert list(idioms(NAME, [(1, text)])) != []


@pytest.mark.parametrize("text", ["a recommended amendment", "it was away for so long that it was gone", "as it is"])
def test_what_only_looks_like_an_idiom_is_none(text: str) -> None:
    assert list(idioms(NAME, [(1, re.sub(" +", " ", text))])) == []
