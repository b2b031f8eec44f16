"""The rules of style that a program can check, and where a tree of files breaks them.

STYLE in short: Markdown lines that can be read beside code, docstrings that make sense alone in an editor's hover box,
and everyday words. Files are named relative to the tree's top.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

TOP: Final = Path(__file__).parents[2]

MARKDOWN_COLUMNS_MAX: Final = 100

# A docstring that begins with one of these needs the name above it, or the docstring before it, to be understood.
ELLIPTIC_BEGINNINGS: Final = re.compile(
    r"(?:The same|As"
    r"|Of|With|Without|Within|In|Into|On|Onto|At|By|From|To|Toward|Towards|For|Behind|Beside|Besides|Before|After"
    r"|Under|Over|Above|Below|Through|Between|Beyond|Until|Till|Since|During|Among|Against|Along|Around|Across|About"
    r"|Near|Like|Unlike|Off|Out|Per|Despite|Except|But"
    r"|It|Its|They|Their|Theirs|Them|That|Those|These|He|His|Him|She|Her|Hers|Who|Whom|Whose)\b"
)

# Words that stop a reader whose first language is not English, each with an everyday form beside it.
IDIOMS: Final = {
    re.compile(pattern, re.IGNORECASE): instead
    for pattern, instead in {
        r"\bmend(?:s|ed)?\b": "fix",
        r"\bbe it\b": "even if, or a list",
        r"\b(?:is|are|was|were|be|been) had\b": "comes from, or get",
        r"\bso many\b": "a number, or its name",
        r"\b(?:for|twice|as) so long\b(?! that\b)": "a time with its unit, or the setting's name",
        r"\bas (?:it|they) may\b": "at its limit",
        r"\bwhoever\b": "the user, the client, the follower",
        r"\bnothing twice\b": "without repeating anything",
    }.items()
}


class Finding(NamedTuple):
    """One place that breaks a rule."""

    name: Path
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}: {self.problem}"


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a Markdown text, without code, tables and HTML comments."""
    fence = ""
    is_commented = False
    previous = ""
    for number, line in enumerate(text.splitlines(), 1):
        opened = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            if opened and opened[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
        elif opened:
            fence = opened[1]
        elif is_commented or line.startswith("<!--"):
            is_commented = "-->" not in line
        elif line.startswith("    ") and (not previous.strip() or previous.startswith("    ")):
            pass  # indented code
        elif not line.lstrip().startswith("|"):
            yield number, line
        previous = line


def markdown_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a Markdown text that hold words: prose and tables, without code."""
    tables = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.startswith("|"))
    for number, line in (*markdown_prose(text), *tables):
        yield number, re.sub(r"`[^`]*`", "", line)


def is_only_a_link(line: str) -> bool:
    """Whether a Markdown line holds nothing but one link or image, which cannot be broken."""
    return re.fullmatch(r"\s*(?:[-*] )?(?:!?\[[^\]]*\]\([^)]*\)|<?https?://\S+>?)[.:]?", line) is not None


def long_lines(name: Path, text: str) -> Iterator[Finding]:
    """Yield the prose lines of a Markdown file that are too long."""
    for number, line in markdown_prose(text):
        if len(line) > MARKDOWN_COLUMNS_MAX and not is_only_a_link(line):
            yield Finding(name, number, f"{len(line)} columns, more than {MARKDOWN_COLUMNS_MAX}")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each docstring of a module with the line that it begins on."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.lineno, first.value.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of a Python text; adjacent lines are one comment, as an idiom may be broken over two."""
    block: list[str] = []
    begun = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        number = token.start[0]
        if block and number != last + 1:
            yield begun, " ".join(block)
            block = []
        begun = begun if block else number
        block.append(token.string.lstrip("# "))
        last = number
    if block:
        yield begun, " ".join(block)


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the string literals of a module: error messages, descriptions, docstrings and all others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def elliptic_docstrings(name: Path, tree: ast.Module) -> Iterator[Finding]:
    """Yield the docstrings that cannot be read alone."""
    for number, docstring in docstrings(tree):
        if found := ELLIPTIC_BEGINNINGS.match(docstring.strip()):
            yield Finding(name, number, f"a docstring begins with {found[0]!r}: {docstring.strip().splitlines()[0]!r}")


def idioms(name: Path, texts: Iterable[tuple[int, str]]) -> Iterator[Finding]:
    """Yield the idioms that stand in numbered pieces of text."""
    for number, text in texts:
        for pattern, instead in IDIOMS.items():
            if found := pattern.search(" ".join(text.split())):
                yield Finding(name, number, f"{found[0]!r}: say {instead}")


def findings(name: Path, top: Path = TOP) -> list[Finding]:
    """Return all places of one file that break a rule; none for a kind of file that has no rules.

    String literals are looked at in `server` and `models` only: what a test says to an agent is a user's text.
    """
    if name.suffix not in (".md", ".sql", ".py"):
        return []
    text = (top / name).read_text()
    if name.suffix == ".md":
        return [*long_lines(name, text), *idioms(name, markdown_words(text))]
    if name.suffix == ".sql":
        lines = enumerate(text.splitlines(), 1)
        return list(idioms(name, ((number, line.partition("--")[2]) for number, line in lines)))
    tree = ast.parse(text)
    is_product = name.parts[0] in ("server", "models")
    words = {*comments(text), *(strings(tree) if is_product else docstrings(tree))}
    return [*elliptic_docstrings(name, tree), *idioms(name, sorted(words))]
