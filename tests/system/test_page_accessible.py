"""The chat page for everybody: by keyboard alone, with a screen reader, on a phone, in large text, without motion."""

from __future__ import annotations

import gzip
import re
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from hatch_build import RegistryUnreachable, find_node, install_tools
from tests.agents.scripted import Strings, script_of
from tests.kit.browser import Browser, Chat, Locator, Page, Tab, expect, open_context, until
from tests.kit.harness import NodeProcess, token_for
from tests.kit.programs import give_up_without
from tests.kit.rest import rest_to

pytestmark = pytest.mark.asyncio(loop_scope="module")
WEB: Final = Path(__file__).parents[2] / "web"
RULES: Final = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
WIDE: Final = {"viewport": {"width": 1280, "height": 800}}
PHONE: Final[Mapping[str, Any]] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
TARGET_PIXELS_MIN: Final = 24  # WCAG 2.2, 2.5.8
FIRST_LOAD_BYTES_MAX: Final = 250_000
TABS_MAX: Final = 60
RICH: Final = """# A heading

Some **bold** text with `code`, a [link](https://example.com/) and ~~more~~.

```python
def answer() -> int:
    return 42  # of course
```

| name | value |
|---|---:|
| one | 1 |

- [x] done
- [ ] to do

1. first
2. second

> A quote.
"""
SAID: Final = (
    "This is the first sentence. Here comes another one, which is longer! Is there a third? There is: e.g. this one. "
    "Then **bold words** end a sentence.\n\n- An item.\n- Another item.\n\nA paragraph without much in it. "
    "And the last words come without a mark"
)
SPOKEN: Final = (
    "This is the first sentence. Here comes another one, which is longer! Is there a third? There is: e.g. this one. "
    "Then bold words end a sentence. An item. Another item. A paragraph without much in it. "
    "And the last words come without a mark"
)
# Notes what is added to the polite region, in order.
LISTEN: Final = """() => {
    window.heard = [];
    new MutationObserver((records) => {
        for (const { addedNodes } of records) for (const node of addedNodes) heard.push(node.textContent);
    }).observe(document.querySelector('[aria-live=polite]'), { childList: true, subtree: true, characterData: true });
}"""
# What has the focus, as far as one can see: why not, or nothing.
FOCUS: Final = """() => {
    const focused = document.activeElement;
    if (focused === null || focused === document.body) return 'nothing has the focus';
    const named = `${focused.localName} "${focused.getAttribute('aria-label') ?? focused.textContent.slice(0, 40)}"`;
    const { left, top, right, bottom } = focused.getBoundingClientRect();
    if (right - left < 8 || bottom - top < 8) return `${named} has no size`;
    if (right <= 0 || bottom <= 0 || left >= innerWidth || top >= innerHeight) return `${named} is out of sight`;
    if (!focused.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return `${named} is invisible`;
    if (!focused.matches(':focus-visible')) return `${named} does not show its focus`;
    const { outlineStyle, outlineWidth } = getComputedStyle(focused);
    const isMarked = outlineStyle !== 'none' && parseFloat(outlineWidth) >= 1;
    return isMarked || /^(input|textarea)$/.test(focused.localName) ? '' : `${named} has no outline`;
}"""
TARGETS: Final = f"""() => [...document.querySelectorAll('a[href], button, summary, input:enabled, textarea')]
    .filter((e) => e.checkVisibility({{ opacityProperty: true, visibilityProperty: true }}))
    .filter((e) => !e.closest('.markdown p'))
    .map((e) => [e, e.getBoundingClientRect()])
    .filter(([e, {{ width, height }}]) => width > 1 && (width < {TARGET_PIXELS_MIN} || height < {TARGET_PIXELS_MIN}))
    .map(([e, {{ width, height }}]) => `${{width}}x${{height}}: ${{e.outerHTML.slice(0, 120)}}`)"""
WIDER: Final = """() => [...document.querySelectorAll('body *')].map((e) => [e, e.getBoundingClientRect()])
    .filter(([e, { right, width }]) => width > 1 && right > innerWidth + 1 && !e.closest('pre, .table, .sidebar'))
    .map(([e, { right }]) => `${right}: ${e.outerHTML.slice(0, 120)}`)
    .concat(document.documentElement.scrollWidth > innerWidth ? `all: ${document.documentElement.scrollWidth}` : [])"""


@asynccontextmanager
async def open_chat(browser: Browser, **options: Any) -> AsyncIterator[Chat]:
    """The page in a profile of its own, where in the end nothing has gone wrong. Without motion, unless asked for, as
    what moves would be looked at half-way."""
    async with open_context(browser, **{"reduced_motion": "reduce", **options}) as context:
        tab = Tab(await context.new_page())
        yield Chat(tab)
        assert tab.unexpected == []


async def with_menu(page: Page) -> None:
    """Let the page have the menu of `anynode dev`, by the mark that its server puts in."""
    await page.add_init_script(
        "new MutationObserver((_, observer) => {"
        " if (!document.head) return;"
        " observer.disconnect();"
        " document.head.append(Object.assign(document.createElement('meta'), { name: 'anynode-dev' }));"
        "}).observe(document, { childList: true, subtree: true });"
    )


async def sign_in(chat: Chat, user: str) -> None:
    """Sign in with the form."""
    await chat.page.get_by_label("Token").fill(token_for(user))
    await chat.page.keyboard.press("Enter")
    await expect(chat.status).to_contain_text("Connected to node ")


# What a machine can check.


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core, as a script: one of the tools of web/, which a build of the page does without."""
    node = find_node()
    assert node is not None, "the nodejs wheel is among the development dependencies"
    try:
        install_tools(WEB, node)
    except RegistryUnreachable as error:
        give_up_without("npm's registry", "scripts/web run check", error.output)
    return (WEB / "node_modules" / "axe-core" / "axe.min.js").read_text()


async def violations(page: Page, axe: str) -> list[str]:
    """What breaks a rule, each with the elements that do."""
    await page.evaluate(f"() => {{ if (!window.axe) {{ {axe} }} }}")
    rules = {"type": "tag", "values": RULES}
    found = await page.evaluate(
        "(rules) => axe.run(document, { runOnly: rules, resultTypes: ['violations'], preload: false })", rules
    )
    return [
        f"{each['id']} ({each['impact']}) {node['target']}: {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_no_state_breaks_a_rule(
    browser: Browser, node: NodeProcess, strings: Strings, user: str, axe: str, scheme: str
) -> None:
    found: dict[str, list[str]] = {}
    async with open_chat(browser, color_scheme=scheme, **WIDE) as chat:
        page = chat.page

        async def look(state: str) -> None:
            found[state] = await violations(page, axe)

        await with_menu(page)
        await page.goto(f"{node.http}/")
        await expect(page.get_by_label("Token")).to_be_visible()
        await look("sign-in")
        await sign_in(chat, user)
        await look("empty")
        gate = strings.name()
        calls: list[list[Any]] = [
            ["call", "1", "search", {"words": "x"}],
            ["result", "1", "search", '{"found": 1}', False],
            ["step"],
        ]
        await chat.ask(script_of(*calls, ["text", RICH[:200]], ["gate", gate], ["text", RICH[200:]]))
        await expect(chat.said).to_contain_text("bold")
        await look("streaming")
        strings.open(gate)
        await chat.ended()
        await expect(chat.answer.locator(".hljs-keyword").first).to_be_visible()
        await look("a rich answer")
        await chat.answer.get_by_role("group").locator("summary").click()
        await look("a tool that is open")
        await chat.ask(script_of(["text", "Half of "], ["agent_error", "The model is away.", False]))
        await expect(chat.answer).to_contain_text("This answer failed.")
        await look("an answer that failed")
        item = chat.sidebar.get_by_role("listitem").first
        await item.hover()
        await look("an item with its actions")
        await item.get_by_role("button", name="Rename").click()
        await look("renaming")
        await page.keyboard.press("Escape")
        await item.get_by_role("button", name="Delete").click()
        await look("deleting")
        await page.keyboard.press("Escape")
        menu = page.get_by_role("main").locator("header").get_by_role("group")
        await menu.locator("summary").click()
        await expect(page.get_by_role("button", name="Kill it")).to_be_visible()
        await look("the menu of the development server")
        await page.keyboard.press("Escape")
        await chat.ask("x" * 70_000)
        await expect(chat.alert).to_be_visible()
        await look("a question that was refused")
        chat.tab.expected.append(r"Failed to load resource: .*")
    assert {state: broken for state, broken in found.items() if broken} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_no_state_on_a_phone_breaks_a_rule(
    browser: Browser, node: NodeProcess, user: str, axe: str, scheme: str
) -> None:
    async with open_chat(browser, color_scheme=scheme, **PHONE) as chat:
        await chat.open(node.http, token_for(user))
        await chat.ask(script_of(["text", RICH]))
        await chat.ended()
        found = {"an answer": await violations(chat.page, axe)}
        await chat.page.get_by_role("button", name="Conversations").click()
        await expect(chat.listed).to_be_visible()
        found["the drawer"] = await violations(chat.page, axe)
    assert {state: broken for state, broken in found.items() if broken} == {}


async def test_what_breaks_a_rule_would_be_found(browser: Browser, node: NodeProcess, user: str, axe: str) -> None:
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        await chat.page.evaluate(
            "() => { const image = document.createElement('button'); image.style.color = '#eee'; "
            "document.querySelector('main').append(image, document.createElement('img')); }"
        )
        found = "\n".join(await violations(chat.page, axe))
        assert "image-alt (critical)" in found
        assert "button-name (critical)" in found


# By keyboard alone.


async def tab_to(chat: Chat, wanted: Locator, key: str = "Tab") -> None:
    """Press a key until this has the focus; at each stop the focus can be seen."""
    await expect(wanted).to_have_count(1)
    for _ in range(TABS_MAX):
        await chat.page.keyboard.press(key)
        assert await chat.page.evaluate(FOCUS) == ""
        if await wanted.evaluate("(element) => element === document.activeElement"):
            return
    raise AssertionError(f"{key} does not lead to {wanted}")


async def assert_focus_is_seen(chat: Chat) -> None:
    """Something has the focus, soon, and one sees it."""

    async def is_seen() -> bool:
        return bool(await chat.page.evaluate(FOCUS) == "")

    try:
        await until(is_seen, within_seconds=2)
    except AssertionError:
        assert await chat.page.evaluate(FOCUS) == ""


async def test_one_signs_in_asks_and_stops_by_keyboard(browser: Browser, node: NodeProcess, user: str) -> None:
    async with open_chat(browser) as chat:
        await chat.page.goto(f"{node.http}/")
        await expect(chat.page.get_by_label("Token")).to_be_focused()
        await chat.page.keyboard.insert_text(token_for(user))
        await chat.page.keyboard.press("Enter")
        await expect(chat.box).to_be_focused()
        await chat.page.keyboard.insert_text(script_of(["text", "Some words"], ["hang"]))
        await chat.page.keyboard.press("Enter")
        await expect(chat.said).to_have_text("Some words")
        await assert_focus_is_seen(chat)
        await chat.page.keyboard.press("Escape")
        await expect(chat.answer).to_contain_text("Stopped.")
        await expect(chat.box).to_be_focused()


async def test_the_focus_stays_when_an_answer_is_stopped_with_the_button(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        await chat.ask(script_of(["text", "Some words"], ["hang"]))
        await tab_to(chat, chat.stop)
        await chat.page.keyboard.press("Enter")
        await expect(chat.answer).to_contain_text("Stopped.")
        await assert_focus_is_seen(chat)


async def test_the_focus_stays_when_an_answer_is_copied(browser: Browser, node: NodeProcess, user: str) -> None:
    async with open_chat(browser, permissions=["clipboard-read", "clipboard-write"]) as chat:
        await chat.open(node.http, token_for(user))
        await chat.ask(script_of(["text", "Some words"]))
        await chat.ended()
        await tab_to(chat, chat.answer.get_by_role("button", name="Copy message"), "Shift+Tab")
        await chat.page.keyboard.press("Enter")
        copied = chat.answer.get_by_role("button", name="Copied")
        await expect(copied).to_be_focused()
        assert await chat.page.evaluate("navigator.clipboard.readText()") == "Some words"


async def test_the_focus_stays_when_a_question_is_answered_again(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        await chat.ask(script_of(["paced", 10, "again ", 0.02]))
        await chat.ended()
        before = await chat.answer.evaluate_handle("(answer) => answer")
        await tab_to(chat, chat.again, "Shift+Tab")
        await chat.page.keyboard.press("Space")
        await until(lambda: before.evaluate("(answer) => !answer.isConnected || answer.ariaBusy === 'true'"))
        await assert_focus_is_seen(chat)
        await chat.ended()
        await assert_focus_is_seen(chat)


async def test_a_conversation_is_renamed_and_deleted_by_keyboard(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with rest_to(node, user) as rest:
        for title in ("First", "Second", "Third"):
            await rest.create(title=title)
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        link = chat.sidebar.get_by_role("link", name="Second", exact=True)
        await tab_to(chat, link, "Shift+Tab")
        await tab_to(chat, chat.page.get_by_role("button", name="Rename Second"))
        await chat.page.keyboard.press("Enter")
        await expect(chat.page.get_by_role("textbox", name="New title of Second")).to_be_focused()
        await chat.page.keyboard.insert_text("Renamed")
        await chat.page.keyboard.press("Enter")
        renamed = chat.sidebar.get_by_role("link", name="Renamed", exact=True)
        await expect(renamed).to_be_focused()
        await assert_focus_is_seen(chat)
        await tab_to(chat, chat.page.get_by_role("button", name="Delete Renamed"))
        await chat.page.keyboard.press("Enter")
        await expect(chat.page.get_by_role("alertdialog").get_by_role("button", name="Delete")).to_be_focused()
        await chat.page.keyboard.press("Escape")
        await expect(renamed).to_be_focused()
        await tab_to(chat, chat.page.get_by_role("button", name="Delete Renamed"))
        await chat.page.keyboard.press("Enter")
        await chat.page.keyboard.press("Enter")
        await expect(renamed).to_have_count(0)
        await assert_focus_is_seen(chat)


async def test_the_focus_stays_when_the_open_conversation_is_deleted(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with rest_to(node, user) as rest:
        id = await rest.create(title="Open")
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user), id)
        await tab_to(chat, chat.page.get_by_role("button", name="Delete Open"), "Shift+Tab")
        await chat.page.keyboard.press("Enter")
        await chat.page.keyboard.press("Space")
        await expect(chat.listed).to_have_count(0)
        await assert_focus_is_seen(chat)
        chat.tab.expected.append("Failed to load resource: .* 404 .*")  # of who was reading it


async def test_one_searches_and_begins_anew_by_keyboard(browser: Browser, node: NodeProcess, user: str) -> None:
    async with rest_to(node, user) as rest:
        ids = [await rest.create(title=title) for title in ("Apples", "Pears")]
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user), ids[0])
        await tab_to(chat, chat.page.get_by_role("searchbox", name="Search conversations"), "Shift+Tab")
        await chat.page.keyboard.insert_text("pear")
        await expect(chat.listed).to_have_text(["Pears"])
        await tab_to(chat, chat.listed)
        await chat.page.keyboard.press("Enter")
        await expect(chat.page.get_by_role("heading", name="Pears", level=1)).to_be_visible()
        await assert_focus_is_seen(chat)
        await tab_to(chat, chat.new, "Shift+Tab")
        await chat.page.keyboard.press("Enter")
        await expect(chat.page.get_by_role("heading", name="New conversation", level=1)).to_be_visible()
        await assert_focus_is_seen(chat)


async def test_one_scrolls_up_and_jumps_down_by_keyboard(browser: Browser, node: NodeProcess, user: str) -> None:
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        await chat.ask(script_of(["repeat", 100, "Paragraph {number}.\n\n"]))
        await chat.ended()
        await tab_to(chat, chat.again, "Shift+Tab")
        await chat.scroller.evaluate(
            "(box) => { window.scrolled = new Promise((done) => { box.onscrollend = done; }); }"
        )
        await chat.page.keyboard.press("PageUp")
        await chat.page.evaluate("scrolled.then(() => {})")
        await expect(chat.jump).to_be_visible()
        await tab_to(chat, chat.jump)
        await chat.page.keyboard.press("Enter")
        await expect(chat.jump).to_have_count(0)
        await expect(chat.answer.get_by_text("Paragraph 99.")).to_be_in_viewport()
        await assert_focus_is_seen(chat)


async def test_the_menu_of_the_development_server_is_used_by_keyboard(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with open_chat(browser) as chat:
        await with_menu(chat.page)
        await chat.open(node.http, token_for(user))
        summary = chat.page.get_by_role("main").locator("header summary")
        await tab_to(chat, summary, "Shift+Tab")
        await chat.page.keyboard.press("Enter")
        kill = chat.page.get_by_role("button", name="Kill it")
        await expect(kill).to_be_visible()
        await tab_to(chat, kill)
        await chat.page.keyboard.press("Escape")
        await expect(kill).to_be_hidden()
        await expect(summary).to_be_focused()
        await assert_focus_is_seen(chat)


# What is spoken.


async def test_an_answer_is_busy_while_it_streams(
    browser: Browser, node: NodeProcess, strings: Strings, user: str
) -> None:
    gate = strings.name()
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        log = chat.page.get_by_role("log")
        await expect(log).to_have_attribute("aria-busy", "false")
        await chat.ask(script_of(["text", "Some words"], ["gate", gate]))
        await expect(chat.answer).to_have_attribute("aria-busy", "true")
        await expect(log).to_have_attribute("aria-busy", "true")
        strings.open(gate)
        await expect(chat.answer).to_have_attribute("aria-busy", "false")
        await expect(log).to_have_attribute("aria-busy", "false")


async def test_an_answer_is_spoken_once_in_whole_sentences(browser: Browser, node: NodeProcess, user: str) -> None:
    words = re.findall(r"\S+\s*", SAID)
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user))
        await chat.page.evaluate(LISTEN)
        await chat.ask(script_of(*(["paced", 1, word, 0.07] for word in words)))
        await chat.ended()

        async def heard() -> str:
            return " ".join(await chat.page.evaluate("heard"))

        async def is_all_heard() -> bool:
            return (await heard()).endswith("without a mark")

        await until(is_all_heard)
        assert await heard() == SPOKEN
        spoken = await chat.page.evaluate("heard")
        assert len(spoken) > 2
        assert [text for text in spoken[:-1] if text[-1] not in ".!?"] == []


async def test_nothing_moves_for_who_wants_no_motion(
    browser: Browser, node: NodeProcess, strings: Strings, user: str
) -> None:
    moving = "document.getAnimations().filter(({ playState }) => playState === 'running').length"
    counts = {}
    for motion in ("reduce", "no-preference"):
        gate = strings.name()
        async with open_chat(browser, reduced_motion=motion) as chat:
            await chat.open(node.http, token_for(user))
            await chat.ask(script_of(["call", "1", "search", {}], ["gate", gate]))
            await expect(chat.answer.get_by_role("group")).to_be_visible()
            counts[motion] = await chat.page.evaluate(moving)
            strings.open(gate)
            await expect(chat.stop).to_have_count(0)
    assert counts["reduce"] == 0
    assert counts["no-preference"] > 0


# On a phone, and in large text.


@pytest.mark.parametrize("size", ["100%", "200%"])
async def test_a_phone_shows_all_and_has_targets_for_fingers(
    browser: Browser, node: NodeProcess, user: str, size: str
) -> None:
    long = "\n\n" + "a" * 400 + "\n\n`" + "b" * 400 + "`\n\n|" + " cell |" * 12 + "\n|" + "-|" * 12 + "\n"
    async with open_chat(browser, **PHONE) as chat:
        page = chat.page
        await page.goto(f"{node.http}/")
        await page.evaluate(f"document.documentElement.style.fontSize = '{size}'")
        await expect(page.get_by_role("button", name="Sign in")).to_be_in_viewport()
        assert await page.evaluate(WIDER) == []
        assert await page.evaluate(TARGETS) == []
        await sign_in(chat, user)
        calls: list[list[Any]] = [
            ["call", "1", "t" * 200, {"words": "x" * 300}],
            ["result", "1", "t" * 200, "y" * 300, False],
            ["step"],
        ]
        await chat.ask(script_of(*calls, ["text", RICH + long]))
        await chat.ended()
        await chat.answer.get_by_role("group").locator("summary").click()
        for needed in (
            chat.box,
            chat.send,
            page.get_by_role("button", name="Conversations"),
            page.get_by_role("button", name="New conversation").last,
        ):
            await expect(needed).to_be_in_viewport(ratio=0.9)
        assert await page.evaluate(WIDER) == []
        assert await page.evaluate(TARGETS) == []
        await page.get_by_role("button", name="Conversations").click()
        await expect(chat.listed).to_be_in_viewport(ratio=0.9)
        for name in ("Rename", "Delete"):
            await expect(chat.sidebar.get_by_role("button", name=name)).to_be_in_viewport(ratio=0.9)
        leave = chat.sidebar.get_by_role("button", name="Sign out")
        await leave.scroll_into_view_if_needed()
        await expect(leave).to_be_in_viewport(ratio=0.9)
        assert await page.evaluate(WIDER) == []
        assert await page.evaluate(TARGETS) == []


async def test_what_is_too_wide_too_small_or_out_of_sight_would_be_found(
    browser: Browser, node: NodeProcess, user: str
) -> None:
    async with open_chat(browser, **PHONE) as chat:
        await chat.open(node.http, token_for(user))
        await chat.page.evaluate(
            "() => { const button = document.createElement('button'); const wide = document.createElement('p');"
            " Object.assign(button.style, { width: '20px', height: '20px', outline: 'none' });"
            " wide.style.width = '500px'; document.querySelector('main').prepend(button, wide); button.focus(); }"
        )
        assert "x20" in "".join(await chat.page.evaluate(TARGETS))
        assert len(await chat.page.evaluate(WIDER)) > 0
        assert "button" in await chat.page.evaluate(FOCUS)
        await chat.page.evaluate("document.activeElement.blur()")
        assert await chat.page.evaluate(FOCUS) == "nothing has the focus"


async def test_what_the_page_loads_first_is_small(browser: Browser, node: NodeProcess, user: str) -> None:
    async with rest_to(node, user) as rest:
        id = await rest.create(title="Words")
        reply = await rest.append(
            id, {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "**Hello** too."}
        )
        reply.expect(201)
    async with open_chat(browser) as chat:
        await chat.open(node.http, token_for(user), id)
        await expect(chat.said).to_have_text("Hello too.")
        loaded = {url for url in chat.tab.requests if url.startswith((f"{node.http}/assets/", f"{node.http}/#"))}
        sizes = {url.rpartition("/")[2]: packed_bytes(url.partition("#")[0]) for url in loaded}
    assert len(sizes) >= 3, sizes
    assert sum(sizes.values()) < FIRST_LOAD_BYTES_MAX, sizes


def packed_bytes(url: str) -> int:
    """How long what is there is when it is packed, as the server does where the package has been built."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return len(gzip.compress(response.read()))
