"""The AI SDK's own chats, unmodified, over WebSocket and HTTP: whatever breaks, what is shown is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.agents.scripted import Strings, eventually
from tests.kit.harness import running_node, sql, token_for
from tests.kit.npm import Script
from tests.kit.stock.balancer import Break, running_balancer
from tests.kit.stock.tabs import Tab, View, open_tab, running_driver
from tests.kit.stock.world import CLIENTS, TOKENS, WHOLE, World, asked, environment_of, paced, said_in

# Where the connection of an answer breaks: at shares of its bytes, before the first of them too, and at its ends.
CUTS: tuple[float | bytes, ...] = (0.0, 0.01, 0.2, 0.4, 0.6, 0.8, b'"type":"finish-step"', b'"type":"finish"')
BREAKS: tuple[Break, Break] = ("rst", "fin")
LOOK: tuple[list[Any], ...] = (["text", "Look. "], ["call", "a", "f", {}], ["result", "a", "f", "1"], ["step"])


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


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The options of a client."""
    return CLIENTS[request.param]


# Turns.


async def test_turns_follow_one_another(world: World, user: str, client: Mapping[str, Any]) -> None:
    async with world.tab(user, **client) as tab:
        view = await tab.ask(asked(paced(0.1), ["usage", 3, 4, "a model"]))
        await world.assert_whole(user, tab, view)
        (turn,) = await sql(
            world.database_url,
            "SELECT t.id::text AS id FROM turns t JOIN conversations c ON c.id = conversation_id WHERE client_id = $1",
            tab.chat_id,
        )
        assert view.answer["id"] == turn["id"]
        assert view.answer["metadata"]["usage"] == {"inputTokens": 3, "outputTokens": 4, "totalTokens": 7}
        assert view.answer["metadata"]["model"] == "a model"
        assert view.finishes == [{"isAbort": False, "isDisconnect": False, "isError": False, "finishReason": "stop"}]
        view = await tab.ask(asked(["recall"]))
        assert view.roles == ["user", "assistant"] * 2
        assert f'["assistant", "{WHOLE}", null]' in view.text
        assert view.complaints == []
        assert await world.stored(user, tab.chat_id) == [("user", "completed"), ("assistant", "completed")] * 2


async def test_tools_are_shown_with_what_they_were_asked_and_have_answered(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    script = asked(
        *(["text", "Let me see. "], ["call", "a", "search", {"query": "x"}], ["call", "b", "read", {}]),
        *(["result", "b", "read", "unreadable", True], ["result", "a", "search", "found"], ["text", "There."]),
    )
    async with world.tab(user, **client) as tab:
        view = await tab.ask(script)
        await world.assert_whole(user, tab, view, "Let me see. There.")
        await tab.close()
        await tab.open(url=world.nodes[1].http, token=token_for(user), resume=True, **client)
        again = await tab.settled()
    for shown in (view, again):
        assert [part["type"] for part in shown.answer["parts"]] == [
            *("step-start", "text", "dynamic-tool", "dynamic-tool", "step-start", "text"),
        ]
        found, failed = (part for part in shown.answer["parts"] if part["type"] == "dynamic-tool")
        assert (found["toolName"], found["input"], found["output"]) == ("search", {"query": "x"}, "found")
        assert (failed["toolName"], failed["state"], failed["errorText"]) == ("read", "output-error", "unreadable")
        assert found["providerExecuted"]
        assert failed["providerExecuted"]


async def test_an_answer_is_regenerated(world: World, user: str, client: Mapping[str, Any]) -> None:
    async with world.tab(user, **client) as tab:
        first = await tab.ask(asked(paced(0.1)))
        await tab.regenerate()
        second = await tab.settled()
        assert (second.status, second.roles, second.text) == ("ready", ["user", "assistant"], WHOLE)
        assert second.complaints == []
        assert second.answer["id"] != first.answer["id"]
        stored = await world.stored(user, tab.chat_id)
        assert stored == [("user", "completed"), ("assistant", "superseded"), ("assistant", "completed")]
        loaded = await world.messages(user, tab.chat_id)
        assert [message["id"] for message in loaded] == [message["id"] for message in second.messages]


async def test_a_failed_agent_leaves_its_partial_text_and_an_error(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab:
        view = await tab.ask(asked(["text", "a beginning"], ["agent_error", "it went wrong", False]))
        assert (view.status, view.text, view.roles) == ("error", "a beginning", ["user", "assistant"])
        assert "it went wrong" in str(view.error)
        assert await world.turns(user, tab.chat_id) == ["failed"]
        after = await tab.ask(asked(["text", "well again"]))
        assert (after.status, after.text) == ("ready", "well again")


async def test_a_chat_may_have_any_id(world: World, user: str, client: Mapping[str, Any]) -> None:
    async with world.balanced(user, chat_id=f"a/b?c d#ü%2F {user}", **client) as (tab, balancer):
        await tab.send(asked(paced(0.3)))
        await tab.until(characters=20)
        balancer.drop()
        await world.assert_whole(user, tab, await tab.settled())


async def test_a_silent_agent_is_waited_for(world: World, user: str) -> None:
    """No heartbeat is taken for an answer, or for a mistake, also where none is under way."""
    async with AsyncExitStack() as stack:
        tabs = [await stack.enter_async_context(world.tab(user, **options)) for options in CLIENTS.values()]
        for _ in range(2):
            for tab in tabs:
                await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
                await tab.until(characters=20)
            await asyncio.sleep(1.5)  # a heartbeat comes every second
            world.strings.open(user)
            for tab in tabs:
                view = await tab.settled()
                assert (view.status, view.text, view.complaints) == ("ready", WHOLE, [])
                assert view.wire["closed"] == []


# Connections that break.


async def test_a_send_whose_answer_was_lost_is_sent_again_and_asked_but_once(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.balanced(user, reconnect=False, **client) as (tab, balancer):
        await tab.resume()  # to be connected, so that the next byte is one of the answer
        await tab.settled()
        balancer.cut(0)
        lost = await tab.ask(asked(["gate", user], paced(0.1)))
        await world.until_turn(user, tab.chat_id, "running")
        assert (lost.status, lost.roles) == ("error", ["user"])
        assert lost.finishes[-1]["isDisconnect"]
        await tab.send_again()
        world.strings.open(user)
        await world.assert_whole(user, tab, await tab.settled())


async def test_a_chat_whose_connection_breaks_anywhere_goes_on_at_another_node(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.balanced(user, **client) as (tab, balancer):
        await world.assert_whole(user, tab, await tab.ask(asked(paced(0.1))))
        bytes_sent = balancer.bytes_sent

    async def break_at(number: int) -> None:
        async with world.balanced(user, number % 2, **client) as (tab, balancer):
            at = CUTS[number]
            balancer.cut(at if isinstance(at, bytes) else int(at * bytes_sent), BREAKS[number % 2])
            view = await tab.ask(asked(paced(0.4)))  # which is more bytes than a faster one
            assert balancer.has_cut
            assert view.wire["connections"] > 1
            await world.assert_whole(user, tab, view)

    async with asyncio.TaskGroup() as group:
        for number in range(len(CUTS)):
            group.create_task(break_at(number))


async def test_a_chat_whose_connection_breaks_again_and_again_is_whole_in_the_end(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.balanced(user, **client) as (tab, balancer):
        for number in range(6):
            balancer.cut(700, BREAKS[number % 2])
        view = await tab.ask(asked(*LOOK, paced(0.5)))
        assert balancer.has_cut
        await world.assert_whole(user, tab, view, f"Look. {WHOLE}")
        assert sum(part["type"] == "dynamic-tool" for part in view.answer["parts"]) == 1


async def test_regenerating_goes_on_where_its_connection_breaks(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async def break_at(bytes_sent: int) -> None:
        async with world.balanced(user, **client) as (tab, balancer):
            first = await tab.ask(asked(paced(0.1)))
            balancer.cut(bytes_sent)
            await tab.regenerate()
            view = await tab.settled()
            assert (view.status, view.text, view.roles) == ("ready", WHOLE, ["user", "assistant"]), view
            assert view.answer["id"] != first.answer["id"]
            assert view.complaints == []
            assert await world.turns(user, tab.chat_id) == ["completed"] * 2

    async with asyncio.TaskGroup() as group:
        for bytes_sent in (0, 300, 600):
            group.create_task(break_at(bytes_sent))


async def test_a_killed_node_s_turns_go_on_at_another_also_where_text_is_taken_back(
    world: World, driver: Script, user: str, tmp_path: Path
) -> None:
    """The agent begins its step again, and says something else the second time."""
    script = asked(*LOOK, paced(0.3, "try {attempt} "), ["gate", user])
    text = "Look. " + "try 2 " * TOKENS
    with running_node(world.database_url, tmp_path, environment_of(world.strings)) as dying:
        async with AsyncExitStack() as stack:
            balancer = await stack.enter_async_context(running_balancer(dying.port, world.nodes[0].port))
            pairs: list[tuple[Tab, Tab]] = []
            for options in CLIENTS.values():
                tab = await stack.enter_async_context(world.tab(user, dying, **options))
                await tab.close()
                await tab.open(url=balancer.http, token=token_for(user), **options)
                balancer.ports[:] = [dying.port]
                await tab.send(script)
                await tab.until(characters=20)
                watcher = await stack.enter_async_context(
                    world.tab(user, world.nodes[1], chat_id=tab.chat_id, resume=True, **options)
                )
                await watcher.until(characters=20)
                pairs.append((tab, watcher))
            for tab, _ in pairs:
                await tab.until(characters=len(text))
            balancer.ports[:] = [world.nodes[0].port]
            dying.kill()
            world.strings.open(user)
            for options, (tab, watcher) in zip(CLIENTS.values(), pairs, strict=True):
                view, watched = await tab.settled(), await watcher.settled()
                await world.assert_whole(user, tab, view, text)
                assert watched.text == text, (options, watched)
                assert (watched.status, watched.roles, watched.complaints) == ("ready", ["assistant"], [])
                assert ("reset-step" in watched.wire["received"]) == (options["face"] == "ws")
                for shown in (view, watched):
                    assert sum(part["type"] == "dynamic-tool" for part in shown.answer["parts"]) == 1


async def test_a_drained_node_s_turns_are_followed_at_another(
    world: World, driver: Script, user: str, tmp_path: Path
) -> None:
    settings = {**environment_of(world.strings), "DRAIN_SECONDS": "3"}
    with running_node(world.database_url, tmp_path, settings) as leaving:
        async with AsyncExitStack() as stack:
            balancer = await stack.enter_async_context(running_balancer(leaving.port))
            tabs = []
            for options in CLIENTS.values():
                tab = await stack.enter_async_context(open_tab(driver, balancer.http, token_for(user), **options))
                await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
                tabs.append(tab)
            for tab in tabs:
                await tab.until(characters=20)
            balancer.ports[:] = [node.port for node in world.nodes]
            stopping = asyncio.create_task(asyncio.to_thread(leaving.stop))
            await asyncio.sleep(0.3)
            world.strings.open(user)
            for tab in tabs:
                await world.assert_whole(user, tab, await tab.settled())
            assert await stopping == 0


# Resuming.


async def test_an_answer_that_has_ended_is_shown_by_resuming(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab:
        asked_view = await tab.ask(asked(paced(0.1)))
        await tab.resume()
        await world.assert_whole(user, tab, await tab.settled())
        loaded = await world.messages(user, tab.chat_id)
        for messages in (loaded, loaded[:1], []):
            async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, messages=messages, **client) as other:
                await other.resume()
                view = await other.settled()
                assert (view.status, view.text, view.complaints) == ("ready", WHOLE, [])
                assert [message["id"] for message in view.messages] == [
                    message["id"] for message in asked_view.messages[0 if messages else 1 :]
                ]


async def test_where_nothing_ever_ran_there_is_nothing_to_resume(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab:
        await tab.resume()
        view = await tab.settled()
        assert (view.status, view.messages, view.complaints) == ("ready", [], [])


async def test_a_page_that_is_loaded_again_and_a_second_tab_show_the_turn_from_its_beginning(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.tab(user, **client) as tab, AsyncExitStack() as stack:
        await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
        await tab.until(characters=20)
        tabs = [tab]
        for node in world.nodes:
            messages = await world.messages(user, tab.chat_id)
            opened = world.tab(user, node, chat_id=tab.chat_id, messages=messages, resume=True, **client)
            tabs.append(await stack.enter_async_context(opened))
        for one in tabs:
            await one.until(characters=20)
        await tab.close()
        world.strings.open(user)
        for one in tabs[1:]:
            await world.assert_whole(user, one, await one.settled())


async def test_resuming_again_while_a_resumed_answer_streams_does_not_stop_its_turn(
    world: World, user: str, client: Mapping[str, Any]
) -> None:
    async with world.balanced(user, reconnect=False, **client) as (tab, balancer):
        await tab.send(asked(paced(0.6)))
        await tab.until(characters=20)
        balancer.drop()
        await tab.settled()
        for _ in range(3):
            await tab.resume()
            await asyncio.sleep(0.05)
        view = await tab.settled()
        await world.until_turn(user, tab.chat_id, "completed")
        assert view.complaints == []
        if client["version"] > 5:  # which has no replay mode: what is resumed twice is shown twice
            await world.assert_whole(user, tab, view)


# Over the WebSocket alone.


async def test_stopping_over_the_websocket_cancels_the_turn_and_keeps_what_was_said(world: World, user: str) -> None:
    async with world.tab(user) as tab:
        await tab.send(asked(["text", "a beginning"], ["hang"]))
        await tab.until(characters=len("a beginning"))
        await tab.stop()
        view = await tab.settled()
        assert (view.status, view.text, view.roles) == ("ready", "a beginning", ["user", "assistant"])
        await world.until_turn(user, tab.chat_id, "cancelled")
        assert [said_in(message) for message in await world.messages(user, tab.chat_id)][1] == "a beginning"
        after = await tab.ask(asked(paced(0.1)))
        assert (after.status, after.text, after.complaints) == ("ready", WHOLE, [])


async def test_a_turn_that_has_not_said_anything_is_stopped_too(world: World, user: str) -> None:
    async with world.tab(user) as tab:
        await tab.send(asked(["hang"]))
        await world.until_turn(user, tab.chat_id, "running")
        await tab.stop()
        assert (await tab.settled()).status == "ready"
        await world.until_turn(user, tab.chat_id, "cancelled")
        after = await tab.ask(asked(paced(0.1)))
        assert (after.status, after.text, after.complaints) == ("ready", WHOLE, [])


async def test_stopping_a_resumed_answer_cancels_the_turn_at_its_node(world: World, user: str) -> None:
    async with world.tab(user) as tab:
        await tab.send(asked(["text", "a beginning"], ["hang"]))
        await tab.until(characters=len("a beginning"))
        async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, resume=True) as other:
            await other.until(characters=len("a beginning"))
            await other.stop()
            assert (await other.settled()).status == "ready"
            await world.until_turn(user, tab.chat_id, "cancelled")
        view = await tab.settled()
        assert (view.status, view.text) == ("ready", "a beginning")


async def test_chats_that_share_a_websocket_stream_side_by_side(world: World, user: str) -> None:
    async with world.balanced(user) as (tab, balancer), world.tab(user, shares=tab.name) as other:
        await tab.send(asked(paced(0.4)))
        await other.send(asked(["text", "a beginning"], ["hang"]))
        await other.until(characters=len("a beginning"))
        await tab.until(characters=20)
        balancer.drop()
        await other.until(received="(start)")
        await other.until(status="streaming")
        await other.until(characters=len("a beginning"))  # what is stopped before shows nothing of it
        await other.stop()
        await world.assert_whole(user, tab, await tab.settled())
        await world.until_turn(user, other.chat_id, "cancelled")
        view = await other.settled()
        assert (view.status, view.text) == ("ready", "a beginning")
        assert view.wire["connections"] == 2


async def test_what_is_asked_in_another_process_is_followed_live(world: World, user: str) -> None:
    """Two tabs run the lines of docs/clients.md, each at a node of its own."""
    with running_driver() as elsewhere:
        async with AsyncExitStack() as stack:
            tab = await stack.enter_async_context(world.tab(user, follow=True))
            await tab.ask(asked(["text", "first"]))
            messages = await world.messages(user, tab.chat_id)
            url, token = world.nodes[1].http, token_for(user)
            opened = open_tab(elsewhere, url, token, chat_id=tab.chat_id, messages=messages, follow=True)
            other = await stack.enter_async_context(opened)
            for number, (asking, following) in enumerate(((tab, other), (tab, other), (other, tab)), 2):
                gate = world.strings.name()
                await asking.send(asked(["text", WHOLE[:20]], ["gate", gate], ["text", WHOLE[20:]]))
                # Nothing was said to it, and the rest is not said yet.
                begun = await following.until(messages=2 * number, characters=20)
                assert (begun.text, begun.status) == (WHOLE[:20], "streaming")
                world.strings.open(gate)
                views = [await asking.settled(), await following.settled()]
                assert [(view.text, view.status, list(view.complaints)) for view in views] == [(WHOLE, "ready", [])] * 2
                assert await world.turns(user, tab.chat_id) == ["completed"] * number
            await tab.regenerate()
            again = await tab.settled()

            async def is_shown() -> bool:
                return (await other.view()).answer == again.answer

            await eventually(is_shown)
            views = [again, await other.settled()]
            loaded = await world.messages(user, tab.chat_id)
            for view in views:
                assert [message["id"] for message in view.messages] == [message["id"] for message in loaded]
                assert [said_in(message) for message in view.messages] == [said_in(message) for message in loaded]


async def test_heartbeats_that_are_asked_for_are_passed_over(world: World, user: str) -> None:
    async with world.tab(user, query="?heartbeats=true") as tab:
        await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
        await tab.until(characters=20)
        await tab.until(received="(heartbeat)")
        world.strings.open(user)
        view = await tab.settled()
        await world.assert_whole(user, tab, view)
        assert view.wire["received"][0] == "(ready)"
        assert view.wire["closed"] == []


async def test_a_frozen_node_is_left_and_its_turn_goes_on_at_another(world: World, user: str, tmp_path: Path) -> None:
    with running_node(world.database_url, tmp_path, environment_of(world.strings)) as freezing:
        async with AsyncExitStack() as stack:
            balancer = await stack.enter_async_context(running_balancer(freezing.port))
            opened = world.tab(user, balancer, query="?heartbeats=true", leaves=True)
            tab = await stack.enter_async_context(opened)
            await tab.send(asked(["text", WHOLE[:20]], ["gate", user], ["text", WHOLE[20:]]))
            await tab.until(characters=20, received="(ready)")
            balancer.ports[:] = [world.nodes[1].port]
            freezing.pause()
            world.strings.open(user)
            await tab.until(characters=len(WHOLE))
            view = await tab.settled()
            await world.assert_whole(user, tab, view)
            assert view.wire["connections"] > 1


@pytest.mark.parametrize("auth", ["handshake", "protocols", "frames", "ticket"])
async def test_a_websocket_is_authenticated_in_each_way(world: World, user: str, auth: str) -> None:
    async with world.balanced(user, auth=auth) as (tab, balancer):
        await tab.send(asked(paced(0.3)))
        await tab.until(characters=20)
        balancer.drop()
        await world.assert_whole(user, tab, await tab.settled())


@pytest.mark.parametrize("auth", ["handshake", "protocols", "frames"])
async def test_a_bad_token_is_an_error_that_is_shown(world: World, driver: Script, auth: str) -> None:
    token = token_for("eve", secret="x" * 64)
    async with open_tab(driver, world.nodes[0].http, token, auth=auth, reconnect=False) as tab:
        view = await tab.ask(asked(["text", "never"]))
        assert (view.status, view.text) == ("error", "")
        assert view.error


async def test_the_hook_of_react_shows_all_of_it(world: World, user: str) -> None:
    script = asked(*LOOK, paced(0.5))
    text = f"Look. {WHOLE}"

    def assert_shown(view: View) -> None:
        shown = [part["type"] for part in view.answer["parts"]]
        assert shown == ["step-start", "text", "dynamic-tool", "step-start", "text"]

    async with world.balanced(user, hook=True) as (tab, balancer):
        await tab.send(script)
        for characters in (10, 40, 80):
            await tab.until(characters=characters)
            balancer.drop()
        view = await tab.settled()
        await world.assert_whole(user, tab, view, text)
        assert_shown(view)
        messages = await world.messages(user, tab.chat_id)
        for loaded in (messages, messages[:1]):
            options = {"messages": loaded, "hook": True, "resume": True}
            async with world.tab(user, world.nodes[1], chat_id=tab.chat_id, **options) as other:
                await other.until(received="(end)")
                again = await other.settled()
                await world.assert_whole(user, other, again, text)
                assert_shown(again)
        await tab.send(asked(["text", "a beginning"], ["hang"]))
        await tab.until(characters=len("a beginning"), status="streaming")
        await tab.stop()
        await world.until_turn(user, tab.chat_id, "cancelled")
        await tab.regenerate()
