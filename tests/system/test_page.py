"""The chat page at `/`, in a real browser against real nodes."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from tests.agents.scripted import Strings, script_of
from tests.kit.browser import NO_CONNECTION, PATIENCE_MS, Browser, Chat, Locator, Route, expect, open_tab, until
from tests.kit.harness import NodeProcess, sql, token_for
from tests.kit.rest import Rest, rest_to

pytestmark = pytest.mark.asyncio(loop_scope="module")
REFUSED = r"Failed to load resource: the server responded with a status of 401 \(Unauthorized\)"
BOTTOM = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight"
# When messages are added, the page is busy for ten frames with what comes before the calls of its observers. In the
# middle of them it scrolls to its top: one call tells an observer that its element was out of sight, and is in sight.
BUSY_AT_THE_TOP = """() => {
    let frames = 0;
    const work = () => {
        const end = performance.now() + 4;
        while (performance.now() < end);
        if (frames < 10) scheduler.postTask(work, {priority: 'user-blocking'});
    };
    const frame = () => {
        frames += 1;
        if (frames === 5) document.querySelector('.scroller').scrollTop = 0;
        if (frames < 10) requestAnimationFrame(frame);
    };
    new MutationObserver((_, me) => {
        me.disconnect();
        work();
        requestAnimationFrame(frame);
    }).observe(document.querySelector('[role=log]'), {childList: true});
}"""
PARAGRAPHS = "\n\n".join(f"line {number}" for number in range(30)) + "\n\n"


@pytest_asyncio.fixture(loop_scope="module")
async def chat(browser: Browser) -> AsyncIterator[Chat]:
    """The page in a profile of its own, where in the end nothing has gone wrong."""
    async with open_tab(browser, permissions=["clipboard-read", "clipboard-write"]) as tab:
        yield Chat(tab)
        assert tab.unexpected == []
        assert {urlsplit(url).hostname for url in tab.requests} == {"127.0.0.1"}


async def stored(database_url: str, user: str) -> list[tuple[str, str, str]]:
    """Role, text and status of all of a user's messages, in order."""
    statement = "SELECT role, content, status FROM messages WHERE user_id = $1 ORDER BY conversation_id, position"
    return [tuple(row) for row in await sql(database_url, statement, user)]


async def statuses(database_url: str, user: str) -> list[str]:
    """The status of each of a user's answers."""
    return [status for role, _, status in await stored(database_url, user) if role == "assistant"]


async def begin_elsewhere(rest: Rest, chat_id: str, text: str) -> None:
    """What another device of the user asks in a chat; returns when the answer has ended."""
    parts = [{"type": "text", "text": text}]
    message = {"id": f"elsewhere-{chat_id}", "role": "user", "parts": parts}
    reply = await rest.post("/api/chat", {"id": chat_id, "messages": [message]})
    assert reply.status == 200, reply


@dataclass
class Held:
    """Requests whose answers are late: they are fetched at once, and given to the page when they are released."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


async def holding(chat: Chat, pattern: str, *, after: int = 0) -> Held:
    """Hold up what the page asks for at such addresses, after a number of requests that pass."""
    held = Held()
    requests = itertools.count(1)

    async def hold(route: Route) -> None:
        response = await route.fetch()
        if next(requests) > after:
            held.asked.set()
            await held.released.wait()
        await route.fulfill(response=response)

    await chat.page.route(pattern, hold)
    return held


async def append_long(rest: Rest, pairs: int) -> tuple[str, list[str]]:
    """The id of a new conversation that has this number of questions and of answers, and how each of them begins."""
    messages = [
        {"role": role, "content": f"{role} {number}" + "\n\nand more" * (number % 3)}
        for number in range(pairs)
        for role in ("user", "assistant")
    ]
    conversation_id = await rest.create(title="long")
    (await rest.append(conversation_id, *messages)).expect(201)
    return conversation_id, [message["content"].split("\n")[0] for message in messages]


async def shown_beginnings(chat: Chat) -> list[str]:
    """How each question and answer begins that the page shows."""
    return [text.split("and")[0].strip() for _, text in await chat.shown()]


async def scroll_up_until(chat: Chat, asked: asyncio.Event, pixels: int = 2000) -> None:
    """Turn the wheel as a reader does until the page asks for what is older."""
    await chat.scroller.hover()

    async def is_asked() -> bool:
        await chat.page.mouse.wheel(0, -pixels)
        return asked.is_set()

    await until(is_asked)


async def scroll_to_the_beginning(chat: Chat, answers: int) -> None:
    """Go to the top again and again until this number of answers is there; each page of them has time of its own."""

    async def has_more() -> bool:
        await chat.scroller.evaluate("(e) => e.scrollTop = 0")
        return await chat.answers.count() > before

    while (before := await chat.answers.count()) < answers:
        await until(has_more)
    await expect(chat.page.get_by_text("Reading older messages…")).to_have_count(0)


# Signing in.


async def test_signs_in_from_the_fragment_and_streams(
    chat: Chat, node: NodeProcess, strings: Strings, user: str
) -> None:
    token, gate = token_for(user), strings.name()
    await chat.open(node.http, token)
    assert token not in chat.page.url
    await chat.ask(script_of(("text", "Hear "), ("gate", gate), ("text", "this.")))
    await expect(chat.said).to_have_text("Hear")
    await expect(chat.answer).to_have_attribute("aria-busy", "true")
    await expect(chat.box).to_have_value("")
    strings.open(gate)
    await chat.ended()
    await expect(chat.said).to_have_text("Hear this.")
    assert token not in await chat.page.content()
    await chat.page.reload()  # signed in all the same
    await expect(chat.said).to_have_text("Hear this.")


async def test_a_call_whose_id_is_a_number_is_not_taken_for_a_part_of_the_text(
    chat: Chat, node: NodeProcess, strings: Strings, user: str
) -> None:
    gate = strings.name()
    await chat.open(node.http, token_for(user))
    await chat.ask(script_of(("text", "Hear this."), ("call", "1", "search", {}), ("gate", gate)))
    await expect(chat.answer.locator("details")).to_have_count(1)
    strings.open(gate)  # the call has no result, and is not stored
    await expect(chat.answer.locator("details")).to_have_count(0)
    await chat.ended()
    await expect(chat.answer.locator(".markdown")).to_have_text(["Hear this."])


async def test_signs_in_by_the_form_which_says_why(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    chat.tab.expected.append(REFUSED)
    page, why = chat.page, chat.page.get_by_role("alert")
    field = page.get_by_label("Token")
    await page.goto(f"{shared_node.http}/#token=not.a.token")
    await expect(why).to_contain_text("malformed")
    assert "not.a.token" not in page.url
    await field.fill("two words")
    await field.press("Enter")
    await expect(why).to_have_text("This is not a token.")
    await field.fill(token_for(user, ttl_seconds=-60))
    await field.press("Enter")
    await expect(why).to_contain_text("expired")
    await field.fill(token_for(user))
    await page.get_by_role("button", name="Sign in").click()
    await expect(chat.status).to_contain_text("Connected to node ")
    await chat.ask("hello")
    await chat.ended()
    assert await chat.shown() == [("user", "hello"), ("assistant", "[1] hello")]
    await page.get_by_role("button", name="Sign out").click()
    await expect(field).to_be_visible()
    await expect(why).to_have_count(0)
    await page.reload()
    await expect(field).to_be_visible()


async def test_a_token_that_runs_out_asks_for_another_one(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    chat.tab.expected.append(REFUSED)
    await chat.open(shared_node.http, token_for(user, ttl_seconds=2))
    await expect(chat.page.get_by_role("alert")).to_contain_text("expired")
    await chat.page.get_by_label("Token").fill(token_for(user))
    await chat.page.keyboard.press("Enter")
    await expect(chat.status).to_contain_text("Connected to node ")


# Questions and answers.


async def test_enter_sends_and_with_shift_begins_a_line(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    await chat.open(shared_node.http, token_for(user))
    await expect(chat.box).to_be_focused()
    await chat.page.keyboard.type("several")
    await chat.page.keyboard.press("Shift+Enter")
    await chat.page.keyboard.type("lines")
    await expect(chat.box).to_have_value("several\nlines")
    await chat.page.keyboard.press("Enter")
    await chat.ended()
    assert await chat.shown() == [("user", "several\nlines"), ("assistant", "[1] several\nlines")]
    await expect(chat.box).to_be_focused()
    await chat.page.keyboard.type("  ")
    await expect(chat.send).to_be_disabled()
    await chat.page.keyboard.press("Enter")
    await expect(chat.questions).to_have_count(1)
    await chat.page.keyboard.type("more")
    await chat.send.click()
    await chat.ended(2)
    await expect(chat.said).to_have_text("[3] more")


@pytest.mark.parametrize("way", ["button", "key"])
async def test_stop_keeps_what_was_said(
    chat: Chat, node: NodeProcess, user: str, module_database_url: str, way: str
) -> None:
    await chat.open(node.http, token_for(user))
    await chat.ask(script_of(("paced", 500, "w{number} ", 0.02)))
    await expect(chat.said).to_contain_text("w5 ")
    await (chat.stop.click() if way == "button" else chat.page.keyboard.press("Escape"))
    await chat.ended()
    await expect(chat.answer).to_contain_text("Stopped.")
    _, (role, said, status) = await stored(module_database_url, user)
    assert (role, status) == ("assistant", "cancelled")
    assert (await chat.shown())[1:] == [("assistant", said.rstrip())]
    assert 5 < len(said.split()) < 500
    await chat.page.reload()
    await expect(chat.answer).to_contain_text("Stopped.")
    assert (await chat.shown())[1:] == [("assistant", said.rstrip())]
    await chat.ask(script_of(("text", "Well?")))
    await chat.ended(2)
    await expect(chat.said).to_have_text("Well?")


async def test_an_answer_is_given_again(
    chat: Chat, node: NodeProcess, strings: Strings, user: str, module_database_url: str
) -> None:
    gate = strings.name()
    await chat.open(node.http, token_for(user))
    await chat.ask(script_of(("text", "Hear "), ("gate", gate), ("text", "this.")))
    strings.open(gate)
    await chat.ended()
    (strings.directory / gate).unlink()
    await chat.again.click()
    await expect(chat.said).to_have_text("Hear")
    await expect(chat.answers).to_have_count(1)
    strings.open(gate)
    await chat.ended()
    await expect(chat.said).to_have_text("Hear this.")
    assert await statuses(module_database_url, user) == ["superseded", "completed"]
    await expect(chat.questions).to_have_count(1)


async def test_what_is_read_late_takes_nothing_away_that_was_asked_since(
    chat: Chat, node: NodeProcess, strings: Strings, user: str
) -> None:
    gate = strings.name()
    await chat.open(node.http, token_for(user))
    held = await holding(chat, "**/messages?*")
    await chat.ask(script_of(("text", "First.")))
    await expect(chat.said).to_have_text("First.")
    async with asyncio.timeout(PATIENCE_MS / 1000):
        await held.asked.wait()  # as it does when an answer has ended
    await chat.ended()
    question = script_of(("text", "Second"), ("gate", gate), ("text", " one."))
    await chat.ask(question)
    await expect(chat.said).to_have_text("Second")
    await chat.watch()
    async with chat.page.expect_response("**/messages?*"):
        held.released.set()
    await settled(chat)
    await expect(chat.questions).to_have_count(2)
    await expect(chat.said).to_have_text("Second")
    strings.open(gate)
    await chat.ended(2)
    await expect(chat.said).to_have_text("Second one.")
    texts, most = await chat.watched()
    assert set(texts[1:]) <= {"Second", "Second one."}
    assert most == 4


async def test_copies_messages_and_code(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    async def copy(button: Locator, text: str) -> None:
        async def is_there() -> bool:
            return bool(await chat.page.evaluate("navigator.clipboard.readText()") == text)

        await button.click()
        await until(is_there)

    code = "if a < b:\n    print('**a**')"
    question = f"A **bold** word:\n\n```python\n{code}\n```\n\nand more"
    await chat.open(shared_node.http, token_for(user))
    await chat.ask(question)
    await chat.ended()
    await copy(chat.answer.get_by_role("button", name="Copy code"), code)
    await expect(chat.answer.get_by_role("button", name="Copied")).to_have_count(1)
    await copy(chat.answer.get_by_role("button", name="Copy message"), f"[1] {question}")
    await copy(chat.questions.get_by_role("button", name="Copy message"), question)
    await expect(chat.answer.locator("code span").first).to_be_visible()  # it has got its colours
    await expect(chat.said.get_by_role("strong")).to_have_text("bold")


async def test_tool_calls_are_folded_and_open(chat: Chat, node: NodeProcess, strings: Strings, user: str) -> None:
    gate = strings.name()
    script = script_of(
        *(("text", "Let me see."), ("call", "a", "search", {"query": "the needle"}), ("gate", gate)),
        *(("result", "a", "search", "found it"), ("step",), ("text", "There.")),
    )
    await chat.open(node.http, token_for(user))
    await chat.ask(script)
    tool = chat.answer.locator("details")
    await expect(tool.locator("summary")).to_have_text("Calls search")
    strings.open(gate)
    await chat.ended()
    for _ in range(2):  # as it was streamed, and when it is loaded
        await expect(chat.said).to_have_text(["Let me see.", "There."])
        await expect(tool.locator("summary")).to_have_text("Called search")
        await expect(tool.get_by_text("the needle")).to_be_hidden()
        await tool.locator("summary").click()
        await expect(tool.get_by_text("the needle")).to_be_visible()
        await expect(tool.get_by_text("found it")).to_be_visible()
        await tool.locator("summary").press("Enter")
        await expect(tool.get_by_text("found it")).to_be_hidden()
        await chat.page.reload()


async def test_a_tool_call_that_failed_says_so(chat: Chat, node: NodeProcess, strings: Strings, user: str) -> None:
    gate = strings.name()
    await chat.open(node.http, token_for(user))
    failing = (("call", "a", "read", {"path": "/"}), ("result", "a", "read", "unreadable", True), ("step",))
    await chat.ask(script_of(*failing, ("text", "There"), ("gate", gate), ("text", " it is.")))
    await expect(chat.said).to_have_text("There")
    await expect(chat.answer.locator("summary")).to_have_text("Failed: read")
    strings.open(gate)
    await chat.ended()
    for _ in range(2):
        await expect(chat.said).to_have_text("There it is.")
        await expect(chat.answer.locator("summary")).to_have_text("Failed: read")
        await chat.page.reload()


async def test_markup_is_text_and_nothing_of_it_is_loaded_or_run(
    chat: Chat, shared_node: NodeProcess, user: str
) -> None:
    markup = "<img src=\"http://192.0.2.1/x\" onerror=\"document.title='run'\"><script>document.title='run'</script>"
    await chat.open(shared_node.http, token_for(user))
    await chat.ask(f"{markup} ![shown](http://192.0.2.1/y) [led](javascript:document.title='run')")
    await chat.ended()
    await expect(chat.said).to_contain_text(f"[1] {markup}")
    await expect(chat.said.get_by_text("led")).to_be_visible()
    await expect(chat.page.get_by_role("log").locator("img, script, [href^=javascript]")).to_have_count(0)
    await expect(chat.page).to_have_title(re.compile("Anynode$"))
    assert chat.tab.complaints == []
    # That a violation would have been seen:
    inline = "document.body.setAttribute('style', 'color: red')"
    await chat.page.evaluate(inline)
    assert "Content Security Policy" in chat.tab.complaints.pop()


# The address.


async def test_a_reload_in_mid_answer_goes_on(
    chat: Chat, node: NodeProcess, strings: Strings, user: str, module_database_url: str
) -> None:
    gate = strings.name()
    await chat.open(node.http, token_for(user))
    await chat.ask(script_of(("text", "Hear "), ("gate", gate), ("paced", 40, "w{number} ", 0.01)))
    await expect(chat.said).to_have_text("Hear")
    address = chat.page.url
    await chat.page.reload()
    await expect(chat.said).to_have_text("Hear")
    await expect(chat.answer).to_have_attribute("aria-busy", "true")
    strings.open(gate)
    await expect(chat.said).to_contain_text("w5 ")
    await chat.page.reload()
    await chat.ended()
    whole = "Hear " + "".join(f"w{number} " for number in range(40))
    await expect(chat.said).to_have_text(whole.rstrip())
    assert (await stored(module_database_url, user))[1:] == [("assistant", whole, "completed")]
    assert chat.page.url == address
    assert len(await chat.shown()) == 2


async def test_back_and_forward_lead_through_conversations(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    await chat.open(shared_node.http, token_for(user))
    await chat.ask("first")
    await chat.ended()
    first = await chat.conversation()
    await chat.new.click()
    await expect(chat.questions).to_have_count(0)
    await expect(chat.page).to_have_url(re.compile("/#?$"))
    await chat.ask("second")
    await chat.ended()
    await expect(chat.said).to_have_text("[1] second")
    second = await chat.conversation()
    assert second != first
    await chat.page.go_back()
    await expect(chat.said).to_have_text("[1] first")
    assert await chat.conversation() == first
    await chat.page.go_forward()
    await expect(chat.said).to_have_text("[1] second")
    await chat.listed.filter(has_text="first").click()
    await expect(chat.said).to_have_text("[1] first")
    await chat.ask("third")
    await chat.ended(2)
    await expect(chat.said).to_have_text("[3] third")
    await chat.page.go_back()
    await expect(chat.said).to_have_text("[1] second")
    await expect(chat.page).to_have_title("second · Anynode")


async def test_somebody_elses_conversation_is_a_new_one(
    chat: Chat, shared_node: NodeProcess, user: str, module_database_url: str
) -> None:
    other = f"other-of-{user}"
    async with rest_to(shared_node, other) as rest:
        theirs = await rest.create()
        await rest.proceed(theirs, "a secret")
        before = await stored(module_database_url, other)
        assert len(before) == 2
        await chat.open(shared_node.http, token_for(user), theirs)
        await expect(chat.page.get_by_text("What would you like to know?")).to_be_visible()
        await chat.ask("hello")
        await chat.ended()
        assert await chat.shown() == [("user", "hello"), ("assistant", "[1] hello")]
        await chat.page.reload()
        await expect(chat.said).to_have_text("[1] hello")
        assert await chat.shown() == [("user", "hello"), ("assistant", "[1] hello")]
        assert await stored(module_database_url, other) == before
        assert len(await stored(module_database_url, user)) == 2


# The list.


async def test_conversations_are_named_and_deleted(
    chat: Chat, shared_node: NodeProcess, user: str, module_database_url: str
) -> None:
    async def titles() -> list[str]:
        rows = await sql(module_database_url, "SELECT title FROM conversations WHERE user_id = $1", user)
        return sorted(row["title"] for row in rows)

    await chat.open(shared_node.http, token_for(user))
    await expect(chat.sidebar.get_by_text("Nothing yet.")).to_be_visible()
    for question in ("one", "two"):
        await chat.new.click()
        await chat.ask(question)
        await chat.ended()
        await expect(chat.said).to_have_text(f"[1] {question}")
    await expect(chat.listed).to_have_text(["two", "one"])
    field = chat.sidebar.get_by_role("textbox")
    for key, typed, expected in (("Escape", "kept", "one"), ("Enter", "renamed", "renamed")):
        await chat.listed.filter(has_text="one").hover()
        await chat.sidebar.get_by_role("button", name="Rename one").click()
        await expect(field).to_have_value("one")
        await field.fill(typed)
        await field.press(key)
        await expect(field).to_have_count(0)
        await expect(chat.listed.filter(has_text=expected)).to_be_focused()
        assert expected in await until(titles)
    await expect(chat.listed.filter(has_text="renamed")).to_have_count(1)
    assert await titles() == ["renamed", "two"]
    delete = chat.sidebar.get_by_role("button", name="Delete two")
    await chat.listed.filter(has_text="two").hover()
    await delete.click()
    sure = chat.sidebar.get_by_role("alertdialog")
    await sure.get_by_role("button", name="Keep").click()
    await delete.click()
    await chat.page.keyboard.press("Escape")
    await expect(sure).to_have_count(0)
    assert await titles() == ["renamed", "two"]
    await delete.click()
    await sure.get_by_role("button", name="Delete").click()
    await expect(chat.listed).to_have_text(["renamed"])
    assert await titles() == ["renamed"]
    await expect(chat.answers).to_have_count(0)  # it was open
    await expect(chat.page).to_have_url(re.compile("/#?$"))
    await chat.listed.click()
    await expect(chat.page).to_have_title("renamed · Anynode")


async def test_the_list_is_searched_and_goes_on(chat: Chat, shared_node: NodeProcess, user: str) -> None:
    async with rest_to(shared_node, user) as rest:
        for number in range(52):
            await rest.create(title=f"number {number}")
        await rest.create(title="a needle")
    await chat.open(shared_node.http, token_for(user))
    await expect(chat.listed).to_have_count(50)
    more = chat.sidebar.get_by_role("button", name="Show more")
    await more.click()
    await expect(chat.listed).to_have_count(53)
    await expect(chat.listed.last).to_have_text("number 0")
    await expect(more).to_have_count(0)
    search = chat.sidebar.get_by_role("searchbox")
    await search.fill("NEEDLE")
    await expect(chat.listed).to_have_text(["a needle"])
    await search.fill("a haystack")
    await expect(chat.sidebar.get_by_text("Nothing has that in its title.")).to_be_visible()
    await search.fill("")
    await expect(chat.listed).to_have_count(50)


# What goes wrong.


async def test_a_question_in_a_busy_conversation_is_asked_again_and_not_doubled(
    chat: Chat, node: NodeProcess, strings: Strings, user: str, module_database_url: str
) -> None:
    async def is_alone() -> bool:
        return any("no-active" in frame for frame in chat.tab.frames)

    gate, chat_id = strings.name(), strings.name()
    early, late = script_of(("text", "Too early? ")), script_of(("text", "Not too late. "))
    async with rest_to(node, user) as rest:
        await chat.open(node.http, token_for(user), chat_id)
        # The page waits for what others begin in a conversation only when there is one.
        await until(is_alone)
        elsewhere = asyncio.create_task(begin_elsewhere(rest, chat_id, script_of(("gate", gate), ("text", "There."))))

        async def runs() -> bool:
            return bool(await stored(module_database_url, user))

        await until(runs)
        await chat.ask(early)
        for _ in range(2):
            await expect(chat.alert).to_contain_text("still running")
            await chat.retry.click()
        await expect(chat.alert).to_contain_text("still running")
        await expect(chat.questions).to_have_count(1)
        strings.open(gate)
        await elsewhere
        await chat.retry.click()
        await chat.ended(2)
        await expect(chat.said).to_have_text("Too early?")
        await expect(chat.alert).to_have_count(0)
        assert [text for role, text in await chat.shown() if role == "assistant"] == ["There.", "Too early?"]
        await chat.ask(late)
        await chat.ended(3)
    assert [role for role, _, _ in await stored(module_database_url, user)] == ["user", "assistant"] * 3


@pytest.mark.parametrize(("size", "before"), [(70_000, 0), (70_000, 1), (500_000, 0)])
async def test_a_question_that_is_too_large_is_edited(
    chat: Chat, shared_node: NodeProcess, user: str, size: int, before: int
) -> None:
    first = [("user", "first"), ("assistant", "[1] first")] * before
    await chat.open(shared_node.http, token_for(user))
    if first:
        await chat.ask("first")
        await chat.ended()
    await chat.ask("x" * size)
    await expect(chat.alert).to_contain_text("longer than 65536 bytes")
    await chat.retry.click()
    await expect(chat.alert).to_contain_text("longer than 65536 bytes")
    await chat.alert.get_by_role("button", name="Edit the message").click()
    await expect(chat.alert).to_have_count(0)
    await expect(chat.questions).to_have_count(before)
    assert len(await chat.box.input_value()) == size
    await chat.ask("shorter")
    await chat.ended(before + 1)
    expected = [*first, ("user", "shorter"), ("assistant", f"[{len(first) + 1}] shorter")]
    assert await chat.shown() == expected
    await chat.page.reload()
    await chat.ended(before + 1)
    assert await chat.shown() == expected


async def test_an_answer_that_failed_says_so_and_is_given_again(
    chat: Chat, node: NodeProcess, user: str, module_database_url: str
) -> None:
    await chat.open(node.http, token_for(user))
    await chat.ask(script_of(("text", "As far as this"), ("agent_error", "The model has left.", False)))
    await expect(chat.alert).to_contain_text("The model has left.")
    await expect(chat.said).to_have_text("As far as this")
    await expect(chat.answer).to_contain_text("This answer failed.")
    await chat.retry.click()
    await expect(chat.alert).to_contain_text("The model has left.")

    async def failed_twice() -> bool:
        return await statuses(module_database_url, user) == ["superseded", "failed"]

    await until(failed_twice)
    better = script_of(("text", "As far as that."))
    await sql(
        module_database_url, "UPDATE messages SET content = $2 WHERE user_id = $1 AND role = 'user'", user, better
    )
    await chat.page.reload()
    await expect(chat.said).to_have_text("As far as this")
    await expect(chat.answer).to_contain_text("This answer failed.")
    await chat.again.click()
    await chat.ended()
    await expect(chat.said).to_have_text("As far as that.")
    await expect(chat.answer).not_to_contain_text("failed")
    assert await statuses(module_database_url, user) == ["superseded", "superseded", "completed"]


# What is long.


async def test_a_long_conversation_opens_at_its_end_and_stays_in_place_while_older_messages_come(
    chat: Chat, shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        conversation_id, beginnings = await append_long(rest, 500)
    await chat.open(shared_node.http, token_for(user), conversation_id)
    last = chat.answer.get_by_text("assistant 499")
    await expect(last).to_be_in_viewport()
    assert await chat.scroller.evaluate(BOTTOM) < 5
    assert await chat.answers.count() < 200
    before = await settled(chat)
    held = await holding(chat, "**/messages?*before=*")
    await scroll_up_until(chat, held.asked, 100)
    await settled(chat)
    read, top = await chat.scroller.evaluate(
        """(e) => {
            const top = e.getBoundingClientRect().top;
            const articles = [...e.querySelectorAll('article')];
            const read = articles.find((article) => article.getBoundingClientRect().top > top + 20);
            return [read.querySelector('p').textContent, read.getBoundingClientRect().top];
        }"""
    )
    held.released.set()

    async def has_more() -> bool:
        return await chat.answers.count() > before

    await until(has_more)
    await settled(chat)
    articles = chat.page.get_by_role("log").get_by_role("article")
    mark = articles.filter(has_text=re.compile(rf"(You|Answer){read.split(chr(10))[0]}(?!\d)"))
    moved = await mark.evaluate("(e) => e.getBoundingClientRect().top") - top
    assert abs(moved) <= 2, moved
    await expect(chat.jump).to_be_visible()

    await scroll_to_the_beginning(chat, 500)
    await chat.scroller.evaluate("(e) => e.scrollTop = 0")
    await expect(chat.questions.first.get_by_text("user 0")).to_be_in_viewport()
    assert await shown_beginnings(chat) == beginnings
    await chat.jump.click()
    await expect(last).to_be_in_viewport()
    await chat.ask("and now?")
    await expect(chat.said).to_contain_text("and now?")
    await expect(chat.said).to_be_in_viewport()
    await expect(chat.answers).to_have_count(501)


async def test_older_messages_come_to_a_reader_at_the_top_of_a_page_that_is_busy(
    chat: Chat, shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        conversation_id, beginnings = await append_long(rest, 150)
    await chat.open(shared_node.http, token_for(user), conversation_id)
    await expect(chat.answer.get_by_text("assistant 149")).to_be_in_viewport()
    held = await holding(chat, "**/messages?*before=*")
    await scroll_up_until(chat, held.asked)
    await settled(chat)
    await chat.page.evaluate(BUSY_AT_THE_TOP)
    held.released.set()  # and the reader does nothing more
    await expect(chat.page.get_by_text("Reading older messages…")).to_have_count(0)
    await expect(chat.answers).to_have_count(150)
    assert await shown_beginnings(chat) == beginnings


async def test_older_messages_are_asked_for_once_when_the_newest_ones_are_read_late(
    chat: Chat, shared_node: NodeProcess, user: str
) -> None:
    async with rest_to(shared_node, user) as rest:
        conversation_id, beginnings = await append_long(rest, 150)
    newest = await holding(chat, "**/messages?limit=60", after=1)  # they are read twice
    await chat.page.goto(f"{shared_node.http}/#token={token_for(user)}&c={conversation_id}")
    await expect(chat.answer.get_by_text("assistant 149")).to_be_in_viewport()
    before = await settled(chat)
    async with asyncio.timeout(PATIENCE_MS / 1000):
        await newest.asked.wait()
    older = await holding(chat, "**/messages?*before=*")
    await scroll_up_until(chat, older.asked)
    async with chat.page.expect_response("**/messages?limit=60"):
        newest.released.set()
    assert await settled(chat) == before
    assert len([url for url in chat.tab.requests if "before=" in url]) == 1
    older.released.set()
    await scroll_to_the_beginning(chat, 150)
    assert await shown_beginnings(chat) == beginnings


async def test_older_messages_that_cannot_be_read_are_asked_for_less_and_less_often(
    chat: Chat, shared_node: NodeProcess, user: str
) -> None:
    chat.tab.expected.append(NO_CONNECTION)
    asked = asyncio.Event()
    times: list[float] = []

    async def fail(route: Route) -> None:
        times.append(time.monotonic())
        asked.set()
        await route.abort("connectionfailed")

    async with rest_to(shared_node, user) as rest:
        conversation_id, beginnings = await append_long(rest, 150)
    await chat.open(shared_node.http, token_for(user), conversation_id)
    await expect(chat.answer.get_by_text("assistant 149")).to_be_in_viewport()
    await settled(chat)
    await chat.page.route("**/messages?*before=*", fail)
    await scroll_up_until(chat, asked)

    async def has_failed_often() -> bool:
        return len(times) > 4

    await until(has_failed_often)
    assert times[4] - times[0] > 1.1  # half of 150, 300, 600 and 1200 ms, at the least
    await chat.page.unroute("**/messages?*before=*", fail)
    await scroll_to_the_beginning(chat, 150)
    assert await shown_beginnings(chat) == beginnings


async def test_a_request_that_is_held_when_its_tab_closes_breaks_no_other_tab(
    browser: Browser, shared_node: NodeProcess, user: str
) -> None:
    async with open_tab(browser) as tab:
        held = await holding(Chat(tab), "**/conversations?*")
        await Chat(tab).open(shared_node.http, token_for(user))
        async with asyncio.timeout(PATIENCE_MS / 1000):
            await held.asked.wait()
        held.released.set()  # and the page closes before it has the answer
    for _ in range(2):
        async with open_tab(browser) as tab:
            await Chat(tab).open(shared_node.http, token_for(user))


async def settled(chat: Chat) -> int:
    """The number of answers when it has not changed for some frames."""
    same, count, height = 0, -1, -1
    while same < 5:
        await chat.page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)))")
        now = await chat.answers.count(), await chat.scroller.evaluate("(e) => e.scrollHeight")
        same = same + 1 if now == (count, height) else 0
        count, height = now
    return count


async def test_stays_at_the_bottom_only_if_it_was_there(
    chat: Chat, node: NodeProcess, strings: Strings, user: str
) -> None:
    async def is_at_the_bottom() -> bool:
        return bool(await chat.scroller.evaluate(BOTTOM) < 5)

    first, second = strings.name(), strings.name()
    await chat.page.set_viewport_size({"width": 390, "height": 500})
    await chat.open(node.http, token_for(user))
    parts = (("text", PARAGRAPHS), ("gate", first), ("text", f"{PARAGRAPHS}half"), ("gate", second))
    await chat.ask(script_of(*parts, ("text", f"\n\n{PARAGRAPHS}whole")))
    await expect(chat.said).to_contain_text("line 29")
    await until(is_at_the_bottom)
    await expect(chat.jump).to_have_count(0)
    await chat.scroller.hover()
    await chat.page.mouse.wheel(0, -300)
    await expect(chat.jump).to_be_visible()
    top = await chat.scroller.evaluate("(e) => e.scrollTop")
    strings.open(first)
    await expect(chat.said).to_contain_text("half")
    await settled(chat)
    assert await chat.scroller.evaluate("(e) => e.scrollTop") == top
    await chat.jump.click()
    await until(is_at_the_bottom)
    await expect(chat.jump).to_have_count(0)
    await chat.box.fill("a box\nthat\ngrows")
    await until(is_at_the_bottom)
    strings.open(second)
    await expect(chat.said).to_contain_text("whole")
    await chat.ended()
    await until(is_at_the_bottom)
    await expect(chat.answer.get_by_text("whole")).to_be_in_viewport()
