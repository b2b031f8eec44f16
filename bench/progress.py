"""One line that says what is being measured."""

from __future__ import annotations

import sys
import time

import click


class Progress:
    """One line that says what is being measured; on a terminal it replaces itself."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._started = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def step(self, text: str) -> None:
        """Show that the next step begins."""
        self._step += 1
        said = f"[{self._step}/{self._steps}] {time.monotonic() - self._started:4.0f} s  {text}"
        click.echo(f"\r\x1b[K{said}" if self._is_terminal else said, err=True, nl=not self._is_terminal)

    def clear(self) -> None:
        """Erase the line."""
        if self._is_terminal:
            click.echo("\r\x1b[K", err=True, nl=False)
