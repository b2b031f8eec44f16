"""Hostile texts in the chat page, wherever it shows text: nothing of them runs, loads, leads away or stops the page."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import pytest_asyncio
from playwright.async_api import Dialog
from playwright.async_api import Frame as BrowserFrame

from tests.agents.scripted import Strings, script_of
from tests.kit.browser import Browser, BrowserContext, Chat, Page, Tab, expect, open_context, until
from tests.kit.harness import NodeProcess, running_node, sql, token_for
from tests.kit.payloads import CANARY, DEEP, HTML, LINKS, MARKDOWN, PAYLOADS, TEXT, Payload
from tests.kit.rest import Rest, rest_to

pytestmark = pytest.mark.asyncio(loop_scope="module")
TITLE_MAX: Final = 200
DEEP_SECONDS_MAX: Final = 10.0  # for a text of 64 KiB at the most; what is not linear takes minutes
TOO_DEEP: Final = r"(?s).*Maximum call stack size exceeded.*"  # it may be logged, if all that comes of it is a text
CALLS_AT_ONCE: Final = 24  # an answer that fits in what the page reads first

# Looks at every element and attribute as it comes into the page, in all states that a text goes through while it is
# streamed, and tells of those that no text may bring. `audited.look()` looks at all that is there.
AUDIT: Final = r"""(() => {
    const KNOWN = new Set(`html head body title meta link script noscript main nav header section article div p span
        i b a button form label input textarea ul ol li h1 h2 h3 h4 strong em del br hr blockquote pre code figure
        figcaption table thead tbody tr th td sub sup details summary small svg path`.split(/\s+/));
    const IN_TEXT = new Set(`class href target rel start type checked disabled open title role tabindex style
        viewbox width height d`.split(/\s+/));
    const OF_THE_PAGE = /^(page|open|sidebar|skip|shade|drawer|sign-in|dev|foot|jump|composer|messages|scroller)$/;
    const IS_CODE = /^on|^(src|srcset|srcdoc|action|formaction|ping|background|poster|xlink:href|is|nonce|slot)$/i;
    const found = new Set();

    function problems(element) {
        const tag = element.localName.toLowerCase();
        const log = element.closest('[role=log]');
        const all = [];
        if (!KNOWN.has(tag)) all.push('an element');
        if (/^(script|link|meta|title)$/.test(tag)) {
            if (element.parentNode !== document.head || log) all.push('an element of the head');
            const url = element.getAttribute('src') ?? element.getAttribute('href') ?? location.href;
            if (new URL(url, location.href).origin !== location.origin) all.push('of another origin');
            if (element.httpEquiv) all.push('http-equiv');
            return all;
        }
        if (tag === 'form' && !element.matches('.foot > form, .sign-in > form')) all.push('a form');
        for (const { name, value } of element.attributes) {
            const known = !log || IN_TEXT.has(name.toLowerCase()) || /^(aria|data)-[a-z-]+$/.test(name);
            if (!known || IS_CODE.test(name)) all.push(`attribute ${name}`);
            const leads = log ? /^(https?:|mailto:)/i : /^#(c=[^&]*)?$/;
            if (name === 'href' && !leads.test(value)) all.push(`href ${value}`);
            const isGroup = element.parentElement?.matches('[role=log]'); // made by the page, with a height of its own
            if (name === 'style' && !isGroup && !/^text-align: (left|center|right);$/.test(value))
                all.push(`style ${value}`);
            if (log && /^(id|name)$/i.test(name)) all.push(`${name} ${value}`);
        }
        if (tag === 'a' && log && (element.target !== '_blank' || !element.relList.contains('noopener')))
            all.push('a link in this tab');
        if (tag === 'input' && log && (element.type !== 'checkbox' || !element.disabled)) all.push('an input');
        if (element.closest('.markdown') && [...element.classList].some((name) => OF_THE_PAGE.test(name)))
            all.push(`class ${element.className}`);
        return all;
    }

    function note(element) {
        for (const problem of problems(element)) {
            const articles = [...document.querySelectorAll('[role=log] article')];
            const at = articles.indexOf(element.closest('article'));
            found.add(`${at}: ${problem}: ${element.outerHTML.slice(0, 200)}`);
        }
    }

    function look(root) {
        if (root.nodeType !== Node.ELEMENT_NODE) return;
        note(root);
        root.querySelectorAll('*').forEach(note);
    }

    new MutationObserver((records) => {
        for (const { type, target, addedNodes } of records) {
            if (type === 'attributes') note(target);
            else addedNodes.forEach(look);
        }
    }).observe(document, { subtree: true, childList: true, attributes: true });
    addEventListener('securitypolicyviolation', (event) => found.add(`-1: violation: ${event.blockedURI}`));
    const audited = {
        look() {
            look(document.documentElement);
            const odd = Object.keys(Object.prototype).concat('polluted' in {} ? 'polluted' : []);
            for (const name of odd) found.add(`-1: prototype: ${name}`);
            if (!document.title.endsWith('Anynode')) found.add(`-1: title: ${document.title}`);
            return [...found];
        },
        /** Resolves when so many answers have ended, or, with false, when the page is gone. */
        ended(answers) {
            const log = () => document.querySelector('[role=log]');
            const isGone = () => log() === null && document.getElementById('root').childElementCount > 0;
            const isEnded = () =>
                document.querySelectorAll('[role=log] article[aria-busy=false]').length === answers &&
                document.querySelectorAll('[role=log] article').length === 2 * answers &&
                log()?.getAttribute('aria-busy') === 'false';
            return new Promise((resolve) => {
                const observer = new MutationObserver(() => {
                    if (!isGone() && !isEnded()) return;
                    observer.disconnect();
                    resolve(!isGone());
                });
                observer.observe(document, { subtree: true, childList: true, attributes: true });
                if (isEnded()) resolve(true);
            });
        },
    };
    Object.defineProperty(window, 'audited', { value: audited });
})()"""


class Trap:
    """A server that nobody may come to; texts point at it."""

    def __init__(self) -> None:
        self.address = ""
        self.visits = 0

    def visited(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Count a visitor, and send him away."""
        self.visits += 1
        writer.close()


@asynccontextmanager
async def open_trap() -> AsyncIterator[Trap]:
    """A listening socket that counts who comes."""
    trap = Trap()
    async with await asyncio.start_server(trap.visited, "127.0.0.1", 0) as server:
        trap.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield trap


class Guard:
    """All that must not happen in a profile, as it happens."""

    def __init__(self, context: BrowserContext, node: NodeProcess, trap: Trap) -> None:
        self.happened: list[str] = []
        self._context = context
        self._own = (f"{node.http}/", f"{node.ws}/")
        self._trap = trap
        self._visits = trap.visits
        context.on("page", self._opened)
        context.on("request", lambda request: self._asked_for(request.url))
        context.on("dialog", self._asked)

    async def prepare(self) -> None:
        """Prepare the context; call it before there is a page."""
        await self._context.expose_binding(CANARY, lambda _source, *_said: self._happens("a script ran"))
        await self._context.add_init_script(AUDIT)

    async def findings(self, page: Page) -> list[str]:
        """What has happened, and what is in the page that must not be there; behind the number of its article."""
        visits = self._trap.visits - self._visits
        return [*self.happened, *await page.evaluate("audited.look()"), *["visit"] * visits]

    async def _asked(self, dialog: Dialog) -> None:
        self._happens(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _happens(self, what: str) -> None:
        self.happened.append(f"-1: {what}")

    def _asked_for(self, url: str) -> None:
        if not url.startswith(self._own):
            self._happens(f"request: {url}")

    def _opened(self, page: Page) -> None:
        if len(self._context.pages) > 1:
            self._happens(f"page: {page.url}")
        page.on("websocket", lambda socket: self._asked_for(socket.url))
        page.on("download", lambda download: self._happens(f"download: {download.url}"))
        page.on("frameattached", lambda frame: self._happens(f"frame: {frame.url}"))
        page.on("framenavigated", self._navigated)

    def _navigated(self, frame: BrowserFrame) -> None:
        if not frame.url.startswith((f"{self._own[0]}#", "about:blank")) and frame.url != self._own[0]:
            self._happens(f"navigation: {frame.url}")


@asynccontextmanager
async def guarded(browser: Browser, node: NodeProcess, trap: Trap) -> AsyncIterator[tuple[Chat, Guard]]:
    """The page in a profile where nothing may happen."""
    async with open_context(browser) as context:
        guard = Guard(context, node, trap)
        await guard.prepare()
        tab = Tab(await context.new_page())
        yield Chat(tab), guard
        assert tab.unexpected == []


async def ended(chat: Chat, answers: int, what: str) -> None:
    """Wait until this number of answers has ended; `what` is the last question."""
    try:
        async with asyncio.timeout(DEEP_SECONDS_MAX):
            is_there = await chat.page.evaluate(f"audited.ended({answers})")
    except TimeoutError:
        pytest.fail(f"{what}: nothing for {DEEP_SECONDS_MAX} seconds")
    assert is_there, f"{what}: the page is gone: {chat.tab.complaints[-1:]}"


async def assert_nothing_happened(chat: Chat, guard: Guard, sent: Sequence[Payload] = ()) -> None:
    """Nothing did; what did is told with the text, of those that were sent, that it belongs to."""
    findings = await guard.findings(chat.page)
    told = []
    for finding in findings:
        at = int(finding.partition(":")[0]) if finding[0] in "-0123456789" else -1
        told.append(f"[{sent[at // 2].name}] {finding}" if 0 <= at // 2 < len(sent) else finding)
    assert told == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trap() -> AsyncIterator[Trap]:
    """Where all texts point."""
    async with open_trap() as trap:
        yield trap


@pytest.fixture(scope="module")
def scripted_node(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node whose agent does what the question says."""
    strings = Strings(tmp_path_factory.mktemp("strings"))
    with running_node(module_database_url, tmp_path_factory.mktemp("scripted"), strings.environment) as node:
        yield node


def in_parts(payloads: Sequence[Payload], length: int) -> list[Any]:
    """Cut the payloads into parts of one conversation each."""
    return [
        pytest.param(payloads[at : at + length], id=f"{payloads[at].name} and on".replace(" ", "-"))
        for at in range(0, len(payloads), length)
    ]


# Said, and said back.


@pytest.mark.parametrize("payloads", in_parts(PAYLOADS, 28))
async def test_a_text_that_is_said_and_said_back_is_text(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str, payloads: Sequence[Payload]
) -> None:
    sent = [payload.aimed(trap.address) for payload in payloads]
    async with guarded(browser, shared_node, trap) as (chat, guard):
        await chat.open(shared_node.http, token_for(user))
        for number, payload in enumerate(sent, 1):
            await chat.ask(payload.text)
            await ended(chat, number, payload.name)
        await assert_is_shown(chat, sent)
        await assert_nothing_happened(chat, guard, sent)
        await chat.page.reload()
        await ended(chat, len(sent), "all, stored")
        await assert_is_shown(chat, sent)
        await assert_nothing_happened(chat, guard, sent)


async def test_a_deep_or_long_text_stops_neither_the_page_nor_the_reader(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str
) -> None:
    chats = {}
    async with rest_to(shared_node, user) as rest:
        for payload in DEEP:
            chats[payload] = await rest.create(title=payload.name)
            (await rest.proceed(chats[payload], payload.text)).expect(200)
    async with guarded(browser, shared_node, trap) as (chat, guard):
        chat.tab.expected.append(TOO_DEEP)
        await chat.open(shared_node.http, token_for(user))
        for payload, id in chats.items():
            await chat.page.evaluate(f"location.hash = '#c={id}'")
            await expect(chat.page).to_have_title(f"{payload.name} · Anynode")
            await ended(chat, 1, payload.name)
            await assert_is_shown(chat, [payload])
        await assert_nothing_happened(chat, guard)


async def test_a_deep_text_that_streams_does_not_stop_the_page(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str
) -> None:
    deep = [payload for payload in DEEP if payload.name in ("quotes in quotes", "lists in lists", "stars", "tags")]
    async with guarded(browser, shared_node, trap) as (chat, guard):
        await chat.open(shared_node.http, token_for(user))
        for number, payload in enumerate(deep, 1):
            await chat.ask(payload.text)
            await ended(chat, number, payload.name)
        await assert_is_shown(chat, deep)
        await assert_nothing_happened(chat, guard, deep)
        chat.tab.expected.append(TOO_DEEP)


async def test_a_text_is_text_in_every_state_that_it_streams_through(
    browser: Browser, scripted_node: NodeProcess, trap: Trap, user: str
) -> None:
    """The audit looks at each state; here there are many, as the text comes in bits that cut its marks in two."""
    sent = [payload.aimed(trap.address) for payload in (*HTML[:8], *HTML[-8:], LINKS[0], LINKS[12], *MARKDOWN[:16])]
    text = "\n\n".join(payload.text for payload in sent if len(payload.text) < 2000)
    bits = [text[at : at + 23] for at in range(0, len(text), 23)]
    async with guarded(browser, scripted_node, trap) as (chat, guard):
        await chat.open(scripted_node.http, token_for(user))
        await chat.watch()
        await chat.ask(script_of(*(["paced", 1, bit.replace("{", "("), 0.02] for bit in bits)))
        await ended(chat, 1, "all")
        states, _ = await chat.watched()
        assert len(states) > 40
        await assert_nothing_happened(chat, guard)


# Elsewhere than in texts.


async def test_a_title_is_text(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str, module_database_url: str
) -> None:
    titles = [payload.aimed(trap.address).text for payload in (*HTML, *LINKS, *MARKDOWN, *TEXT)]
    insert = "INSERT INTO conversations (id, user_id, title) SELECT gen_random_uuid(), $1, t FROM unnest($2::text[]) t"
    async with rest_to(shared_node, user) as rest:
        await rest.create(title="Untitled")
        await sql(module_database_url, insert, user, titles[1:])
        newest = await rest.create(title=titles[0])
    async with guarded(browser, shared_node, trap) as (chat, guard):
        await chat.open(shared_node.http, token_for(user), newest)
        more = chat.sidebar.get_by_role("button", name="Show more")

        while await more.is_visible():
            count = await chat.listed.count()
            await more.click()
            await expect(chat.listed).not_to_have_count(count)
        await expect(chat.listed).to_have_count(len(titles) + 1)
        link = chat.page.get_by_role("link", name=titles[0], exact=True)
        await expect(link).to_have_text(titles[0])
        await expect(chat.page.get_by_role("heading", level=1)).to_have_text(titles[0])
        item = chat.sidebar.get_by_role("listitem").filter(has=link)
        await item.hover()
        await item.get_by_role("button", name="Rename").click()
        await expect(chat.page.get_by_role("textbox", name=f"New title of {titles[0]}")).to_have_value(titles[0])
        await chat.page.keyboard.press("Escape")
        await item.get_by_role("button", name="Delete").click()
        await expect(chat.page.get_by_role("alertdialog")).to_have_accessible_name(f"Delete {titles[0]}?")
        await chat.page.keyboard.press("Escape")
        await assert_nothing_happened(chat, guard)


# Puts a text in a box that no protocol of a driver could carry.
PASTE: Final = """((box, text) => {
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(box, text);
    box.dispatchEvent(new Event('input', { bubbles: true }));
})"""
POLLUTING: Final = {
    "__proto__": {"polluted": 1},
    "constructor": {"prototype": {"polluted": 1}},
    "toString": "<img src=x onerror=canary()>",
    "then": None,
    "$$typeof": "Symbol(react.element)",
    "type": "script",
    "props": {"dangerouslySetInnerHTML": {"__html": "<img src=x onerror=canary()>"}},
    "children": [{"toJSON": "canary()"}],
}


def results_of(payloads: Sequence[Payload]) -> list[str]:
    """What a tool may give back: texts, JSON of them, and JSON that is more than it looks."""
    texts = [payload.text for payload in payloads]
    return [*texts, json.dumps(POLLUTING), json.dumps([POLLUTING] * 3), json.dumps(texts), *ODD_RESULTS]


ODD_RESULTS: Final = ("", " ", "null", "0", '"text"', "{", "[" * 400 + "]" * 400)
# What JavaScript's numbers and objects cannot hold, or hold in another order.
EXACT_RESULTS: Final = ("1e999", "-0", "1.0", '{"id": 12345678901234567890}', '{"a":1,"a":2}', '{"b":1,"2":2,"1":3}')


async def store_calls(rest: Rest, database_url: str, title: str, results: Sequence[tuple[str, str]]) -> str:
    """A conversation with one answer that has called a tool for each result, by its name; returns its id."""
    id = await rest.create(title=title)
    calls = [
        {"id": f"call-{at}", "function": {"name": name, "arguments": json.dumps({"text": text[:4000], **POLLUTING})}}
        for at, (text, name) in enumerate(results)
    ]
    given = [{"role": "tool", "tool_call_id": f"call-{at}", "content": text} for at, (text, _) in enumerate(results)]
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    done = {"role": "assistant", "content": "Done."}
    (await rest.append(id, {"role": "user", "content": "Call."}, asked, *given, done)).expect(201)
    statement = "UPDATE messages SET turn_id = $2 WHERE conversation_id = $1 AND role <> 'user'"  # as of one turn
    await sql(database_url, statement, uuid.UUID(id), uuid.uuid4())
    return id


async def test_what_a_tool_is_called_with_and_gives_back_is_text(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str, module_database_url: str
) -> None:
    sent = [payload.aimed(trap.address) for payload in (*HTML, *LINKS[:8], *MARKDOWN, *TEXT)]
    results = [(text, text[:256].strip() or "tool") for text in results_of(sent)]
    assert len(results) > 80
    parts = [results[at : at + CALLS_AT_ONCE] for at in range(0, len(results), CALLS_AT_ONCE)]
    async with guarded(browser, shared_node, trap) as (chat, guard), rest_to(shared_node, user) as rest:
        await chat.open(shared_node.http, token_for(user))
        for number, part in enumerate(parts):
            id = await store_calls(rest, module_database_url, f"Tools {number}", part)
            await chat.page.evaluate(f"location.hash = '#c={id}'")
            await expect(chat.page).to_have_title(f"Tools {number} · Anynode")
            await ended(chat, 1, f"part {number}")
            tools = chat.answer.get_by_role("group")
            await expect(tools).to_have_count(len(part))
            shown = await tools.evaluate_all(
                "all => all.map((e) => (e.open = true, [e.querySelector('b').textContent,"
                " e.querySelectorAll('pre')[1].textContent]))"
            )
            assert [name for name, _ in shown] == [name for _, name in part]
            for (text, _), (_, output) in zip(part, shown, strict=True):
                assert output == text or json.loads(output) == json.loads(text)
            await assert_nothing_happened(chat, guard)


async def test_json_of_a_tool_is_shown_as_it_is(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str, module_database_url: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        results = [(text, "exact") for text in EXACT_RESULTS]
        id = await store_calls(rest, module_database_url, "Exact", results)
    async with guarded(browser, shared_node, trap) as (chat, _):
        await chat.open(shared_node.http, token_for(user), id)
        await ended(chat, 1, "exact JSON")
        shown = await chat.answer.get_by_role("group").evaluate_all(
            "all => all.map((e) => e.querySelectorAll('pre')[1].textContent.replace(/\\s/g, ''))"
        )
        assert shown == [text.replace(" ", "") for text in EXACT_RESULTS]


async def test_deep_json_of_a_tool_does_not_stop_the_page(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str, module_database_url: str
) -> None:
    """Indented, a result of 10 kB may be one of 50 MB."""
    deep = ["[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 30_000 + "]" * 30_000]
    async with rest_to(shared_node, user) as rest:
        id = await store_calls(rest, module_database_url, "Deep", [(text, "deep") for text in deep])
    async with guarded(browser, shared_node, trap) as (chat, guard):
        await chat.open(shared_node.http, token_for(user), id)
        await ended(chat, 1, "deep JSON")
        tools = chat.answer.get_by_role("group")
        for number in range(len(deep)):
            await tools.nth(number).locator("summary").click()
            await expect(tools.nth(number)).to_have_attribute("open", "")
        lengths = await tools.evaluate_all("all => all.map((e) => e.textContent.length)")
        assert max(lengths) < 1_000_000
        await assert_nothing_happened(chat, guard)


async def test_a_tool_that_runs_and_an_answer_that_fails_are_text(
    browser: Browser, scripted_node: NodeProcess, trap: Trap, user: str
) -> None:
    sent = [payload.aimed(trap.address) for payload in (*HTML[::12], *MARKDOWN[4:6])]
    async with guarded(browser, scripted_node, trap) as (chat, guard):
        await chat.open(scripted_node.http, token_for(user))
        for number, payload in enumerate(sent, 1):
            text = payload.text
            calls: list[list[Any]] = [
                ["call", f"{number}", text[:256], {"text": text, **POLLUTING}],
                ["result", f"{number}", text[:256], text, number % 2 == 0],
                ["call", f"{number} left", "__proto__", {"text": text}],
            ]
            await chat.ask(script_of(["text", text], *calls, ["text", text], ["agent_error", text, False]))
            await expect(chat.answers).to_have_count(number)
            await expect(chat.answer).to_have_attribute("aria-busy", "false")
            await expect(chat.answer).to_contain_text("This answer failed.")
        await assert_nothing_happened(chat, guard)
        await chat.page.reload()
        await expect(chat.answers).to_have_count(len(sent))
        await assert_nothing_happened(chat, guard)


async def test_what_no_text_can_hold_is_refused_in_words_or_replaced(
    browser: Browser, scripted_node: NodeProcess, trap: Trap, user: str
) -> None:
    async with guarded(browser, scripted_node, trap) as (chat, guard):
        await chat.open(scripted_node.http, token_for(user))
        for text in ("'\\ud800'", "'a\\udc00b'", "'a\\0b'"):
            await chat.box.evaluate(f"(box) => {PASTE}(box, {text})")
            await chat.box.press("Enter")
            await expect(chat.alert).to_be_visible()
            await chat.alert.get_by_role("button", name="Edit the message").click()
            await expect(chat.alert).to_have_count(0)
        await chat.ask(script_of(["text", "a\ud800b\0c"], ["call", "1", "t\0", {"a\0": "\udc00"}]))
        await ended(chat, 1, "replaced")
        assert (await texts(chat))[1] == "a\ufffdb\ufffdc"
        await assert_nothing_happened(chat, guard)


# What would be found.


async def test_what_runs_loads_opens_or_is_markup_would_be_found(
    browser: Browser, shared_node: NodeProcess, user: str
) -> None:
    async with open_trap() as trap, open_context(browser, bypass_csp=True) as context:
        guard = Guard(context, shared_node, trap)
        await guard.prepare()
        chat = Chat(Tab(await context.new_page()))
        await chat.open(shared_node.http, token_for(user))
        await chat.ask("hello")
        await ended(chat, 1, "hello")
        assert await guard.findings(chat.page) == []
        await chat.answer.evaluate(
            "(answer, trap) => {"
            " const put = (tag, attributes) =>"
            "   answer.querySelector('.markdown').append(Object.assign(document.createElement(tag), attributes));"
            " put('img', { src: `http://${trap}/pixel` });"
            " put('script', { textContent: 'canary()' });"
            " put('iframe', {}); put('form', {}); put('a', { href: 'javascript:canary()' });"
            " put('p', { id: 'root' }); put('p', { className: 'shade' }); put('p', { style: 'position: fixed' }); }",
            trap.address,
        )
        await chat.page.evaluate("setTimeout(() => alert('hello'))")
        await chat.page.evaluate("Object.prototype.polluted = 1")
        await chat.page.evaluate("new Image().src = 'http://192.0.2.1/'; void open('about:blank')")
        await until(lambda: is_visited(trap))
        found = "\n".join(await guard.findings(chat.page))
        for what in (
            *("a script ran", f"request: http://{trap.address}/pixel", "dialog: hello", "frame: ", "page: ", "visit"),
            *(
                "1: an element: <img",
                "of the head: <script",
                "an element: <iframe",
                "a form",
                "href javascript:canary()",
            ),
            *("id root", "class shade", "style position: fixed", "prototype: polluted"),
        ):
            assert what in found


async def test_what_the_policy_forbids_would_be_found(
    browser: Browser, shared_node: NodeProcess, trap: Trap, user: str
) -> None:
    async with open_context(browser) as context:
        guard = Guard(context, shared_node, trap)
        await guard.prepare()
        chat = Chat(Tab(await context.new_page()))
        await chat.open(shared_node.http, token_for(user))
        await chat.page.evaluate(
            "document.body.append(Object.assign(document.createElement('img'), {src: 'http://192.0.2.1/'}))"
        )

        async def is_found() -> bool:
            return any("violation: http://192.0.2.1/" in finding for finding in await guard.findings(chat.page))

        await until(is_found)
        assert any("Content Security Policy" in said for said in chat.tab.unexpected)


async def is_visited(trap: Trap) -> bool:
    """Somebody came."""
    return trap.visits > 0


async def texts(chat: Chat) -> list[str]:
    """The texts of all questions and answers, as Markdown or plain, in order."""
    articles = chat.page.get_by_role("log").get_by_role("article")
    found: list[str] = await articles.evaluate_all(
        "all => all.map((article) => [...article.querySelectorAll('.bubble > p, .markdown, .plain')]"
        ".map((element) => element.textContent).join(''))"
    )
    return found


async def assert_is_shown(chat: Chat, sent: Sequence[Payload]) -> None:
    """What was said is there to the letter, and of what was said back that which must be readable."""
    shown = await texts(chat)
    assert len(shown) == 2 * len(sent)
    for payload, said, answered in zip(sent, shown[::2], shown[1::2], strict=True):
        assert said == payload.text, payload.name
        assert payload.readable is None or payload.readable.strip() in answered, payload.name
