"""`Store.chat` in a process that is killed, or paused and goes on, at each step: one question, one answer, one end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from anynode import AgentFailed, ChatAnswer, ConversationBusy, Store
from tests.agents.scripted import Strings, eventually
from tests.agents.stepping import improvise, question
from tests.kit.harness import running_node, sql
from tests.kit.postgres_proxy import Hold, PostgresProxy, postgres_proxy
from tests.kit.soundness import assert_sound, let_lease_lapse
from tests.kit.store_process import StoreProcess, store_process
from tests.kit.stored import turns_of

# What the agent says, up to each place at which it can be held.
TEXTS: Final = ("One ", "two ", "three ", "four.")
ANSWER: Final = "three four."
# At each point: what the database has of the answer.
STEPS: Final = {
    "before the admission": None,
    "after the admission": "",
    "before the first word": "",
    "in mid-text": "One ",
    "between a call and its result": "One two ",
    "in the step after": "One two three ",
    "before the commit of the end": "One two ",  # at least: the rest may be held with the end
    "after the commit of the end": "One two three four.",
}
GATES: Final = list(STEPS)[2:6]
HOLDS: Final[dict[str, tuple[Any, str]]] = {
    "before the admission": ("before", "admit"),
    "after the admission": ("after", "admit"),
    "before the commit of the end": ("before", "flush_with_endings"),
    "after the commit of the end": ("after", "flush_with_endings"),
}
SAID: Final = "SELECT count(*) AS count FROM events WHERE conversation_id = $1 AND type = $2 AND payload::text LIKE $3"


@pytest.fixture(scope="module")
def proxy(module_database_url: str) -> Iterator[PostgresProxy]:
    with postgres_proxy(module_database_url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def _gates(strings: Strings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the agent find its gates in this process too."""
    for name, value in strings.environment.items():
        monkeypatch.setenv(name, value)


@dataclass
class Case:
    """A conversation in which a process is about to ask a question, and what holds that process up."""

    strings: Strings
    user: str
    point: str
    conversation_id: str
    gates: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    hold: Hold | None = None

    def __post_init__(self) -> None:
        self.gates = [self.strings.name() for _ in GATES]
        self.marks = [self.strings.name() for _ in GATES]

    @property
    def question(self) -> str:
        """The question that makes the agent talk, call a tool and talk again, with a gate at each point."""
        gates = [[["mark", mark], ["gate", gate]] for mark, gate in zip(self.marks, self.gates, strict=True)]
        first = [*gates[0], ["text", TEXTS[0]], *gates[1], ["text", TEXTS[1]], ["call", "call-1", "search", {"q": 1}]]
        return question(
            [*first, ["text", ""], *gates[2], ["result", "call-1", "search", "found"]],
            [["text", TEXTS[2]], *gates[3], ["text", TEXTS[3]]],
        )

    def ask(self, process: StoreProcess) -> asyncio.Future[ChatAnswer]:
        """Let the process ask the question."""
        return process.ask("chat", self.user, self.question, self.conversation_id, message_id=self.message_id)

    @property
    def message_id(self) -> str:
        """The application's id of the question."""
        return f"question in {self.conversation_id}"

    async def reached(self, database_url: str) -> None:
        """Wait until the process is held up at the point, and all that it has said is committed."""
        if self.hold is not None:
            await self.hold.reached()
            return
        number = GATES.index(self.point)

        async def is_there() -> bool:
            return self.strings.marks(self.marks[number]) == [1]

        await eventually(is_there)
        for text in TEXTS[:number]:
            await eventually(lambda text=text: self.has_said(database_url, text))  # type: ignore[misc]

    async def has_said(self, database_url: str, text: str) -> bool:
        """Whether the journal has this text."""
        rows = await sql(database_url, SAID, self.conversation_id, "turn.delta", f"%{text}%")
        return bool(rows[0]["count"])

    def open_gates(self) -> None:
        """Hold no agent up any more."""
        for gate in self.gates:
            self.strings.open(gate)

    def go_on(self) -> None:
        """Hold nobody up any more: a statement that is held reaches Postgres, or its answer the process."""
        self.open_gates()
        if self.hold is not None:
            self.hold.release()

    @property
    def begun(self) -> int:
        """How often the agent has begun."""
        return len(self.strings.marks(self.marks[0]))


@asynccontextmanager
async def held_up(
    point: str, database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> AsyncIterator[tuple[Case, StoreProcess, asyncio.Future[ChatAnswer], Store]]:
    """A process that is held up at a point, its call, and a store in another process, which is this one."""
    async with Store(database_url) as store, store_process(proxy.url, strings, agent=improvise) as process:
        conversation = await store.create_conversation(user)
        case = Case(strings, user, point, str(conversation.id))
        if point in HOLDS:
            when, statement = HOLDS[point]
            case.hold = proxy.hold(when, statement)
        for gate in case.gates[: GATES.index(point) if point in GATES else None]:
            strings.open(gate)
        asked = case.ask(process)
        await case.reached(database_url)
        yield case, process, asked, store


async def asked_again(case: Case, store: Store) -> ChatAnswer:
    """Ask the same question in this process."""
    return await store.chat(case.user, case.question, case.conversation_id, improvise, message_id=case.message_id)


async def assert_one_answer(database_url: str, case: Case, *answers: ChatAnswer) -> None:
    """There is one question with one answer, said once, and all have got it."""
    messages = await assert_sound(database_url, case.conversation_id)
    assert [(each["role"], each["status"]) for each in messages] == [
        ("user", "completed"),
        ("assistant", "completed"),
        ("tool", "completed"),
        ("assistant", "completed"),
    ]
    assert "".join(each["content"] for each in messages if each["role"] == "assistant") == "".join(TEXTS)
    assert await turns_of(database_url, case.conversation_id) == ["completed"]
    for answer in answers:
        assert str(answer["conversation_id"]) == case.conversation_id
        assert answer["response"] == ANSWER
        assert [call["id"] for call in answer["tool_calls"]] == ["call-1"]


async def assert_failed(database_url: str, case: Case, messages: Sequence[Any]) -> None:
    """The killed process's question is there, and its turn has failed with what it had said; if it had not ended."""
    said = STEPS[case.point]
    first = [each for each in messages if each["turn_id"] == messages[0]["turn_id"]]
    assert first[0]["role"] == "user"
    assert first[0]["content"] == case.question
    text = "".join(each["content"] for each in first if each["role"] == "assistant")
    assert said is not None
    if case.point == "before the commit of the end":
        assert text.startswith(said)
        assert "".join(TEXTS).startswith(text)
    else:
        assert text == said
    assert first[-1]["status"] == ("completed" if case.point == "after the commit of the end" else "failed")


@pytest.mark.parametrize("point", STEPS)
async def test_the_same_question_goes_on_in_another_process_where_the_first_was_killed(
    point: str, module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    async with held_up(point, module_database_url, proxy, strings, user) as (case, process, _, store):
        process.kill()
        case.open_gates()
        await let_lease_lapse(module_database_url, case.conversation_id)
        answer = await asked_again(case, store)
        begun = case.begun
        await assert_one_answer(module_database_url, case, answer, await asked_again(case, store))
        assert case.begun == begun, "the stored answer is returned without an agent"


@pytest.mark.parametrize("point", STEPS)
async def test_another_question_ends_the_turn_of_a_killed_process_and_is_answered(
    point: str, module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    async with held_up(point, module_database_url, proxy, strings, user) as (case, process, _, store):
        process.kill()
        case.open_gates()
        await let_lease_lapse(module_database_url, case.conversation_id)
        other = question([["text", "Another answer."]])
        answer = await store.chat(user, other, case.conversation_id, improvise)
        assert answer["response"] == "Another answer."
        messages = await assert_sound(module_database_url, case.conversation_id)
        assert [each["content"] for each in messages[-2:]] == [other, "Another answer."]
        if STEPS[point] is None:
            assert len(messages) == 2
            return
        await assert_failed(module_database_url, case, messages)
        if point == "after the commit of the end":
            assert (await asked_again(case, store))["response"] == ANSWER
        else:
            with pytest.raises(AgentFailed, match=r"^The process that answered has ended\.$"):
                await asked_again(case, store)
        assert case.begun <= 1


@pytest.mark.parametrize("point", STEPS)
async def test_a_paused_process_that_comes_back_finds_its_turn_taken_and_returns_its_answer(
    point: str, module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    async with held_up(point, module_database_url, proxy, strings, user) as (case, process, asked, store):
        process.pause()
        await let_lease_lapse(module_database_url, case.conversation_id)
        again = asyncio.create_task(asked_again(case, store))
        if case.hold is None:
            case.go_on()
        answer = await again
        case.go_on()  # what the paused process had sent comes late
        process.resume()
        await assert_one_answer(module_database_url, case, answer, await asked)
        await assert_one_answer(module_database_url, case, await case.ask(process))


@pytest.mark.parametrize("point", [point for point, said in STEPS.items() if said is not None])
async def test_a_paused_process_that_comes_back_after_another_question_is_told_that_its_turn_has_failed(
    point: str, module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    async with held_up(point, module_database_url, proxy, strings, user) as (case, process, asked, store):
        process.pause()
        await let_lease_lapse(module_database_url, case.conversation_id)
        await store.chat(user, question([["text", "Another answer."]]), case.conversation_id, improvise)
        case.go_on()
        process.resume()
        if point == "after the commit of the end":
            assert (await asked)["response"] == ANSWER
        else:
            with pytest.raises(AgentFailed):
                await asked
        messages = await assert_sound(module_database_url, case.conversation_id)
        await assert_failed(module_database_url, case, messages)
        assert messages[-1]["content"] == "Another answer."


async def test_a_node_ends_the_turns_of_killed_and_of_paused_processes_and_never_asks_its_own_agent(
    database_url: str, strings: Strings, user: str, tmp_path: Any
) -> None:
    own = Strings(tmp_path / "own")
    with postgres_proxy(database_url) as proxy, running_node(database_url, tmp_path, own.environment) as node:

        async def ends(point: str, *, is_killed: bool) -> None:
            async with held_up(point, database_url, proxy, strings, f"{user} {point} {is_killed}") as (
                case,
                process,
                asked,
                store,
            ):
                if is_killed:
                    process.kill()
                else:
                    process.pause()
                await let_lease_lapse(database_url, case.conversation_id)
                await eventually(lambda: has_ended(database_url, case.conversation_id))
                case.open_gates()
                if not is_killed:
                    case.go_on()
                    process.resume()
                    with pytest.raises(AgentFailed, match=r"^The process that answered has ended\.$"):
                        await asked
                with pytest.raises(AgentFailed, match=r"^The process that answered has ended\.$"):
                    await asked_again(case, store)
                await assert_failed(database_url, case, await assert_sound(database_url, case.conversation_id))

        await asyncio.gather(*(ends(point, is_killed=is_killed) for point in GATES for is_killed in (True, False)))
        for point in ("after the admission", "before the commit of the end"):  # each is the only one that is held
            for is_killed in (True, False):
                await ends(point, is_killed=is_killed)
        assert list(own.directory.iterdir()) == [], "the node's agent has never begun"
        assert "Traceback" not in node.log.read_text()


async def has_ended(database_url: str, conversation_id: str) -> bool:
    """Whether no turn runs in the conversation."""
    return "running" not in await turns_of(database_url, conversation_id)


# What a process does that loses its turn, and nobody else comes.


async def test_a_process_that_was_paused_past_its_lease_goes_on_with_its_turn_where_nobody_has_taken_it(
    module_database_url: str, strings: Strings, user: str
) -> None:
    async with store_process(module_database_url, strings, agent=improvise, lease_seconds=1.0) as process:
        (made,) = await asyncio.gather(process.ask("create_conversation", user))
        case = Case(strings, user, "in mid-text", made["id"])
        strings.open(case.gates[0])
        asked = case.ask(process)
        await case.reached(module_database_url)
        process.pause()
        await eventually(lambda: has_lapsed(module_database_url, case.conversation_id))
        process.resume()
        await eventually(lambda: has_begun_again(case))
        case.go_on()
        async with asyncio.timeout(10):
            await assert_one_answer(module_database_url, case, await asked)


async def test_a_process_that_was_cut_off_from_postgres_past_its_lease_goes_on_with_its_turn(
    module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    async with store_process(proxy.url, strings, agent=improvise, lease_seconds=1.0) as process:
        made = await process.ask("create_conversation", user)
        case = Case(strings, user, "in mid-text", made["id"])
        strings.open(case.gates[0])
        asked = case.ask(process)
        await case.reached(module_database_url)
        proxy.cut()
        await eventually(lambda: has_lapsed(module_database_url, case.conversation_id))
        proxy.heal()
        case.go_on()
        async with asyncio.timeout(10):
            await assert_one_answer(module_database_url, case, await asked)


async def test_who_waits_for_the_turn_of_a_dead_process_goes_on_with_it_also_where_postgres_was_away_meanwhile(
    module_database_url: str, proxy: PostgresProxy, strings: Strings, user: str
) -> None:
    held = held_up("in mid-text", module_database_url, proxy, strings, user)
    async with held as (case, process, _, _), Store(proxy.url, lease_seconds=1.0) as waiting:
        looks = proxy.executions("take_over")
        again = asyncio.create_task(asked_again(case, waiting))
        await eventually(lambda: is_looked_for(proxy, looks))
        process.kill()
        proxy.cut()
        await asyncio.sleep(2)  # longer than a takeover tries
        await let_lease_lapse(module_database_url, case.conversation_id)
        proxy.heal()
        case.go_on()
        async with asyncio.timeout(10):
            await assert_one_answer(module_database_url, case, await again)


async def test_a_nodes_turn_whose_lease_has_run_out_is_left_to_nodes(module_database_url: str, user: str) -> None:
    async with Store(module_database_url) as store:
        made = await store.create_conversation(user)
        await store.add_message(made.id, user, "user", "hello")
        await sql(
            module_database_url,
            "INSERT INTO turns (id, conversation_id, status, node, epoch, lease_expires_at, created_at, first_seq) "
            "VALUES (gen_random_uuid(), $1, 'running', 'node-1', 1, now() - interval '1 minute', now(), 2)",
            made.id,
        )
        with pytest.raises(ConversationBusy):
            await store.chat(user, "another", made.id, improvise)
        (turn,) = await sql(module_database_url, "SELECT node, epoch FROM turns WHERE conversation_id = $1", made.id)
        assert tuple(turn) == ("node-1", 1)


async def has_lapsed(database_url: str, conversation_id: str) -> bool:
    """Whether the lease of the running turn has run out by the database's clock."""
    statement = "SELECT bool_and(lease_expires_at < clock_timestamp()) AS has FROM turns WHERE conversation_id = $1"
    return bool((await sql(database_url, statement, conversation_id))[0]["has"])


async def has_begun_again(case: Case) -> bool:
    """Whether the agent has begun for the second time."""
    return case.begun == 2


async def is_looked_for(proxy: PostgresProxy, looks: int) -> bool:
    """Whether somebody has looked for the turn of a process that may have died, again."""
    return proxy.executions("take_over") > looks
