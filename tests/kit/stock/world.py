"""What stock clients are tested against: a driver, two nodes whose agent does what the question says, and Postgres."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import aiohttp
from yarl import URL

from tests.agents.scripted import DIRECTORY, Strings, eventually
from tests.agents.stock import AGENT
from tests.kit.harness import NodeProcess, sql, token_for
from tests.kit.npm import Script
from tests.kit.stock.balancer import Balancer, running_balancer
from tests.kit.stock.tabs import Tab, View, open_tab

TOKENS: Final = 40
WHOLE: Final = "".join(f"w{number} " for number in range(TOKENS))
# Options of a tab: which package, and over what.
CLIENTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "ws-7": {"face": "ws", "version": 7},
    "http-7": {"face": "http", "version": 7},
    "http-6": {"face": "http", "version": 6},
    "http-5": {"face": "http", "version": 5},
}
HTTP_CLIENTS: Final = {name: options for name, options in CLIENTS.items() if options["face"] == "http"}


def asked(*actions: Sequence[Any]) -> str:
    """A question to the scripted agent."""
    return json.dumps(actions)


def paced(seconds: float, text: str = "w{number} ") -> list[Any]:
    """Return the action that says WHOLE within some seconds."""
    return ["paced", TOKENS, text, seconds / TOKENS]


@dataclass(frozen=True)
class World:
    """Two nodes that share a database, and the driver of the tabs."""

    driver: Script
    nodes: Sequence[NodeProcess]
    database_url: str
    strings: Strings

    @asynccontextmanager
    async def tab(
        self, user: str, at: NodeProcess | Balancer | None = None, *, chat_id: str | None = None, **options: Any
    ) -> AsyncIterator[Tab]:
        """A tab at a node or behind a balancer."""
        url = (at or self.nodes[0]).http
        async with open_tab(self.driver, url, token_for(user), chat_id=chat_id, **options) as tab:
            yield tab

    @asynccontextmanager
    async def balanced(self, user: str, first: int = 0, **options: Any) -> AsyncIterator[tuple[Tab, Balancer]]:
        """A tab behind a balancer of its own, which begins with one of the nodes."""
        ports = [node.port for node in (*self.nodes[first:], *self.nodes[:first])]
        async with AsyncExitStack() as stack:
            balancer = await stack.enter_async_context(running_balancer(*ports))
            yield await stack.enter_async_context(self.tab(user, balancer, **options)), balancer

    async def request(self, method: str, user: str, chat_id: str, route: str, *, at: int = 0) -> tuple[int, Any]:
        """Status and JSON, where there is any, of a request to a chat."""
        url = f"{self.nodes[at].http}/api/chat/{quote(chat_id, safe='')}/{route}"
        headers = {"Authorization": f"Bearer {token_for(user)}"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, URL(url, encoded=True), headers=headers) as response,
        ):
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else None

    async def messages(self, user: str, chat_id: str, *, at: int = 0) -> list[dict[str, Any]]:
        """What a page loads when it is opened."""
        status, body = await self.request("GET", user, chat_id, "messages", at=at)
        assert status == 200, body
        messages: list[dict[str, Any]] = body["messages"]
        return messages

    async def stored(self, user: str, chat_id: str) -> list[tuple[str, str]]:
        """Role and status of the chat's messages, those of tools left out."""
        rows = await sql(
            self.database_url,
            "SELECT m.role, m.status FROM messages m JOIN conversations c ON c.id = m.conversation_id "
            "WHERE c.user_id = $1 AND c.client_id = $2 AND m.role <> 'tool' ORDER BY m.position",
            *(user, chat_id),
        )
        return [(row["role"], row["status"]) for row in rows]

    async def turns(self, user: str, chat_id: str) -> list[str]:
        """The status of each of the chat's turns."""
        rows = await sql(
            self.database_url,
            "SELECT t.status FROM turns t JOIN conversations c ON c.id = t.conversation_id "
            "WHERE c.user_id = $1 AND c.client_id = $2 ORDER BY t.created_at",
            *(user, chat_id),
        )
        return [row["status"] for row in rows]

    async def until_turn(self, user: str, chat_id: str, status: str) -> None:
        """Wait until the chat has turns and the last one has such a status."""

        async def has_status() -> bool:
            return (await self.turns(user, chat_id))[-1:] == [status]

        await eventually(has_status)

    async def assert_whole(self, user: str, tab: Tab, view: View, text: str = WHOLE) -> None:
        """The tab shows one question and one whole answer, and so does Postgres; nothing was wrong on the way."""
        assert view.text == text, view
        assert (view.status, view.roles) == ("ready", ["user", "assistant"]), view
        assert list(view.complaints) == []
        turns = await self.turns(user, tab.chat_id)
        assert turns == ["completed"], turns
        loaded = await self.messages(user, tab.chat_id, at=1)
        assert [message["id"] for message in loaded] == [message["id"] for message in view.messages]
        assert [said_in(message) for message in loaded] == [said_in(message) for message in view.messages]


def said_in(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def environment_of(strings: Strings) -> dict[str, str]:
    """The settings of a node."""
    return {
        "AGENT": AGENT,
        DIRECTORY: str(strings.directory),
        "LEASE_SECONDS": "1",
        "MAX_ATTEMPTS": "10",
        "HEARTBEAT_SECONDS": "1",
    }
