"""`python -m bench.page`: how soon the page is there, and how much work Chromium has while answers stream."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import signal
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
from playwright.async_api import Browser, Page, ViewportSize, async_playwright

from anynode.server.api.page import DIRECTORY
from anynode.server.dev.embedded_postgres import embedded_postgres
from bench.agents import MARKDOWN
from bench.load import LoadError
from bench.progress import Progress
from bench.servers import Bench, Server
from tests.kit.browser import FLAGS

HISTORY: Final = 1000
ROUNDS: Final = 7  # of opening the page
VIEWPORT: Final[ViewportSize] = {"width": 1280, "height": 800}
TRACED: Final = ("toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline")
TURN_SECONDS_MAX: Final = 240.0


@dataclass(frozen=True)
class Frames:
    """The main thread's work for each frame, in milliseconds of CPU, in order."""

    work: Sequence[float]

    def centile(self, part: float) -> float:
        """Return the work that this share of the frames does not exceed."""
        return sorted(self.work)[min(int(len(self.work) * part), len(self.work) - 1)]

    def __str__(self) -> str:
        centiles = ", ".join(f"p{part * 100:g} {self.centile(part):.1f}" for part in (0.5, 0.95, 0.99))
        return f"{len(self.work)} frames: {centiles}, most {max(self.work):.1f} ms"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokens", default=20_000, show_default=True, type=click.IntRange(500), help="Of the long answer.")
@click.option("--rate", default=200, show_default=True, type=click.IntRange(1, 2000), help="Tokens a second of it.")
def page(tokens: int, rate: int) -> None:
    """Measure the page in Chromium: first paint, frames in a long conversation, frames of a long answer."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no process outlives this one
    directory = Path(tempfile.mkdtemp(prefix="anynode-bench-"))
    try:
        with embedded_postgres(directory / "postgres") as postgres:
            asyncio.run(_measure(Bench(postgres, directory), tokens, rate))
    except LoadError as error:
        raise click.ClickException(str(error)) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def _measure(bench: Bench, tokens: int, rate: int) -> None:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or not (DIRECTORY / "index.html").exists():
        raise LoadError("this needs a Chromium, and the page that `uv run` builds")
    progress = Progress(4)
    await bench.prepare({HISTORY: 2, 2: 1}, ("product",))
    async with (
        bench.serve("product", AGENT=MARKDOWN, ANSWER_BYTES_MAX=4_000_000) as server,
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            progress.step("opening the page")
            opened = await _first_paints(bench, server, browser)
            shown, whole = bench.conversations[HISTORY]
            progress.step(f"200 tokens a second into a conversation of {HISTORY:,} messages")
            newest = await _frames(bench, server, browser, str(shown), 1600, 200, is_all_read=False)
            progress.step("the same, with all of them read")
            all_read = await _frames(bench, server, browser, str(whole), 1600, 200, is_all_read=True)
            progress.step(f"an answer of {tokens:,} tokens, {rate} a second")
            long = await _frames(bench, server, browser, str(bench.conversations[2][0]), tokens, rate)
        finally:
            await browser.close()
    progress.clear()
    tenth = max(len(long.work) // 10, 1)
    click.echo(f"first load: {_first_load_bytes() / 1000:.0f} kB gzipped")
    click.echo(f"first contentful paint: {_range(opened)} ms")
    click.echo(f"into {HISTORY:,} messages, the newest of them shown: {newest}")
    click.echo(f"… all of them shown: {all_read}")
    click.echo(f"{tokens:,} tokens, first tenth: {Frames(long.work[:tenth])}")
    click.echo(f"… last tenth: {Frames(long.work[-tenth:])}")


async def _first_paints(bench: Bench, server: Server, browser: Browser) -> list[float]:
    """Measure first contentful paints with nothing cached, in ms."""
    paints: list[float] = []
    for _ in range(ROUNDS):
        context = await browser.new_context(viewport=VIEWPORT)
        tab = await context.new_page()
        await tab.goto(f"http://127.0.0.1:{server.port}/#token={bench.token}")
        await tab.get_by_role("textbox", name="Your message").wait_for()
        paints.append(
            await tab.evaluate(
                """() => new Promise((resolve) => new PerformanceObserver((list) => {
                    for (const { name, startTime } of list.getEntries())
                        if (name === 'first-contentful-paint') resolve(startTime);
                }).observe({ type: 'paint', buffered: true }))"""
            )
        )
        await context.close()
    return paints


async def _frames(
    bench: Bench, server: Server, browser: Browser, chat: str, tokens: int, rate: int, *, is_all_read: bool = False
) -> Frames:
    """Measure the work of each frame while an answer streams, without its first second."""
    context = await browser.new_context(viewport=VIEWPORT)
    try:
        tab = await context.new_page()
        await tab.goto(f"http://127.0.0.1:{server.port}/#token={bench.token}&c={chat}")
        await tab.get_by_role("article").first.wait_for()
        if is_all_read:
            await _read_all(tab)
        box = tab.get_by_role("textbox", name="Your message")
        await box.fill(f"{tokens} {rate}")
        await box.press("Enter")
        await tab.wait_for_timeout(1000)
        await browser.start_tracing(page=tab, categories=list(TRACED))
        # Not by its role, which would be looked for in all of the page, again and again.
        await tab.locator("form button[type=submit]").wait_for(timeout=TURN_SECONDS_MAX * 1000)
        return Frames(list(_work_of_frames(json.loads(await browser.stop_tracing()))))
    finally:
        await context.close()


async def _read_all(tab: Page) -> None:
    scroller = tab.get_by_role("region", name="Messages")
    while await tab.get_by_role("article").count() < HISTORY:
        await scroller.evaluate("(box) => box.scrollTo(0, 0)")
        await tab.wait_for_timeout(100)
    await scroller.evaluate("(box) => box.scrollTo(0, box.scrollHeight)")
    await tab.wait_for_timeout(500)


def _work_of_frames(trace: dict[str, Any]) -> Iterator[float]:
    """Return the CPU time of the page's main thread in ms, from the end of each frame to the end of the next."""

    def spans(name: str, length: str) -> Iterator[tuple[tuple[int, int], int, int]]:
        for event in trace["traceEvents"]:
            if event["name"] == name and event["ph"] == "X":
                yield (event["pid"], event["tid"]), event["ts"], event.get(length, 0)

    commits = list(spans("Commit", "dur"))
    if not commits:
        raise LoadError("Chromium has traced no frame")
    main = statistics.mode(thread for thread, _, _ in commits)
    ends = sorted(at + length for thread, at, length in commits if thread == main)
    tasks = sorted((at, length) for thread, at, length in spans("RunTask", "tdur") if thread == main)
    number = 0
    for begin, end in pairwise(ends):
        work = 0
        while number < len(tasks) and tasks[number][0] < end:
            if tasks[number][0] >= begin:
                work += tasks[number][1]
            number += 1
        yield work / 1000


def _first_load_bytes() -> int:
    """Return the compressed size of everything that `/` loads at once."""
    html = (DIRECTORY / "index.html").read_bytes()
    assets = [file for file in (DIRECTORY / "assets").iterdir() if file.suffix != ".gz" and file.name.encode() in html]
    return sum(len(gzip.compress(data, 9)) for data in (html, *(file.read_bytes() for file in assets)))


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


if __name__ == "__main__":
    page()
