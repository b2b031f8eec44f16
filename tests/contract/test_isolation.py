"""Yours only: a statement that a client's id of a conversation, turn or message reaches also asks for the user."""

from __future__ import annotations

import re

from anynode.models.queries import statements

# What a node asks for itself, of turns that it has or that nobody has, and never because a client said so.
OF_THE_NODE = {
    *("flush", "flush_one", "flush_with_endings", "turn_states", "renew", "release", "take_over", "watch", "history"),
    *("read_running", "delete_expired_events", "delete_expired_messages", "forget_deletions"),
    *("delete_expired_tickets", "read_usage"),  # of turns that were read with their user
    "write_emails",  # of users whose tokens were verified
    *("revoke", "read_revocations", "forget_revocations", "stop_turns"),  # an operator's orders, and the memory of them
}
FUNCTIONS = {
    "admit",
    "admit_to_chat",
    "answer",
    "regenerate",
    "append",
    "delete_conversation",
    "find_chat",
    "find_chat_end",
}
TICKETS = {"add_ticket", "redeem_ticket"}  # who has one need not say who he is


def test_every_statement_for_clients_has_the_user_in_its_condition() -> None:
    for name, statement in statements().items():
        if name in OF_THE_NODE | TICKETS:
            continue
        user = rf"\${statement.parameters.index('user_id') + 1}\b"
        if name in FUNCTIONS:  # their first argument is the user's id
            assert re.search(rf"(FROM|SELECT) anynode_\w+\({user}, ", statement.sql), name
        elif name == "create_conversation":
            assert re.search(rf"INTO conversations \(id, user_id, .*\)\n +SELECT \$\d, {user},", statement.sql)
        else:
            assert re.search(rf"WHERE (?:[ct]?\.?id = \$\d AND )?(?:c\.)?user_id = {user}", statement.sql), name
