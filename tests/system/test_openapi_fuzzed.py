"""The API does what `/openapi.json` says, whatever schemathesis makes of that: no crash, no undocumented answer,
nothing refused that is allowed, and nothing taken that is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.harness import NodeProcess, token_for

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 25
# NUL is refused everywhere (Postgres cannot hold it), as no schema can say. A stream of events has no end, of a list
# only the last message must be a question, and a response is asked for in ways that exclude each other: these are
# tested by themselves. That there is no such turn is no sign that a conversation has vanished.
CONFIGURATION = """
workers = 2
seed = 1
continue-on-failure = true

[generation]
allow-x00 = false
max-examples = 10

[[operations]]
include-operation-id = ["followConversation", "sendChatMessage", "createResponse"]
enabled = false

[[operations]]
include-operation-id = ["cancelTurn", "readTurn"]
checks.ensure_resource_availability.enabled = false

[[operations]]
include-operation-id = "chat"
parameters = { user_id = "%(user)s" }
"""


@pytest.mark.slow
# Of one operation after another it finds those that have to do with each other.
@pytest.mark.parametrize(("phases", "operations"), [("examples,coverage,fuzzing", 20), ("stateful", 10)])
def test_schemathesis_finds_nothing(
    shared_node: NodeProcess, user: str, tmp_path: Path, phases: str, operations: int
) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION % {"user": user})
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{shared_node.http}/openapi.json"),
            *("--header", f"Authorization: Bearer {token_for(user)}", "--phases", phases),
            *("--max-time", str(SECONDS_MAX)),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "tests.kit.schemathesis_hooks",
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        },
        capture_output=True,
        text=True,
        timeout=3 * SECONDS_MAX,
    )
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    (tested,) = re.findall(r"Tested: (\d+)", finished.stdout)
    assert int(tested) >= operations, finished.stdout[-2000:]
    assert "Traceback" not in shared_node.log.read_text()
