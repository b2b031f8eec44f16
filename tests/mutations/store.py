"""Mutations of the store for Python code: what it reads, and what becomes of its turns."""

from __future__ import annotations

from typing import Final

from tests.mutations.mutation import Change, Mutation

CHATS: Final = "server/store/chats.py"
GIVEN: Final = "server/store/given.py"
ORM: Final = "models/orm.py"
ROWS: Final = "server/store/rows.py"
STORE: Final = "server/store/store.py"
LEASES: Final = "server/engine/leases.py"
ADMISSION: Final = "server/engine/admission.py"
TAKE_OVER: Final = "models/functions/take_over.sql"

BASICS: Final = "system/test_store.py"
IN_AGENTS: Final = "system/test_store_in_agents.py"
KILLED: Final = "system/test_store_killed.py"
MEMORY: Final = "system/test_store_memory.py"
OUTAGES: Final = "system/test_store_outages.py"
PROCESSES: Final = "system/test_store_processes.py"
READING: Final = "system/test_store_reading.py"
REFUSED: Final = "system/test_store_refused.py"

MUTATIONS: Final = (
    # What is read.
    Mutation(
        "a store finds anybody's conversation",
        [Change(ROWS, "self._conversations.filter(is_meant, user_id=user_id)", "self._conversations.filter(is_meant)")],
        [REFUSED],
    ),
    Mutation(
        "a store lists everybody's conversations",
        [
            Change(
                ROWS,
                'self._conversations.filter(user_id=user_id).order_by("-updated_at", "-id")',
                'self._conversations.order_by("-updated_at", "-id")',
            )
        ],
        [BASICS],
    ),
    Mutation(
        "a history has superseded answers",
        [Change(ROWS, ".exclude(\n                status=SUPERSEDED\n            )", "")],
        [BASICS, IN_AGENTS],
    ),
    Mutation(
        "a context has what an agent does not get",
        [Change(STORE, "in visible(newest)]", "in newest]")],
        [IN_AGENTS],
    ),
    Mutation(
        "a page has no bound of bytes",
        [Change(ROWS, "if last > after and total > PAGE_BYTES:", "if False:")],
        [MEMORY],
    ),
    Mutation(
        "the models' connection has the name of an application's own",
        [Change(ORM, '_CONNECTION: Final = "anynode"', '_CONNECTION: Final = "default"')],
        [READING],
    ),
    Mutation(
        "a raw query may write",
        [Change(ORM, 'if not query.lstrip().upper().startswith("SELECT"):', "if False:")],
        [READING],
    ),
    Mutation(
        "a database without tables is one that is away",
        [
            Change("server/startup.py", "    with explain_database_errors(source):", "    if True:"),
        ],
        [OUTAGES],
    ),
    Mutation(
        "a history is never cut",
        [
            Change(
                ADMISSION,
                'any(message.role != "system" for message in left_out)',
                "False",
            )
        ],
        [IN_AGENTS],
    ),
    Mutation(
        "after a takeover a history is never cut",
        [Change(LEASES, "messages_max=messages_max + 1", "messages_max=messages_max")],
        [f"{IN_AGENTS}::test_after_a_takeover_a_history_is_cut_as_before", IN_AGENTS],
    ),
    # What becomes of turns.
    Mutation(
        "a node asks its own agent on a store's turn",
        [Change(LEASES, "None if taken.agent_is_gone else agent", "agent")],
        [f"{KILLED}::test_a_node_ends_the_turns_of_killed_and_of_paused_processes_and_never_asks_its_own_agent"],
    ),
    Mutation(
        "a store takes over the turns of nodes",
        [
            Change(
                TAKE_OVER,
                "(t.conversation_id = p_conversation_id AND t.node LIKE 'store:%')",
                "(t.conversation_id = p_conversation_id)",
            )
        ],
        [f"{KILLED}::test_a_nodes_turn_whose_lease_has_run_out_is_left_to_nodes"],
    ),
    Mutation(
        "another question does not end the turn of a dead process",
        [
            Change(
                CHATS,
                "is_ending = is_ending or await self._node.take_over_turn(question.conversation_id, None)\n",
                "pass\n",
            )
        ],
        [KILLED],
    ),
    Mutation(
        "who waits for a turn does not outlast Postgres",
        [
            Change(
                CHATS,
                "                except DatabaseUnavailable as error:\n",
                "                except KeyError as error:\n",
            )
        ],
        [
            f"{KILLED}::test_who_waits_for_the_turn_of_a_dead_process_goes_on_with_it_also_where_postgres_was_away_meanwhile"
        ],
    ),
    Mutation(
        "a store's turn is taken over while it runs",
        [Change(TAKE_OVER, "AND (t.lease_expires_at < clock_timestamp()\n", "AND (true\n")],
        [PROCESSES],
    ),
    Mutation(
        "a call that is cancelled leaves its turn running",
        [Change(CHATS, "            self._node.cancel_here(turn.turn_id)\n            raise\n", "            raise\n")],
        [OUTAGES],
    ),
    Mutation(
        "closing a store leaves its turns running",
        [Change(CHATS, "            self._node.cancel_here()\n", "")],
        [OUTAGES],
    ),
    Mutation(
        "NaN is stored as null",
        [
            Change(
                GIVEN,
                "json.dumps(msgspec.to_builtins(given, str_keys=True), allow_nan=False).encode()",
                "msgspec.json.encode(given)",
            )
        ],
        ["unit/store/test_given.py"],
    ),
)
