"""Tabs of a browser that chats with the AI SDK's own packages, as tests use them."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from tests.kit.npm import Script, project, running_script

SOURCES: Final = Path(__file__).parent
Message: TypeAlias = dict[str, Any]
_numbers = itertools.count()


@contextmanager
def running_driver() -> Iterator[Script]:
    """The process in which tabs are opened."""
    directory = Path(tempfile.mkdtemp(prefix="anynode-stock-"))
    try:
        with running_script(project(SOURCES, directory / "stock") / "driver.mjs") as script:
            yield script
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class View:
    """What a tab shows, and what its chat has said."""

    messages: Sequence[Message]
    status: Literal["submitted", "streaming", "ready", "error"]
    error: str | None
    text: str  # of the last message, where that is the assistant's
    finishes: Sequence[Mapping[str, Any]]  # what `onFinish` was told
    complaints: Sequence[str]  # errors other than those of a broken connection
    wire: Mapping[str, Any]  # how many connections; the types of what was sent and received; close codes

    @property
    def answer(self) -> Message:
        """The last message, which must be the assistant's."""
        assert self.messages
        assert self.messages[-1]["role"] == "assistant"
        return self.messages[-1]

    @property
    def roles(self) -> list[str]:
        """The roles of the messages, in order."""
        return [message["role"] for message in self.messages]


class Tab:
    """One chat that is open."""

    def __init__(self, script: Script, chat_id: str) -> None:
        self.chat_id = chat_id
        self._script = script
        self.name = f"tab-{next(_numbers)}"

    async def open(self, **options: Any) -> None:
        """Open it, with the options of `Tab` in chats.mjs."""
        await self._script.call("open", tab=self.name, id=self.chat_id, **options)

    async def send(self, text: str, **options: Any) -> None:
        """Begin to ask; with a `messageId`, that message anew."""
        await self._call("send", text=text, **options)

    async def send_again(self) -> None:
        """Begin to ask what is the last message."""
        await self._call("send")

    async def regenerate(self, **options: Any) -> None:
        """Begin to have the last answer made again."""
        await self._call("regenerate", **options)

    async def resume(self) -> None:
        """Begin to resume."""
        await self._call("resume")

    async def stop(self) -> None:
        """Stop what is streaming."""
        await self._call("stop")

    async def settled(self) -> View:
        """Wait until nothing is under way."""
        return _view(await self._call("settled"))

    async def until(
        self,
        *,
        characters: int = 0,
        messages: int = 0,
        status: str | None = None,
        received: str | None = None,
        within_seconds: float = 20,
    ) -> View:
        """Wait until the tab shows this number of characters of the last answer and this number of messages, the chat
        has this status, and this chunk or frame has come."""
        conditions = {"characters": characters, "messages": messages, "status": status, "received": received}
        given = {name: value for name, value in conditions.items() if value is not None}
        return _view(await self._call("until", within_seconds=within_seconds, **given))

    async def view(self) -> View:
        """What it shows."""
        return _view(await self._call("view"))

    async def ask(self, text: str) -> View:
        """Ask, and wait for the end."""
        await self.send(text)
        return await self.settled()

    async def close(self) -> None:
        """Close it."""
        await self._call("close")

    async def _call(self, method: str, **parameters: Any) -> Any:
        return await self._script.call(method, tab=self.name, **parameters)


def _view(answer: Mapping[str, Any]) -> View:
    return View(**answer)


@asynccontextmanager
async def open_tab(
    script: Script, url: str, token: str, *, chat_id: str | None = None, **options: Any
) -> AsyncIterator[Tab]:
    """A tab with a chat, a new one where no id is given; it connects when it has something to say. At the end no
    rejection may have been left unhandled by the packages."""
    tab = Tab(script, chat_id or uuid.uuid4().hex)
    await tab.open(url=url, token=token, **options)
    try:
        yield tab
    finally:
        await tab.close()
    assert (left := await script.call("unhandled")) == [], left
