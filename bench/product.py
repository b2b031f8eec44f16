"""A node as `anynode serve` runs it, which also stops when its standard input ends: none outlives the bench."""

from __future__ import annotations

import logging
import os

from anynode.server.serve import run_node
from anynode.server.startup import one_line_errors

if __name__ == "__main__":
    with one_line_errors():
        run_node(os.environ, log_level=logging.WARNING, stop_with_input=True)
