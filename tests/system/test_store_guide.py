"""docs/store.md: its code runs, and it names every method of the store."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from anynode import Store, Turn
from anynode.server.store.store import Store as StoreClass
from tests.kit.harness import running_node
from tests.kit.rest import rest_to

TOP: Final = Path(__file__).parents[2]
GUIDE: Final = (TOP / "docs" / "store.md").read_text()
CODE: Final = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
URL: Final = "postgresql://user:password@host:5432/database"


def run(code: str, folder: Path) -> str:
    """What a program prints."""
    program = folder / "program.py"
    program.write_text(code)
    done = subprocess.run([sys.executable, "-P", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_program_runs_as_it_is(database_url: str, tmp_path: Path) -> None:
    assert URL in CODE[0]
    said = run(CODE[0].replace(URL, database_url), tmp_path)
    assert said == "You said: Why is the sky blue?\nYou said: And at night?\n"


def test_the_other_pieces_run_in_it(database_url: str, tmp_path: Path) -> None:
    repeated = next(code for code in CODE if "message_id=" in code)
    reports = [code for code in CODE if "store.reading()" in code]
    assert len(reports) == 2
    body = f"""
        {repeated.strip()}
        assert {repeated.strip().partition(" = ")[2]} == answer
        await longest(store)
        await with_answers(store, "ada")
"""
    head, last = CODE[0].replace(URL, database_url).split("\n\n\nasyncio.run(")
    said = run("\n\n".join([*reports, head + body, f"asyncio.run({last}"]), tmp_path)
    assert said.splitlines()[2:] == [
        "{'user_id': 'ada', 'title': 'Why is the sky blue?', 'length': 4}",
        "{'user_id': 'ada', 'title': 'Why is the sky blue?', 'length': 2}",
        "Why is the sky blue? ['Why is the sky blue?', 'You said: Why is the sky blue?', 'And at night?', "
        "'You said: And at night?']",
        "Why is the sky blue? ['Why is the sky blue?', 'You said: Why is the sky blue?']",
    ]


async def test_the_agent_that_asks_for_more_history_runs(database_url: str, tmp_path: Path) -> None:
    agent = next(code for code in CODE if "history_is_cut" in code)
    (tmp_path / "asks_for_more.py").write_text(agent)
    environment = {"AGENT": "asks_for_more:answer", "HISTORY_MESSAGES_MAX": "3", "PYTHONPATH": f"{tmp_path}:{TOP}"}
    with running_node(database_url, tmp_path, environment) as node:
        async with rest_to(node, "ada") as rest:
            conversation = None
            for expected in (1, 3, 5):
                reply = await rest.post("/api/ada/chat", {"message": "x", "conversation_id": conversation})
                answer = reply.expect(200)
                conversation = answer["conversation_id"]
                assert answer["response"] == f"This conversation has {expected} messages."


def test_each_method_of_the_store_is_in_the_guide_with_its_parameters() -> None:
    methods = {
        name: inspect.signature(method)
        for name, method in inspect.getmembers(StoreClass, inspect.isfunction)
        if not name.startswith("_") and name not in ("in_node", "close")
    }
    assert len(methods) >= 14
    for name, signature in methods.items():
        calls = re.findall(rf"\b{name}\(([^()]*)\)", GUIDE)
        assert calls, name
        for given in calls:
            named = set(re.findall(r"(\w+)=", given))
            assert named <= signature.parameters.keys(), (name, given)
    assert Store is StoreClass
    assert {"store", "history_is_cut"} <= Turn.__dataclass_fields__.keys()
