"""What a node loads before it knows its settings is small: it decides how soon a killed node is back."""

from __future__ import annotations

import subprocess
import sys


def test_neither_the_http_client_nor_the_orm_is_loaded_at_the_start() -> None:
    code = (
        "import sys; import anynode.server.cli, anynode.server.serve; print({'aiohttp', 'tortoise'} & {*sys.modules})"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout == "set()\n"
