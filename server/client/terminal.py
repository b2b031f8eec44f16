"""The command `anynode chat`: a chat in the terminal, which reconnects and resumes by itself.

What a server or a model says is printed without control characters. With them a terminal can be made to change its
title, overwrite what was said, fill the clipboard or type into the prompt. They are left out of a file or pipe too: a
terminal shows it later. Programs that need the exact text use the client.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Final

import click

from anynode.server.client.client import Client, Frame, GivenUp, Refused

try:
    import readline as readline  # gives input() its line editing
except ImportError:  # not on this platform
    pass

_CONTROLS: Final = dict.fromkeys(
    [
        *(code for code in range(0x20) if chr(code) not in "\n\t"),  # C0, with the escape that begins a sequence
        *range(0x7F, 0xA0),  # DEL, and C1, which are whole sequences in one character
        *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # the direction of writing
    ]
)


def printable(text: str) -> str:
    """Return the text without control characters but newline and tab. Each is left out by itself, so a sequence that
    comes in pieces is harmless too."""
    return text.translate(_CONTROLS)


async def chat(urls: Sequence[str], token: str, conversation_id: str | None) -> int:
    """Chat until the input ends; return the exit status."""
    is_terminal = sys.stdin.isatty()
    sockets = [url.replace("http", "ws", 1) if url.startswith("http") else url for url in urls]
    if is_terminal:
        click.secho("Ctrl-C stops an answer, Ctrl-D ends the chat.", dim=True)
    client = Client(sockets, token, on_status=_Status())
    async with client:
        lines = _Lines("you> " if is_terminal else "")
        status = 0
        while (line := await lines.next()) is not None:
            if not line.strip():
                continue
            try:
                conversation_id = await _answer(client, line, conversation_id)
            except (Refused, GivenUp) as error:
                click.secho(printable(str(error)), fg="red", err=True)
                status = 1
                if not is_terminal:
                    break
    if is_terminal and conversation_id:
        click.secho(f"\nGo on later with --conversation {printable(conversation_id)}", dim=True)
    return status


class _Status:
    """Prints when the connection changes, but not when it is first made."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if self._last and text != self._last:
            _say(text)
        self._last = text


async def _answer(client: Client, line: str, conversation_id: str | None) -> str | None:
    loop = asyncio.get_running_loop()
    cancelling: set[asyncio.Task[None]] = set()

    def cancel() -> None:
        if conversation_id is not None:
            cancelling.add(asyncio.create_task(client.cancel(conversation_id)))

    loop.add_signal_handler(signal.SIGINT, cancel)
    try:
        async with aclosing(client.send(line, conversation_id=conversation_id)) as frames:
            shown = _Shown()
            async for frame in frames:
                conversation_id = frame["conversation_id"]
                shown.show(frame)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return conversation_id


class _Shown:
    """The answer that the terminal shows."""

    def __init__(self) -> None:
        self._text = ""

    def show(self, frame: Frame) -> None:
        """Show what a frame adds to the answer."""
        match frame["type"]:
            case "turn.delta":
                self._add(frame["text"])
            case "turn.restarted":
                self._replace(frame["text"], "continued on another node", "started again on another node")
            case "turn.tool_call":
                _say(f"{frame['tool_name']} …")
            case "conversation.snapshot" if frame["turn"] is not None:
                self._replace(frame["turn"]["text"], "caught up", "this is the answer so far")
            case "turn.completed":
                click.echo()
            case "turn.cancelled":
                _say("stopped")
            case "turn.failed":
                reason = frame["error"]["message"] if "error" in frame else "failed"
                click.secho(f"\n{printable(reason)}", fg="red", err=True)

    def _add(self, text: str) -> None:
        self._text += text
        click.echo(printable(text), nl=False)

    def _replace(self, text: str, if_continued: str, otherwise: str) -> None:
        """Continue the text that is shown, or show all of the new text where it does not begin with that."""
        if text.startswith(self._text):
            _say(if_continued)
            self._add(text[len(self._text) :])
        else:
            _say(otherwise)
            self._text = ""
            self._add(text)


def _say(text: str) -> None:
    click.secho(f"\n· {printable(text)}", fg="yellow", err=True)


class _Lines:
    """Reads lines of standard input, in a thread that does not keep the process alive."""

    def __init__(self, prompt: str) -> None:
        self._prompt = f"\001\033[1;32m\002{prompt}\001\033[0m\002" if prompt else ""
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Semaphore(0)
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    async def next(self) -> str | None:
        """Return the next line, or None at the end of the input."""
        self._wanted.release()
        return await self._lines.get()

    def _read(self) -> None:
        line: str | None = ""
        while line is not None:
            self._wanted.acquire()
            try:
                line = input(self._prompt)
            except (EOFError, ValueError):
                line = None
            with suppress(RuntimeError):  # the loop may be over
                self._loop.call_soon_threadsafe(self._lines.put_nowait, line)
