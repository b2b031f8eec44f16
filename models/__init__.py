"""The database: its schema, the statements of the serving path, and the functions that run them.

Owned here:

- `schema.sql` is the schema as it is; `migrations/` is how it came to be; `functions/` holds the SQL functions, one
  file each. `migrate` applies migrations, and `schema_version` says which ones a database has seen. `tables` describes
  the tables to Tortoise.
- `queries.sql` holds every statement of the serving path by name; `queries` reads it. Statements are called by the
  functions of `conversations`, `client_chats`, `messages`, `events`, `turns`, `tickets`, `users` and `revocations`,
  and run by `database`.
- `rules`, `ids` and `text` are pure: role order and what an agent sees, UUIDs, and text that Postgres can hold.

Concurrency. A statement is one transaction, and nothing is kept in a session between two of them. So a pooler of
transactions may stand in between.

- Locks are taken in one order: turns, ascending by id, then conversations. `flush`, `renew`, `release` and `take_over`
  lock turns in that order. `flush_with_endings` and `delete_conversation` then lock conversations. `admit`,
  `regenerate` and `append` lock one conversation and never wait for a turn. `take_over` and the deletion of
  expired events skip locked rows.
- The lock on a conversation's row serialises what changes it from outside: admissions, regenerations, appends and
  deletions. Its running turn, of which the index `turns_running` allows one, changes it from inside: the turn's owner
  alone numbers its events, and commits its messages with its ending.
- A write of a turn carries the turn's epoch and checks it under a lock, in the statement that writes. A stale owner
  writes nothing.

Repetition. The outcome of a statement is unknown when its connection breaks, so `Database.run` runs it again. Every
statement may be repeated with the same arguments: the ids are made before the first attempt, inserts say ON CONFLICT or
look for their own rows first, and updates set the same values. Some answers differ where a first attempt was
committed, and the callers know it: `flush_with_endings` refuses a turn that it has ended (`events.ended_under`),
`delete_conversation` finds nothing, `take_over` leaves the turns that it took to a later beat, and after
`redeem_ticket` the client needs another ticket.

Imports nothing of `anynode.server`.
"""
