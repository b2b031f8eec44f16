"""REST: messages that come without a turn, in the right order of roles; their events; pages; export and import."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest

from tests.agents.scripted import Strings, eventually, script_of
from tests.conftest import StartNode
from tests.kit.harness import TERMINAL, NodeProcess, running_node, socket_to, sql
from tests.kit.rest import MISSING, Event, Reply, Rest, frames_of, rest_to

Nodes = Sequence[NodeProcess]
Message = dict[str, Any]
UUID = uuid.UUID
FIELDS = {"id", "role", "content", "tool_calls", "tool_name", "tool_call_id", "status", "turn_id", "created_at"}
QUICK = script_of(("text", "quick"))


@pytest.fixture(scope="module")
def nodes(module_database_url: str, strings: Strings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    directory = tmp_path_factory.mktemp("nodes")
    with ExitStack() as stack:
        yield [stack.enter_context(running_node(module_database_url, directory, strings.environment)) for _ in range(2)]


def system(content: str = "s") -> Message:
    return {"role": "system", "content": content}


def user_says(content: str = "q") -> Message:
    return {"role": "user", "content": content}


def assistant(content: str | None = "a", *calls: str) -> Message:
    if not calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content, "tool_calls": [call(id) for id in calls]}


def call(id: str) -> Message:
    return {"id": id, "type": "function", "function": {"name": f"tool-{id}", "arguments": '{"n": 1}'}}


def tool(id: str, content: str = "r") -> Message:
    return {"role": "tool", "tool_call_id": id, "content": content}


def essence(message: Message) -> Message:
    """A stored message as it was posted."""
    kept = {name: value for name, value in message.items() if name in ("role", "tool_calls", "tool_call_id") and value}
    return {**kept, "content": message["content"]}


async def export(rest: Rest, id: str, **query: Any) -> list[Message]:
    return await rest.messages(id, format="openai", **query)


async def assert_gapless(database_url: str, id: str) -> None:
    """Positions and seqs have no gap, and each message has its one event."""
    positions = await sql(database_url, "SELECT position FROM messages WHERE conversation_id = $1 ORDER BY 1", UUID(id))
    assert [row["position"] for row in positions] == list(range(1, len(positions) + 1))
    events = await sql(database_url, "SELECT seq FROM events WHERE conversation_id = $1 ORDER BY 1", UUID(id))
    ((last_seq,),) = await sql(database_url, "SELECT last_seq FROM conversations WHERE id = $1", UUID(id))
    assert [row["seq"] for row in events] == list(range(1, last_seq + 1))


# One and many.


async def test_a_message_is_appended_as_it_was_given(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        given = [
            system("Be kind. \u2615"),
            user_says("  spaces stay \n"),
            assistant(None, "1", "ö-2"),
            {**tool("ö-2", ""), "tool_name": "another name"},
            tool("1", '{"a": "\\u00e4"}'),
            assistant(""),
            {"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]},
            {"role": "assistant", "content": [{"text": "also"}], "tool_calls": None},
        ]
        replies = [await client.append(id, each) for client, each in zip([rest, elsewhere] * 4, given, strict=True)]
        messages = [reply.expect(201) for reply in replies]
        assert await elsewhere.messages(id) == messages
    for message in messages:
        assert message.keys() == FIELDS
        assert (message["status"], message["turn_id"]) == ("completed", None)
    expected = [*given[:6], user_says("in parts"), assistant("also")]
    assert [message["content"] for message in messages] == [each["content"] or "" for each in expected]
    assert [message["role"] for message in messages] == [each["role"] for each in expected]
    assert messages[2]["tool_calls"] == given[2]["tool_calls"]
    assert [message["tool_calls"] for message in messages if message is not messages[2]] == [None] * 7
    # A result knows its tool from the call.
    assert [(message["tool_call_id"], message["tool_name"]) for message in messages[3:5]] == [
        ("ö-2", "another name"),
        ("1", "tool-1"),
    ]


async def test_a_list_is_appended_in_its_order_and_says_where_the_journal_ends(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    given = [system(), user_says("1"), assistant("2", "c"), tool("c", "3"), assistant("4"), user_says("5")]
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        before = (await rest.get(f"/conversations/{id}")).expect(200)
        body = (await rest.append(id, *given)).expect(201)
        after = (await rest.get(f"/conversations/{id}")).expect(200)
        assert body.keys() == {"messages", "seq"}
        assert [essence(message) for message in body["messages"]] == given
        assert await rest.messages(id) == body["messages"]
        assert body["seq"] == after["seq"] == before["seq"] + 6
        assert after["updated_at"] > before["updated_at"]
        async with rest.events(id, before["seq"]) as events:
            frames = frames_of([event for _ in given if (event := await events.next()) is not None])
    assert [frame["type"] for frame in frames] == ["message.created"] * 6
    assert [frame["message"] for frame in frames] == body["messages"]
    await assert_gapless(module_database_url, id)


async def test_a_list_of_one_is_answered_as_a_list(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        path = f"/conversations/{await rest.create()}/messages"
        body = (await rest.post(path, {"messages": [user_says()]})).expect(201)
        assert (len(body["messages"]), body["seq"]) == (1, 1)


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (user_says(" "), 422),
        ({"role": "robot", "content": "x"}, 422),
        (user_says("x" * 65_537), 413),
        (system(), 409),
        (tool("nothing"), 409),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_all_or_none(
    nodes: Nodes, module_database_url: str, user: str, bad: Message, status: int, place: int
) -> None:
    given = [user_says("2"), assistant("3")]
    given.insert(place, bad)
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, user_says("0"), assistant("1"))).expect(201)
        before = (await rest.get(f"/conversations/{id}")).expect(200)
        reply = await rest.append(id, *given)
        assert reply.status == status
        assert f"messages[{place}]" in reply.message
        assert [message["content"] for message in await rest.messages(id)] == ["0", "1"]
        assert (await rest.get(f"/conversations/{id}")).expect(200) == before
    await assert_gapless(module_database_url, id)


async def test_a_thousand_messages_are_appended_at_once_and_heard_in_order(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    given = [user_says(str(number)) if number % 2 == 0 else assistant(str(number)) for number in range(1000)]
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        async with elsewhere.events(id, 0) as events:
            assert (await rest.append(id, *given)).expect(201)["seq"] == 1000
            heard = [event for _ in given if (event := await events.next()) is not None]
        assert [frame["message"]["content"] for frame in frames_of(heard)] == [each["content"] for each in given]
        assert [id for id, _ in heard] == list(range(1, 1001))
        assert (await rest.proceed(id, QUICK)).expect(200)["response"] == "quick"
    await assert_gapless(module_database_url, id)


# The grammar, from the words of the design: `system` only first and at most once; then `user`, then `assistant`,
# strictly in turn; inside a turn an assistant message with tool calls is followed by one `tool` message for each call,
# then by assistant again.


def is_in_order(messages: Sequence[Message]) -> bool:
    """Whether this is the beginning of a conversation, read from its start."""
    rest = list(messages)
    if rest and rest[0]["role"] == "system":
        rest.pop(0)
    while rest:
        if rest.pop(0)["role"] != "user":
            return False
        while rest:  # the answer
            answer = rest.pop(0)
            if answer["role"] != "assistant":
                return False
            wanted = [each["id"] for each in answer.get("tool_calls") or ()]
            if len(set(wanted)) < len(wanted):
                return False
            if not wanted:
                break
            while wanted and rest:
                result = rest.pop(0)
                if result["role"] != "tool" or result["tool_call_id"] not in wanted:
                    return False
                wanted.remove(result["tool_call_id"])
    return True


ROLES = ("system", "user", "assistant", "tool")


def any_message(dice: random.Random, number: int) -> Message:
    """Anything that is well-formed."""
    match dice.choice((*ROLES, "assistant", "tool")):
        case "system":
            return system(f"s{number}")
        case "user":
            return user_says(f"q{number}")
        case "tool":
            return tool(dice.choice("abc"), f"r{number}")
        case _:
            return assistant(f"a{number}", *dice.choices("abc", k=dice.choice((0, 0, 1, 2))))


def may_come(so_far: Sequence[Message]) -> set[str]:
    """The roles that the grammar lets come next."""
    trials = [system(), user_says(), assistant(), *(tool(id) for id in "abc")]
    return {trial["role"] for trial in trials if is_in_order([*so_far, trial])}


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_walk_is_taken_exactly_as_far_as_the_grammar_goes(
    nodes: Nodes, module_database_url: str, user: str, seed: int
) -> None:
    dice = random.Random(seed)
    so_far: list[Message] = []
    outcomes = {True: 0, False: 0}
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        for step in range(120):
            given = [any_message(dice, 10 * step + number) for number in range(dice.choice((1, 1, 1, 2, 3)))]
            if dice.random() < 0.5:  # else hardly anything would get far
                given = [each for each in [any_message(dice, step) for _ in range(40)] if is_in_order([*so_far, each])][
                    :1
                ]
            is_right = is_in_order([*so_far, *given])
            reply = await dice.choice((rest, elsewhere)).append(id, *given)
            outcomes[is_right] += 1
            if is_right:
                assert reply.status == 201, (so_far, given, reply)
                so_far += given
                continue
            assert reply.refusal == (409, "role_order"), (so_far, given, reply)
            good = next(number for number in range(len(given)) if not is_in_order([*so_far, *given[: number + 1]]))
            assert ("messages[" in reply.message) == (len(given) > 1)
            assert len(given) == 1 or f"messages[{good}]:" in reply.message
            allowed = may_come([*so_far, *given[:good]])
            if "expected: " in reply.message:
                assert set(reply.message.split("expected: ")[1].rstrip(".").split(" or ")) == allowed
            elif "is pending; pending: " in reply.message:
                assert allowed == {"tool"}
            else:  # the one thing that is wrong with a message alone
                assert "same id" in reply.message
        stored = await rest.messages(id, limit=1000)
    assert [essence(message) for message in stored] == so_far
    assert min(outcomes.values()) > 15, outcomes
    await assert_gapless(module_database_url, id)


@pytest.mark.parametrize("is_pending", [False, True])
async def test_the_results_of_calls_come_in_any_order_but_each_once(
    nodes: Nodes, user: str, *, is_pending: bool
) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, user_says(), assistant(None, "a", "b", "c"), tool("c"))).expect(201)
        if is_pending:
            for wrong in (tool("c"), tool("d"), assistant(), user_says(), system(), assistant(None, "d")):
                reply = await rest.append(id, wrong)
                assert reply.refusal == (409, "role_order")
            assert reply.message.endswith("expected: tool.")
            return
        for right in (tool("a"), tool("b")):
            (await rest.append(id, right)).expect(201)
        assert (await rest.append(id, tool("a"))).refusal == (409, "role_order")
        assert (await rest.append(id, user_says())).refusal == (409, "role_order")
        # The same ids may come again with the next calls.
        (await rest.append(id, assistant(None, "a"), tool("a"), assistant("done"), user_says())).expect(201)


async def test_appending_goes_on_behind_a_turn_and_a_turn_behind_what_was_appended(nodes: Nodes, user: str) -> None:
    tools = script_of(("call", "1", "f", {}), ("result", "1", "f", "x"), ("text", "done"))
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        (await rest.append(id, system(), user_says(), assistant(None, "c"), tool("c"), assistant("a"))).expect(201)
        (await elsewhere.proceed(id, tools)).expect(200)
        assert (await rest.append(id, assistant())).refusal == (409, "role_order")
        assert (await rest.append(id, tool("1"))).refusal == (409, "role_order")
        (await rest.append(id, user_says(QUICK), assistant("a"))).expect(201)
        (await elsewhere.post(f"/conversations/{id}/regenerate")).expect(200)
        assert (await rest.append(id, user_says())).status == 201


async def test_an_agent_sees_what_was_appended(start_node: StartNode, user: str) -> None:
    # The echo agent says how many messages it was given.
    async with rest_to(start_node(), user) as rest:
        id = await rest.create(system_prompt="not this one")
        (await rest.append(id, system(), user_says(), assistant("x", "c"), tool("c"), assistant("y"))).expect(201)
        assert (await rest.proceed(id, "hello")).expect(200)["response"] == "[6] hello"


# At once.


async def test_of_many_who_append_the_same_role_at_once_one_is_first(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        clients = [rest, elsewhere] * 10
        for role in ("user", "assistant", "user"):
            asked = [client.append(id, {"role": role, "content": str(n)}) for n, client in enumerate(clients)]
            replies = await asyncio.gather(*asked)
            assert [reply.status for reply in replies if reply.status != 201] == [409] * 19
            assert {reply.refusal for reply in replies if reply.status != 201} == {(409, "role_order")}
    await assert_gapless(module_database_url, id)


async def test_many_who_append_whole_exchanges_at_once_never_mingle(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()

        async def append(client: Rest, number: int) -> Reply:
            given = [
                user_says(f"{number}"),
                assistant(f"{number}", "c"),
                tool("c", f"{number}"),
                assistant(f"{number}"),
            ]
            while True:
                reply = await client.append(id, *given)
                if reply.status == 201:
                    return reply
                # It is not the client's fault that others were faster, so it is told that it may try again.
                assert reply.refusal == (409, "conversation_busy")

        replies = await asyncio.gather(*(append(client, n) for n, client in enumerate([rest, elsewhere] * 10)))
        messages = await rest.messages(id, limit=100)
    assert len(messages) == 80
    for start in range(0, 80, 4):
        assert len({message["content"] for message in messages[start : start + 4]}) == 1
    assert is_in_order([essence(message) for message in messages])
    assert sorted(reply.json["seq"] for reply in replies) == list(range(4, 81, 4))
    await assert_gapless(module_database_url, id)


async def test_appends_that_race_with_questions_leave_an_orderly_conversation(
    nodes: Nodes, module_database_url: str, user: str
) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere, AsyncExitStack() as stack:
        id = await rest.create()
        sockets = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        watchers = [await stack.enter_async_context(client.events(id, 0)) for client in (rest, elsewhere)]
        for number in range(12):
            work: list[Any] = [socket.answer(QUICK, id) for socket in sockets]
            work += [client.append(id, user_says(f"{number}"), assistant("a")) for client in (rest, elsewhere) * 3]
            *frames, one, two, three, four, five, six = await asyncio.gather(*work)
            for answer in frames:
                assert answer[-1]["type"] == "turn.completed" or answer[-1]["code"] == "conversation_busy"
            for reply in (one, two, three, four, five, six):
                assert reply.status == 201 or reply.refusal == (409, "conversation_busy")
            for socket in sockets:
                await socket.send({"type": "conversation.unfollow", "conversation_id": id})
                await socket.send({"type": "ping", "request_id": str(number)})
                while (await socket.receive()).get("request_id") != str(number):
                    pass
        messages = await rest.messages(id, limit=1000)
        seq = (await rest.get(f"/conversations/{id}")).expect(200)["seq"]
        heard: list[list[Event]] = [[], []]
        for watcher, events in zip(watchers, heard, strict=True):
            while not events or events[-1][1]["seq"] < seq:
                event = await watcher.next()
                assert event is not None
                events.append(event)
    assert is_in_order([essence(message) for message in messages])
    await assert_gapless(module_database_url, id)
    # Those who followed were shown every message once, in order.
    for events in heard:
        shown = [frame["message"]["id"] for _, frame in events if frame["type"] in ("message.created", *TERMINAL)]
        assert shown == [message["id"] for message in messages]
        seqs = [frame["seq"] for frame in frames_of(events)]
        assert seqs == sorted(set(seqs))


@pytest.mark.parametrize(
    "given",
    [
        [assistant()],
        [assistant(), user_says()],
        [user_says()],
        [user_says(), assistant()],
        [system()],
        [tool("c")],
    ],
)
async def test_nothing_is_appended_while_a_turn_runs_and_all_is_when_it_has_ended(
    nodes: Nodes, strings: Strings, user: str, given: list[Message]
) -> None:
    gate = strings.name()
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user) as elsewhere:
        id = await rest.create()
        started = await rest.proceed(id, script_of(("gate", gate), ("text", "x")), wait=False, message_id=gate)
        assert started.status == 202
        refused = [(await client.append(id, *given)).refusal for client in (rest, elsewhere)]
        strings.open(gate)
        assert refused == [(409, "conversation_busy")] * 2
        assert (await elsewhere.proceed(id, "-", message_id=gate)).status == 200
        assert (await rest.append(id, user_says())).status == 201


# Those who follow.


async def test_followers_on_every_node_hear_of_each_message_once_and_in_order(nodes: Nodes, user: str) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(rest_to(node, user)) for node in nodes]
        sockets = [await stack.enter_async_context(socket_to(node, user)) for node in nodes]
        id = await clients[0].create()
        streams = [await stack.enter_async_context(client.events(id, 0)) for client in clients]
        for socket in sockets:
            await socket.follow(id, 0)
        given = [
            system(),
            user_says(),
            assistant(None, "a", "b"),
            tool("b"),
            tool("a"),
            assistant(),
            user_says(),
            assistant(),
        ]
        for number, each in enumerate(given[:-2]):
            (await clients[number % 2].append(id, each)).expect(201)
        (await clients[1].append(id, *given[-2:])).expect(201)
        (await clients[0].proceed(id, QUICK)).expect(200)
        (await clients[1].append(id, user_says("last"))).expect(201)
        transcripts = []
        for stream in streams:
            frames: list[dict[str, Any]] = []
            while not frames or frames[-1].get("message", {}).get("content") != "last":
                frames += frames_of(await stream.until("message.created"))
            transcripts.append(frames)
        for socket in sockets:
            frames = []
            while not frames or frames[-1].get("message", {}).get("content") != "last":
                frames += await socket.until("message.created")
            transcripts.append(frames)
        stored = await clients[0].messages(id)
    for frames in transcripts:
        assert frames == transcripts[0]
    said = [frame["message"] for frame in transcripts[0] if "message" in frame]
    assert said == stored
    assert [frame["seq"] for frame in transcripts[0]] == list(range(1, 14))


async def test_the_events_of_appended_messages_expire_and_an_older_cursor_gets_a_snapshot(
    start_node: StartNode, database_url: str, user: str
) -> None:
    node = start_node(JOURNAL_RETENTION_MINUTES="0.005")
    async with rest_to(node, user) as rest:
        id = await rest.create()
        (await rest.append(id, user_says(), assistant())).expect(201)
        (await rest.proceed(id, "x", message_id="m-1")).expect(200)
        (await rest.append(id, user_says("last"))).expect(201)

        async def are_gone() -> bool:
            return not await sql(database_url, "SELECT FROM events")

        async with rest.events(id) as live:
            assert (await live.until("conversation.snapshot"))[-1][0] is not None
            await eventually(are_gone)
            stored = await rest.messages(id)
            assert [message["content"] for message in stored] == ["q", "a", "x", "[3] x", "last"]
            seq = (await rest.get(f"/conversations/{id}")).expect(200)["seq"]
            for after in (0, 1, seq - 1):
                async with rest.events(id, after) as events:
                    ((id_, snapshot),) = await events.until("conversation.snapshot")
                    assert (id_, snapshot["seq"], snapshot["messages"]) == (seq, seq, stored)
            # Where nothing is missing, nothing is said; what comes next is.
            async with rest.events(id, seq) as events:
                (await rest.append(id, assistant("news"))).expect(201)
                for stream in (events, live):
                    ((_, frame),) = await stream.until("message.created")
                    assert (frame["message"]["content"], frame["seq"]) == ("news", seq + 1)
        # A repeated question finds its turn, whose events are gone.
        repeated = (await rest.proceed(id, "x", message_id="m-1", wait=False)).expect(202)
        assert repeated["after"] is None
        assert (await rest.proceed(id, "x", message_id="m-1")).expect(200)["response"] == "[3] x"


# Pages.


async def pages_of(rest: Rest, id: str, limit: int, **query: Any) -> list[list[Message]]:
    """All pages, the oldest first, found by their links."""
    pages: list[list[Message]] = []
    reply = await rest.get(f"/conversations/{id}/messages", limit=limit, **query)
    while True:
        pages.insert(0, reply.expect(200)["messages"])
        if "Link" not in reply.headers:
            assert reply.json.get("next_before") is None
            return pages
        link, relation = reply.headers["Link"].split("; ")
        assert relation == 'rel="next"'
        assert "next_before" not in reply.json or f"before={reply.json['next_before']}" in link
        reply = await rest.ask("GET", link.strip("<>"))


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 8])
async def test_pages_hold_every_message_once_whatever_their_size(nodes: Nodes, user: str, limit: int) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, *[user_says("q"), assistant("a")] * 4)).expect(201)
        whole = await rest.messages(id)
        assert len(whole) == 8
        pages = await pages_of(rest, id, limit)
    assert [message for page in pages for message in page] == whole
    # The newest come first, so the oldest page is the one that may be short.
    assert [len(page) for page in pages[1:]] == [limit] * (len(pages) - 1)
    assert 1 <= len(pages[0]) <= limit


async def test_a_page_has_50_messages_unless_it_is_told_otherwise(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        empty = await rest.get(f"/conversations/{id}/messages")
        assert empty.expect(200) == {"messages": [], "next_before": None}
        given = [user_says(str(n)) if n % 2 == 0 else assistant(str(n)) for n in range(52)]
        messages = (await rest.append(id, *given)).expect(201)["messages"]
        page = (await rest.get(f"/conversations/{id}/messages")).expect(200)
        assert page == {"messages": messages[2:], "next_before": messages[2]["id"]}
        older = (await rest.get(f"/conversations/{id}/messages", before=page["next_before"])).expect(200)
        assert older == {"messages": messages[:2], "next_before": None}
        first = (await rest.get(f"/conversations/{id}/messages", before=messages[0]["id"])).expect(200)
        assert first == {"messages": [], "next_before": None}
        assert (await rest.get(f"/conversations/{id}/messages", before=MISSING)).refusal == (404, "not_found")


async def test_pages_are_bounded_by_their_bytes_too_and_hold_every_message_once(nodes: Nodes, user: str) -> None:
    sizes = (900_000, 900_000, 10, 1_000_000, 1_000_000, 1_000_000, 500_000, 10)
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        for number, size in enumerate(sizes):
            (await rest.append(id, user_says(f"{number}"), assistant(f"{number}".ljust(size, "x")))).expect(201)
        for query in ({}, {"format": "openai"}):
            pages = await pages_of(rest, id, 50, **query)
            contents = [message["content"] for page in pages for message in page]
            assert [content[0] for content in contents] == [f"{number // 2}" for number in range(16)]
            assert [len(content) for content in contents[1::2]] == list(sizes)
            assert all(sum(len(message["content"]) for message in page) <= 2_097_152 for page in pages)


async def test_older_pages_stay_as_they_are_while_messages_come(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.append(id, *[user_says("q"), assistant("a")] * 3)).expect(201)
        page = (await rest.get(f"/conversations/{id}/messages", limit=2)).expect(200)
        older = await rest.messages(id, limit=2, before=page["next_before"])
        (await rest.proceed(id, QUICK)).expect(200)
        assert await rest.messages(id, limit=2, before=page["next_before"]) == older


# Export and import.

TOOLS = script_of(
    *(
        ("text", "Let me look. "),
        ("call", "1", "search", {"q": "föö"}),
        ("call", "2", "sum", {}),
        ("result", "2", "sum", "3"),
    ),
    *(("result", "1", "search", "no \u2615"), ("text", "It is 42.")),
)
SILENT = script_of(("agent_error", "nothing", False))
HALF = script_of(("text", "half"), ("agent_error", "nothing", False))
TOOLS_AND_SILENT = script_of(("call", "1", "f", {}), ("result", "1", "f", "x"), ("agent_error", "nothing", False))


async def full_conversation(rest: Rest) -> str:
    """One with everything in it that a turn can leave."""
    id = await rest.create(system_prompt="Be kind.")
    for question in (TOOLS, SILENT, QUICK, HALF):
        await rest.proceed(id, question)
    assert (await rest.post(f"/conversations/{id}/regenerate")).status == 502
    (await rest.append(id, user_says("by hand"), assistant("x", "c"), tool("c"), assistant(""))).expect(201)
    await rest.proceed(id, TOOLS)
    (await rest.post(f"/conversations/{id}/regenerate")).expect(200)
    return id


def calls_of_openai(message: Message) -> list[Message]:
    calls: list[Message] = message.get("tool_calls", [])
    return calls


async def test_an_export_is_what_the_chat_completions_api_takes(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await full_conversation(rest)
        messages = await export(rest, id)
    tools = [
        {
            "role": "assistant",
            "content": "Let me look. ",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q":"föö"}'}},
                {"id": "2", "type": "function", "function": {"name": "sum", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "3", "tool_call_id": "2"},
        {"role": "tool", "content": "no \u2615", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 42."},
    ]
    assert messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": TOOLS},
        *tools,
        # The question that had no answer is gone, and what was superseded.
        {"role": "user", "content": QUICK},
        {"role": "assistant", "content": "quick"},
        {"role": "user", "content": HALF},
        {"role": "assistant", "content": "half"},
        {"role": "user", "content": "by hand"},
        {"role": "assistant", "content": "x", "tool_calls": [call("c")]},
        {"role": "tool", "content": "r", "tool_call_id": "c"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": TOOLS},
        *tools,
    ]


async def test_what_is_exported_can_be_imported_and_is_exported_again_as_it_was(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest, rest_to(nodes[1], user + "-2") as other:
        reply = await rest.get(f"/conversations/{await full_conversation(rest)}/messages", format="openai")
        assert reply.json.keys() == {"messages"}
        copy = await other.create()
        (await other.ask("POST", f"/conversations/{copy}/messages", data=reply.body)).expect(201)
        again = await other.get(f"/conversations/{copy}/messages", format="openai")
        assert again.body == reply.body
        assert (await other.proceed(copy, QUICK)).expect(200)["response"] == "quick"


def any_script(dice: random.Random) -> str:
    """What an agent might do, and also what it had better not."""
    actions: list[Sequence[Any]] = []
    calls: list[str] = []
    for number in range(dice.randrange(8)):
        match dice.choice(("text", "call", "call", "result", "result", "step", "blank")):
            case "text":
                actions.append(("text", f"{number} "))
            case "blank":
                actions.append(("text", " "))
            case "call":
                calls.append(f"{number}")
                actions.append(("call", f"{number}", "f", {"n": number}))
            case "result" if calls:
                actions.append(("result", calls.pop(dice.randrange(len(calls))), "f", dice.choice(("", "x"))))
            case "step":
                actions.append(("step",))
    if dice.random() < 0.4:
        actions.append(("agent_error", "enough", False))
    return script_of(*actions)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_agents_do_is_exported_in_order_and_can_be_imported(nodes: Nodes, user: str, seed: int) -> None:
    dice = random.Random(seed)
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        for _ in range(25):
            assert (await rest.proceed(id, any_script(dice))).status in (200, 502)
            if dice.random() < 0.2:
                assert (await rest.post(f"/conversations/{id}/regenerate")).status in (200, 502)
            messages = await export(rest, id)
            assert is_in_order(messages), messages
        copy = await rest.create()
        (await rest.append(copy, *messages)).expect(201)
        assert await export(rest, copy) == messages


@pytest.mark.parametrize("has_system_message", [False, True])
async def test_the_system_prompt_is_exported_once(nodes: Nodes, user: str, *, has_system_message: bool) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create(system_prompt="prompt")
        given = [system("message")] if has_system_message else []
        (await rest.append(id, *given, user_says("q"), assistant("a"))).expect(201)
        first = system("message" if has_system_message else "prompt")
        assert await export(rest, id) == [first, user_says("q"), assistant("a")]
        # Not on every page, and not where older messages are left out.
        assert await export(rest, id, limit=2) == (
            [user_says("q"), assistant("a")] if has_system_message else [first, user_says("q"), assistant("a")]
        )
        assert await export(rest, id, limit=1) == [assistant("a")]


async def test_an_empty_conversation_is_exported_empty(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        assert await export(rest, await rest.create()) == []
        assert await export(rest, await rest.create(system_prompt="x")) == [system("x")]


@pytest.mark.parametrize("limit", range(1, 14))
async def test_the_pages_of_an_export_put_together_are_the_whole(nodes: Nodes, user: str, limit: int) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await full_conversation(rest)
        whole = await export(rest, id)
        pages = await pages_of(rest, id, limit, format="openai")
    assert [message for page in pages for message in page] == whole


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
async def test_a_turn_that_failed_behind_its_tools_is_exported_alike_on_all_pages(
    nodes: Nodes, user: str, limit: int
) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        assert (await rest.proceed(id, TOOLS_AND_SILENT)).status == 502
        whole = await export(rest, id)
        assert [message["role"] for message in whole] == ["user", "assistant", "tool", "assistant"]
        pages = await pages_of(rest, id, limit, format="openai")
    assert [message for page in pages for message in page] == whole


async def test_an_export_of_a_thousand_messages_with_a_system_prompt_can_be_imported(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create(system_prompt="one more")
        (await rest.append(id, *[user_says(), assistant()] * 500)).expect(201)
        reply = await rest.get(f"/conversations/{id}/messages", format="openai")
        copy = await rest.create()
        (await rest.ask("POST", f"/conversations/{copy}/messages", data=reply.body)).expect(201)


async def test_an_export_of_a_long_answer_can_be_imported(nodes: Nodes, user: str) -> None:
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        (await rest.proceed(id, script_of(("huge", "x", 100_000)))).expect(200)
        reply = await rest.get(f"/conversations/{id}/messages", format="openai")
        copy = await rest.create()
        (await rest.ask("POST", f"/conversations/{copy}/messages", data=reply.body)).expect(201)


async def test_a_content_in_parts_may_have_parts_that_are_only_space(nodes: Nodes, user: str) -> None:
    parts = [{"type": "text", "text": text} for text in ("Hello,", "\n", "world")]
    async with rest_to(nodes[0], user) as rest:
        message = (await rest.append(await rest.create(), {"role": "user", "content": parts})).expect(201)
        assert message["content"] == "Hello,\nworld"


async def test_what_other_programs_export_is_taken(nodes: Nodes, user: str) -> None:
    # As the official SDK dumps an answer that goes back into the history: nulls for what is not there.
    async with rest_to(nodes[0], user) as rest:
        id = await rest.create()
        given = [
            user_says(),
            {"role": "assistant", "content": None, "tool_calls": [call("c")]},
            tool("c"),
            {"role": "assistant", "content": "a", "tool_calls": None},
        ]
        (await rest.append(id, *given)).expect(201)


async def test_nothing_of_all_this_was_an_error_of_the_nodes(nodes: Nodes) -> None:
    for node in nodes:
        assert "Traceback" not in node.log.read_text()
