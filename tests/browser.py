"""A headless Chromium, driven over the DevTools protocol with nothing but a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.asyncio.client import ClientConnection, connect

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, "")}
SHIFT = 8


@contextmanager
def running_chromium() -> Iterator[str]:
    """The DevTools URL of a fresh Chromium. Skips the test where there is none, except in CI."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a Chromium")
        pytest.skip("there is no Chromium here")
    directory = tempfile.mkdtemp(prefix="anynode-chromium-")
    process = subprocess.Popen(
        [path, *FLAGS, f"--user-data-dir={directory}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, route = _devtools(process, Path(directory, "DevToolsActivePort"))
        yield f"ws://127.0.0.1:{port}{route}"
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait()
        psutil.wait_procs(tree, timeout=10)
        shutil.rmtree(directory, ignore_errors=True)


def _devtools(process: subprocess.Popen[bytes], file: Path) -> list[str]:
    deadline = time.monotonic() + 30
    while not (file.exists() and len(lines := file.read_text().split()) == 2):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("Chromium did not start")
        time.sleep(0.02)
    return lines


class Page:
    """One tab, and everything that its console has complained about."""

    def __init__(self, connection: ClientConnection) -> None:
        self.complaints: list[str] = []
        self._connection = connection
        self._session: str | None = None
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def receive(self) -> None:
        """Take what the browser says, until the connection ends."""
        async for text in self._connection:
            message = json.loads(text)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
                continue
            method, parameters = message["method"], message.get("params", {})
            if method == "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(parameters["args"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol."""
        command: dict[str, Any] = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session is not None:
            command["sessionId"] = self._session
        self._answers[command["id"]] = answered = asyncio.get_running_loop().create_future()
        await self._connection.send(json.dumps(command))
        async with asyncio.timeout(30):
            answer = await answered
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    async def open_tab(self) -> str:
        """Use a new tab of a new profile; returns the profile's id."""
        context: str = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        self._session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        return context

    async def open(self, url: str) -> None:
        """Go to an address."""
        await self.call("Page.navigate", url=url)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    async def until(self, expression: str, *, within_seconds: float = 20.0) -> Any:
        """Wait for an expression to become true, and return its value."""
        deadline = time.monotonic() + within_seconds
        while True:
            # Between two documents, and in a half of one, there is nothing to ask.
            value = await self.evaluate(f"document.readyState !== 'loading' && document.body ? ({expression}) : null")
            if value:
                return value
            if time.monotonic() > deadline:
                shown = await self.evaluate("document.body.innerText")
                raise AssertionError(f"not within {within_seconds:g} s: {expression}\n{shown}\n{self.complaints}")
            await asyncio.sleep(0.02)

    async def type(self, text: str) -> None:
        """Put text in where the focus is."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        code, text = KEYS[key]
        same = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    async def screenshot(self) -> bytes:
        """A picture as PNG, for people."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@asynccontextmanager
async def open_page(devtools_url: str) -> AsyncIterator[Page]:
    """A tab that shares nothing with any other."""
    async with connect(devtools_url, max_size=None, proxy=None) as connection:
        page = Page(connection)
        receiving = asyncio.create_task(page.receive())
        try:
            context = await page.open_tab()
            yield page
            page._session = None
            await page.call("Target.disposeBrowserContext", browserContextId=context)
        finally:
            receiving.cancel()
            await asyncio.wait((receiving,))
