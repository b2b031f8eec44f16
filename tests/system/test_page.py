"""The page at `/`, in a real browser against real nodes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import SHIFT, Page, open_page, running_chromium
from tests.conftest import StartNode
from tests.harness import NodeProcess, free_port, running_node, sql, token_for

LONG = " ".join(f"word{number}" for number in range(60))  # three seconds at 20 tokens a second
ANSWER = "[...document.querySelectorAll('article.assistant')].at(-1)"
TEXT = f"({ANSWER} ? {ANSWER}.querySelector('.text').textContent : '')"
CONNECTED = "document.getElementById('status').textContent.startsWith('connected to ')"
RECONNECTING = "document.getElementById('status').textContent == 'reconnecting…'"
SLOW = {"ECHO_TOKENS_PER_SECOND": "20"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    """A browser for all tests here."""
    with running_chromium() as devtools_url:
        yield devtools_url


@pytest.fixture
async def page(chromium: str) -> AsyncIterator[Page]:
    """A tab with a profile of its own."""
    async with open_page(chromium) as page:
        yield page


def has_ended(count: int = 1, status: str = "completed") -> str:
    """Whether so many answers have ended, so."""
    return f"document.querySelectorAll('article.assistant.{status}').length == {count}"


def has_text(text: str) -> str:
    """Whether the last answer has this text in it."""
    return f"{TEXT}.includes({json.dumps(text)})"


async def log_in(page: Page, node: NodeProcess, user: str) -> None:
    """Open the page as `anynode dev` says it."""
    await page.open(f"{node.http}/#token={token_for(user)}")
    await page.until(CONNECTED)


async def ask(page: Page, text: str) -> None:
    """Type a message and send it."""
    await page.until("!document.getElementById('box').readOnly")
    await page.evaluate("document.getElementById('box').focus()")
    await page.type(text)
    await page.press("Enter")


async def answers_in(database_url: str) -> list[tuple[Any, ...]]:
    """Text and status of all answers in the database."""
    statement = "SELECT content, status FROM messages WHERE role = 'assistant' ORDER BY position"
    return [tuple(row) for row in await sql(database_url, statement)]


async def test_logs_in_from_the_fragment_and_streams(page: Page, start_node: StartNode, user: str) -> None:
    node = start_node(**SLOW)
    await log_in(page, node, user)
    assert await page.evaluate("location.href") == node.http + "/"
    await ask(page, LONG)
    await page.until(has_text("[1] word0"))
    assert not await page.evaluate(has_ended())
    await page.until(has_ended())
    assert await page.evaluate(TEXT) == "[1] " + LONG
    assert await page.evaluate("document.querySelector('.user').textContent") == LONG
    assert await page.evaluate("document.getElementById('box').value") == ""
    await ask(page, "more")
    await page.until(has_ended(2))
    assert await page.evaluate(TEXT) == "[3] more"


async def test_a_reload_in_mid_answer_goes_on(page: Page, start_node: StartNode, user: str, database_url: str) -> None:
    node = start_node(**SLOW)
    await log_in(page, node, user)
    await ask(page, LONG)
    await page.until(has_text("word3"))
    await page.evaluate("window.isOld = true")
    await page.call("Page.reload")
    await page.until("!window.isOld && " + has_text("word6"))
    assert not await page.evaluate(has_ended()), "the turn was over before the page was back"
    await page.until(has_ended())
    assert await answers_in(database_url) == [("[1] " + LONG, "completed")]
    assert await page.evaluate(TEXT) == "[1] " + LONG


@pytest.mark.parametrize("way", ["button", "key"])
async def test_stop_keeps_what_was_said(
    page: Page, start_node: StartNode, user: str, database_url: str, way: str
) -> None:
    await log_in(page, start_node(**SLOW), user)
    await ask(page, LONG)
    await page.until(has_text("word3"))
    if way == "button":
        await page.evaluate("document.getElementById('stop').click()")
    else:
        await page.press("Escape")
    await page.until(has_ended(1, "cancelled"))
    [(said, status)] = await answers_in(database_url)
    assert status == "cancelled"
    assert said == await page.evaluate(TEXT)
    assert ("[1] " + LONG).startswith(said)
    assert "word3" in said
    assert said != "[1] " + LONG
    assert await page.evaluate(f"{ANSWER}.querySelector('.note').textContent") == "Stopped."
    assert await page.evaluate("document.getElementById('stop').hidden")


async def test_a_node_dies_in_mid_answer(page: Page, user: str, database_url: str, tmp_path: Path) -> None:
    port = free_port()
    settings = {**SLOW, "LEASE_SECONDS": "1"}
    with running_node(database_url, tmp_path, settings, port=port) as first:
        await log_in(page, first, user)
        await ask(page, LONG)
        await page.until(has_text("word5"))
        first.kill()
        await page.until(RECONNECTING)
    with running_node(database_url, tmp_path, settings, port=port):
        await page.until(has_ended(), within_seconds=30)
        assert await page.evaluate(CONNECTED)
        assert await answers_in(database_url) == [("[1] " + LONG, "completed")]
        assert await page.evaluate(TEXT) == "[1] " + LONG
        assert await page.evaluate("document.querySelectorAll('article').length") == 2


async def test_a_message_of_unknown_fate_is_sent_again(
    page: Page, user: str, database_url: str, tmp_path: Path
) -> None:
    port = free_port()
    with running_node(database_url, tmp_path, {"HEARTBEAT_SECONDS": "1"}, port=port) as first:
        await log_in(page, first, user)
        await ask(page, "one")
        await page.until(has_ended())
        first.pause()
        await ask(page, "two")
        await page.until(RECONNECTING)  # two heartbeats were missed
        first.kill()
    with running_node(database_url, tmp_path, port=port):
        await page.until(has_ended(2))
        questions = await page.evaluate("[...document.querySelectorAll('.user')].map((e) => e.textContent)")
        assert questions == ["one", "two"]
        assert await answers_in(database_url) == [("[1] one", "completed"), ("[3] two", "completed")]
        assert await page.evaluate("document.getElementById('box').value") == ""


async def test_a_frame_that_was_lost_on_the_way_back_is_not_shown_twice(
    page: Page, start_node: StartNode, user: str, database_url: str
) -> None:
    await log_in(page, start_node(**SLOW), user)
    await ask(page, "first")
    await page.until(has_ended())
    # Nothing that the server says after this question is heard over this socket; then the network comes back.
    await page.evaluate(
        "WebSocket.prototype.send = new Proxy(WebSocket.prototype.send, {apply(send, socket, [text]) {"
        "  if (!window.isCut && text.includes('message.send')) {"
        "    window.isCut = true; socket.onmessage = null; socket.addEventListener('message', ({data}) =>"
        "      data.includes('word5 ') && !window.isBack && (window.isBack = dispatchEvent(new Event('online'))));"
        "  }"
        "  Reflect.apply(send, socket, [text]);"
        "}}), 0"
    )
    # What is shown of the answer must at all times be its beginning: at the end it is replaced as a whole.
    await page.evaluate(
        f"window.wrong = [], new MutationObserver(() => {json.dumps('[3] ' + LONG)}.startsWith({TEXT})"
        f" || {TEXT} == '[1] first' || wrong.push({TEXT}))"
        ".observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}), 0"
    )
    await ask(page, LONG)
    await page.until(has_ended(2))
    assert await page.evaluate("window.isBack")
    assert await page.evaluate("wrong") == []
    assert [("[1] first", "completed"), (await page.evaluate(TEXT), "completed")] == await answers_in(database_url)
    assert await page.evaluate("document.querySelectorAll('article').length") == 4


async def test_stays_at_the_bottom_only_if_it_was_there(page: Page, start_node: StartNode, user: str) -> None:
    rest = "(log.scrollHeight - log.scrollTop - log.clientHeight)".replace("log", "document.getElementById('log')")
    await page.call("Emulation.setDeviceMetricsOverride", width=390, height=400, deviceScaleFactor=1, mobile=True)
    await log_in(page, start_node(**SLOW), user)
    await ask(page, LONG.replace(" ", "\n"))
    await page.until(has_text("word5"))
    assert await page.evaluate(f"{rest} < 5")
    await page.evaluate("document.getElementById('log').scrollTop = 100")
    await page.until(has_text("word15"))
    assert await page.evaluate("document.getElementById('log').scrollTop == 100")
    await page.evaluate("document.getElementById('log').scrollTop = 1e6")
    await page.until(has_text("word20"))
    assert await page.evaluate(f"{rest} < 5")
    await page.type("a box\nthat\ngrows")
    await page.until(f"document.getElementById('box').clientHeight > 70 && {rest} < 5")
    await page.until(has_ended())


async def test_markup_is_text(page: Page, shared_node: NodeProcess, user: str) -> None:
    markup = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    await log_in(page, shared_node, user)
    await ask(page, markup)
    await page.until(has_ended())
    assert await page.evaluate(TEXT) == "[1] " + markup
    assert await page.evaluate("document.querySelector('.user').textContent") == markup
    await page.until("document.querySelector('#conversations a')?.textContent.startsWith('<img')")
    assert await page.evaluate("document.querySelectorAll('img, #log script').length") == 0
    assert await page.evaluate("document.title") == "Anynode"
    assert page.complaints == []


async def test_normal_use_leaves_the_console_empty(page: Page, shared_node: NodeProcess, user: str) -> None:
    await log_in(page, shared_node, user)
    await ask(page, "first")
    await page.until(has_ended())
    await page.evaluate("document.getElementById('new').click()")
    await page.until("document.querySelectorAll('article').length == 0")
    await page.type("several")
    await page.press("Enter", SHIFT)
    await page.type("lines")
    await page.press("Enter")
    await page.until(has_ended())
    assert await page.evaluate(TEXT) == "[1] several\nlines"
    await page.until("document.querySelectorAll('#conversations a').length == 2")
    await page.evaluate("document.querySelectorAll('#conversations a')[1].click()")
    await page.until(has_text("[1] first"))
    assert page.complaints == []
    # That a violation would have been seen:
    await page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'isRun = true'}))")
    assert await page.evaluate("typeof isRun") == "undefined"
    assert "Content Security Policy" in "".join(page.complaints)


async def test_a_refused_message_stays_in_the_box(page: Page, start_node: StartNode, user: str) -> None:
    await log_in(page, start_node(**SLOW), user)
    await ask(page, LONG)
    await page.until(has_text("word2"))
    await ask(page, "too early")
    await page.until("!document.getElementById('notice').hidden")
    assert "still running" in await page.evaluate("document.getElementById('notice').textContent")
    assert await page.evaluate("document.getElementById('box').value") == "too early"
    await page.until(has_ended())
    await page.press("Enter")
    await page.until(has_ended(2))
    assert await page.evaluate(TEXT) == "[3] too early"


@pytest.mark.parametrize("size", [70_000, 3_000_000])
async def test_a_message_that_is_too_large(page: Page, shared_node: NodeProcess, user: str, size: int) -> None:
    await log_in(page, shared_node, user)
    await page.evaluate(f"document.getElementById('box').value = 'x'.repeat({size})")
    await page.evaluate("document.getElementById('box').focus()")
    await page.press("Enter")
    await page.until("!document.getElementById('notice').hidden && " + CONNECTED)
    assert await page.evaluate("document.getElementById('box').value.length") == size
    await page.evaluate("document.getElementById('box').value = ''")
    await ask(page, "shorter")
    await page.until(has_ended())


async def test_a_failed_answer_says_why(page: Page, start_node: StartNode, user: str) -> None:
    await log_in(page, start_node(ECHO_FAIL_AFTER="3"), user)
    await ask(page, "a b c d")
    await page.until(has_ended(1, "failed"))
    assert await page.evaluate(TEXT) == "[1] a b "
    assert "fails after 3" in await page.evaluate(f"{ANSWER}.querySelector('.note').textContent")


async def test_asks_for_a_token(page: Page, shared_node: NodeProcess, user: str) -> None:
    await page.open(f"{shared_node.http}/#token=not.a.token")
    await page.until("document.getElementById('why').textContent.includes('malformed')")
    await page.type(token_for(user))
    await page.press("Enter")
    await page.until(CONNECTED)
    assert await page.evaluate("document.getElementById('login').hidden")
    assert token_for(user)[:20] not in await page.evaluate("document.documentElement.outerHTML + location.href")
    # Somebody else's conversation, or none: a new one, and a word about it.
    await page.evaluate("location.hash = 'c=00000000-0000-7000-8000-000000000000', 0")
    await page.until("!document.getElementById('notice').hidden")
    assert await page.evaluate("location.hash") == ""
    await ask(page, "hello")
    await page.until(has_ended())


async def test_a_deploy_goes_unnoticed(page: Page, user: str, database_url: str, tmp_path: Path) -> None:
    port = free_port()
    with running_node(database_url, tmp_path, {**SLOW, "DRAIN_SECONDS": "0.2"}, port=port) as first:
        await log_in(page, first, user)
        await ask(page, LONG)
        await page.until(has_text("word3"))
        first.stop()
    with running_node(database_url, tmp_path, SLOW, port=port):
        await page.until(has_ended(), within_seconds=30)
        assert [(await page.evaluate(TEXT), "completed")] == await answers_in(database_url)


def test_the_script_makes_no_markup() -> None:
    source = Path("server/page/page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in source
