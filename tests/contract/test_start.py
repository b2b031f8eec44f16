"""What a node loads before it knows its settings is small: it decides how soon a killed node is back."""

from __future__ import annotations

import subprocess
import sys


def test_the_http_client_is_not_loaded_at_the_start() -> None:
    loaded = "import sys; import anynode.server.cli; print('aiohttp' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert finished.stdout == "False\n"
