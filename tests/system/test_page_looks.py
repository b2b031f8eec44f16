"""How the chat page looks: pictures for people, in build/screenshots, each of what it should show."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.agents.scripted import Strings, script_of
from tests.kit.browser import Browser, Chat, Tab, expect, open_context, screenshot
from tests.kit.harness import NodeProcess, token_for
from tests.kit.rest import rest_to

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIZES: Final[dict[str, dict[str, Any]]] = {
    "wide": {"viewport": {"width": 1280, "height": 800}},
    "narrow": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
TITLES: Final = ("Plans for the garden", "A letter to the council", "Why the sky is blue", "Dinner for eight")
CODE_AND_TABLE: Final = """To merge two sorted lists, **look at both heads**:

```python
def merge(left: list[int], right: list[int]) -> list[int]:
    merged = []
    while left and right:
        merged.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return [*merged, *left, *right]  # one of them is empty
```

| | time | memory |
|---|---:|---:|
| merge | O(n) | O(n) |
| sort | O(n log n) | O(n) |

- [x] stable
- [ ] in place

See [Merge sort](https://en.wikipedia.org/wiki/Merge_sort).
"""
RESULT: Final = '{"found": 2, "titles": ["Merge sort", "Insertion sort"]}'


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pictures(
    browser: Browser, node: NodeProcess, strings: Strings, user: str, scheme: str, size: str
) -> None:
    async with rest_to(node, user) as rest:
        stored = [await rest.create(title=title) for title in TITLES]
        long = [
            {"role": role, "content": f"{words} {number}. {CODE_AND_TABLE if role == 'assistant' else ''}"}
            for number in range(6)
            for role, words in (("user", "Question"), ("assistant", "Answer"))
        ]
        (await rest.append(stored[0], *long)).expect(201)
    options = {"color_scheme": scheme, "reduced_motion": "reduce", **SIZES[size]}
    async with open_context(browser, **options) as context:
        chat = Chat(Tab(await context.new_page()))
        page = chat.page

        async def take(what: str) -> None:
            await screenshot(page, f"{what}-{scheme}-{size}")

        await page.goto(f"{node.http}/")
        await expect(page.get_by_role("button", name="Sign in")).to_be_visible()
        await take("sign-in")

        await page.get_by_label("Token").fill(token_for(user))
        await page.keyboard.press("Enter")
        await expect(chat.status).to_contain_text("Connected to node ")
        await expect(page.get_by_role("listitem")).to_have_count(0 if size == "narrow" else len(TITLES))
        await expect(chat.box).to_be_visible()
        await take("empty")

        gate = strings.name()
        await chat.ask(script_of(["text", CODE_AND_TABLE[:300]], ["gate", gate], ["text", CODE_AND_TABLE[300:]]))
        await expect(chat.answer.get_by_text("def merge")).to_be_visible()
        await expect(chat.stop).to_be_visible()
        await take("streaming")

        strings.open(gate)
        await chat.ended()
        await expect(chat.answer.get_by_role("table")).to_be_in_viewport()
        await expect(chat.answer.locator(".hljs-keyword").first).to_be_visible()
        await take("code-and-table")

        calls: list[list[Any]] = [
            ["call", "1", "search", {"words": "sorting"}],
            ["result", "1", "search", RESULT, False],
        ]
        failing: list[list[Any]] = [
            ["call", "2", "fetch", {"page": 7}],
            ["result", "2", "fetch", "There is no such page.", True],
        ]
        await chat.ask(script_of(*calls, ["step"], *failing, ["step"], ["text", "There are two of them."]))
        await chat.ended(2)
        for number in range(2):
            await chat.answer.get_by_role("group").nth(number).locator("summary").click()
        await expect(chat.answer.get_by_text("Insertion sort")).to_be_visible()
        await expect(chat.answer.get_by_text("There is no such page.")).to_be_visible()
        await take("tools")

        await chat.ask(script_of(["text", "Half of an answer, and "], ["agent_error", "The model is away.", False]))
        await expect(chat.answer).to_contain_text("This answer failed.")
        await expect(chat.alert).to_be_in_viewport()
        await take("error")

        await page.evaluate(f"location.hash = '#c={stored[0]}'")
        await expect(chat.answers).to_have_count(6)
        await expect(chat.answer).to_be_in_viewport()
        await chat.scroller.hover()
        await page.mouse.wheel(0, -1500)  # who is not the reader does not leave the bottom
        await expect(chat.jump).to_be_in_viewport(ratio=1)
        await take("scrolled-up")

        if size == "narrow":
            await page.get_by_role("button", name="Conversations").click()
        await expect(chat.sidebar.get_by_role("link", name=TITLES[0])).to_be_in_viewport(ratio=1)
        await take("list")
        assert chat.tab.unexpected == []
