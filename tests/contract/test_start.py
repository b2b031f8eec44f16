"""What a node loads before it knows its settings is small: it decides how soon a killed node is back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_neither_the_http_client_nor_the_orm_is_loaded_at_the_start() -> None:
    code = (
        "import sys; import anynode.server.cli, anynode.server.serve; print({'aiohttp', 'tortoise'} & {*sys.modules})"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"


def test_what_is_loaded_later_is_not_a_file_of_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "my_tools.py").write_text("tools = ()\n")
    for name in ("aiohttp", "yarl", "multidict"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a file of the user in place of a dependency')\n")
    code = (
        "import anynode.server.cli, anynode.server.serve\n"
        "from anynode.server.agents.import_by_name import import_named\n"
        "import_named('TOOLS', 'my_tools:tools')\n"
        "import anynode.server.agents.openai\n"
    )
    finished = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
