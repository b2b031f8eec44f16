"""Finding the agent that AGENT names."""

from __future__ import annotations

import sys
from pathlib import Path
from uuid import UUID

import pytest

from anynode.server.agents.agent import HistoryMessage, TextDelta, Turn
from anynode.server.agents.load import check_agent, open_agent
from anynode.server.errors import ConfigurationError
from anynode.server.settings import Settings

MODULE = """
from functools import partial

from anynode import TextDelta


async def answer(turn):
    yield TextDelta("mine")


async def shout(suffix, turn):
    yield TextDelta("mine" + suffix)


class Called:
    async def __call__(self, turn):
        yield TextDelta("called")

    async def method(self, turn):
        yield TextDelta("method")


loud = partial(shout, "!")
called = Called()
nested = partial(partial(called))
number = 3


async def forgetful(turn):
    return "no yield"


def plain(turn):
    yield TextDelta("plain")
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds modules that no path leads to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    (tmp_path / "my_agents.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import a_module_that_nobody_has\n")
    (tmp_path / "broken.py").write_text("async def answer(turn:\n")
    (tmp_path / "angry.py").write_text("raise RuntimeError('two\\nlines')\n")
    for name in ("my_agents", "needs_more", "broken", "angry"):
        monkeypatch.delitem(sys.modules, name, raising=False)


async def first_text(settings: Settings) -> str:
    history = [HistoryMessage("user", "Hi")]
    turn = Turn(turn_id=UUID(int=1), conversation_id=UUID(int=2), user_id="ada", history=history)
    async with open_agent(settings) as agent:
        async for event in agent(turn):
            assert isinstance(event, TextDelta)
            return event.text
    raise AssertionError("no event")


async def test_echo_is_the_default() -> None:
    assert await first_text(Settings()) == "[1] "


@pytest.mark.parametrize("name", ["echo", "openai"])
async def test_the_built_in_agents_can_be_opened(name: str) -> None:
    check_agent(name)
    async with open_agent(Settings(agent=name)) as agent:
        assert callable(agent)


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ("answer", "mine"),
        ("loud", "mine!"),
        ("called", "called"),
        ("called.method", "method"),
        ("nested", "called"),
    ],
)
async def test_an_agent_of_the_working_directory_can_be_opened(attribute: str, text: str) -> None:
    check_agent(f"my_agents:{attribute}")
    assert await first_text(Settings(agent=f"my_agents:{attribute}")) == text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("eccho", "must be `echo`, `openai` or `package.module:attribute`, not 'eccho'"),
        ("my_agents:", "must be `echo`, `openai` or"),
        (":answer", "must be `echo`, `openai` or"),
        ("no_such_module:answer", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("needs_more:answer", "No module named 'a_module_that_nobody_has'"),
        ("broken:answer", "SyntaxError"),
        ("angry:answer", "RuntimeError: two lines"),
        (".relative:answer", "cannot be imported"),
        ("my_agents:anwser", "module 'my_agents' has no 'anwser'"),
        ("my_agents:called.anwser", "module 'my_agents' has no 'called.anwser'"),
        ("my_agents:forgetful", "it is an async function without `yield`"),
        ("my_agents:plain", "it is a plain function"),
        ("my_agents:Called", "it is a class"),
        ("my_agents:number", "it is of type int"),
    ],
)
async def test_what_is_no_agent_is_refused_with_one_line(name: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        check_agent(name)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigurationError) as again:
        async with open_agent(Settings(agent=name)):
            pass
    assert str(again.value) == str(refusal.value)
