"""The README says what is so: the settings, the commands that CI runs, and what becomes of a dead node's answer."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import fields

import pydantic_ai

from anynode import AgentEvent, TextDelta, Turn, continues, from_pydantic_ai, from_run_agent, resumes_calls
from anynode.server.agents.agent import Agent, can_continue, can_resume_calls
from anynode.server.agents.echo import make_echo
from anynode.server.agents.openai import open_openai
from anynode.server.settings import Settings
from tests.kit.repository import TOP

README = (TOP / "README.md").read_text()
RUN_COMMAND = "python3 -m pip install --target .uv uv && .uv/bin/uv run -p python3 anynode dev"
# The others are for developers: what they name in capitals may also be a constant.
FOR_USERS = [
    *("README.md", "PROTOCOL.md", "ARCHITECTURE.md", "CHANGELOG.md", "examples/README.md"),
    *("docs/design.md", "docs/load-balancing.md", "docs/clients.md"),
]
TEST_COMMAND = "python3 -m pip install --target .uv uv && .uv/bin/uv run -p python3 --dev pytest"


def shown(default: object) -> str:
    """A default as the table shows it."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"`{default}`".lower()
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_table_has_every_setting_with_its_default_and_meaning_and_no_other() -> None:
    section = README.split("\n## Settings\n")[1].split("\n## ")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    assert rows == [
        (f"`{setting.name.upper()}`", shown(setting.default), setting.metadata["doc"]) for setting in fields(Settings)
    ]


def test_every_setting_that_the_documents_name_exists() -> None:
    known = {setting.name.upper() for setting in fields(Settings)}
    for name in FOR_USERS:
        named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", (TOP / name).read_text()))
        assert named <= known, name


def test_the_first_two_commands_run_it_and_test_it() -> None:
    commands = re.findall(r"^```\n(.+?)\n```$", README, re.MULTILINE | re.DOTALL)
    assert commands[:2] == [RUN_COMMAND, TEST_COMMAND]


def test_ci_runs_the_tests_by_the_readmes_command_and_stops_where_they_fail() -> None:
    lines = (TOP / ".ci" / "run").read_text().splitlines()
    assert f"{TEST_COMMAND} || exit" in lines


def test_ci_does_not_let_pip_write_to_what_the_system_manages() -> None:
    assert "BREAK_SYSTEM_PACKAGES" not in (TOP / ".ci" / "run").read_text()


def test_what_the_commands_put_into_the_checkout_is_ignored_by_git() -> None:
    assert {".uv/", ".venv/"} <= set((TOP / ".gitignore").read_text().splitlines())


def test_make_check_is_what_ci_runs() -> None:
    makefile = (TOP / "Makefile").read_text()
    (targets,) = re.findall(r"^check: (.+)$", makefile, re.MULTILINE)
    recipes = {
        target: re.findall(r"^\t(.+)$", recipe, re.MULTILINE)
        for target, recipe in re.findall(r"^([\w-]+):[^\n]*\n((?:\t[^\n]+\n)*)", makefile, re.MULTILINE)
    }
    checked = [command.replace("$(RUN)", "uv run --dev") for target in targets.split() for command in recipes[target]]
    script = (TOP / ".ci" / "run").read_text().replace("uv run -p python3 ", "uv run ")
    ran = re.findall(r"uv run (?!anynode)[^|\n]+[^|\n ]|^scripts/.+", script, re.MULTILINE)
    assert checked == ran


async def test_the_table_of_what_a_death_cuts_is_right_for_every_agent() -> None:
    def own() -> Agent:
        async def answer(turn: Turn) -> AsyncIterator[AgentEvent]:
            yield TextDelta("")

        return answer

    async def run_agent(messages: object) -> tuple[str, None]:
        return "", None

    async with open_openai(Settings()) as openai, open_openai(Settings(continue_partial=True)) as openai_continuing:
        agents = {
            "`echo`": make_echo(Settings()),
            "`openai`": openai,
            "`openai` with `CONTINUE_PARTIAL=true`": openai_continuing,
            "`from_pydantic_ai`": from_pydantic_ai(pydantic_ai.Agent()),
            "`from_run_agent`": from_run_agent(run_agent),
            "your own": own(),
            "your own with `continues`": continues(own()),
            "your own with `resumes_calls`": resumes_calls(own()),
        }
    section = README.split("\n### After a node's death\n")[1].split("\n## ")[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in re.findall(r"^\|.+", section, re.M)]
    assert rows[2:] == [
        (
            name,
            "goes on in mid-sentence" if can_continue(agent) else "begins again",
            "run again under their ids" if can_resume_calls(agent) else "are void",
        )
        for name, agent in agents.items()
    ]
