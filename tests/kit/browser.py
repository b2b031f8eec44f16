"""A headless Chromium, driven by Playwright: tabs that tell what goes wrong in them, and the chat page in a tab."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Request,
    Route,
    WebSocket,
    async_playwright,
    expect,
)

from tests.kit.programs import program

# Of the browser's own errands, none: what it asks for is what the page asks for.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
)
ARTEFACTS = Path("build/screenshots")
PATIENCE_MS = 20_000
# What Chromium itself logs of a server that is away, whatever a page makes of it.
NO_CONNECTION = r"WebSocket connection to 'ws://127\.0\.0\.1:\d+/\S+' failed: .*|Failed to load resource: net::ERR_\w+"
# Notes every text of the last answer, beginning with one that is empty, and how many questions and answers there were.
WITNESS = """() => {
    window.witnessed = {texts: [''], articles: []};
    new MutationObserver(() => {
        const articles = [...document.querySelectorAll('[role=log] article')];
        const answers = articles.filter((article) => article.querySelector('h2')?.textContent === 'Answer');
        const text = [...(answers.at(-1)?.querySelectorAll('.markdown') ?? [])].map((e) => e.textContent).join('');
        if (text !== witnessed.texts.at(-1)) witnessed.texts.push(text);
        if (articles.length !== witnessed.articles.at(-1)) witnessed.articles.push(articles.length);
    }).observe(document, {subtree: true, childList: true, characterData: true});
}"""

expect.set_options(timeout=PATIENCE_MS)


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """A fresh Chromium of this machine. See `programs` where there is none."""
    path = program("chromium", "chromium-browser", "google-chrome", install="apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """A page, and everything that went wrong in it: errors, warnings, violations of its policy."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.expected: list[str] = []  # patterns of what a test brings about
        self.requests: list[str] = []  # all URLs that were asked for, sockets included
        self.frames: list[str] = []  # all text that has come over sockets
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._requested)
        page.on("websocket", self._opened)

    @property
    def unexpected(self) -> list[str]:
        """The complaints that no test has brought about."""
        return [said for said in self.complaints if not any(re.fullmatch(known, said) for known in self.expected)]

    def _said(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.complaints.append(said.text)

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def _opened(self, socket: WebSocket) -> None:
        self.requests.append(socket.url)
        socket.on("framereceived", lambda frame: self.frames.append(str(frame)))


@asynccontextmanager
async def open_context(browser: Browser, **options: Any) -> AsyncIterator[BrowserContext]:
    """A profile that shares nothing with any other; `options` are Playwright's, of `new_context`."""
    context = await browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(PATIENCE_MS)
    try:
        yield context
    finally:
        # A route handler that still has a request fails when its page is gone. Playwright raises that in its next call,
        # which may be another test's.
        for page in context.pages:
            await page.unroute_all(behavior="ignoreErrors")
        await context.close()


@asynccontextmanager
async def open_tab(browser: Browser, **options: Any) -> AsyncIterator[Tab]:
    """A tab in a profile of its own."""
    async with open_context(browser, **options) as context:
        yield Tab(await context.new_page())


async def until(condition: Callable[[], Awaitable[Any]], *, within_seconds: float = PATIENCE_MS / 1000) -> Any:
    """Wait until something holds that no locator says, such as an expression of a page whose policy forbids to wait for
    one in it; returns what it has come to."""
    deadline = time.monotonic() + within_seconds
    while not (value := await condition()):
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.02)
    return value


class Chat:
    """The chat page in a tab, as people use it: by what its elements are and what they are called."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab
        self.page = page = tab.page
        self.box = page.get_by_role("textbox", name="Your message")
        self.send = page.get_by_role("button", name="Send", exact=True)
        self.stop = page.get_by_role("button", name="Stop", exact=True)
        self.again = page.get_by_role("button", name="Answer again")
        self.alert = page.get_by_role("main").get_by_role("alert")
        self.retry = self.alert.get_by_role("button", name="Try again")
        self.status = page.get_by_role("status")
        self.jump = page.get_by_role("button", name="To the newest message")
        self.scroller = page.get_by_role("region", name="Messages")
        self.sidebar = page.get_by_role("navigation", name="Conversations")
        self.listed = self.sidebar.get_by_role("link")
        self.new = self.sidebar.get_by_role("button", name="New conversation")
        articles = page.get_by_role("log").get_by_role("article")
        self.answers = articles.filter(has=page.get_by_role("heading", name="Answer", exact=True, level=2))
        self.questions = articles.filter(has=page.get_by_role("heading", name="You", exact=True, level=2))

    @property
    def answer(self) -> Locator:
        """The last answer."""
        return self.answers.last

    @property
    def said(self) -> Locator:
        """The text of the last answer, without what is said about it."""
        return self.answer.locator(".markdown")

    async def open(self, url: str, token: str, conversation: str | None = None) -> None:
        """Sign in as `anynode dev` says, perhaps to a conversation."""
        named = "" if conversation is None else f"&c={conversation}"
        await self.page.goto(f"{url}/#token={token}{named}")
        await expect(self.status).to_contain_text("Connected to node ")

    async def ask(self, text: str) -> None:
        """Type a question and send it."""
        await self.box.fill(text)
        await expect(self.send).to_be_enabled()
        await self.box.press("Enter")

    async def ended(self, answers: int = 1) -> None:
        """Wait until this number of answers is there, and nothing runs."""
        await expect(self.answers).to_have_count(answers)
        await expect(self.answer).to_have_attribute("aria-busy", "false")
        await expect(self.stop).to_have_count(0)

    async def shown(self) -> list[tuple[str, str]]:
        """Role and text of all questions and answers, in order; the space at the end of an answer is not shown."""
        pairs = (
            await self.page.get_by_role("log")
            .get_by_role("article")
            .evaluate_all(
                "all => all.map((e) => e.querySelector('h2').textContent === 'You'"
                " ? ['user', e.querySelector('p').textContent]"
                " : ['assistant', [...e.querySelectorAll('.markdown')].map((m) => m.textContent).join('')])"
            )
        )
        return [(role, text.rstrip() if role == "assistant" else text) for role, text in pairs]

    async def conversation(self) -> str:
        """The id in the address."""
        found: str | None = await self.page.evaluate("new URLSearchParams(location.hash.slice(1)).get('c')")
        assert found is not None, self.page.url
        return found

    async def watch(self) -> None:
        """Note all that is shown of the last answer from now on."""
        await self.page.evaluate(WITNESS)

    async def watched(self) -> tuple[list[str], int]:
        """The texts that the last answer has had, one after the other, and the most questions and answers at a time."""
        found = await self.page.evaluate("witnessed")
        return [text.rstrip() for text in found["texts"]], max(found["articles"], default=0)


async def screenshot(page: Page, name: str) -> None:
    """Keep a picture, for people."""
    await page.screenshot(path=ARTEFACTS / f"{name}.png")


__all__ = [
    "NO_CONNECTION",
    "PATIENCE_MS",
    "Browser",
    "BrowserContext",
    "Chat",
    "Locator",
    "Page",
    "Route",
    "Tab",
    "expect",
    "open_context",
    "open_tab",
    "running_browser",
    "screenshot",
    "until",
]
