"""The conversation store for Python code: conversations and messages of users, and whole turns without a node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

from msgspec import UNSET, UnsetType

from anynode.models.conversations import get_or_create_conversation
from anynode.models.database import Database
from anynode.models.ids import uuid7
from anynode.models.rules import visible
from anynode.models.text import is_storable
from anynode.server.agents.agent import Agent
from anynode.server.agents.load import is_agent
from anynode.server.agents.run_agent import RunAgent, from_run_agent
from anynode.server.engine.admission import new_message_id
from anynode.server.engine.node import Node
from anynode.server.engine.postgres_errors import unavailable_as_client_error
from anynode.server.errors import InvalidFrame, NotFound
from anynode.server.protocol.bodies import Chat, ConversationChanges, NewConversation, NewMessages
from anynode.server.protocol.conversation_fields import stored_fields
from anynode.server.protocol.frames import MessageSend
from anynode.server.settings import Settings
from anynode.server.startup import connect_database
from anynode.server.store.chats import ChatAnswer
from anynode.server.store.given import ConversationId, check_number, check_user_id, decoded, ids_of, is_user_id, posted
from anynode.server.store.messages import message_for_model
from anynode.server.store.parts import Parts

if TYPE_CHECKING:
    from anynode.models.tables import Conversation, Message

_DEFAULTS: Final = Settings()

SKIPPED_MAX: Final = 1_000_000
LISTED_MAX: Final = 1000  # conversations of one list
HISTORY_MAX: Final = 100_000  # messages of one history
POOL_MAX: Final = 1000
LEASE_SECONDS_MIN: Final = 1  # a shorter one runs out while its process is merely busy


class Store:
    """The conversations of all users in one database, for Python code.

    Open it with `async with Store(url) as store`, where `url` is that of a migrated Postgres; any number of stores and
    nodes may use one database at once. An agent and a tool of a node find an open one in `turn.store`. A store is used
    in one event loop, by any number of tasks.

    Every method is given a user, and its statement filters by that user. Somebody else's conversation is as one that
    does not exist: `get_conversation` returns None, `delete_conversation` returns False, those that make one where
    there is none make the user's own, and all others raise NotFound. A conversation's id is ours (a UUID, or its text)
    or the application's own text of 1 to 128 printable characters.

    Conversations and messages are returned as rows of `anynode.models.tables`: read their fields, and change them with
    the methods here. All methods raise DatabaseUnavailable while Postgres does not answer, after having tried for
    seconds; and InvalidFrame or MessageTooLarge for arguments that cannot be stored, with a message that says why.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_max: int = 5,
        history_messages_max: int = _DEFAULTS.history_messages_max,
        system_prompt: str | None = None,
        lease_seconds: float = _DEFAULTS.lease_seconds,
        agent_timeout_seconds: float = _DEFAULTS.agent_timeout_seconds,
    ) -> None:
        """Make a store that is not open yet.

        `pool_max` bounds the connections for requests; `chat` takes three more. `history_messages_max` is the number of
        the newest messages that the agents of `chat` get, and `system_prompt` is that of conversations without one.
        After `lease_seconds` (at least 1) others may end or go on with a turn whose process has died. An agent that is
        silent for `agent_timeout_seconds` fails; `run_agent` is silent until it returns. Raises InvalidFrame for a
        number out of its bounds.
        """
        check_number("pool_max", pool_max, 1, POOL_MAX)
        check_number("history_messages_max", history_messages_max, 1, HISTORY_MAX)
        if not lease_seconds >= LEASE_SECONDS_MIN:
            raise InvalidFrame(f"lease_seconds must be at least {LEASE_SECONDS_MIN}, not {lease_seconds!r}")
        if not agent_timeout_seconds > 0:
            raise InvalidFrame(f"agent_timeout_seconds must be more than 0, not {agent_timeout_seconds!r}")
        self._url = url
        self._settings = Settings(
            database_pool_max=pool_max,
            history_messages_max=history_messages_max,
            system_prompt=system_prompt,
            lease_seconds=lease_seconds,
            agent_timeout_seconds=agent_timeout_seconds,
        )
        self._opened: Parts | None = None
        self._agent: Agent | None = None
        self._is_owner = True

    @classmethod
    def in_node(cls, settings: Settings, database: Database, agent: Agent) -> Store:
        """Return the store of a node, on the node's own connections; `agent` is what `chat` asks by default."""
        store = cls("")
        store._settings, store._agent, store._is_owner = settings, agent, False
        store._open(database)
        return store

    async def __aenter__(self) -> Self:
        """Connect. Raises ConfigurationError where the URL, the login or the schema is wrong, and DatabaseUnavailable
        where Postgres does not answer."""
        pool_max = self._settings.database_pool_max
        with unavailable_as_client_error():
            database = await connect_database(self._url, pool_max=pool_max, source="the Store's URL")
        self._open(database)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the turns that still run here, which keeps what they have said, and close the connections."""
        parts, self._opened = self._opened, None
        if parts is None:
            return
        await parts.chats.close()
        if self._is_owner:
            await parts.database.close()

    def _open(self, database: Database) -> None:
        self._opened = Parts(database, Node(self._settings, database, None, store=self))

    @property
    def _parts(self) -> Parts:
        """The parts of an open store. Raises RuntimeError where it is not open."""
        if self._opened is None:
            raise RuntimeError("The store is not open: use it inside `async with Store(url) as store`.")
        return self._opened

    # Conversations.

    async def create_conversation(
        self,
        user_id: str,
        title: str | None = None,
        system_prompt: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Make a conversation. Without a title (at most 200 characters) it gets one from its first question."""
        fields = self._new_fields(user_id, title=title, system_prompt=system_prompt, metadata=metadata)
        made = await self._parts.node.conversations.create(
            user_id, title=fields["title"], system_prompt=fields["system_prompt"], metadata=fields["metadata"]
        )
        return await self._found(made.id, user_id)

    async def get_conversation(self, conversation_id: ConversationId, user_id: str) -> Conversation | None:
        """Return a conversation, or None where the user has none with this id."""
        text, id = ids_of(conversation_id)
        if not is_user_id(user_id) or not is_storable(text):
            return None
        return await self._parts.rows.conversation(user_id, text, id)

    async def get_or_create_conversation(
        self, conversation_id: ConversationId | None, user_id: str, title: str | None = None
    ) -> Conversation:
        """Return a conversation. Where there is none with this id it is made under it, and without an id (None) under a
        new one.

        A UUID that no conversation has becomes the new conversation's `id`; any other text becomes its `client_id`, and
        so does a UUID that is taken by somebody else. Any number of tasks, processes and nodes may do this at once.
        """
        if conversation_id is None:
            return await self.create_conversation(user_id, title)
        if (found := await self.get_conversation(conversation_id, user_id)) is not None:
            return found
        text, wanted_id = ids_of(conversation_id)
        fields = self._new_fields(user_id, title=title, client_id=text)
        row = None
        with unavailable_as_client_error():
            for client_id in [text] if wanted_id is None else [None, str(wanted_id)]:
                row, _ = await get_or_create_conversation(
                    self._parts.database,
                    user_id,
                    conversation_id=uuid7(),
                    client_id=client_id,
                    wanted_id=wanted_id,
                    title=fields["title"],
                    system_prompt=None,
                    metadata="{}",
                    created_at=datetime.now(UTC),
                    limits=None,
                )
                if row is not None:
                    break
        if row is None:
            raise NotFound
        return await self._found(row["id"], user_id)

    async def list_conversations(self, user_id: str, skip: int = 0, limit: int = 20) -> list[Conversation]:
        """Return at most `limit` (1 to 1,000) conversations after the first `skip`, newest activity first."""
        check_number("skip", skip, 0, SKIPPED_MAX)
        check_number("limit", limit, 1, LISTED_MAX)
        return await self._parts.rows.conversations(user_id, skip=skip, limit=limit) if is_user_id(user_id) else []

    async def update_conversation(
        self,
        conversation_id: ConversationId,
        user_id: str,
        *,
        title: str | UnsetType | None = UNSET,
        system_prompt: str | UnsetType | None = UNSET,
        metadata: Mapping[str, Any] | UnsetType = UNSET,
    ) -> Conversation:
        """Set the fields that are given, and return the conversation. Raises NotFound."""
        given = {"title": title, "system_prompt": system_prompt, "metadata": metadata}
        changes = self._fields(
            {name: value for name, value in given.items() if value is not UNSET}, ConversationChanges
        )
        found = await self._found(conversation_id, user_id)
        await self._parts.node.conversations.update(user_id, found.id, changes)
        return await self._found(found.id, user_id)

    async def delete_conversation(self, conversation_id: ConversationId, user_id: str) -> bool:
        """Delete a conversation with its messages, and stop the turn that runs in it. Return whether there was one."""
        found = await self.get_conversation(conversation_id, user_id)
        if found is None:
            return False
        try:
            await self._parts.node.delete(user_id, found.id)
        except NotFound:  # somebody else was faster
            return False
        return True

    # Messages.

    async def add_message(
        self,
        conversation_id: ConversationId,
        user_id: str,
        role: str,
        content: str,
        tool_name: str | None = None,
        tool_call_id: str | None = None,
        tool_calls: Sequence[Mapping[str, Any]] | None = None,
    ) -> Message:
        """Append a message, ask no agent, and return the message.

        `role` is `system` (only the first message), `user`, `assistant` or `tool`. An assistant's message may have
        `tool_calls`, as in the chat completions API; a tool's message has the `tool_call_id` of one of them. Raises
        RoleOrder where a message of this role may not come next, ConversationBusy while a turn runs, and NotFound.
        """
        given = {"role": role, "content": content, "tool_name": tool_name, "tool_call_id": tool_call_id}
        calls = None if tool_calls is None else list(tool_calls)
        (added,) = await self.save_conversation_messages(conversation_id, user_id, [{**given, "tool_calls": calls}])
        return added

    async def save_conversation_messages(
        self, conversation_id: ConversationId, user_id: str, messages: Sequence[Any]
    ) -> list[Message]:
        """Append 1 to 2,000 messages, all or none, and return them. The conversation's `updated_at` moves.

        A message is a dict with the arguments of `add_message` (`role`, `content`, …), or a row of a store. Raises what
        `add_message` raises.
        """
        given = decoded({"messages": [posted(message) for message in messages]}, NewMessages)
        found = await self._found(conversation_id, user_id)
        added, _ = await self._parts.node.append(user_id, found.id, given.messages)
        return await self._parts.rows.messages(user_id, [each.id for each in added])

    async def get_messages(self, conversation_id: ConversationId, user_id: str) -> AsyncIterator[Message]:
        """Yield all messages of a conversation, oldest first: `async for message in store.get_messages(…)`.

        They are read in pages of at most 500 messages and 2 MiB, so memory stays small however many there are. Answers
        that were superseded are among them (`message.status`). Raises NotFound before the first one.
        """
        found = await self._found(conversation_id, user_id)
        position = 0
        while page := await self._parts.rows.page(user_id, found.id, position):
            for message in page:
                yield message
            position = page[-1].position

    async def get_conversation_history(
        self, conversation_id: ConversationId, user_id: str, limit: int = 50
    ) -> list[Message]:
        """Return the newest `limit` (1 to 100,000) messages, oldest first, without superseded answers. Raises
        NotFound."""
        check_number("limit", limit, 1, HISTORY_MAX)
        found = await self._found(conversation_id, user_id)
        return await self._parts.rows.newest(user_id, found.id, limit)

    async def get_conversation_context(
        self, conversation_id: ConversationId, user_id: str, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Return what a model is told of a conversation: dicts with `role` and `content`, the system prompt first.

        These are the messages that an agent gets: the newest `limit` (by default `history_messages_max`), from a user's
        message on, without superseded answers and without turns that ended before they said anything. Messages with
        calls have `tool_calls`, and their results `tool_call_id`. Raises NotFound.
        """
        limit = self._settings.history_messages_max if limit is None else limit
        check_number("limit", limit, 1, HISTORY_MAX)
        found = await self._found(conversation_id, user_id)
        first = await self._parts.rows.leading_system_message(user_id, found.id)
        prompt = (found.system_prompt or self._settings.system_prompt) if first is None else first.content
        newest = await self._parts.rows.newest(user_id, found.id, limit)
        context = [message_for_model(message) for message in visible(newest)]
        return [{"role": "system", "content": prompt}, *context] if prompt else context

    # Turns.

    async def load_conversation_history(
        self, user_id: str, conversation_id: ConversationId | None = None
    ) -> tuple[Conversation, list[Message]]:
        """Return a conversation, which is made where there is none, with its newest `history_messages_max` messages."""
        conversation = await self.get_or_create_conversation(conversation_id, user_id)
        return conversation, await self._parts.rows.newest(
            user_id, conversation.id, self._settings.history_messages_max
        )

    async def chat(
        self,
        user_id: str,
        message: str,
        conversation_id: ConversationId | None = None,
        agent: Agent | RunAgent | None = None,
        *,
        message_id: str | None = None,
    ) -> ChatAnswer:
        """Ask a question, let an agent answer it in this process, and return the answer; both are stored.

        `agent` is an `async def run_agent(messages)` that returns `(response, tool_calls)`, or an agent of Anynode (an
        async generator function that is given a `Turn`). In a node it is by default the node's agent. The conversation
        is made where there is none with this id, and without an id (None).

        The question is committed before the agent is asked. The answer is committed as it comes, so that any node shows
        it live; it can be stopped from there, and then what was said is returned. Cancelling the call stops the turn
        too. Where this process dies, the question stays: call again with the same `message_id`, in any process, and the
        agent goes on with the same turn, or the stored answer is returned. Otherwise the turn ends as failed once its
        lease has run out. A `message_id` has 1 to 128 printable characters, and names one message of the user.

        Raises AgentFailed where the agent fails, ConversationBusy while another turn runs in the conversation, and
        RoleOrder where a question may not come next.
        """
        agent = agent or self._agent
        if agent is None:
            raise TypeError("chat needs an agent: an `async def run_agent(messages)`, or an agent of Anynode")
        answer: Any = agent if is_agent(agent) else from_run_agent(agent)  # type: ignore[arg-type]
        fields = {"message": message} if message_id is None else {"message": message, "message_id": message_id}
        check_user_id(user_id)
        question = decoded(fields, Chat)
        found = None if conversation_id is None else await self.get_or_create_conversation(conversation_id, user_id)
        frame = MessageSend(
            question.message_id or new_message_id(), question.message, None if found is None else found.id
        )
        return await self._parts.chats.ask(user_id, frame, answer)

    # Reports.

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let the models of `anynode.models.tables` read this database while the context lasts, in the current task:

            with store.reading():
                newest = await Conversation.filter(user_id="ada").order_by("-updated_at").first()

        They use the store's connections; other models go on using those of the application. What would write raises
        TypeError, and so does a raw query that is no SELECT. A SELECT that calls a function which writes is not found
        out. Queries raise DatabaseUnavailable.
        """
        with self._parts.rows.reading():
            yield

    async def _found(self, conversation_id: ConversationId, user_id: str) -> Conversation:
        found = await self.get_conversation(conversation_id, user_id)
        if found is None:
            raise NotFound
        return found

    # What is given.

    def _new_fields(self, user_id: str, **given: Any) -> dict[str, Any]:
        """Return a new conversation's fields as the database takes them. Raises InvalidFrame or MessageTooLarge."""
        check_user_id(user_id)
        return self._fields({name: value for name, value in given.items() if value is not None}, NewConversation)

    def _fields(self, given: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
        return stored_fields(decoded(given, kind), system_prompt_bytes_max=self._settings.message_bytes_max)
