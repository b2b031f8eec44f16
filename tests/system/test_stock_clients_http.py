"""The AI SDK's own chats: what a page loads, what is refused, and what is special about those that talk HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from tests.agents.scripted import Strings
from tests.kit.harness import running_node, sql, token_for
from tests.kit.npm import Script
from tests.kit.stock.tabs import open_tab, running_driver
from tests.kit.stock.world import CLIENTS, HTTP_CLIENTS, WHOLE, World, asked, environment_of, paced, said_in

BEGINNING = "a beginning"


@pytest.fixture(scope="module")
def driver() -> Iterator[Script]:
    with running_driver() as script:
        yield script


@pytest.fixture(scope="module")
def world(driver: Script, module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("nodes")
    strings = Strings(directory / "strings")
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(running_node(module_database_url, directory, environment_of(strings))) for _ in range(2)
        ]
        yield World(driver, nodes, module_database_url, strings)


@pytest.fixture(params=HTTP_CLIENTS)
def client(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The options of a client over HTTP."""
    return CLIENTS[request.param]


@pytest.fixture(params=CLIENTS)
def any_client(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The options of a client."""
    return CLIENTS[request.param]


async def test_stopping_over_http_is_a_disconnect_and_the_turn_goes_on(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab:
        await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
        await tab.until(characters=20)
        await tab.stop()
        view = await tab.settled()
        assert (view.status, view.text) == ("ready", WHOLE[:20])
        assert await world.turns(user, tab.chat_id) == ["running"]
        world.strings.open(user)
        await world.until_turn(user, tab.chat_id, "completed")
        messages = await world.messages(user, tab.chat_id)
        async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, messages=messages, **client) as other:
            await world.assert_whole(user, other, await other.view())


async def test_the_route_to_stop_returns_when_the_turn_has_stopped_wherever_it_ran(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab:
        await tab.send(asked(["text", BEGINNING], ["hang"]))
        await tab.until(characters=len(BEGINNING))
        status, _ = await world.request("POST", user, tab.chat_id, "stop", at=1)
        assert status == 200
        assert await world.turns(user, tab.chat_id) == ["cancelled"]
        view = await tab.settled()
        assert (view.status, view.text, view.roles, view.complaints) == ("ready", BEGINNING, ["user", "assistant"], [])
        messages = await world.messages(user, tab.chat_id)
        assert [said_in(message) for message in messages][1] == BEGINNING
        for loaded in (messages, messages[:1]):
            async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, messages=loaded, **client) as other:
                await other.resume()
                again = await other.settled()
                assert (again.status, again.text, len(again.messages)) == ("ready", BEGINNING, 2)
        after = await tab.ask(asked(["text", "well again"]))
        assert (after.status, after.text) == ("ready", "well again")


async def test_a_chat_goes_on_from_the_messages_that_are_loaded(
    world: World, user: str, any_client: Mapping[str, Any]
) -> None:
    script = asked(["text", "Look. "], ["call", "a", "f", {"x": 1}], ["result", "a", "f", "1"], ["step"], paced(0.1))
    async with world.tab(user, **any_client) as tab:
        first = await tab.ask(script)
        messages = await world.messages(user, tab.chat_id, at=1)
        assert [_shown(message) for message in messages] == [_shown(message) for message in first.messages]
        assert messages[1]["metadata"] == first.answer["metadata"]
        async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, messages=messages, **any_client) as other:
            view = await other.ask(asked(["recall"]))
            assert (view.status, view.roles, view.complaints) == ("ready", ["user", "assistant"] * 2, [])
            assert f'["assistant", "{WHOLE}", null]' in view.text
            assert '["tool", "1", "a"]' in view.text


async def test_an_answer_whose_events_have_been_deleted_is_shown_from_what_it_left(
    world: World, user: str, any_client: Mapping[str, Any]
) -> None:
    script = asked(["text", "Look. "], ["call", "a", "f", {"x": 1}], ["result", "a", "f", "1"], ["step"], paced(0.1))
    async with world.tab(user, **any_client) as tab:
        first = await tab.ask(script)
        await sql(
            world.database_url,
            "DELETE FROM events WHERE conversation_id = (SELECT id FROM conversations WHERE client_id = $1)",
            tab.chat_id,
        )
        async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, **any_client) as other:
            await other.resume()
            view = await other.settled()
            assert (view.status, view.complaints) == ("ready", [])
            assert _shown(view.answer) == _shown(first.answer)
            assert view.answer["metadata"] == first.answer["metadata"]


async def test_text_may_be_anything(world: World, user: str, any_client: Mapping[str, Any]) -> None:
    text = '\U0001f600\u2028é "quoted" \\ \n\ndata: {}\n\n: x\r\n</script>\x7f '
    async with world.tab(user, **any_client) as tab:
        view = await tab.ask(asked(["text", text], ["repeat", 3, text]))
        await world.assert_whole(user, tab, view, text * 4)


def _shown(message: Mapping[str, Any]) -> tuple[str, str, list[Any]]:
    """What a message shows, less what only tells that it has come to its end."""
    parts = [
        {name: value for name, value in part.items() if part["type"] != "text" or name != "state"}
        for part in message["parts"]
    ]
    return message["id"], message["role"], parts


@pytest.mark.parametrize("version", [5, 6, 7])
async def test_only_ai_5_shows_a_resumed_answer_after_its_partial_unless_that_is_emptied(
    world: World, user: str, version: int
) -> None:
    """This is what its users have to know; that the emptied one is whole, other tests show."""
    async with world.balanced(user, face="http", version=version, reconnect=False) as (tab, balancer):
        await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
        await tab.until(characters=20)
        balancer.drop()
        assert (await tab.settled()).text == WHOLE[:20]
        await tab.resume()
        world.strings.open(user)
        view = await tab.settled()
        assert view.text == (WHOLE[:20] + WHOLE if version == 5 else WHOLE)
        assert view.roles == ["user", "assistant"]


async def test_a_question_while_another_is_answered_is_refused_and_hurts_nobody(
    world: World, user: str, any_client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **any_client) as tab:
        await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
        await tab.until(characters=20)
        async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, **any_client) as other:
            refused = await other.ask(asked(["text", "never"]))
            assert (refused.status, refused.text) == ("error", "")
            assert not refused.finishes[-1]["isDisconnect"]
        world.strings.open(user)
        await world.assert_whole(user, tab, await tab.settled())


async def test_a_bad_token_is_refused_and_not_taken_for_a_lost_connection(
    world: World, driver: Script, client: Mapping[str, Any]
) -> None:
    token = token_for("eve", secret="x" * 64)
    async with open_tab(driver, world.nodes[0].http, token, **client) as tab:
        view = await tab.ask(asked(["text", "never"]))
        assert (view.status, view.roles, view.wire["sent"]) == ("error", ["user"], ["POST 401"])
        assert "unauthorized" in str(view.error)
        await tab.resume()
        again = await tab.settled()
        assert (again.status, again.wire["sent"]) == ("error", ["POST 401", "GET 401"])


async def test_somebody_else_s_chat_is_nothing_to_resume(
    world: World, user: str, any_client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **any_client) as tab:
        await world.assert_whole(user, tab, await tab.ask(asked(paced(0.1))))
        async with world.tab(f"not-{user}", chat_id=tab.chat_id, **any_client) as other:
            await other.resume()
            view = await other.settled()
            assert (view.status, view.messages, view.complaints) == ("ready", [], [])
            foreign, missing = [
                await world.request("GET", f"not-{user}", chat_id, "messages") for chat_id in (tab.chat_id, "missing")
            ]
            assert foreign == missing
            assert foreign[0] == 200
            assert WHOLE not in str(foreign)
            # The id is another chat's where it is another user's.
            own = await other.ask(asked(["recall"]))
            assert (own.status, own.roles) == ("ready", ["user", "assistant"])
            assert WHOLE not in own.text
