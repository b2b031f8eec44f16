"""docs/clients.md shows code that is run: each of its blocks stands in the file that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()
BLOCK = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```(\w+)\n(.+?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall((TOP / "docs" / "clients.md").read_text())
LINES_MAX = 60  # of an application


@pytest.mark.parametrize(("file", "code"), [(file, code) for file, _, code in BLOCKS])
def test_a_block_stands_in_the_file_that_it_names(file: str, code: str) -> None:
    assert code in (TOP / file).read_text()


def test_the_readmes_client_is_the_one_of_the_page() -> None:
    (script,) = re.findall(r"^```js\n(.+?)^```$", README, re.M | re.S)
    page = (TOP / "examples" / "browser" / "index.html").read_text()
    assert script in re.sub(r"^      ", "", page, flags=re.M)


@pytest.mark.parametrize("name", ["react", "assistant-ui"])
def test_an_application_is_small(name: str) -> None:
    assert len((TOP / "examples" / name / "src" / "main.tsx").read_text().splitlines()) < LINES_MAX


@pytest.mark.parametrize("lock", [*TOP.glob("examples/*/package-lock.json"), TOP / "tests/kit/stock/package-lock.json"])
def test_a_lock_says_nothing_of_where_packages_come_from(lock: Path) -> None:
    text = lock.read_text()
    assert '"integrity"' in text
    assert '"resolved"' not in text


def test_every_message_that_is_shown_is_one_of_the_servers() -> None:
    source = "".join(path.read_text() for path in (TOP / "server").rglob("*.py"))
    table = (TOP / "docs" / "clients.md").read_text().split("## What is not taken")[1]
    rows = re.findall(r"^\| ([^|]+) \| `(?:… )?([^`]+)`", table, re.M)
    assert len(rows) == 5
    for _, message in rows:
        assert message in source, message
