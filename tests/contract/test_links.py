"""Every link in a Markdown file of the repository leads to a file and a heading that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit.prose import markdown_prose
from tests.kit.repository import TOP, listed

DOCUMENTS = [name for name in listed() if name.suffix == ".md"] if (TOP / ".git").exists() else []
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.M)


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as GitHub makes them; a repeated heading gets a number."""
    found: list[str] = []
    for _, line in markdown_prose(text):
        if heading := re.match(r"#+ (.+)$", line):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            anchor = re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
            found.append(f"{anchor}-{count}" if (count := found.count(anchor)) else anchor)
    return set(found)


def links(text: str) -> list[str]:
    """The targets of a Markdown text's links and images, those in tables too, without code."""
    text = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [inline or reference for inline, reference in LINK.findall(text)]


def broken(name: Path, text: str) -> list[str]:
    """The relative links of a document that lead nowhere."""
    lost = []
    for target in links(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (TOP / name).parent / path if path else TOP / name
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            lost.append(target)
    return lost


@pytest.mark.parametrize("name", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings_that_exist(name: Path) -> None:
    assert broken(name, (TOP / name).read_text()) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "See [one](nowhere.md), [two\nlines](README.md#limits), ![an image](docs/none.webp) and [three](#none)."
    assert broken(Path("README.md"), text) == ["nowhere.md", "docs/none.webp", "#none"]


def test_the_readme_leads_to_every_guide() -> None:
    guides = [name for name in DOCUMENTS if name.parts[0] == "docs" or len(name.parts) == 1]
    targets = {target.partition("#")[0] for target in links((TOP / "README.md").read_text())}
    assert {str(name) for name in guides} - targets == {"README.md"}
