"""The chat page while nodes die, drain and freeze, and the network goes: what is shown stays, goes on, and is what is
stored in the end."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.agents.scripted import DIRECTORY, Strings, script_of
from tests.agents.stock import AGENT
from tests.kit.browser import NO_CONNECTION, Browser, Chat, Tab, expect, open_context, open_tab, until
from tests.kit.harness import NodeProcess, running_node, sql, token_for
from tests.kit.stock.balancer import Balancer, running_balancer

pytestmark = pytest.mark.asyncio(loop_scope="module")
TOKENS = 60
WHOLE = "".join(f"w{number} " for number in range(TOKENS))
PACED = script_of(("paced", TOKENS, "w{number} ", 0.025))  # a second and a half, and a takeover begins again
NAMES = itertools.count(1)


class Cluster:
    """Nodes on one database, whose agent does what the question says; those that have gone are replaced."""

    def __init__(self, database_url: str, directory: Path, stack: ExitStack) -> None:
        self.database_url = database_url
        self.strings = Strings(directory / "strings")
        self.nodes: list[NodeProcess] = []
        self._directory = directory
        self._stack = stack

    async def start(self, port: int | None = None) -> NodeProcess:
        """One more node, with a name of its own."""
        environment = {
            "AGENT": AGENT,
            DIRECTORY: str(self.strings.directory),
            "LEASE_SECONDS": "1",
            "MAX_ATTEMPTS": "10",
            "HEARTBEAT_SECONDS": "1",
            "NODE_NAME": f"node{next(NAMES)}",
        }
        starting = running_node(self.database_url, self._directory, environment, port=port)
        node = await asyncio.to_thread(self._stack.enter_context, starting)
        self.nodes.append(node)
        return node

    async def fill(self, count: int) -> None:
        """Start nodes until `count` of them live."""
        self.nodes = [node for node in self.nodes if node.process.poll() is None]
        for _ in range(count - len(self.nodes)):
            await self.start()

    async def answering(self) -> NodeProcess:
        """The node that runs the turn."""

        async def found() -> NodeProcess | None:
            running = [
                node
                for node in self.nodes
                if node.process.poll() is None and await asyncio.to_thread(node.metric, "anynode_turns_running") == 1
            ]
            return running[0] if len(running) == 1 else None

        node = await until(found)
        assert isinstance(node, NodeProcess)
        return node

    async def stored(self, user: str) -> list[tuple[str, str, str]]:
        """Role, text and status of a user's messages, without those of tools and those that are superseded."""
        rows = await sql(
            self.database_url,
            "SELECT role, content, status FROM messages WHERE user_id = $1 AND role <> 'tool'"
            " AND status <> 'superseded' ORDER BY conversation_id, position",
            user,
        )
        return [tuple(row) for row in rows]


def name_of(node: NodeProcess) -> str:
    """The name that the page calls a node by."""
    node_id: str = json.loads(node.get("/livez")[1])["node_id"]
    return node_id.rpartition("-")[0]


@pytest.fixture(scope="module")
def shared_cluster(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The nodes of all tests here."""
    with ExitStack() as stack:
        yield Cluster(module_database_url, tmp_path_factory.mktemp("nodes"), stack)


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(shared_cluster: Cluster) -> Cluster:
    """Two nodes that live."""
    await shared_cluster.fill(2)
    return shared_cluster


@pytest_asyncio.fixture(loop_scope="module")
async def balancer(cluster: Cluster) -> AsyncIterator[Balancer]:
    """The address of all nodes."""
    async with running_balancer(*(node.port for node in cluster.nodes)) as balancer:
        yield balancer


@asynccontextmanager
async def opened(
    browser: Browser, balancer: Balancer, user: str, conversation: str | None = None
) -> AsyncIterator[Chat]:
    """The page on a device of the user's, where in the end nothing has gone wrong but what tests do."""
    async with open_tab(browser) as tab:
        tab.expected.append(NO_CONNECTION)
        chat = Chat(tab)
        await chat.open(balancer.http, token_for(user), conversation)
        yield chat
        assert tab.unexpected == []


@pytest_asyncio.fixture(loop_scope="module")
async def chat(browser: Browser, balancer: Balancer, user: str) -> AsyncIterator[Chat]:
    """The page, whose texts are noted."""
    async with opened(browser, balancer, user) as chat:
        await chat.watch()
        yield chat


async def assert_whole(
    chat: Chat, cluster: Cluster, user: str, question: str = PACED, answer: str = WHOLE, *, status: str = "completed"
) -> None:
    """The page shows one question and one answer as they are stored, and at no time less than before, or more."""
    await chat.ended()
    await expect(chat.said).to_have_text([answer.rstrip()])
    assert await chat.shown() == [("user", question), ("assistant", answer.rstrip())]
    assert await cluster.stored(user) == [("user", question, "completed"), ("assistant", answer, status)]
    assert_grew(*await chat.watched(), answer)


def assert_grew(texts: Sequence[str], articles: int, answer: str) -> None:
    """The text was only ever the beginning of the answer, and longer each time."""
    assert [text for text in texts if not answer.startswith(text)] == []
    assert [(a, b) for a, b in itertools.pairwise(texts) if len(b) < len(a)] == []
    assert articles <= 2


async def turns(cluster: Cluster, user: str) -> list[str]:
    """The status of each of a user's turns."""
    statement = "SELECT t.status FROM turns t JOIN conversations c ON c.id = t.conversation_id WHERE c.user_id = $1"
    return [row["status"] for row in await sql(cluster.database_url, statement, user)]


# Nodes.


async def test_the_node_is_killed_that_answers(chat: Chat, cluster: Cluster, user: str) -> None:
    await chat.ask(PACED)
    await expect(chat.said).to_contain_text("w10 ")
    dying = await cluster.answering()
    name = await asyncio.to_thread(name_of, dying)
    await expect(chat.status).to_have_text(f"Connected to node {name}")
    dying.kill()
    (other,) = (node for node in cluster.nodes if node is not dying)
    continued = f"Reconnected: continued on node {await asyncio.to_thread(name_of, other)} (it was on node {name})"
    await expect(chat.status).to_have_text(continued)
    await assert_whole(chat, cluster, user)
    await expect(chat.status).to_have_text(continued)
    await chat.page.reload()
    await chat.ended()
    assert await chat.shown() == [("user", PACED), ("assistant", WHOLE.rstrip())]


async def test_a_node_is_drained(chat: Chat, cluster: Cluster, user: str) -> None:
    await chat.ask(PACED)
    await expect(chat.said).to_contain_text("w10 ")
    leaving = await cluster.answering()
    await asyncio.to_thread(leaving.stop)
    await expect(chat.status).to_have_text(re.compile("^Reconnected: continued on node "))
    await assert_whole(chat, cluster, user)


async def test_an_answer_that_begins_again_is_shown_as_it_was_until_it_has_caught_up(
    chat: Chat, cluster: Cluster, user: str
) -> None:
    first, second = cluster.strings.name(), cluster.strings.name()
    question = script_of(
        ("text", "Hear "), ("gate", first), ("text", "this "), ("gate", second), ("text", "to the end.")
    )
    await chat.page.clock.install()
    cluster.strings.open(first)
    await chat.ask(question)
    await expect(chat.said).to_have_text("Hear this")
    (cluster.strings.directory / first).unlink()
    (await cluster.answering()).kill()
    await expect(chat.status).to_have_text(re.compile("^Reconnected: continued on node "))
    await cluster.answering()  # which says no more than the beginning
    await chat.page.clock.fast_forward(1900)  # less than a silence after which the page leaves a node
    await expect(chat.said).to_have_text("Hear this")
    cluster.strings.open(first)
    cluster.strings.open(second)
    await assert_whole(chat, cluster, user, question, "Hear this to the end.")


async def test_text_that_a_takeover_has_changed_is_not_shown_for_long(chat: Chat, cluster: Cluster, user: str) -> None:
    gate = cluster.strings.name()
    await chat.ask(script_of(("text", "{attempt} is the attempt"), ("hold", gate, 1), ("gate", gate), ("text", ".")))
    await expect(chat.said).to_have_text("1 is the attempt")
    (await cluster.answering()).kill()
    await expect(chat.said).to_have_text("2 is the attempt")
    cluster.strings.open(gate)
    await chat.ended()
    await expect(chat.said).to_have_text("2 is the attempt.")


async def test_a_frozen_node_is_left(chat: Chat, cluster: Cluster, user: str) -> None:
    await chat.ask(PACED)
    await expect(chat.said).to_contain_text("w10 ")
    frozen = await cluster.answering()
    frozen.pause()
    try:
        await expect(chat.status).to_have_text(re.compile("^Reconnected: continued on node "))
        await assert_whole(chat, cluster, user)
    finally:
        frozen.kill()


async def test_all_nodes_go_and_are_back(chat: Chat, cluster: Cluster, user: str) -> None:
    await chat.ask(PACED)
    await expect(chat.said).to_contain_text("w10 ")
    ports = [node.port for node in cluster.nodes]
    for node in cluster.nodes:
        node.kill()
    await expect(chat.status).to_have_text("Connection lost. Reconnecting…")
    await expect(chat.said).to_contain_text("w10 ")
    for port in ports:
        await cluster.start(port)
    await expect(chat.status).to_have_text(re.compile("^Reconnected: continued on node "))
    await assert_whole(chat, cluster, user)


async def test_a_node_dies_during_a_tool_call(chat: Chat, cluster: Cluster, user: str) -> None:
    gate = cluster.strings.name()
    question = script_of(
        *(("text", "Look. "), ("call", "a", "search", {"query": "x"}), ("mark", f"{gate}-called"), ("gate", gate)),
        *(("result", "a", "search", "found it"), ("step",), ("text", "There.")),
    )
    await chat.ask(question)
    tool = chat.answer.locator("summary")
    await expect(tool).to_have_text("Calls search")
    (await cluster.answering()).kill()

    async def is_called_again() -> bool:
        return len(cluster.strings.marks(f"{gate}-called")) == 2

    await until(is_called_again)
    cluster.strings.open(gate)
    await chat.ended()
    await expect(chat.said).to_have_text(["Look.", "There."])
    await expect(tool).to_have_text(["Called search"])
    await tool.click()
    await expect(chat.answer.get_by_text("found it")).to_be_visible()
    assert_grew(*await chat.watched(), "Look.There.")
    assert await turns(cluster, user) == ["completed"]


# Questions.


async def test_a_question_at_the_moment_of_death_is_asked_once(chat: Chat, cluster: Cluster, user: str) -> None:
    """The node has it, and never reads it."""
    status = (await chat.status.get_attribute("title")) or ""
    (dying,) = [n for n in cluster.nodes if await asyncio.to_thread(name_of, n) == status.rpartition("-")[0]]
    dying.pause()
    await chat.ask(PACED)
    await expect(chat.questions).to_have_count(1)
    dying.kill()
    await assert_whole(chat, cluster, user)
    assert await turns(cluster, user) == ["completed"]


@pytest.mark.parametrize("at", [0, b'{"type":"start"', b'"delta":'], ids=["accepted", "begun", "said"])
async def test_a_question_whose_answer_is_cut_off_is_asked_once(
    chat: Chat, cluster: Cluster, balancer: Balancer, user: str, at: int | bytes
) -> None:
    balancer.cut(at)
    await chat.ask(PACED)
    await assert_whole(chat, cluster, user)
    assert balancer.has_cut
    assert await turns(cluster, user) == ["completed"]


# The network.


async def test_the_page_goes_offline_and_comes_back(
    chat: Chat, cluster: Cluster, balancer: Balancer, user: str
) -> None:
    await chat.ask(PACED)
    await expect(chat.said).to_contain_text("w5 ")
    await chat.page.context.set_offline(True)
    balancer.drop()  # sockets that are open outlive the browser's own switch
    await expect(chat.status).to_have_text("Connection lost. Reconnecting…")

    async def has_ended() -> bool:
        return await turns(cluster, user) == ["completed"]

    await until(has_ended)
    await expect(chat.said).not_to_contain_text("w59")
    await chat.page.context.set_offline(False)
    await assert_whole(chat, cluster, user)
    await chat.ask(script_of(("text", "Well?")))
    await chat.ended(2)
    await expect(chat.said).to_have_text("Well?")


# Devices.


@pytest.mark.parametrize("is_other_device", [False, True], ids=["tab", "device"])
async def test_others_follow_what_is_asked_stopped_and_asked_again(
    browser: Browser, balancer: Balancer, cluster: Cluster, user: str, is_other_device: bool
) -> None:
    async with AsyncExitStack() as stack:
        context = await stack.enter_async_context(open_context(browser))
        other_context = await stack.enter_async_context(open_context(browser)) if is_other_device else context
        asking = Chat(Tab(await context.new_page()))
        following = Chat(Tab(await other_context.new_page()))
        await asking.open(balancer.http, token_for(user))
        await asking.ask(script_of(("text", "Hello.")))
        await asking.ended()
        await following.open(balancer.http, token_for(user), await asking.conversation())
        await expect(following.said).to_have_text("Hello.")

        gate = cluster.strings.name()
        await asking.ask(script_of(("text", "Hear "), ("gate", gate), ("text", "this.")))
        for chat in (asking, following):
            await expect(chat.said).to_have_text("Hear")
            await expect(chat.stop).to_be_visible()
        cluster.strings.open(gate)
        for chat in (asking, following):
            await chat.ended(2)
            await expect(chat.said).to_have_text("Hear this.")

        await following.ask(script_of(("paced", 500, "w{number} ", 0.02)))  # the other way round
        await expect(asking.said).to_contain_text("w5 ")
        await asking.stop.click()
        for chat in (asking, following):
            await chat.ended(3)
            await expect(chat.answer).to_contain_text("Stopped.")
        *_, (_, said, status) = await cluster.stored(user)
        assert status == "cancelled"
        for chat in (asking, following):
            assert (await chat.shown())[-1] == ("assistant", said.rstrip())

        (cluster.strings.directory / gate).unlink()
        await following.ask(script_of(("text", "Once "), ("gate", gate), ("text", "more.")))
        cluster.strings.open(gate)
        await following.ended(4)
        await expect(asking.said).to_have_text("Once more.")
        await asking.ended(4)
        (cluster.strings.directory / gate).unlink()
        await asking.again.click()
        for chat in (asking, following):
            await expect(chat.said).to_have_text("Once")
            await expect(chat.answers).to_have_count(4)
        cluster.strings.open(gate)
        for chat in (asking, following):
            await chat.ended(4)
            await expect(chat.said).to_have_text("Once more.")
            assert chat.tab.unexpected == []
        assert await asking.shown() == await following.shown()
        assert len(await asking.shown()) == len(await cluster.stored(user)) == 8


async def test_who_only_follows_recovers_too(
    chat: Chat, browser: Browser, balancer: Balancer, cluster: Cluster, user: str
) -> None:
    gate = cluster.strings.name()
    question = script_of(("text", "Hear "), ("gate", gate), ("paced", TOKENS, "w{number} ", 0.025))
    await chat.ask(question)
    await expect(chat.said).to_have_text("Hear")
    async with opened(browser, balancer, user, await chat.conversation()) as following:
        await following.watch()
        await expect(following.said).to_have_text("Hear")
        cluster.strings.open(gate)
        await expect(following.said).to_contain_text("w5 ")
        (await cluster.answering()).kill()
        for each in (chat, following):
            await assert_whole(each, cluster, user, question, f"Hear {WHOLE}")
