"""Makes docs/demonstration.webp: a node of `anynode dev` is killed in mid-answer from the page, and the answer goes on.

The echo agent answers, which continues in mid-sentence: the README says so under the animation.

Run it as `uv run --dev python -m scripts.demonstration`, with a Chromium on this machine.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from PIL import Image

from tests.kit.browser import Page, expect, open_tab, running_browser
from tests.kit.harness import free_port

TO: Final = Path("docs/demonstration.webp")
WIDTH, HEIGHT = 960, 600
FRAME_SECONDS: Final = 0.125
KILLED_AFTER_SECONDS: Final = 4.0
SHOWN_AFTER_SECONDS: Final = 6.0
READY_SECONDS: Final = 60.0


@contextmanager
def running_dev() -> Iterator[str]:
    """Run `anynode dev --nodes 3`, and give the URL of the page that it prints."""
    with tempfile.TemporaryDirectory(prefix="anynode-demonstration-") as directory:
        settings = {"AGENT": "echo", "ECHO_TOKENS_PER_SECOND": "30", "LEASE_SECONDS": "2"}
        environment = {**os.environ, "PORT": str(free_port()), **settings}
        command = [sys.executable, "-m", "anynode.server.cli", "dev", "--nodes", "3", "--data-dir", directory]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603 (a list, no shell)
        try:
            yield _url_in(process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _url_in(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + READY_SECONDS
    for line in process.stdout:
        if found := re.search(r"Open the page\s+(\S+)", line):
            return found[1]
        if time.monotonic() > deadline:
            break
    raise SystemExit("anynode dev does not start")


class Film:
    """Pictures of a page, one for each tick of a clock."""

    def __init__(self, page: Page) -> None:
        self.pictures: list[Image.Image] = []
        self._page = page
        self._started = time.monotonic()

    async def shoot(self, seconds: float) -> None:
        """Take pictures for some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            due = self._started + len(self.pictures) * FRAME_SECONDS
            await asyncio.sleep(max(due - time.monotonic(), 0))
            picture = Image.open(io.BytesIO(await self._page.screenshot())).convert("RGB")
            # A picture that is late also stands for those that it has delayed.
            count = max(round((time.monotonic() - self._started) / FRAME_SECONDS) - len(self.pictures), 1)
            self.pictures += [picture] * count

    def save(self, path: Path) -> None:
        """Write the pictures as an animation that repeats."""
        first, *others = self.pictures
        first.save(
            path,
            save_all=True,
            append_images=others,
            duration=round(FRAME_SECONDS * 1000),
            loop=0,
            quality=70,
            method=6,
            minimize_size=True,
        )


async def demonstrate(url: str) -> None:
    """Ask for a long answer, kill the node, and film what becomes of it."""
    async with running_browser() as browser, open_tab(browser, viewport={"width": WIDTH, "height": HEIGHT}) as tab:
        page = tab.page
        await page.goto(url)
        await expect(page.get_by_text("Connected to node")).to_be_visible()
        film = Film(page)
        await film.shoot(1.0)
        await page.get_by_role("button", name="A long answer").click()
        await film.shoot(KILLED_AFTER_SECONDS)
        await page.locator("summary", has_text="Node").click()
        await page.get_by_role("button", name="Kill it").hover()
        await film.shoot(1.2)
        await page.get_by_role("button", name="Kill it").click()
        await film.shoot(SHOWN_AFTER_SECONDS)
        await expect(page.get_by_text("Reconnected: continued on")).to_be_visible()
        await film.shoot(1.5)
        film.save(TO)
    print(f"{TO}: {len(film.pictures) * FRAME_SECONDS:.0f} s, {TO.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    with running_dev() as address:
        asyncio.run(demonstrate(address))
